"""Long texts become tokens one at a time, short ones wait for nobody."""

from __future__ import annotations

import asyncio

import pytest

from serving.errors import Overloaded
from serving.tenancy.text_lanes import LONG_CHARACTERS, MANY_SEGMENTS, TextLanes


def test_long_texts_wait_for_each_other_and_short_ones_do_not() -> None:
    async def main() -> None:
        lanes, inside, most = TextLanes(waiting_max=2), 0, 0
        release = asyncio.Event()

        async def one(characters: int) -> None:
            nonlocal inside, most
            async with lanes.lane(characters):
                inside += 1
                most = max(most, inside)
                await release.wait()
                inside -= 1

        long = [asyncio.create_task(one(LONG_CHARACTERS + 1)) for _ in range(3)]
        await asyncio.sleep(0)
        assert inside == 1
        with pytest.raises(Overloaded) as caught:
            await one(LONG_CHARACTERS + 1)
        assert caught.value.retry_after_s
        with pytest.raises(Overloaded):
            async with lanes.lane(1, MANY_SEGMENTS + 1):
                pass
        async with lanes.lane(LONG_CHARACTERS, MANY_SEGMENTS):
            pass
        release.set()
        await asyncio.gather(*long)
        assert most == 1

    asyncio.run(asyncio.wait_for(main(), 30))


def test_waiting_for_the_lane_has_an_end() -> None:
    async def main() -> None:
        lanes = TextLanes(wait_s=0.05)
        async with lanes.lane(LONG_CHARACTERS + 1):
            with pytest.raises(Overloaded, match=r"waited 0\.05 s"):
                async with lanes.lane(LONG_CHARACTERS + 1):
                    pass
        async with lanes.lane(LONG_CHARACTERS + 1):
            pass

    asyncio.run(asyncio.wait_for(main(), 30))
