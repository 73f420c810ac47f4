"""Programs that try to get out of the sandbox, or to take the machine with them.

Where a program is run with `isolation: none`, too, this shows that it would get what it is after.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from rewards.scoring import make_rollouts, make_scorer

from posttrain.errors import RewardError
from posttrain.rewards.sandbox import Limits, Program, Sandbox

LIMITS = Limits(seconds=30.0, total_seconds=120.0, memory_mib=256, disk_mib=8, processes=12)
CANARY = "canary-5bb1c0ffee"


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(limits=LIMITS)


@pytest.fixture(scope="module")
def unprotected():
    return Sandbox("none", LIMITS)


def run(sandbox, source, limits=None, **values):
    """The result of a program in which some names have values."""
    head = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    (result,) = sandbox.run([Program(head + source)], limits)
    return result


def wait_until(condition, seconds=60.0):
    """Poll, for at most so long that only a defect gets there."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.05)


def own_children():
    return psutil.Process().children(recursive=True)


def command_line(process):
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = own_children()
    yield
    wait_until(lambda: set(own_children()) <= set(before))


# --- escapes

READ = "print(open(path).read())"
READ_THROUGH_LINK = """
import os
for target in (path, '../../..' + path, '/proc/1/root' + path, '/proc/self/root' + path):
    os.symlink(target, 'link')
    try:
        print(open('link').read())
    except OSError as error:
        print(error)
    os.unlink('link')
"""
CONNECT = """
import socket
for family, address in ((socket.AF_INET, ('127.0.0.1', port)), (socket.AF_UNIX, path)):
    try:
        with socket.socket(family) as client:
            client.connect(address)
            print(client.recv(100).decode())
    except OSError as error:
        print(error)
"""
PROC = """
import os
for pid in {'self', os.getppid(), process, 1, 2, *(name for name in os.listdir('/proc') if name.isdigit())}:
    for name in ('environ', 'cmdline', 'cwd/' + path, 'root' + path):
        try:
            print(open(f'/proc/{pid}/{name}', errors='replace').read())
        except OSError as error:
            print(error)
"""
WRITE = """
import os
for target in (path, '/written', '/usr/lib/written', '/dev/written', os.__file__):
    try:
        open(target, 'a').write('')
        print('wrote', target)
    except OSError as error:
        print(error)
"""


@pytest.fixture
def canary_file(tmp_path):
    path = tmp_path / "canary.txt"
    path.write_text(CANARY)
    path.chmod(0o644)
    return path


@pytest.mark.parametrize("source", [READ, READ_THROUGH_LINK], ids=["path", "link"])
def test_a_file_outside_cannot_be_read(sandbox, unprotected, canary_file, source):
    result = run(sandbox, source, path=str(canary_file))
    assert CANARY not in result.stdout.decode() + result.stderr
    assert CANARY in run(unprotected, source, path=str(canary_file)).stdout.decode()


def test_the_environment_cannot_be_read(sandbox, unprotected, canary_file, monkeypatch):
    monkeypatch.setenv("CANARY_VARIABLE", CANARY)
    result = run(sandbox, "import os; print(os.environ)")
    assert "CANARY_VARIABLE" not in result.stdout.decode()
    assert "PYTHONHASHSEED" in result.stdout.decode()
    # A process of ours that has it in the environment it was started with, as the trainer has its secrets.
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            values = {"process": process.pid, "path": str(canary_file)}
            assert CANARY not in run(sandbox, PROC, **values).stdout.decode()
            assert f"CANARY_VARIABLE={CANARY}" in run(unprotected, PROC, **values).stdout.decode()
        finally:
            process.kill()


