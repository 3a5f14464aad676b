"""What bounds loads from a store of memory files: checksums, reads and copies by number of threads, GB/s.

python -m bench.gpu_reads
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import time
from collections.abc import Callable

import torch
import xxhash

BLOCK = 256 * 1024
EACH = 600 * 2**20


def rate(run: Callable[[int], None], threads: int) -> float:
    started = time.perf_counter()
    jobs = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    return EACH * threads / (time.perf_counter() - started) / 1e9


def main() -> None:
    most = 16
    pinned = torch.empty(most * EACH, dtype=torch.uint8, pin_memory=True)
    view = memoryview(pinned.numpy().data).cast("B")
    library = ctypes.CDLL(__import__("xxhash._xxhash", fromlist=["x"]).__file__)
    library.XXH3_64bits.restype = ctypes.c_uint64
    library.XXH3_64bits.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    base = pinned.data_ptr()
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(os.urandom(BLOCK) * (EACH // BLOCK))
        file.flush()
        fd = file.fileno()

        def read(i: int, step: int) -> None:
            for at in range(0, EACH, step):
                os.preadv(fd, [view[i * EACH + at : i * EACH + at + step]], at)

        def digest(i: int) -> None:
            for at in range(i * EACH, (i + 1) * EACH, BLOCK):
                xxhash.xxh3_64_intdigest(view[at : at + BLOCK])

        def digest_object(i: int) -> None:
            for at in range(i * EACH, (i + 1) * EACH, BLOCK):
                xxhash.xxh3_64(view[at : at + BLOCK]).intdigest()

        def digest_free(i: int) -> None:
            for at in range(i * EACH, (i + 1) * EACH, BLOCK):
                library.XXH3_64bits(base + at, BLOCK)

        def verified(i: int, step: int) -> None:
            for at in range(0, EACH, step):
                os.preadv(fd, [view[i * EACH + at : i * EACH + at + step]], at)
                for block in range(i * EACH + at, i * EACH + at + step, BLOCK):
                    xxhash.xxh3_64_intdigest(view[block : block + BLOCK])

        runs: dict[str, Callable[[int], None]] = {
            "preadv 1 MiB": lambda i: read(i, 1 << 20),
            "preadv 4 MiB": lambda i: read(i, 1 << 22),
            "both, 256 KiB": lambda i: verified(i, 1 << 18),
            "both, 512 KiB": lambda i: verified(i, 1 << 19),
            "both, 1 MiB": lambda i: verified(i, 1 << 20),
            "xxhash function": digest,
            "xxhash object": digest_object,
            "xxhash by ctypes": digest_free,
        }
        for name, run in runs.items():
            run(0)
            print(f"{name:18}", *(f"{n}: {rate(run, n):6.1f}" for n in (1, 4, 8, 16)), flush=True)


if __name__ == "__main__":
    main()
