"""What runs outside of the trainer: it builds the sandbox, runs programs in it and reports on them.

A script for a bare interpreter (`python -I -S sandbox_child.py`), never imported: it uses only modules that
load at once, and reads and writes `marshal`, since importing json, signal, typing or pathlib would double its
time. The processes, when isolated:

    launcher    enters new namespaces, builds a root directory, waits for init
    init        process 1 of the new process namespace: starts the programs one after the other, watches
                them, and ends everything that is left after each; when it ends, the kernel ends the rest
    program     another user or no capabilities, limits, no privileges to gain; then the interpreter

Without isolation the launcher does what init does. The request (`posttrain.rewards.sandbox`) comes on
standard input; the reply, `{"runs": […]}` or `{"fault": why}`, goes to standard output.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)

SIGKILL = 9
PROGRAM_ID = 1000
"""User and group of the program inside of the sandbox."""
OWN_PROCESSES = 2
"""Launcher and init, which count as the program's own where they have the same user."""
MAX_STDERR = 2000
CHUNK = 1 << 16

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 0x1, 0x2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
SYS_MOUNT_SETATTR = 442

BOOT = (
    "import builtins, sys; builtins.exit = builtins.quit = sys.exit; del builtins, sys; "
    "__file__ = 'main.py'; exec(compile(open('main.py', 'rb').read(), 'main.py', 'exec'))"
)
"""Runs main.py as the main module. `-S`, which leaves only the standard library, drops `exit` and `quit`."""


