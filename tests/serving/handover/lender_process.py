"""A lender as a process of its own, that can be killed: told over a pipe what to offer and to lend."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from chunk_store.key import ChunkKey
from chunk_store.layout import KVLayout
from engine.kv.pool import TORCH_DTYPES, PagedKVPool
from engine.kv.resident import ResidentChunks
from serving.errors import Unavailable
from serving.handover.lender import Lender
from serving.handover.lent import Lent, Offer
from serving.handover.metrics import LenderMetrics

PAGE_SIZE = 16
ANSWER_S = 120.0


def random_planes(layout: KVLayout, tokens: int, seed: int, device: str) -> list[Tensor]:
    """The KV of a chunk: any bits, the same for the same seed on the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(la.kv_heads, dim) for la in layout.layers for dim in (la.k_dim, la.v_dim)]
    made = []
    for heads, dim in shapes:
        noise = torch.randint(-(1 << 15), 1 << 15, (tokens, heads, dim), generator=generator, device=device)
        made.append(noise.to(torch.int16).view(TORCH_DTYPES[layout.dtype]))
    return made


def run(pipe: Connection, directory: str, device: str, layout: str, tokens: int, chunks: int) -> None:
    """Lends ``chunks`` chunks of ``tokens`` tokens each, chunk n of seed n; in the process."""
    shape = KVLayout.from_canonical(layout)
    pages = chunks * -(-tokens // PAGE_SIZE)
    pool = PagedKVPool(shape, pages=pages, chunk_pages=pages, page_size=PAGE_SIZE, device=device, share=True)
    residents = ResidentChunks(pool)
    for seed in range(chunks):
        chunk = residents.reserve(ChunkKey(f"chunk {seed}"), tokens)
        planes = random_planes(shape, tokens, seed, device)
        for target, plane in zip(pool.run_planes(chunk.run, tokens), planes, strict=True):
            target.copy_(plane)
        chunk.ready = True
        residents.release(chunk)
    if device != "cpu":
        torch.cuda.synchronize(device)
    posted: list[Any] = []
    metrics = LenderMetrics(CollectorRegistry(), "model")
    lender = Lender(residents, posted.append, metrics, lease_s=30.0, directory=Path(directory))
    lender.start()
    pipe.send("ready")
    while True:
        question, *arguments = pipe.recv()
        if question == "offer":
            pipe.send(lender.offer(*arguments))
        elif question == "lend":
            found = residents.find(ChunkKey(f"chunk {arguments[1]}"))
            assert found is not None
            pipe.send(lender.lend(arguments[0], found))
        elif question == "held":
            lender.settle()
            residents.check_integrity()
            pipe.send(residents.held)
        else:
            lender.stop()
            return


class LenderProcess:
    """Another process that lends."""

    def __init__(self, kind: str, directory: Path, device: str, layout: KVLayout, tokens: int, chunks: int) -> None:
        context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            context.set_forkserver_preload([__name__])
        self._lock = threading.Lock()  # borrowers ask from threads of their own
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, str(directory), device, layout.canonical(), tokens, chunks)
        self.process = context.Process(target=run, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def offer(self, borrower: str) -> Offer:
        try:
            offer: Offer = self._ask("offer", borrower)
        except (OSError, EOFError) as error:
            raise Unavailable("the lender has been killed") from error
        return offer

    def lend(self, borrower: str, chunk: int) -> Lent:
        lent: Lent = self._ask("lend", borrower, chunk)
        return lent

    def held(self) -> int:
        held: int = self._ask("held")
        return held

    def kill(self) -> None:
        self.process.kill()
        self.process.join(ANSWER_S)

    def signal(self, number: signal.Signals) -> None:
        """Sends it; SIGSTOP has stopped every thread when this returns."""
        os.kill(self.process.pid, number)
        deadline = time.monotonic() + ANSWER_S
        while number is signal.SIGSTOP and not self._stopped():
            assert time.monotonic() < deadline, "the lender's process has not stopped"
            time.sleep(0.001)

    def _stopped(self) -> bool:
        """Whether each of its threads is stopped; one that runs on another processor goes on for a moment."""
        stats = [path.read_text() for path in Path(f"/proc/{self.process.pid}/task").glob("*/stat")]
        return all(text.rpartition(")")[2].split()[0] == "T" for text in stats)

    def end(self) -> None:
        with suppress(OSError):  # it has been killed
            self._pipe.send(("end",))
            self.process.join(10)
        self.kill()

    def _ask(self, *question: Any) -> Any:
        with self._lock:
            self._pipe.send(question)
            return self._answer()

    def _answer(self) -> Any:
        assert self._pipe.poll(ANSWER_S), "the lender's process does not answer"
        return self._pipe.recv()


@contextmanager
def lender_process(
    directory: Path, layout: KVLayout, *, tokens: int, chunks: int, device: str = "cpu", kind: str = "forkserver"
) -> Iterator[LenderProcess]:
    made = LenderProcess(kind, directory, device, layout, tokens, chunks)
    try:
        yield made
    finally:
        made.end()
