"""``--unit``: only the tests that start no process and make no model; `make coverage` is of these.

A test is one of them if neither its module nor the modules of its fixtures import, themselves or through others of the
tests, what processes and models are made with. The mark ``unit`` says it of a test where that is too strict.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest

STARTERS = re.compile(r"subprocess|multiprocessing|models|transformers\..*(Model\w*|Config|ForCausalLM)")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--unit", action="store_true", help="only tests that start no process and make no model")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--unit"):
        config.hook.pytest_deselected(items=[item for item in items if not _is_unit(item)])
        items[:] = [item for item in items if _is_unit(item)]


def _is_unit(item: Any) -> bool:
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    modules = {item.module.__name__, *(fixture.func.__module__ for found in fixtures for fixture in found)}
    return item.get_closest_marker("unit") is not None or not any(map(_starts_something, modules))


@functools.cache
def _starts_something(name: str) -> bool:
    """Whether a name is one of ``STARTERS``, or that of a module of the tests which imports one."""
    if not name.startswith("tests."):
        return STARTERS.fullmatch(name) is not None
    path = Path(__file__).parent.parent.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():  # a name in a module
        return False
    imported: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return any(map(_starts_something, imported - {name}))
