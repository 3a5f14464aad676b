"""`cairn --version`: package, protocol and what is stored."""

from __future__ import annotations

import pytest

from cairn.cli import main as cli
from chunk_store.format import versions
from serving.process.version import package_version


def test_every_format_version_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    package, protocol, store = capsys.readouterr().out.splitlines()
    assert (package, protocol) == (f"cairn {package_version()}", "protocol cairn.v1")
    kinds = [name.removesuffix("_VERSION").lower() for name in vars(versions) if name.endswith("_VERSION")]
    assert store == "store " + ", ".join(f"{kind} {getattr(versions, f'{kind.upper()}_VERSION')}" for kind in kinds)
