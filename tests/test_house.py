"""The house itself: import floors, generated code, sizes, and nothing of one machine in tracked files."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("chunk_store", "text", "engine", "serving", "prefill_service", "decode_service", "cairn", "bench", "models")
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
    for package in ("protos", "chunk_store", "text", "engine", "serving", "prefill_service", "decode_service", "cairn"):
        assert f"{package}*" in included
        assert package == "protos" or package in settings["tool"]["mypy"]["packages"]
