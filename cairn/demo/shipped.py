"""The model and the examples that come with Cairn: package data in a wheel, folders of their own in a checkout."""

from __future__ import annotations

from pathlib import Path

_DATA = Path(__file__).resolve().with_name("data")
_HOME = _DATA if _DATA.is_dir() else _DATA.parents[2]
MODEL = _HOME / "models" / "fable"
EXAMPLES = _HOME / "examples"