def test_a_local_server_cannot_be_reached(sandbox, unprotected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    abstract = f"\0{CANARY}-{os.getpid()}"
    servers[1].bind(abstract)
    servers[1].listen()
    reached = []

    def serve(server):
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            reached.append(server)
            client.sendall(CANARY.encode())
            client.close()

    threads = [threading.Thread(target=serve, args=[server], daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    values = {"port": servers[0].getsockname()[1], "path": abstract}
    assert CANARY not in run(sandbox, CONNECT, **values).stdout.decode()
    assert reached == []
    assert run(unprotected, CONNECT, **values).stdout.decode().split() == [CANARY, CANARY]
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def test_there_is_no_network(sandbox):
    result = run(sandbox, "import socket; print([name for _, name in socket.if_nameindex()])")
    assert result.stdout == b"['lo']\n"
    result = run(sandbox, "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)")
    assert "Network is unreachable" in result.stderr


def test_nothing_outside_can_be_written(sandbox, tmp_path):
    target = tmp_path / "written"
    result = run(sandbox, WRITE, path=str(target))
    assert result.code == 0
    assert b"wrote" not in result.stdout
    assert not target.exists()


def test_only_the_standard_library_is_to_be_seen(sandbox):
    source = """
import os, pwd, sys
print(os.getuid() != 0, sorted(os.listdir('/tmp')), os.listdir('/etc'), os.path.exists('/proc'))
print([name for path in (*sys.path, '/usr/lib/python3') for end in ('/site-packages', '/dist-packages')
       if os.path.isdir(path + end) for name in os.listdir(path + end)])
print(os.uname().nodename, *sorted(os.listdir('/')))
pwd.getpwuid(0)
"""
    result = run(sandbox, source)
    first, packages, names = result.stdout.decode().splitlines()
    assert first in {f"True ['main.py', 'stdin'] {etc} False" for etc in ([], ["ld.so.cache"])}
    assert packages == "[]"
    host, *top = names.split()
    assert host == "sandbox"
    assert set(top) <= {"dev", "etc", "lib", "lib64", "tmp", "usr", Path(sys.base_prefix).parts[1]}
    assert "KeyError" in result.stderr


def test_no_privileges_can_be_gained(sandbox):
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def tried(call, *args):
    return call(*args) == 0
print(tried(libc.unshare, 0x10000000), tried(libc.unshare, 0x20000), tried(libc.setuid, 0))
print(tried(libc.mount, b'x', b'/tmp', b'tmpfs', 0, None), tried(libc.umount2, b'/tmp', 2))
"""
    assert run(sandbox, source).stdout == b"False False False\nFalse False\n"


def test_other_processes_cannot_be_traced_or_killed(sandbox):
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
SEIZE = 0x4206
for pid in (process, os.getppid(), 1):
    ctypes.set_errno(0)
    print(libc.ptrace(SEIZE, pid, None, None), os.strerror(ctypes.get_errno()))
    for signal in (9, 19, 2, 15):
        try:
            os.kill(pid, signal)
        except ProcessLookupError:
            print('no such process')
        except PermissionError:
            pass
"""
    with subprocess.Popen(["sleep", "1000"]) as victim:
        try:
            result = run(sandbox, source, process=victim.pid)
            assert result.code == 0  # its supervisor, which is process 1, has not noticed
            refused, unknown = "-1 Operation not permitted", ["no such process"] * 4
            assert result.stdout.decode().splitlines() == [refused, *unknown, refused, refused]
            assert victim.poll() is None
            assert psutil.Process(victim.pid).status() == psutil.STATUS_SLEEPING
        finally:
            victim.kill()


def test_what_namespaces_do_not_cover_is_forbidden(sandbox):
    source = """
import ctypes, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)
KEYCTL = {'x86_64': 250}.get(os.uname().machine, 219)
def tried(call, *args):
    try:
        return call(*args) != -1
    except PermissionError:
        return False
print(tried(socket.socket, 40), tried(resource.prlimit, 1, resource.RLIMIT_CPU, (0, 0)))  # AF_VSOCK
print(libc.syscall(KEYCTL, 1, None), os.strerror(ctypes.get_errno()))
print(libc.syscall(425, 8, None), os.strerror(ctypes.get_errno()))  # io_uring_setup
print(tried(socket.socket), tried(socket.socketpair), resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    assert run(sandbox, source).stdout.decode().splitlines() == [
        "False False",
        "-1 Operation not permitted",
        "-1 Operation not permitted",
        "True True (64, 64)",
    ]


@pytest.mark.parametrize("isolation", ["required", "none"])
def test_a_daemon_does_not_outlive_its_program(sandbox, unprotected, isolation):
    name = f"daemon{os.getpid()}"
    source = """
import ctypes, os, time
ready, alive = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
        os.write(alive, b'x')
        time.sleep(1000)
    os._exit(0)
print(os.read(ready, 1))
"""
    result = run(sandbox if isolation == "required" else unprotected, source, name=name)
    assert (result.status, result.code, result.stdout) == ("exited", 0, b"b'x'\n")
    assert [process.pid for process in psutil.process_iter(["name"]) if process.info["name"] == name] == []


def test_no_descriptors_are_inherited(sandbox, unprotected, canary_file):
    source = """
import os
for descriptor in range(3, 1024):
    try:
        print(descriptor, os.fstat(descriptor), os.pread(descriptor, 100, 0))
    except OSError:
        pass
"""
    with canary_file.open() as file:
        os.set_inheritable(file.fileno(), True)
        for place in (sandbox, unprotected):
            assert run(place, source).stdout == b""


# --- what could take the machine with it


def test_a_program_in_an_endless_loop_is_ended(sandbox):
    limits = Limits(seconds=1.0, total_seconds=20.0)
    sources = [
        "while True: pass",
        "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
        "import time; time.sleep(1000)",
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ntime.sleep(1000)",
    ]
    results = sandbox.run([Program(source) for source in sources], limits)
    assert [result.status for result in results] == ["timeout"] * 4


def test_crashes_are_results(sandbox):
    sources = [
        "import os; os.kill(os.getpid(), 9)",
        "import ctypes; ctypes.string_at(0)",
        "import sys; sys.setrecursionlimit(10**9)\nf = lambda _: list(map(f, [0]))\nf(0)",
    ]
    results = sandbox.run([Program(source) for source in sources])
    expected = [("exited", -9), ("exited", -11), ("exited", -11)]
    assert [(result.status, result.code) for result in results] == expected


@pytest.mark.parametrize("isolation", ["required", "none"])
def test_memory_is_limited(sandbox, unprotected, isolation):
    place = sandbox if isolation == "required" else unprotected
    result = run(place, "data = bytearray(5 << 30)")
    assert result.code == 1
    assert "MemoryError" in result.stderr
    assert run(place, "data = bytearray(64 << 20); print(len(data))").code == 0


def test_processes_are_limited(sandbox):
    # Gives up at 200, so that a limit that is missed cannot hurt the machine.
    source = """
import os, time
started = 0
try:
    while started < 200:
        if os.fork() == 0:
            time.sleep(1000)
        started += 1
except BlockingIOError:
    print(started)
"""
    assert run(sandbox, source).stdout == b"11\n"  # and the program itself


@pytest.mark.parametrize("isolation", ["required", "none"])
def test_output_is_limited(sandbox, unprotected, isolation):
    place = sandbox if isolation == "required" else unprotected
    result = run(place, "import os\nwhile True: os.write(1, b'x' * 1000)")
    assert (result.status, len(result.stdout)) == ("output", 1 << 20)
    # Less is enough to fail, also if the program ends before anyone looks.
    (result,) = place.run([Program("print('x' * 1001)", max_output=1000)])
    assert (result.status, len(result.stdout)) == ("output", 1000)


def test_errors_are_cut_and_do_no_harm(sandbox):
    result = run(sandbox, "import sys\nfor _ in range(20): sys.stderr.write('x' * (1 << 20))\nprint('done')")
    assert (result.status, result.code, result.stdout, len(result.stderr)) == ("exited", 0, b"done\n", 2000)


def test_files_are_limited(sandbox):
    source = """
try:
    for number in range(100):
        open(f'/tmp/{number}', 'wb').write(bytes(1 << 20))
except OSError as error:
    print(number, error.strerror)
try:
    open('/dev/shm/x', 'wb').write(bytes(1 << 20))
except OSError as error:
    print(error.strerror)
"""
    first, second = run(sandbox, source).stdout.decode().splitlines()
    assert first in {"7 No space left on device", "8 No space left on device"}
    assert second == "No space left on device"


# --- a sandbox that fails


RESTARTED = """
import os, sys
if sys.argv[-1] != 'running':  # a command line that can be told from others
    os.execv(sys.executable, [sys.executable, '-S', 'main.py', 'running'])
import time
time.sleep(1000)
"""


def test_a_sandbox_that_is_killed_is_an_error(sandbox):
    killed = []

    def program():
        return next((child for child in own_children() if command_line(child)[-1:] == ["running"]), None)

    def kill():
        wait_until(lambda: program() is not None)
        found = program()
        # Earlier tests may have left this process other children, so go up from the program.
        ancestors = found.parents()
        launcher = ancestors[ancestors.index(psutil.Process()) - 1]
        killed.extend([launcher, *launcher.children(recursive=True)])
        launcher.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RewardError, match=r"the sandbox failed: no reply \(exit code -9\)"):
        run(sandbox, RESTARTED)
    killer.join()
    assert len(killed) == 3  # launcher, supervisor, program
    wait_until(lambda: not any(process.is_running() for process in killed))


def test_a_worker_that_is_killed_takes_its_sandbox_along():
    mark = f"running-{os.getpid()}"
    source = RESTARTED.replace("running", mark)
    spec = {"name": "code", "timeout": 4.0, "args": {"test_timeout": 30.0}}

    def running():
        return [
            process for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or [])
        ]

    with make_scorer(spec, workers=1) as scorer, ThreadPoolExecutor(1) as pool:
        rollouts = make_rollouts([source], group_size=1, tests=[{"input": "", "output": ""}])
        report = pool.submit(scorer.score, rollouts)
        wait_until(running)
        assert report.result().rewards["code"].errors == {"timeout": 1}
    assert rollouts[0].reward is None
    wait_until(lambda: not running())


def in_namespace(script, *options):
    """Output of a script run in a user namespace of its own."""
    command = ["unshare", *options, sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


TRY = """
ASK = '''
import os
print(os.getuid(), os.path.exists('/proc'), end=' ')
try:
    open(os.__file__, 'a')
    print('writes')
except OSError as error:
    print(error.strerror)
'''
from posttrain.errors import RewardError
from posttrain.rewards.sandbox import Program, Sandbox
for isolation in ("required", "none"):
    try:
        (result,) = Sandbox(isolation).run([Program(ASK)])
        print(result.stdout.decode().strip())
    except RewardError as error:
        print(error)
"""


def test_without_namespaces_it_refuses_to_start():
    forbid = "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
    done = in_namespace(forbid + TRY, "--user", "--map-root-user")
    refused, unprotected = done.stdout.splitlines()
    assert refused.startswith("model-written programs cannot be isolated here, as user ")
    assert "(the sandbox failed: unshare: No space left on device)" in refused
    assert "`isolation: none` in the reward's args runs them unprotected" in refused
    assert unprotected == "0 True writes"


def test_an_ordinary_user_can_isolate():
    done = in_namespace(TRY, "--user", "--map-user=1234", "--map-group=1234")
    assert done.stdout.splitlines() == ["1000 False Read-only file system", "1234 True writes"]
