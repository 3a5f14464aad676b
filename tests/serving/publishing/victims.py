"""Processes that publish and are killed, one after another on one store; run as a program, because it forks.

    python -m tests.serving.publishing.victims ROOT KILLS SEED

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
from pathlib import Path

import torch

from chunk_store.store import Busy
from tests.serving.publishing.queue_for_tests import NBYTES, WAIT_S, Queue

NAMES = 40  # chunks that each victim tries to publish
KILL_AFTER_S = 0.06  # at most


def publish(root: Path, first: int, begun: int) -> None:
    """Publishes until it is killed, or ends in order when it was not."""
    queue = Queue(root)
    os.write(begun, b".")
    for name in range(first, first + NAMES):
        queue.publisher.reserve(NBYTES, time.monotonic() + WAIT_S, lambda: False).give_back()
        while queue.publisher.room.taken >= 3 * NBYTES:
            time.sleep(0.0005)
        queue.publish(name)
        if len(queue.residents) > 3:
            queue.device.submit(queue.residents.evict, queue.header(name - 3).key).result(WAIT_S)
    queue.close()


def look(root: Path, first: int) -> None:
    """Raises ``AssertionError`` for an entry that is not what it says, or a claim of the dead that still holds."""
    queue = Queue(root)
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


def main(root: Path, kills: int, seed: int) -> int:
    chance = random.Random(seed)
    torch.set_num_threads(1)  # no threads of its own before a fork
    for number in range(kills):
        first = 1 + number * NAMES
        begun, begin = os.pipe()
        victim = forked(lambda first=first, begin=begin: publish(root, first, begin))  # type: ignore[misc]
        os.close(begin)
        os.read(begun, 1)
        os.close(begun)
        time.sleep(chance.uniform(0, KILL_AFTER_S))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        _, status = os.waitpid(forked(lambda first=first: look(root, first)), 0)  # type: ignore[misc]
        if status:
            print(f"after kill {number} of {kills}, seed {seed}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
