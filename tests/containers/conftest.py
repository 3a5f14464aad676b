from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.containers.deployment import ROOT, Deployment, Engine

# Prints a digest of the packages below its working directory.
DIGEST = """
import hashlib, pathlib
found = hashlib.sha256()
services = ("prefill_service", "decode_service", "cairn", "gateway")
for package in ("protos", "chunk_store", "text", "engine", "serving", *services):
    for path in sorted(pathlib.Path(package).rglob("*.py")):
        found.update(str(path).encode() + path.read_bytes())
print(found.hexdigest())
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.containers)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def engine() -> Engine:
    found = Engine()
    if absence := found.absence():
        pytest.skip(absence)
    return found


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The image ``cairn`` of this checkout: the one that is there if it has the same sources, else built."""
    deployment = Deployment(engine, ["compose.yaml"])
    here = subprocess.run([sys.executable, "-c", DIGEST], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    try:
        if engine.image("cairn") is not None:
            inside = deployment.attempt("run", "--rm", "--no-deps", "-T", "prefill", "python", "-c", DIGEST)
            if inside.stdout.strip().endswith(here.strip()):
                return "cairn"
        deployment.compose("build", "prefill", timeout_s=1500)
    finally:
        deployment.down()
    return "cairn"
