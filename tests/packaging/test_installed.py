"""The wheel in an empty environment, outside the checkout: `cairn demo` and `cairn up` work. Needs a package index."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOMS, ROOT, Built

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def home(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a user's with an environment in ``venv``, and packages that bear our rooms' names."""
    top = tmp_path_factory.mktemp("home")
    subprocess.run([sys.executable, "-m", "venv", top / "venv"], check=True, timeout=120)
    makefile = (ROOT / "Makefile").read_text()
    torch, index = (re.search(rf"^{name} \S?= (\S+)", makefile, re.MULTILINE) for name in ("TORCH", "TORCH_INDEX"))
    assert torch and index
    pip: list[str | Path] = [top / "venv/bin/pip", "install", "--quiet", "--retries", "1"]
    if subprocess.run([*pip, "--timeout", "30", "--index-url", index[1], torch[1]], timeout=900).returncode:
        subprocess.run([*pip, torch[1]], check=True, timeout=900)
    subprocess.run([*pip, f"{built.wheel}[server]"], check=True, timeout=900)
    for room in ROOMS:
        (top / room).mkdir()
        (top / room / "__init__.py").write_text("raise ImportError('the user\\'s own')\n")
    return top


@pytest.fixture
def up(home: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of commands that find a running `cairn up`."""
    ports = [f"--{name}{kind}-port=0" for name in ("prefill", "decode") for kind in ("", "-metrics")]
    argv: list[str | Path] = [home / "venv/bin/cairn", "up", "--json", *ports]
    with subprocess.Popen(
        [*argv, "--store", f"file://{tmp_path}/store"], cwd=home, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        addresses = {f"CAIRN_{name.upper()}": ready[name]["address"] for name in ("prefill", "decode")}
        try:
            yield {**environment(), **addresses}
        finally:
            process.send_signal(signal.SIGTERM)
        assert json.loads(process.stdout.readline())["clean"]
    assert process.returncode == 0


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("CAIRN_", "PYTHON"))}


def cairn(home: Path, *argv: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [home / "venv/bin/cairn", *argv],
        cwd=home,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demonstration_runs(home: Path) -> None:
    *answers, done = map(json.loads, cairn(home, "demo", "--json").splitlines())
    assert done["event"] == "done" and done["good"] == done["answers"] == len(answers) == 7


def test_up_serves_the_shipped_model_to_the_command_line(home: Path, up: dict[str, str]) -> None:
    cairn(home, "prefill", "The harbour of Tarn opened in 1911.", "--name", "tarn", env=up)
    asked = ("generate", ":tarn", "--query", "When?", "--max-tokens", "4", "--ignore-eos", "--json")
    answer = json.loads(cairn(home, *asked, env=up))
    assert len(answer["token_ids"]) == 4 and answer["reuse"]["segments"][0]["cached_tokens"] > 0
    assert "cairn 0.1.0" in cairn(home, "--version")


def test_what_works_on_a_model_and_a_store_finds_what_it_needs(home: Path, up: dict[str, str], tmp_path: Path) -> None:
    cairn(home, "prefill", "The harbour of Tarn opened in 1911.", "--name", "tarn", env=up)
    stats = json.loads(cairn(home, "store", "stats", "--json", "--store", f"file://{tmp_path}/store"))
    assert stats["entries"] == 1
    model = next((home / "venv").rglob("cairn/demo/data/models/fable"))
    assert json.loads(cairn(home, "plan", str(model), "--json"))["layers"] > 1
    same = json.loads(cairn(home, "compare", "--model", str(model), "Tarn is a town.", "--query", "Why?", "--json"))
    assert same["beyond"] == 0
