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
from cairn.local.processes import Command, Place, Processes, free_port
from cairn.local.services import TOGETHER

START_S, STOP_S, SCRAPE_S = 400.0, 30.0, 10.0
LOG_LINES = 400
LAYERS = 36
SHARED_MEMORY = Path("/dev/shm")
USUAL, ONE_PROCESS, TWO_CARDS = "two processes", "one process", "two cards"
PAGES = {  # of KV on a card, for prefill and for decode: 2.4 MB each, beside 16 GB of weights a process
    USUAL: (8192, 26_000),  # 19 GB, contexts of 32k with room to spare, and 61 GB: 416k tokens, most of them for chunks
    ONE_PROCESS: (10_000, 30_000),  # one pool of both together, 94 GB
    TWO_CARDS: (26_000, 40_000),
}


@dataclass(frozen=True)
class Layout:
    """Where the services run: on one device in two processes or in one, or the prefill service on a card of its own."""

    device: str
    prefill_device: str
    together: bool = False

    @property
    def name(self) -> str:
        apart = USUAL if self.prefill_device == self.device else TWO_CARDS
        return ONE_PROCESS if self.together else apart

    @property
    def prefill(self) -> list[str]:
        """Options of the prefill service."""
        return ["--device", self.prefill_device, *self._pages(0)]

    @property
    def decode(self) -> list[str]:
        """Options of the decode service: most of its KV is for chunks."""
        return ["--device", self.device, *self._pages(1, "--chunk-page-ratio", "0.75")]

    def _pages(self, service: int, *more: str) -> list[str]:
        return [] if self.device == "cpu" else ["--kv-pages", str(PAGES[self.name][service]), *more]


@dataclass
class Services:
    """Two running services: addresses, what their ready lines said, their last log lines."""

    prefill: str
    decode: str
    ready: dict[str, dict[str, Any]]
    logs: dict[str, deque[str]] = field(repr=False)
    died: asyncio.Task[str]

    def tails(self, lines: int = 60) -> str:
        """The ends of the logs."""
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
    shared: list[str], prefill: list[str], decode: list[str], stacks: Path | None = None, *, together: bool = False
) -> AsyncIterator[Services]:
    """Both services with these options, ready. Raises ``ServiceFailed``, after printing the ends of their logs.

    ``stacks`` is where the decode service's are noted, if they are wanted (``bench.stack_samples``); ``together`` both
    are one process.
    """
    logs: dict[str, deque[str]] = {}
    processes = Processes(lambda name, line: logs.setdefault(name, deque(maxlen=LOG_LINES)).append(line))
    places = {name: f"127.0.0.1:{free_port('127.0.0.1')}" for name in ("prefill", "decode")}
    told = {
        "prefill": [*_listening(places["prefill"]), *shared, *prefill],
        "decode": [*_listening(places["decode"]), *shared, *decode, "--prefill", places["prefill"]],
    }
    commands = _in_one_process(told, places, stacks) if together else _in_two_processes(told, places, stacks)
    died: asyncio.Task[str] | None = None
    try:
        await processes.start(commands)
        died = asyncio.create_task(processes.first_exit())
        services = Services(places["prefill"], places["decode"], {}, logs, died)
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


def _listening(place: str) -> list[str]:
    return ["--port", place.rpartition(":")[2], "--metrics-port", str(free_port("127.0.0.1"))]


def _in_two_processes(told: dict[str, list[str]], places: dict[str, str], stacks: Path | None) -> list[Command]:
    watched = {"decode": stacks}
    return [
        Command(name, (*_python(f"{name}_service", watched.get(name)), *words), places[name])
        for name, words in told.items()
    ]


def _in_one_process(told: dict[str, list[str]], places: dict[str, str], stacks: Path | None) -> list[Command]:
    words = [*told["prefill"], "--", *told["decode"]]
    serves = tuple(Place(name, place) for name, place in places.items())
    return [Command("cairn", (*_python(TOGETHER, stacks), *words), serves=serves)]


def _python(module: str, stacks: Path | None) -> list[str]:
    return [sys.executable, "-m", *([module] if stacks is None else ["bench.stack_samples", str(stacks), module])]


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
