"""./run on machines that lack something: what it installs, what it prints, and that a second run installs nothing."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BARE = ("sh", "dirname", "tr")  # what an empty Debian has and ./run uses
TESTS_NEED = ("docker-compose", "curl", "openssl", "chromium", "prometheus", "amtool", "redis-server")


class Machine:
    """A PATH of its own. ``apt-get`` notes how it was called and installs what ``comes`` names."""

    def __init__(self, path: Path) -> None:
        self.path = path / "bin"
        self.path.mkdir()
        self.calls = path / "calls"
        self.copy = path / "checkout"
        self.copy.mkdir()
        shutil.copy(ROOT / "run", self.copy)
        for name in BARE:
            (self.path / name).symlink_to(shutil.which(name) or name)
        self.user(0)

    def add(self, name: str, text: str = "exit 0") -> None:
        (self.path / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.path / name).chmod(0o755)

    def user(self, number: int) -> None:
        self.add("id", f"echo {number}")

    def apt(self, comes: Iterable[str]) -> None:
        """An ``apt-get install`` after which the programs ``comes`` are there."""
        made = "\n".join(f"printf '#!/bin/sh\\necho {name} \"$@\"\\n' >{self.path}/{name}" for name in comes)
        kept = shutil.which("chmod")
        self.add(
            "apt-get", f'echo "$@" >>{self.calls}\ncase "$*" in *install*)\n:\n{made}\n{kept} +x {self.path}/*\nesac'
        )

    def has(self, names: Iterable[str]) -> None:
        for name in names:
            self.add(name, f'echo {name} "$@"')

    def run(self, *targets: str) -> subprocess.CompletedProcess[str]:
        argv = [str(self.path / "sh"), str(self.copy / "run"), *targets]
        environment = {"PATH": str(self.path)}
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=60, env=environment, stdin=subprocess.DEVNULL, check=False
        )

    def installed(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_root_installs_what_the_demonstration_needs_and_nothing_twice(machine: Machine) -> None:
    machine.apt(["make", "python3"])
    done = machine.run("demo")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "make demo"), done.stderr
    update, install = machine.installed()
    assert "update" in update
    assert install.split()[-3:] == ["make", "python3", "python3-venv"]
    assert machine.run("demo").returncode == 0
    assert len(machine.installed()) == 2


def test_the_tests_need_more_and_only_what_is_missing_is_installed(machine: Machine) -> None:
    machine.has(["make", "python3", "redis-server"])
    machine.apt(TESTS_NEED)
    done = machine.run("test")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "make test"), done.stderr
    words = machine.installed()[-1].split()
    programs = [word for word in words[words.index("--no-install-recommends") + 1 :] if not word.startswith("lib")]
    assert programs == [
        "docker-compose",
        "curl",
        "openssl",
        "chromium",
        "prometheus",
        "prometheus-alertmanager",
    ]


def test_the_tests_need_libraries_too(machine: Machine) -> None:
    machine.has(["make", *TESTS_NEED])
    machine.add("python3", 'case "$2" in *libcurl*|*libnuma*) exec test -e ' + f"{machine.copy}/installed ;; esac")
    machine.add("apt-get", f'echo "$@" >>{machine.calls}; : >{machine.copy}/installed')
    (machine.path / "test").symlink_to(shutil.which("test") or "test")
    assert machine.run("test").returncode == 0
    assert machine.installed()[-1].split()[-2:] == ["libcurl4", "libnuma1"]


def test_an_ordinary_user_goes_through_sudo_when_it_asks_nothing(machine: Machine) -> None:
    machine.user(1000)
    machine.add("sudo", '[ "$1" = -n ] && shift\nexec "$@"')
    machine.add("true")
    machine.apt(["make", "python3"])
    assert machine.run("demo").returncode == 0
    assert len(machine.installed()) == 2


@pytest.mark.parametrize("sudo", [None, "echo sudo: a password is required >&2; exit 1"])
def test_an_ordinary_user_without_sudo_is_told_the_line(machine: Machine, sudo: str | None) -> None:
    machine.user(1000)
    machine.apt([])
    if sudo:
        machine.add("sudo", sudo)
    done = machine.run("demo")
    assert done.returncode == 1 and not machine.installed()
    (line,) = [line.strip() for line in done.stderr.splitlines() if "apt-get" in line]
    assert line.startswith('su -c "') and "make python3 python3-venv" in line
    assert "./run demo" in done.stderr


def test_another_system_is_told_the_names(machine: Machine) -> None:
    done = machine.run("demo")
    assert done.returncode == 1 and "make python3 python3-venv" in done.stderr


def test_an_installation_that_does_not_help_is_not_repeated_for_ever(machine: Machine) -> None:
    machine.add("python3", "exit 1")
    machine.apt(["make"])
    done = machine.run("demo")
    assert done.returncode == 1 and "Still missing" in done.stderr and "python3-venv" in done.stderr
    assert len(machine.installed()) == 2


def test_an_old_python_is_named(machine: Machine) -> None:
    machine.has(["make"])
    machine.add("python3", 'case "$2" in *version_info*) exit 1 ;; esac; echo Python 3.9.2')
    done = machine.run("demo")
    assert done.returncode == 1 and "Python 3.9.2 is too old" in done.stderr


def test_what_to_run_must_be_said(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 2 and "./run demo" in done.stderr


def test_the_readme_has_the_two_commands() -> None:
    blocks = (ROOT / "README.md").read_text().split("```")[1::2]
    assert "\n./run demo\n" in blocks and "\n./run test\n" in blocks
