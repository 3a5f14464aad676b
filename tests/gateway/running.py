"""The gateway as a process of its own, over services that are there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Running:
    """A gateway that serves."""

    process: subprocess.Popen[str]
    port: int
    metrics_port: int
    log: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, token: str = "unused", **more: Any) -> Any:
        """OpenAI's client, which does not repeat what fails unless told to."""
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": token, "max_retries": 0, "timeout": 120, **more}
        )

    def said(self) -> str:
        """Its log."""
        self.log.seek(0)
        return str(self.log.read())


@contextmanager
def gateway(prefill: str, decode: str, *arguments: str) -> Iterator[Running]:
    """A gateway over these services, with more arguments; it must stop cleanly, if it was not stopped already."""
    argv = [sys.executable, "-m", "gateway", "--prefill", prefill, "--decode", decode, "--http-port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        command = [*argv, "--metrics-port", "0", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
        try:
            line = process.stdout.readline()
            ready = json.loads(line) if line else {}
            running = Running(process, ready.get("port", 0), ready.get("metrics_port", 0), log)
            assert ready.get("event") == "ready", running.said()
            yield running
            process.terminate()
            process.communicate(timeout=100)
            assert process.returncode == 0, running.said()
        finally:
            process.kill()
            process.communicate()