def main() -> None:
    """Serve one request."""
    request: dict[str, Any] = marshal.load(sys.stdin.buffer)
    die_with_parent()
    if os.getppid() != request["parent"]:
        os._exit(1)
    try:
        if request["isolated"]:
            memory_kills = open_memory_kills()
            own_user = enter_namespaces()
            build_root(request)
            init = os.fork()
            if init != 0:
                os.waitpid(init, 0)
                os._exit(0)
            die_with_parent()
        else:
            memory_kills, own_user = open_memory_kills(), False
            check("prctl", LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        reply: dict[str, Any] = {"runs": run_all(request, own_user, memory_kills)}
    except OSError as error:
        reply = {"fault": f"{error.filename or 'a system call'}: {error.strerror}"}
    sys.stdout.buffer.write(marshal.dumps(reply))
    sys.stdout.buffer.flush()
    os._exit(0)


def check(name: str, result: int) -> None:
    """Raise the OSError of a C function that did not return 0."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def die_with_parent() -> None:
    """Have the kernel end this process with its parent."""
    check("prctl", LIBC.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))


# --- namespaces -------------------------------------------------------------------------------------------


def enter_namespaces() -> bool:
    """Give this process new namespaces of every kind that matters; its children get a new process namespace.

    Root becomes the new namespace's root, and the program gets an id that nobody else has: neither root's
    files nor root's freedom from limits. Anyone else has only the one id, which becomes `PROGRAM_ID`.

    Returns:
        Whether the program has a user of its own.
    """
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    spare = (spare_id("uid"), spare_id("gid")) if uid == 0 else None
    if spare is None or None in spare:
        spare = None
        check("unshare", LIBC.unshare(flags))
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{PROGRAM_ID} {uid} 1")
        write("/proc/self/gid_map", f"{PROGRAM_ID} {gid} 1")
    else:
        os.setgroups([])
        # More than one id can be mapped only from outside of the new namespace.
        ready, go = os.pipe()
        launcher = os.getpid()
        helper = os.fork()
        if helper == 0:
            os.close(go)
            os._exit(map_ids(launcher, gid, spare) if os.read(ready, 1) else 1)
        check("unshare", LIBC.unshare(flags))
        os.write(go, b"x")
        number = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
        if number != 0:
            raise OSError(number, os.strerror(abs(number)), "uid_map")
    die_with_parent()  # a change of credentials may forget it
    check("sethostname", LIBC.sethostname(b"sandbox", 7))
    # So that the program cannot become root of a namespace of its own; some containers do not let us.
    try_to_write("/proc/sys/user/max_user_namespaces", "0")
    try_to_write("/proc/self/oom_score_adj", "1000")
    return spare is not None


def spare_id(kind: str) -> int | None:
    """An id of this user namespace that is very likely nobody's, or None if there is only one id."""
    with open(f"/proc/self/{kind}_map") as file:
        extents = [[int(number) for number in line.split()] for line in file]
    first, _, length = max(extents, key=lambda extent: extent[2])
    return None if length < 2 else first + length - 2 - os.getpid() % (length // 2)


def map_ids(process: int, gid: int, spare: tuple[int | None, int | None]) -> int:
    """Write the id maps of another process; returns 0 or the error number."""
    try:
        write(f"/proc/{process}/uid_map", f"0 0 1\n{PROGRAM_ID} {spare[0]} 1")
        write(f"/proc/{process}/gid_map", f"0 {gid} 1\n{PROGRAM_ID} {spare[1]} 1")
    except OSError as error:
        return error.errno or 1
    return 0


def write(path: str, text: str) -> None:
    """Write a file of /proc, which takes its content in one call only."""
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(file)


def try_to_write(path: str, text: str) -> None:
    """The same, where it is an additional line of defence."""
    try:
        write(path, text)
    except OSError:
        pass


# --- the root directory -----------------------------------------------------------------------------------


def build_root(request: dict[str, Any]) -> None:
    """Replace the root directory by an empty one in which only some paths of the old one are to be seen.

    The result is read-only. `/tmp` is mounted anew for every program.
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/proc", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")  # on a directory sure to exist
    os.mkdir("/proc/old")
    os.chdir("/proc")
    check("pivot_root", LIBC.pivot_root(b".", b"old"))
    os.chdir("/")
    for path in request["visible"]:
        bind(path)
    for path in request["hidden"]:
        if os.path.isdir(path):
            mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=755")
    os.makedirs("/tmp", exist_ok=True)
    os.symlink("/tmp/stdin", "/dev/stdin")
    os.symlink("/tmp", "/dev/shm")
    check("umount2", LIBC.umount2(b"/old", MNT_DETACH))
    os.rmdir("/old")
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    done = LIBC.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, size)
    check("mount_setattr", done)


def bind(path: str) -> None:
    """Show a file, directory or symbolic link of the old root at its own path, if there is one."""
    old = "/old" + path
    if os.path.islink(old):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(os.readlink(old), path)
    elif os.path.isdir(old):
        os.makedirs(path, exist_ok=True)
        mount(old, path, None, MS_BIND | MS_REC)
    elif os.path.exists(old):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(old, path, None, MS_BIND)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    check(f"mount {target}", LIBC.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]))


# --- system calls -----------------------------------------------------------------------------------------

# What namespaces do not cover: keyrings, sockets to the host of a virtual machine, limits of the supervisor,
# which may have the same user; and calls that no program here needs, but of which the kernel's defects are
# made. For each kind of machine: AUDIT_ARCH_…, forbidden calls, and those with what argument 0 may be.
# x86_64: ptrace, mount, add_key, request_key, keyctl, unshare, perf_event_open, setns, process_vm_readv,
# process_vm_writev, bpf, userfaultfd, io_uring_setup; socket: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK;
# prlimit64: 0, the process itself. The others are the same for the kernel's generic numbers.
FILTERS = {
    "x86_64": (
        0xC000003E,
        (101, 165, 248, 249, 250, 272, 298, 308, 310, 311, 321, 323, 425),
        {41: (1, 2, 10, 16), 302: (0,)},
    ),
}
GENERIC = (117, 40, 217, 218, 219, 97, 241, 268, 270, 271, 280, 282, 425), {198: (1, 2, 10, 16), 261: (0,)}
FILTERS |= {"aarch64": (0xC00000B7, *GENERIC), "riscv64": (0xC00000F3, *GENERIC)}

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
AT_NUMBER, AT_ARCHITECTURE, AT_ARGUMENT_0 = 0, 4, 16  # offsets in struct seccomp_data
ALLOW, FORBID, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # FORBID is EPERM
X32_CALLS = 0x40000000


class SockFprog(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def filter_system_calls() -> None:
    """Forbid system calls to this process and what it starts."""
    machine = os.uname().machine
    if machine not in FILTERS:
        raise OSError(0, f"unknown on {machine}", "seccomp")
    architecture, forbidden, restricted = FILTERS[machine]
    # Instructions: code, jump if true, jump if false, value.
    code = [(LOAD, 0, 0, AT_ARCHITECTURE), (JUMP_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    code += [(LOAD, 0, 0, AT_NUMBER), (JUMP_AT_LEAST, 0, 1, X32_CALLS), (RETURN, 0, 0, FORBID)]
    for number in forbidden:
        code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, FORBID)]
    for number, allowed in restricted.items():
        code += [(JUMP_EQUAL, 0, 2 * len(allowed) + 2, number), (LOAD, 0, 0, AT_ARGUMENT_0)]
        for argument in allowed:
            code += [(JUMP_EQUAL, 0, 1, argument), (RETURN, 0, 0, ALLOW)]
        code += [(RETURN, 0, 0, FORBID)]
    code += [(RETURN, 0, 0, ALLOW)]
    program = SockFprog(len(code), b"".join(struct.pack("HBBI", *instruction) for instruction in code))
    check("seccomp", LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0))


# --- running programs -------------------------------------------------------------------------------------


def run_all(request: dict[str, Any], own_user: bool, memory_kills: int | None) -> list[tuple[Any, ...]]:
    """Run the programs; for each: status, exit code (negative: signal), standard output, standard error.

    Status is one of exited, timeout, output (too much of it), oom (ended by the system, short of memory).
    After `total_seconds` for all of them, the others are timeouts without being started; after a failure,
    if that is asked for, there are no others.
    """
    results: list[tuple[Any, ...]] = []
    last = time.monotonic() + request["total_seconds"]
    for number, (source, stdin, max_output) in enumerate(request["programs"]):
        now = time.monotonic()
        if now >= last:
            results.append(("timeout", None, b"", b""))
            continue
        directory = prepare(request, number, source, stdin)
        before = read_memory_kills(memory_kills)
        result = run(request, directory, own_user, min(now + request["seconds"], last), max_output)
        if result[:2] == ("exited", -SIGKILL) and read_memory_kills(memory_kills) != before:
            result = ("oom", *result[1:])
        results.append(result)
        if request["stop_at_failure"] and result[:2] != ("exited", 0):
            break
    return results


def prepare(request: dict[str, Any], number: int, source: bytes, stdin: bytes) -> str:
    """A fresh private directory with the program and its input."""
    if request["isolated"]:
        directory = "/tmp"
        LIBC.umount2(b"/tmp", MNT_DETACH)  # of the program before; the first time there is none
        options = f"size={request['disk_bytes']},nr_inodes=4096,mode=777"
        mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, options)
    else:
        directory = f"{request['directory']}/{number}"
        os.mkdir(directory, 0o700)
    for name, content in (("main.py", source), ("stdin", stdin)):
        with open(f"{directory}/{name}", "wb") as file:
            file.write(content)
    return directory


def run(
    request: dict[str, Any], directory: str, own_user: bool, deadline: float, max_output: int
) -> tuple[Any, ...]:
    """Run the program of a directory to its end or the deadline, and end all that it leaves."""
    output, output_in = os.pipe()
    errors, errors_in = os.pipe()
    trouble, trouble_in = os.pipe()
    limit_processes = request["processes"] + (0 if own_user else OWN_PROCESSES)
    if not request["isolated"] and os.getuid() != 0:  # this limit is on all that the user has
        limit_processes += sum(threads for _, _, uid, threads in processes() if uid == os.getuid())
    program = os.fork()
    if program == 0:
        try:
            become_program(request, directory, own_user, limit_processes, output_in, errors_in)
        except OSError as error:
            os.write(trouble_in, f"{error.filename or 'a system call'}: {error.strerror}".encode())
        finally:
            os._exit(1)
    for end in (output_in, errors_in, trouble_in):
        os.close(end)
    reason = os.read(trouble, CHUNK)  # ends when the program's interpreter starts
    try:
        if reason:
            raise OSError(0, reason.decode(), "program")
        status, kept = watch(program, output, errors, deadline, max_output)
    finally:
        code = end_all(program, request["isolated"])
    for end in (output, errors):
        os.set_blocking(end, False)
        while len(kept[end]) <= max_output and (data := read_or_nothing(end)):
            kept[end] += data
    if len(kept[output]) > max_output:
        status = "output"
    for end in (output, errors, trouble):
        os.close(end)
    return status, code, bytes(kept[output][:max_output]), bytes(kept[errors][:MAX_STDERR])


def become_program(
    request: dict[str, Any], directory: str, own_user: bool, limit_processes: int, output: int, errors: int
) -> None:
    """Turn a fork of init into the interpreter of the program."""
    os.setsid()
    os.chdir(directory)
    os.dup2(os.open("stdin", os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    seconds = int(request["seconds"]) + 2
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_FSIZE, request["disk_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, limit_processes),
    ):
        hardest = resource.getrlimit(kind)[1]
        value = value if hardest == resource.RLIM_INFINITY else min(value, hardest)
        resource.setrlimit(kind, (value, value))
    if own_user:
        os.setresgid(PROGRAM_ID, PROGRAM_ID, PROGRAM_ID)
        os.setresuid(PROGRAM_ID, PROGRAM_ID, PROGRAM_ID)
    check("prctl", LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if request["isolated"]:
        filter_system_calls()
    else:
        die_with_parent()
    # Equal hashes: sets iterate in equal order. As the user is not 0, capabilities end with this call.
    environment = {"HOME": directory, "TMPDIR": directory, "PYTHONHASHSEED": "0"}
    python = request["python"]
    os.execve(python, [python, "-S", "-s", "-B", "-X", "utf8", "-c", BOOT], environment)


def watch(
    program: int, output: int, errors: int, deadline: float, max_output: int
) -> tuple[str, dict[int, bytearray]]:
    """Read what a program writes until it ends, takes too long or writes too much."""
    poll = select.poll()
    process = os.pidfd_open(program)
    kept = {output: bytearray(), errors: bytearray()}
    for descriptor in (process, *kept):
        poll.register(descriptor, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000 + 1):
                if descriptor == process:
                    return "exited", kept
                data = os.read(descriptor, CHUNK)
                if not data:
                    poll.unregister(descriptor)
                elif len(kept[descriptor]) <= max_output:  # more standard error is read and forgotten
                    kept[descriptor] += data
                if len(kept[output]) > max_output:
                    return "output", kept
        return "timeout", kept
    finally:
        os.close(process)


def read_or_nothing(descriptor: int) -> bytes:
    """What there is to read without waiting."""
    try:
        return os.read(descriptor, CHUNK)
    except BlockingIOError:
        return b""


def end_all(program: int, isolated: bool) -> int | None:
    """Kill every process besides this one, wait for them, and return the program's exit code.

    Process 1 can name them all, in one call that none of them can outrun by forking. Without isolation they
    are found as children, which orphans become, too.
    """
    code = None
    while True:
        for process in (
            [-1] if isolated else [pid for pid, parent, _, _ in processes() if parent == os.getpid()]
        ):
            try:
                os.kill(process, SIGKILL)
            except ProcessLookupError:
                pass
        try:
            process, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code
        if process == program:
            code = os.waitstatus_to_exitcode(status)


def processes() -> Iterator[tuple[int, int, int, int]]:
    """Process, parent, user and number of threads of everything in /proc."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/status") as file:
                    fields = dict(line.split(":", 1) for line in file)
            except OSError:  # it has ended
                continue
            yield int(name), int(fields["PPid"]), int(fields["Uid"].split()[0]), int(fields["Threads"])


def open_memory_kills() -> int | None:
    """The file with the number of processes that the system ended for want of memory, if there is one."""
    try:
        return os.open("/proc/vmstat", os.O_RDONLY)
    except OSError:
        return None


def read_memory_kills(file: int | None) -> bytes:
    """The line with that number."""
    if file is None:
        return b""
    lines = os.pread(file, CHUNK, 0).splitlines()
    return next((line for line in lines if line.startswith(b"oom_kill ")), b"")


if __name__ == "__main__":
    main()
