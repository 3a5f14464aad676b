"""The stages of a load to a card alone: reading, verifying, copying, and reading beside copies."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from bench.gpu_load_documents import LAYOUT, MIB, Documents, shared_out, show, timed
from chunk_store.format.header import checksum


def stage_reads(documents: Documents, paths: Sequence[Path], threads: Sequence[int], repeats: int) -> None:
    """Reads all documents, each thread into memory of its own, and verifies or not."""
    files = [os.open(path, os.O_RDONLY) for path in paths]
    start = paths[0].stat().st_size - documents.nbytes_each
    for count in threads:
        for span_mib, block_mib in [(2, 0), (1, 0.25), (2, 2), (8, 2)] if count == max(threads) else [(2, 2)]:
            seconds = _read_all(documents, files, start, count, int(span_mib * MIB), int(block_mib * MIB), repeats)
            what = f"read spans of {span_mib:g} MiB" + (f", verify blocks of {block_mib:g}" if block_mib else "")
            show(f"{what}, {count} threads", documents.nbytes, seconds)
    for fd in files:
        os.close(fd)


def stage_verify(documents: Documents, threads: int, repeats: int) -> None:
    """Hashes the bytes of one document in all threads: with our function, and with one that keeps the others out."""
    memory = pinned(documents, documents.nbytes_each // (4 * MIB) * (4 * MIB)).numpy().data.cast("B")
    ways: list[tuple[str, Callable[[memoryview], int]]] = [("", checksum), (", one call", xxhash.xxh3_64_intdigest)]
    for name, hashed in ways:
        for block_mib in (0.25, 2):
            seconds = _hash_all(memory, int(block_mib * MIB), hashed, threads, repeats)
            show(f"verify blocks of {block_mib:g} MiB{name}, {threads} threads", memory.nbytes, seconds)


def stage_copies(documents: Documents, repeats: int) -> None:
    """Copies pinned memory to the pages, in pieces, on streams that take turns."""
    if documents.device.type != "cuda":
        return
    memory = pinned(documents, documents.nbytes_each)
    planes = [plane.view(-1).view(torch.uint8) for n in range(len(documents.runs)) for plane in documents.planes(n)]
    starts = [sum(LAYOUT.plane_nbytes(documents.tokens)[:n]) for n in range(2 * len(LAYOUT.layers))]
    for streams in (1, 4):
        made = [torch.cuda.Stream() for _ in range(streams)]
        for piece_mib in (2, 8):

            def run(piece: int = piece_mib * MIB, made: list[torch.cuda.Stream] = made) -> None:
                number = 0
                for at, plane in enumerate(planes):
                    source = memory[starts[at % len(starts)] :]
                    for first in range(0, plane.nbytes, piece):
                        last = min(first + piece, plane.nbytes)
                        with torch.cuda.stream(made[number % len(made)]):
                            plane[first:last].copy_(source[first:last], non_blocking=True)
                        number += 1
                torch.cuda.synchronize()

            show(f"copy pieces of {piece_mib} MiB, {streams} streams", documents.nbytes, timed(run, repeats))


def stage_both(documents: Documents, paths: Sequence[Path], threads: int, repeats: int) -> None:
    """Reads and verifies while the bus is kept busy with copies of other memory, in a few calls."""
    if documents.device.type != "cuda":
        return
    memory, target = pinned(documents, documents.nbytes_each), torch.empty(documents.nbytes_each, dtype=torch.uint8)
    target, stop, copied = target.to(documents.device), threading.Event(), [0]
    stream = torch.cuda.Stream()

    def copy() -> None:
        while not stop.is_set():
            with torch.cuda.stream(stream):
                target.copy_(memory, non_blocking=True)
            stream.synchronize()
            copied[0] += memory.nbytes

    thread = threading.Thread(target=copy)
    thread.start()
    files = [os.open(path, os.O_RDONLY) for path in paths]
    start = paths[0].stat().st_size - documents.nbytes_each
    for block_mib in (0, 2):
        before, at = copied[0], time.perf_counter()
        seconds = _read_all(documents, files, start, threads - 1, 2 * MIB, block_mib * MIB, repeats)
        rate = (copied[0] - before) / (time.perf_counter() - at) / 1e9
        what = f"read spans of 2 MiB{', verify' if block_mib else ''}, {threads - 1} threads, beside copies"
        show(f"{what} at {rate:.1f} GB/s", documents.nbytes, seconds)
    stop.set()
    thread.join()
    for fd in files:
        os.close(fd)


def _read_all(
    documents: Documents, files: Sequence[int], start: int, threads: int, span: int, block: int, repeats: int
) -> tuple[float, float]:
    memory = [pinned(documents, span).numpy().data.cast("B") for _ in range(threads)]

    def read(number: int, place: tuple[int, int]) -> None:
        got = os.preadv(place[0], [memory[number]], start + place[1])
        for first in range(0, got if block else 0, block or 1):
            checksum(memory[number][first : min(first + block, got)])

    places = [(fd, at) for fd in files for at in range(0, documents.nbytes_each, span)]
    return timed(lambda: shared_out(places, threads, read), repeats)


def _hash_all(
    memory: memoryview, block: int, hashed: Callable[[memoryview], int], threads: int, repeats: int
) -> tuple[float, float]:
    def work(_: int, at: int) -> None:
        hashed(memory[at : at + block])

    return timed(lambda: shared_out(range(0, memory.nbytes, block), threads, work), repeats)


def pinned(documents: Documents, nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=documents.device.type == "cuda")
