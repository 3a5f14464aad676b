"""The build step that makes absolute imports of our rooms imports of ``cairn.ROOM``."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.packaging.conftest import ROOT


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cairn_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from protos import chunks_pb2", "from cairn.protos import chunks_pb2"),
        ("from text.codec import (\n    A,  # é\n    B,\n)", "from cairn.text.codec import (\n    A,  # é\n    B,\n)"),
        ("if x:\n    from text import a; from text import b", None),
        ("s = 'ü'; from text import a", "s = 'ü'; from cairn.text import a"),
        ("import text", "from cairn import text"),
        ("import text as t", "from cairn import text as t"),
        ("import text.codec as c  # why", "from cairn.text import codec as c  # why"),
        ("def f():\r\n    import text\r\n", "def f():\r\n    from cairn import text\r\n"),
        ("from texts import a", "from texts import a"),
        ("from rich.text import Text", "from rich.text import Text"),
        ("from . import text\nfrom .text import a", "from . import text\nfrom .text import a"),
        ("import os, sys", "import os, sys"),
        (
            '"""from text import a"""\n# import text\nx = "import text"',
            '"""from text import a"""\n# import text\nx = "import text"',
        ),
    ],
)
def test_only_imports_of_rooms_change(setup: ModuleType, before: str, after: str | None) -> None:
    if after is None:
        after = before.replace("from text", "from cairn.text")
    assert setup.imports_inside(before.encode(), ("protos", "text")) == after.encode()


@pytest.mark.parametrize("source", ["import text.codec", "import os, text", "import text, protos"])
def test_an_import_that_cannot_be_moved_stops_the_build(setup: ModuleType, source: str) -> None:
    with pytest.raises(ValueError, match="line 1: write `from PACKAGE import NAME`"):
        setup.imports_inside(source.encode(), ("protos", "text"))
