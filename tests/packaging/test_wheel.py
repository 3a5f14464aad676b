"""The wheel: one top-level name, everything that is needed in it, and no quarrel with a user's own packages."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOMS, ROOT, Built

# Imports every module of the wheel, as an installation with everything would; then says whose modules are there.
IMPORT_ALL = """
import importlib, os, pkgutil, sys
import cairn
missing = []
for found in pkgutil.walk_packages(cairn.__path__, "cairn."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        missing.append(error.name)
for room in sys.argv[1:]:
    module = importlib.import_module(room)
    assert module.MINE, room
    assert not any(name.startswith(room + ".") for name in sys.modules if name != "protos.chunks_pb2"), room
print("missing", sorted(set(missing)))
"""


def run(unpacked: Path, *argv: str, path: tuple[Path, ...] = (), cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python over the unpacked wheel, in a directory of the user's."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, unpacked)))}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=240, env=environment, cwd=cwd, check=False
    )


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A directory with packages of the user's own under each of our rooms' names, one with messages of its own."""
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("MINE = True\n")
    (tmp_path / "protos" / "chunks.proto").write_text(
        'syntax = "proto3";\npackage mine;\nmessage Chunk { string other = 1; }\n'
    )
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "protos/chunks.proto"],
        cwd=tmp_path, check=True, timeout=60,
    )  # fmt: skip
    return tmp_path


def test_one_name_at_the_top(built: Built) -> None:
    assert {path.name for path in built.unpacked.iterdir()} == {"cairn", "cairn-0.1.0.dist-info"}
    assert (built.unpacked / "cairn-0.1.0.dist-info" / "top_level.txt").read_text().split() == ["cairn"]


def test_every_module_travels(built: Built) -> None:
    for room in ROOMS:
        here = {path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py")}
        assert {
            path.relative_to(built.unpacked / "cairn") for path in (built.unpacked / "cairn" / room).rglob("*.py")
        } == here
    assert (built.unpacked / "cairn" / "py.typed").is_file()


def test_the_shipped_model_and_the_examples_travel(built: Built) -> None:
    data = built.unpacked / "cairn" / "demo" / "data"
    for folder in ("models/fable", "examples"):
        for path in (ROOT / folder).rglob("*.*"):
            assert (data / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_the_generator_of_the_wheel_is_that_of_the_checkout(built: Built) -> None:
    """The stubs differ in nothing but where they lie: one generator made both."""
    for name in ("chunks", "decode", "prefill"):
        file = f"{name}_pb2_grpc.py"
        here, there = (ROOT / "protos" / file).read_text(), (built.unpacked / "cairn/protos" / file).read_text()
        for old, new in (("cairn.protos", "protos"), ("cairn/protos", "protos"), ("cairn_dot_protos", "protos")):
            there = there.replace(old, new)
        assert there == here, "grpcio-tools of [build-system] or of this environment is another one than made protos/"


def test_nothing_names_a_room_at_the_top(built: Built) -> None:
    """No import, and no dotted name in a string, such as one for ``import_module``."""
    dotted = re.compile(rf"({'|'.join(ROOMS)})(\.\w+)+")
    for path in (built.unpacked / "cairn").rglob("*.py*"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and dotted.fullmatch(node.value):
                assert not (ROOT / node.value.replace(".", "/")).with_suffix(".py").exists(), f"{path}:{node.lineno}"
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.partition(".")[0] for name in names} & set(ROOMS), f"{path}: {names}"


def test_packages_of_the_same_names_live_beside_it(built: Built, user: Path) -> None:
    """The user's stand first in the path and are imported first; every module of ours is found all the same."""
    code = f"import protos.chunks_pb2 as mine\n{IMPORT_ALL}\nassert mine.Chunk(other='x')"
    done = run(built.unpacked, "-P", "-c", code, *ROOMS, path=(user,), cwd=user)
    assert done.returncode == 0, done.stderr[-3000:]
    missing = ast.literal_eval(done.stdout.strip().removeprefix("missing "))
    assert set(missing) <= {"triton", "flashinfer", "mooncake"}, "what only a GPU or a cluster needs"


def test_it_takes_no_names_from_packages_that_come_later(built: Built, user: Path) -> None:
    code = f"import cairn, sys; sys.path.insert(0, {str(user)!r}); import protos.chunks_pb2 as mine, engine, text"
    done = run(
        built.unpacked, "-P", "-c", f"{code}; assert mine.Chunk(other='x') and engine.MINE and text.MINE", cwd=user
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_source_distribution_builds_the_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path.relative_to(built.unpacked / "cairn") for path in (built.unpacked / "cairn").rglob("*") if path.is_file()
    }
    for path in wanted:
        parts = path.parts[2:] if path.parts[:2] == ("demo", "data") else path.parts
        assert "/".join(parts) in names or "/".join(("cairn", *parts)) in names, path
    assert {"setup.py", "pyproject.toml"} <= names


def test_an_editable_install_keeps_the_layout_of_the_checkout(built: Built, tmp_path: Path) -> None:
    done = run(
        built.build("editable", tmp_path),
        "-c",
        "import cairn, protos, __editable___cairn_0_1_0_finder as f; print(sorted(f.MAPPING))",
        cwd=tmp_path,
    )
    assert ast.literal_eval(done.stdout) == sorted((*ROOMS, "cairn")), done.stderr
