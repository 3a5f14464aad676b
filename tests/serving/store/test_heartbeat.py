"""What a heartbeat's lines bear."""

from __future__ import annotations

import threading

from serving.store.heartbeat import heartbeat
from serving.trace.request_id import current_request_id, set_request_id


def test_the_heartbeat_of_a_request_bears_it() -> None:
    seen: list[str] = []
    beaten = threading.Event()

    def renew() -> None:
        seen.append(current_request_id())
        beaten.set()

    def work() -> None:
        set_request_id("mine")
        with heartbeat(renew, every_s=0.001):
            assert beaten.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert set(seen) == {"mine"}
