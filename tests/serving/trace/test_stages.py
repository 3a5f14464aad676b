"""One list of stages; both kinds of watch tell the same of the same request."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import pytest

from cairn.client.reports import Timings
from serving.trace.stages import STAGES, StageClock, StageTimer


def test_the_client_has_the_same_stages() -> None:
    assert tuple(part.name.removesuffix("_s") for part in fields(Timings)) == STAGES


def test_a_timer_adds_up_blocks_and_what_was_measured_elsewhere() -> None:
    timer = StageTimer()
    with timer.stage("load"), timer.stage("publish"):
        pass
    timer.add("load", 1000)
    with pytest.raises(RuntimeError), timer.stage("prefill"):
        raise RuntimeError("it fails")
    spent = timer.spent_ns()
    assert spent["total"] >= spent["load"] > 1000 and {"publish", "prefill"} <= spent.keys()
    with pytest.raises(ValueError, match="lunch"), timer.stage(cast(Any, "lunch")):
        pass


def test_a_clock_tells_stages_between_what_a_request_passed() -> None:
    clock = StageClock(arrived=100, submitted=110, admitted=130, filled=160, first_token=200, finished=300)
    clock.measured_ns["lookup"] = 5
    assert clock.spent_ns() == {
        **{"lookup": 5, "queue": 20, "forward": 40, "first_token": 100, "decode": 100, "total": 200}
    }


def test_a_stage_that_was_not_ended_took_no_time() -> None:
    waiting = StageClock(arrived=100, submitted=110).spent_ns()
    assert not any(waiting.values())
    aborted = StageClock(arrived=100, submitted=110, admitted=130, finished=180).spent_ns()
    assert {stage: spent for stage, spent in aborted.items() if spent} == {"queue": 20, "total": 80}
    filled = StageClock(arrived=100, submitted=110, admitted=130, filled=140, finished=180).spent_ns()
    assert filled["forward"] == 40 and filled["decode"] == filled["first_token"] == 0
