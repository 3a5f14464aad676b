"""The wheel of this checkout, built once and unpacked."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("protos", "chunk_store", "text", "engine", "serving", "prefill_service", "decode_service", "gateway")
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, 'build_' + sys.argv[1])(sys.argv[2]))"


@dataclass(frozen=True)
class Built:
    """``source`` is a copy of the checkout's sources; ``wheel`` the file; ``unpacked`` is what an installation has."""

    source: Path
    wheel: Path
    unpacked: Path

    def build(self, kind: str, into: Path) -> Path:
        return build(self.source, kind, into)


def build(source: Path, kind: str, into: Path) -> Path:
    """A ``wheel``, ``sdist`` or ``editable`` of ``source``, made by the environment's setuptools: no network."""
    into.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(into)], cwd=source, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="package")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    top = tmp_path_factory.mktemp("wheel")
    source = top / "source"
    source.mkdir()
    for folder in (*ROOMS, "cairn", "models/fable", "examples"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    wheel = build(source, "wheel", top / "dist")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(top / "unpacked")
    return Built(source, wheel, top / "unpacked")
