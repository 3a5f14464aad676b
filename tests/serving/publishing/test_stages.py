"""Each stage of an entry's way into the store: whatever fails there, the entry ends and gives back what it held."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.publishing.stages import Stages
from tests.serving.publishing.queue_for_tests import NBYTES, WAIT_S, Queue


def test_a_device_that_fails_is_told_to_who_waits_for_the_rows(tmp_path: Path) -> None:
    queue = Queue(tmp_path, staged=2)

    class Failed:
        def synchronize(self) -> None:
            raise RuntimeError("device-side assert")

    wait = Stages._wait

    def fail(self: Stages, item: object) -> None:
        item.launched = Failed()  # type: ignore[attr-defined]
        wait(self, item)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stages, "_wait", fail)
        future = queue.publish(1)
        with pytest.raises(RuntimeError, match="device-side"):
            future.computed.result(WAIT_S)
        assert isinstance(future.exception(WAIT_S), RuntimeError)
    queue.idle()
    queue.close()


def test_what_fails_before_it_is_written_gives_back_all_it_held(tmp_path: Path) -> None:
    """Its claim, its room; nobody waits for its rows any more. A second end changes nothing."""
    queue = Queue(tmp_path, room=1)
    first = queue.publish(1, gated=True)
    asked = queue.publisher.ask_behind(NBYTES)
    assert asked is not None
    behind = queue.publish(2, asked=asked)
    item = queue.publisher._items[queue.header(2).key]
    queue.publisher.stages.fail(item, RuntimeError("why"))
    queue.publisher.stages.fail(item, RuntimeError("again"))
    assert str(behind.exception(WAIT_S)) == "why" and queue.publisher.room.waiting == 0
    queue.claim(2).abort()
    queue.device.submit(queue.publisher.stages.begin, item).result(WAIT_S)
    queue.gate.open.set()
    assert first.result(WAIT_S)
    queue.idle()
    queue.close()


def test_once_given_up_nothing_comes_to_its_next_stage(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.publisher.stages.give_up()
    assert queue.publish(1).exception(WAIT_S) is not None and queue.stored(1) is None
    queue.claim(1).abort()
    queue.idle()
    queue.close()
