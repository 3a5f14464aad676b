"""The real services for ``bench.serving``: a checkpoint, a store, two processes, and what they say of themselves."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import shutil
import sys
import tempfile
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cairn.demo.shipped import MODEL
from cairn.local.processes import Command, Processes, free_port

START_S, STOP_S, SCRAPE_S = 400.0, 30.0, 10.0
LOG_LINES = 400
LAYERS = 36
SHARED_MEMORY = Path("/dev/shm")
USUAL, TWO_CARDS = "two processes", "two cards"


@dataclass(frozen=True)
class Layout:
    """Where the services run: on one device, or the prefill service on a card of its own."""

    device: str
    prefill_device: str

    @property
    def name(self) -> str:
        return USUAL if self.prefill_device == self.device else TWO_CARDS

    @property
    def prefill(self) -> list[str]:
        """Options of the prefill service: on a card that both share 19 GB for KV (131k tokens), else 61 GB."""
        pages = 8192 if self.name != TWO_CARDS else 26_000
        return ["--device", self.prefill_device, *self._pages(pages)]

    @property
    def decode(self) -> list[str]:
        """Options of the decode service: on a card with weights twice (33 GB) 61 GB for KV (416k tokens), else 94 GB.

        Most of it is for chunks.
        """
        pages = 26_000 if self.name != TWO_CARDS else 40_000
        return ["--device", self.device, *self._pages(pages, "--chunk-page-ratio", "0.75")]

    def _pages(self, pages: int, *more: str) -> list[str]:
        return [] if self.device == "cpu" else ["--kv-pages", str(pages), *more]


@dataclass
class Services:
    """Two running services: addresses, what their ready lines said, their last log lines."""

    prefill: str
    decode: str
    ready: dict[str, dict[str, Any]]
    logs: dict[str, deque[str]] = field(repr=False)
    died: asyncio.Task[str]

    def tails(self, lines: int = 60) -> str:
        """The ends of both logs."""
        return "\n".join(f"--- {name} service\n" + "\n".join(list(log)[-lines:]) for name, log in self.logs.items())

    def scrape(self) -> dict[str, dict[str, float]]:
        """Each service's metrics, by name and labels; buckets and creation times are left out."""
        return {name: _samples(ready["metrics_port"]) for name, ready in self.ready.items()}


def checkpoint(folder: Path, device: str) -> Path:
    """The shipped model on a CPU, else a random one of Qwen3-8B's shape, written to ``folder`` if it is not there."""
    if device == "cpu":
        return MODEL
    model = folder / "model"
    if not (model / "config.json").exists():
        _write_checkpoint(model)
    return model


def _write_checkpoint(model: Path) -> None:
    """In a process of its own, which leaves nothing on the card, and under another name until it is whole."""
    from bench.gpu_start import save_checkpoint

    part = model.with_name(model.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    child = multiprocessing.get_context("spawn").Process(target=save_checkpoint, args=(part, LAYERS))
    child.start()
    child.join(START_S)
    if child.exitcode != 0:
        child.kill()
        raise RuntimeError(f"writing the checkpoint to {part} ended with {child.exitcode}")
    part.rename(model)


def vocabulary_of(model: Path) -> int:
    """Rows of the model's embedding."""
    config = json.loads((model / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


@contextmanager
def fresh_store() -> Iterator[tuple[Path, int]]:
    """A folder for a store and a capacity for it in bytes, in shared memory if there is room; gone at the end."""
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 4 << 30 else None
    with tempfile.TemporaryDirectory(prefix="cairn-bench-", dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder), min(48 << 30, shutil.disk_usage(folder).free // 2)


@asynccontextmanager
async def running(
    shared: list[str], prefill: list[str], decode: list[str], stacks: Path | None = None
) -> AsyncIterator[Services]:
    """Both services with these options, ready. Raises ``ServiceFailed``, after printing the ends of their logs.

    ``stacks`` is where the decode service's are noted, if they are wanted (``bench.stack_samples``).
    """
    logs: dict[str, deque[str]] = {name: deque(maxlen=LOG_LINES) for name in ("prefill", "decode")}
    processes = Processes(lambda name, line: logs[name].append(line))
    first = _command("prefill", [*shared, *prefill])
    second = _command("decode", [*shared, *decode, "--prefill", first.address], stacks)
    died: asyncio.Task[str] | None = None
    try:
        await processes.start([first, second])
        services = Services(
            first.address, second.address, {}, logs, died := asyncio.create_task(processes.first_exit())
        )
        try:
            services.ready.update(await processes.wait_ready(START_S))
            yield services
        except BaseException:
            print(services.tails(), file=sys.stderr, flush=True)
            raise
    finally:
        if died is not None:
            died.cancel()
        await processes.stop(STOP_S)


def _command(name: str, options: list[str], stacks: Path | None = None) -> Command:
    port = free_port("127.0.0.1")
    module = [f"{name}_service"] if stacks is None else ["bench.stack_samples", str(stacks), f"{name}_service"]
    argv = [sys.executable, "-m", *module, "--port", str(port), "--metrics-port", "0", *options]
    return Command(name, tuple(argv), f"127.0.0.1:{port}")


def _samples(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SCRAPE_S) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    found = {}
    for family in families:
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                labels = ",".join(f"{key}={value}" for key, value in sample.labels.items() if key != "model_name")
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found
