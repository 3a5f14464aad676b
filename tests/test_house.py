"""The house itself: import floors, generated code, sizes, and nothing of one machine in tracked files."""

from __future__ import annotations

import ast
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
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *outs, *names], cwd=ROOT, check=True, timeout=120)
    made = sorted((tmp_path / "protos").iterdir())
    assert len(made) == 3 * len(protos)
    for path in made:
        assert path.read_text() == (ROOT / "protos" / path.name).read_text(), f"run `make protos`: {path.name} is stale"


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
