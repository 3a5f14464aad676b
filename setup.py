"""How the wheel differs from the checkout: there every room lies inside the package ``cairn``.

``protos``, ``engine``, ``text`` and the like are names that whoever installs us may have, too. So the build moves the
rooms below ``cairn``, makes their absolute imports of each other imports of ``cairn.ROOM``, generates the protobuf code
again under the name that its files have there, and adds the shipped model and the examples. Everything else is in
pyproject.toml; an editable install keeps the checkout's layout.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

HOUSE = "cairn"
SHIPPED = ("models/fable", "examples")
DATA = "cairn/demo/data"

_FROM = re.compile(rb"from +")


class BuildHouse(build_py):
    """``build_py`` with all rooms in one house."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        packages = {package.partition(".")[0] for package in self.packages}
        lib, rooms = Path(self.build_lib), packages - {HOUSE}
        for package in packages:  # modules of an earlier build that are no more
            shutil.rmtree(lib / package, ignore_errors=True)
        super().run()
        for room in rooms:
            shutil.move(lib / room, lib / HOUSE / room)
        for path in sorted((lib / HOUSE).rglob("*.py*")):  # .pyi, too
            path.write_bytes(imports_inside(path.read_bytes(), rooms))
        generate_protos(lib)
        for place in SHIPPED:
            shutil.copytree(place, lib / DATA / place, dirs_exist_ok=True)


class NameHouse(egg_info):
    """``egg_info`` that names what the wheel installs."""

    def run(self) -> None:
        super().run()
        Path(self.egg_info, "top_level.txt").write_text(f"{HOUSE}\n")


def imports_inside(source: bytes, rooms: Collection[str]) -> bytes:
    """``source`` with each absolute import of one of ``rooms`` made one of ``cairn.ROOM``; nothing else changes.

    Raises ``ValueError`` for an import that binds a room's name without saying so (``import engine.plan``).
    """
    lines = source.splitlines(keepends=True)
    edits: list[tuple[int, int, int, str]] = []  # line, first byte, last byte, what stands there then
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and _room(node.module or "") in rooms:
            keyword = _FROM.match(lines[node.lineno - 1], node.col_offset)
            assert keyword, f"line {node.lineno}: the module's name does not follow its `from`"
            edits.append((node.lineno, keyword.end(), keyword.end(), f"{HOUSE}."))
        elif isinstance(node, ast.Import) and any(_room(alias.name) in rooms for alias in node.names):
            edits.append((node.lineno, node.col_offset, node.end_col_offset or 0, ast.unparse(_from_house(node))))
    for number, start, end, words in sorted(edits, reverse=True):
        line = lines[number - 1]
        lines[number - 1] = line[:start] + words.encode() + line[end:]
    return b"".join(lines)


def generate_protos(lib: Path) -> None:
    """The protobuf code as ``make protos`` makes it, for files in ``cairn/protos``; the stubs stay as they are.

    A process has one pool of such files by name: a user's own ``protos/chunks.proto`` must not meet ours there.
    """
    from grpc_tools import protoc  # not for an editable install

    protos = sorted((lib / HOUSE / "protos").glob("*.proto"))
    for path in protos:
        path.write_text(path.read_text().replace('import "protos/', f'import "{HOUSE}/protos/'))
    outs = [f"--{kind}_out={lib}" for kind in ("python", "grpc_python")]
    if protoc.main(["protoc", f"-I{lib}", *outs, *map(str, protos)]):
        raise RuntimeError("protoc failed; what it said stands above")


def _from_house(node: ast.Import) -> ast.ImportFrom:
    (alias, *more) = node.names
    parent, _, name = alias.name.rpartition(".")
    if more or (parent and not alias.asname):
        raise ValueError(f"line {node.lineno}: write `from PACKAGE import NAME` instead of `{ast.unparse(node)}`")
    return ast.ImportFrom(".".join(filter(None, (HOUSE, parent))), [ast.alias(name, alias.asname)], 0)


def _room(module: str) -> str:
    return module.partition(".")[0]


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildHouse, "egg_info": NameHouse})
