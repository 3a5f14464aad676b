"""What GetLoads tells, and whom."""

from __future__ import annotations

from protos import decode_pb2
from tests.decode_service.api.desk import TOKENS, Call, Desk


def test_loads_of_everybody_are_for_who_may_see_all(desk: Desk) -> None:
    async def body() -> None:
        desk.service.resolver.served.refusals = {
            mode: "positions are learned" if mode == "anchored" else ""
            for mode in desk.service.resolver.served.refusals
        }
        mine = await desk.service.GetLoads(decode_pb2.GetLoadsRequest(), Call("ann"))
        assert (mine.running, mine.waiting, mine.pages_total, mine.pages_free, mine.chunks_resident) == (1, 2, 8, 0, 0)
        assert (mine.steps, mine.step_bytes_read, mine.step_bytes_flat) == (0, 0, 0)
        everybodys = await desk.service.GetLoads(decode_pb2.GetLoadsRequest(), Call("boss"))
        assert (everybodys.running, everybodys.waiting, everybodys.pages_free) == (2, 5, 6)
        assert (everybodys.steps, everybodys.step_bytes_read, everybodys.step_bytes_flat) == (3, 40, 50)
        assert (everybodys.waiting_max, everybodys.batch_max, everybodys.page_size) == (7, 3, 4)
        modes = {mode.mode: (mode.supported, mode.reason, mode.context_length_max) for mode in everybodys.modes}
        assert sorted(modes.values()) == [(False, "positions are learned", 0), (True, "", 64), (True, "", 64)]

    desk.run(body, tokens=TOKENS)
