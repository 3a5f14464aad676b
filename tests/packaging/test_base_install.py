"""The wheel with its base dependencies alone: the client and the command line work, the rest says what to install."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

from cairn.cli.extras import SERVER
from tests.cairn.cairn_fakes import FakeServices
from tests.packaging.conftest import ROOT, Built

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# As `sitecustomize`: of what is installed beside the wheel only these packages can be imported.
ONLY = """
import os, sys
ALLOWED += os.environ.get("ALSO_INSTALLED", "").split()
class Only:
    @staticmethod
    def find_spec(name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in ALLOWED and root not in sys.stdlib_module_names and root != "sitecustomize":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Only)
"""


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


def with_what_they_need(names: list[str]) -> set[str]:
    """Distributions by their plain names: these, and what they ask for without an extra."""
    found: set[str] = set()
    while names:
        name = plain(re.split(r"[\s<>=!~;\[(]", names.pop())[0])
        if name not in found:
            found.add(name)
            names += [each for each in distribution(name).requires or [] if "extra ==" not in each]
    return found


@pytest.fixture(scope="module")
def base(built: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of an installation without extras."""
    wanted = with_what_they_need(list(PROJECT["dependencies"]))
    installed = packages_distributions().items()
    allowed = {"cairn", *(name for name, places in installed if wanted & set(map(plain, places)))}
    assert not allowed & set(SERVER)
    folder = tmp_path_factory.mktemp("only")
    (folder / "sitecustomize.py").write_text(f"ALLOWED = {sorted(allowed)}\n{ONLY}")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CAIRN_")}
    return {**clean, "PYTHONPATH": f"{folder}{os.pathsep}{built.unpacked}"}


def cairn(base: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "cairn.cli", *argv]
    return subprocess.run(command, env=base, capture_output=True, text=True, timeout=120, check=False)


def test_the_extra_brings_what_the_command_line_says_it_brings() -> None:
    names = {re.split(r"[<>=]", each)[0].replace("-", "_") for each in PROJECT["optional-dependencies"]["server"]}
    assert {name.replace("grpcio", "grpc") for name in names} == set(SERVER)


def test_the_client_is_all_there(base: dict[str, str]) -> None:
    code = (
        "import cairn, sys; print([getattr(cairn, name).__module__ for name in cairn.__all__]); print(cairn.__file__)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], env=base, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    modules, file = done.stdout.splitlines()
    assert all(name.startswith("cairn.client.") for name in ast.literal_eval(modules))
    assert Path(file).is_relative_to(base["PYTHONPATH"].split(os.pathsep)[1])


def test_version_names_package_protocol_and_store_formats(base: dict[str, str]) -> None:
    done = cairn(base, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    package, protocol, store = done.stdout.splitlines()
    assert (package, protocol) == (f"cairn {PROJECT['version']}", "protocol cairn.v1")
    assert re.fullmatch(r"store entry \d+, index \d+, redis \d+, archive \d+", store)


def test_help_and_a_request(base: dict[str, str]) -> None:
    assert cairn(base, "--help").returncode == 0
    services = FakeServices()
    try:
        base = {**base, "CAIRN_PREFILL": services.address, "CAIRN_DECODE": services.address}
        done = cairn(base, "generate", ":doc-1", "--query", "Why?", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["text"] == "Cairn is stone."
        listed = cairn(base, "chunks", "list", "--limit", "2", "--json")
        assert len(listed.stdout.splitlines()) == 2, listed.stderr
    finally:
        services.stop()


@pytest.mark.parametrize(
    "argv", ["up --model m --store file:///s", "demo", "store stats", "plan m", "compare --model m text"]
)
def test_what_needs_the_server_side_says_what_to_install(base: dict[str, str], argv: str) -> None:
    done = cairn(base, *argv.split())
    assert (done.returncode, done.stdout) == (2, "")
    command = argv.split()[0]
    assert re.fullmatch(
        rf'cairn: cairn {command} needs the server side, and \w+ is not installed: pip install "cairn\[server\]"\n',
        done.stderr,
    )


def test_a_plan_without_transformers_says_what_to_install(base: dict[str, str]) -> None:
    done = cairn({**base, "ALSO_INSTALLED": "xxhash"}, "plan", str(ROOT / "models" / "fable"))
    assert (done.returncode, done.stdout) == (2, "")
    assert 'transformers is not installed: pip install "cairn[server]"' in done.stderr


def test_a_package_that_no_extra_brings_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from cairn.cli import main as command_line

    def lost(chosen: str) -> None:
        raise ModuleNotFoundError("No module named 'lost'", name="lost")

    monkeypatch.setattr(command_line, "build_parser", lost)
    with pytest.raises(ModuleNotFoundError, match="lost"):
        command_line.main(["health"])
