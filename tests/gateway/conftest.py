"""Both services and the gateway over the shipped model, started once: what the tests ask with OpenAI's own client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
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
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=120, **more)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Both services in one process, and the gateway, with a token file; at the end all must stop cleanly."""
    folder = tmp_path_factory.mktemp("gateway")
    tokens, log = folder / "tokens", folder / "log"
    tokens.write_text(TOKENS)
    with ExitStack() as ends, log.open("w") as stderr:
        argv = ["cairn.cli", "up", "--json", "--model", str(ROOT / "models" / "fable"), "--dtype", "float32"]
        argv += ["--store", f"file://{folder / 'store'}", "--no-separate", "--token-file", str(tokens)]
        for port in ("--prefill-port", "--decode-port", "--prefill-metrics-port", "--decode-metrics-port"):
            argv += [port, "0"]
        ready = ends.enter_context(_started(argv, stderr, log))
        prefill, decode = ready["prefill"]["address"], ready["decode"]["address"]
        argv = ["gateway", "--prefill", prefill, "--decode", decode, "--http-port", "0", "--token-file", str(tokens)]
        ready = ends.enter_context(_started(argv, stderr, log))
        yield Served(f"http://127.0.0.1:{ready['port']}", prefill, decode, log)


class _started:
    """A module as a process, until the block ends."""

    def __init__(self, argv: list[str], stderr: Any, log: Path) -> None:
        self._argv, self._stderr, self._log = [sys.executable, "-m", *argv], stderr, log

    def __enter__(self) -> dict[str, Any]:
        self._process = subprocess.Popen(self._argv, stdout=subprocess.PIPE, stderr=self._stderr, text=True, cwd=ROOT)
        line = self._process.stdout.readline()
        if not line or json.loads(line)["event"] != "ready":
            self._process.kill()
            pytest.fail(f"{self._argv} did not start: {line}{self._log.read_text()[-3000:]}")
        return json.loads(line)

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=100)
        assert self._process.returncode == 0, self._log.read_text()[-3000:]
