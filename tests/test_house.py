"""The house itself: import floors, generated code, sizes, and nothing of one machine in tracked files."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
ROOMS = ("chunk_store", "text", "engine", "serving", "prefill_service", "decode_service", "cairn", "gateway")
PACKAGES = (*ROOMS, "bench", "models")
LOCKED = (
    "server",
    "http",
    "load",
    "dev",
    "redis",
    "mooncake",
    "quantized",
    "lora",
)  # the extras that `make env` installs
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_imports_go_down_only() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout


def test_generated_code_is_what_the_protos_say(tmp_path: Path) -> None:
    protos = sorted((ROOT / "protos").glob("*.proto"))
    names = [f"protos/{path.name}" for path in protos]
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where protoc finds mypy's two plugins
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outs, *names]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, env={**os.environ, "PATH": scripts})
    made = sorted((tmp_path / "protos").iterdir())
    assert len(made) == 4 * len(protos)
    for path in made:
        assert path.read_text() == (ROOT / "protos" / path.name).read_text(), f"run `make protos`: {path.name} is stale"


MISUSES = """
import grpc
from protos import chunks_pb2, decode_pb2, prefill_pb2, prefill_pb2_grpc

decode_pb2.GenerateRequest(no_such_field=1)
decode_pb2.GenerateRequest(request_id=1)
decode_pb2.GenerateRequest().sampling.no_such_field
decode_pb2.Segment().HasField("no_such_field")
decode_pb2.Segment().WhichOneof("no_such_oneof")
chunks_pb2.CHUNK_TYPE_NO_SUCH
prefill_pb2.PrefillChunkRequest(type=3)
prefill_pb2_grpc.PrefillServiceStub(grpc.insecure_channel("")).NoSuchCall
prefill_pb2_grpc.PrefillServiceStub(grpc.insecure_channel("")).GetChunk(prefill_pb2.PinChunkRequest())
prefill_pb2_grpc.PrefillServiceStub(grpc.insecure_channel("")).GetChunk(prefill_pb2.GetChunkRequest()).no_such_field
"""


def test_mypy_reads_messages_and_stubs(tmp_path: Path) -> None:
    """A field, an enum value or an RPC that the protos do not have, or one of another type, fails ``make check``."""
    (tmp_path / "misuses.py").write_text(MISUSES)
    mypy: list[str | Path] = [Path(sys.executable).with_name("mypy"), "--no-error-summary", tmp_path / "misuses.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    found = subprocess.run(mypy, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    wrong = {int(number) for number in re.findall(r"misuses\.py:(\d+): error", found.stdout)}
    meant = {number for number, line in enumerate(MISUSES.splitlines(), 1) if line and "import" not in line}
    assert wrong == meant, found.stdout + found.stderr


@pytest.mark.parametrize("guide", ["CONTRIBUTING.md", "ARCHITECTURE.md", "README.md"])
def test_every_path_in_a_guide_exists(guide: str) -> None:
    words = re.findall(r"`([\w.*/-]+)`", (ROOT / guide).read_text())
    paths = [word for word in words if "/" in word.strip("/") or Path(word).suffix in {".py", ".md", ".toml", ".lock"}]
    assert paths
    tops = [top for top in ROOT.iterdir() if top.name[0] != "." or top.name == ".ci"]
    there = [path for top in tops for path in (top, *top.rglob("*")) if "__pycache__" not in path.parts]
    names = [f"/{path.relative_to(ROOT)}" for path in there]  # a guide may leave out the room it speaks of
    assert not [path for path in paths if not any(fnmatch(name, f"*/{path.strip('/')}") for name in names)]


def test_the_guide_names_targets_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"format", "test-gpu", "test-all", "coverage", "lock"} <= named <= targets


def test_git_runs_what_make_check_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    checked = re.search(r"^check:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    hooks = re.findall(r"entry: \.venv/bin/([^}\n]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert checked
    lines = [line.strip().removeprefix("$(BIN)/").removesuffix(" .") for line in checked[1].splitlines()]
    assert [hook.strip().removesuffix(" --force-exclude") for hook in hooks] == lines


def test_the_lock_holds_what_is_required_and_no_address() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = settings["optional-dependencies"]
    wanted = map(Requirement, settings["dependencies"] + [line for name in LOCKED for line in extras[name]])
    _, *lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    held = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in {"torch", "cairn"} or requirement.specifier.contains(held[name]), requirement


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_modules_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path.name != "__main__.py" or path.stat().st_size:
        assert ast.get_docstring(tree), f"{path} has no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 70, f"{path}:{node.lineno} {node.name} is too long"


def test_no_path_of_a_machine_and_no_registry_is_tracked() -> None:
    git = shutil.which("git")
    files = subprocess.run([git or "false", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if files.returncode:
        pytest.skip("not a git checkout" if git else "git is not installed")
    registry = re.compile(r"py" r"pi\.org|files\.python" r"hosted|registry\.npm" r"js|deb\.deb" r"ian\.org")
    for name in files.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt"} and path.is_file():
            assert not registry.search(path.read_text(errors="replace")), name


def test_every_package_is_installed_and_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    for package in (
        *("protos", "chunk_store", "text", "engine", "serving"),
        *("prefill_service", "decode_service", "cairn", "gateway"),
    ):
        assert f"{package}*" in included
        assert package == "protos" or package in settings["tool"]["mypy"]["packages"]


DECISIONS = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.Match, ast.BoolOp, ast.comprehension)
DECISIONS_MIN = 4  # a module with fewer branches and loops in its functions says what it does by itself
# What is seen by a test of another name, because alone it is nothing (a model, a card) or only the other half.
SEEN_BY = {
    "engine/run/cuda": "tests/gpu",  # needs a card: make test-gpu
    "engine/run/eager": "tests/engine/run/test_runner_protocol.py",
    "engine/check": "tests/engine/check/test_start.py",
    "engine/compare/trace.py": "tests/engine/compare/test_divergence.py",
    "engine/model/borrowed.py": "tests/engine/test_oracle.py",
    "engine/model/probe.py": "tests/engine/check/test_start.py",
    "engine/served.py": "tests/engine/test_oracle.py",
    "cairn/cli/archives.py": "tests/cairn/cli/commands/test_store.py",
    "gateway": "tests/gateway/test_gateway.py",
    "text/chat/parsing": "tests/text/chat/parsing/test_forms.py",
    "decode_service/api/tool_choice.py": "tests/decode_service/test_tools.py",
    "prefill_service/jobs/computer.py": "tests/prefill_service/jobs/test_own_pool.py",
    "decode_service/kv_source/fetch.py": "tests/decode_service/kv_source/test_fetcher.py",
}


def decisions(path: Path) -> int:
    """Branches and loops in the functions of a module."""
    functions = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return len({id(node) for function in functions for node in ast.walk(function) if isinstance(node, DECISIONS)})


def test_every_module_with_logic_has_a_test_named_for_it() -> None:
    missing, used = [], set()
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))):
        module = path.relative_to(ROOT)
        if decisions(path) < DECISIONS_MIN or (ROOT / "tests" / module.parent / f"test_{path.name}").exists():
            continue
        seen_by = [place for place in SEEN_BY if module.is_relative_to(place)]
        used.update(seen_by)
        if not seen_by:
            missing.append(f"{module} needs tests/{module.parent}/test_{path.name}")
    assert not missing, "\n".join(missing)
    assert used == set(SEEN_BY), f"not needed any more in SEEN_BY: {sorted(set(SEEN_BY) - used)}"
    assert all((ROOT / test).exists() for test in SEEN_BY.values())
