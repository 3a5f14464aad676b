"""Processes that publish and are killed, one after another on one store; run as a program, because it forks.

    python -m tests.serving.publishing.victims STORE_URL KILLS SEED

After each kill another process looks at the store: each entry that can be read is whole and has its own bytes, and what
the dead had claimed can be claimed at once. Exits with 1 and says what was wrong.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch

from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.store import Busy
from tests.serving.publishing.queue_for_tests import WAIT_S, Queue

LAYOUT = KVLayout("float32", (LayerLayout(4, 32, 32),) * 8)
TOKENS = 64  # half a MiB: many a kill falls into a write
NAMES = 10  # chunks that each victim tries to publish
STORED_MAX, KILL_AFTER_S = 4, 0.03  # a victim is killed at most so long after so many entries


def publish(url: str, first: int, begun: int) -> None:
    """Publishes until it is killed, and writes a byte for each entry that is stored."""
    queue = Queue(url, layout=LAYOUT, tokens=TOKENS)
    for name in range(first, first + NAMES):
        queue.publisher.reserve(queue.nbytes, time.monotonic() + WAIT_S, lambda: False).give_back()
        while queue.publisher.room.taken >= 3 * queue.nbytes:
            time.sleep(0.0005)
        queue.publish(name).add_done_callback(lambda _: os.write(begun, b"."))
        if len(queue.residents) > 3:
            queue.device.submit(queue.residents.evict, queue.header(name - 3).key).result(WAIT_S)
    queue.close()


def look(url: str, first: int) -> None:
    """Raises ``AssertionError`` for an entry that is not what it says, or a claim of the dead that still holds."""
    queue = Queue(url, layout=LAYOUT, tokens=TOKENS)
    for name in range(first, first + NAMES):
        header = queue.header(name)
        if queue.store.lookup([header.key]) != [None]:
            assert queue.stored(name) == [float(name)], f"{name} was read as {queue.stored(name)}"
            continue
        assert queue.stored(name) is None
        assert not isinstance(queue.store.begin(header.key), Busy), f"{name} is claimed by a dead process"
    queue.store.sweep()
    queue.close()


def forked(run: Callable[[], None]) -> int:
    """A process that runs ``run`` and ends with 0, or with 1 and a traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(url: str, kills: int, seed: int) -> int:
    chance = random.Random(seed)
    torch.set_num_threads(1)  # no threads of its own before a fork
    for number in range(kills):
        first = 1 + number * NAMES
        begun, begin = os.pipe()
        victim = forked(lambda first=first, begin=begin: publish(url, first, begin))  # type: ignore[misc]
        os.close(begin)
        for _ in range(chance.randint(0, STORED_MAX)):
            os.read(begun, 1)
        time.sleep(chance.uniform(0, KILL_AFTER_S))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        os.close(begun)
        _, status = os.waitpid(forked(lambda first=first: look(url, first)), 0)  # type: ignore[misc]
        if status:
            print(f"after kill {number} of {kills}, seed {seed}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
