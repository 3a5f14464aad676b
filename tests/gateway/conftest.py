"""Both services and the gateway over the shipped model, started once: what the tests ask with OpenAI's own client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKENS = "operator - admin\nstone red\nslate blue\n"


@dataclass(frozen=True)
class Served:
    """Where everything is."""

    url: str
    prefill: str
    decode: str
    log: Path

    def client(self, token: str = "stone", **more: Any) -> Any:
        """OpenAI's client, which does not repeat what fails."""
        return openai.OpenAI(base_url=self.url, api_key=token, max_retries=0, timeout=120, **more)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """``cairn up --http-port`` with a token file, both services in one process; at the end all must stop cleanly."""
    folder = tmp_path_factory.mktemp("gateway")
    tokens, log = folder / "tokens", folder / "log"
    tokens.write_text(TOKENS)
    argv = [sys.executable, "-m", "cairn.cli", "up", "--json", "--model", str(ROOT / "models" / "fable")]
    argv += ["--dtype", "float32", "--store", f"file://{folder / 'store'}", "--no-separate", "--http-port", "0"]
    argv += ["--token-file", str(tokens), "--drain-s", "100"]
    for port in ("--prefill-port", "--decode-port", "--prefill-metrics-port", "--decode-metrics-port"):
        argv += [port, "0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT)
    line = process.stdout.readline()
    if not line or json.loads(line)["event"] != "ready":
        process.kill()
        pytest.fail(f"cairn up did not start: {line}{log.read_text()[-3000:]}")
    ready = json.loads(line)
    yield Served(ready["gateway"]["url"], ready["prefill"]["address"], ready["decode"]["address"], log)
    process.terminate()
    out, _ = process.communicate(timeout=250)
    assert json.loads(out) == {"event": "stopped", "reason": "asked", "clean": True}, log.read_text()[-3000:]
