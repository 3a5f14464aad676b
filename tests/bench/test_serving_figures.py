"""What a run's figures are made of."""

from __future__ import annotations

from typing import Any

import pytest

from bench.serving import arrivals_of
from bench.serving_figures import figures, services_between
from bench.serving_records import compared
from bench.traces import TRACES
from cairn.load.answer import CUT, Answer
from cairn.load.processes import Load

pytestmark = pytest.mark.unit


def answer(asked: float, times: list[float], counts: list[int], status: str = "OK", **other: Any) -> Answer:
    return Answer(0, 0, asked, asked, status, times=times, counts=counts, **other)


def test_rates_times_and_errors() -> None:
    load = Load(
        [
            answer(10.0, [10.5, 10.6, 10.9], [1, 1, 1], prompt_tokens=9, reused={"device": 7, "computed": 2}),
            answer(10.5, [11.0, 12.0], [1, 3], prompt_tokens=4, reused={"computed": 4}, stages_ms={"queue": 3.0}),
            answer(11.0, [], [], "RESOURCE_EXHAUSTED", detail="full"),
            answer(11.0, [11.1], [1], CUT),
        ],
        busy=(0.5,),
    )
    found = figures(load)
    assert (found["requests"], found["ok"], found["errors"]) == (4, 2, {"RESOURCE_EXHAUSTED": 1, CUT: 1})
    assert (found["wall_s"], found["tokens"], found["tokens_per_s"]) == (2.0, 8, 4.0)
    assert found["ttft_ms"] == {"p50": 500.0, "p99": 500.0, "max": 500.0}
    assert found["gap_ms"] == {"p50": 100.0, "p99": 972.0, "max": 1000.0}  # 0, 0, 100, 300 and 1000
    assert found["itl_mean_ms"] == pytest.approx((200 + 1000 / 3) / 2, abs=0.01)
    assert found["prompt_tokens_by_source"] == {"device": 7, "computed": 6} and found["prompt_tokens"] == 13
    assert found["details"] == ["full"] and found["stages_mean_ms"] == {"queue": 1.5}


def test_the_first_turn_of_a_conversation_is_told_from_the_later_ones() -> None:
    first, second, third = answer(0.0, [5.0], [1]), answer(6.0, [6.1], [1]), answer(7.0, [7.3], [1])
    second.turn, third.turn = 1, 2
    found = figures(Load([first, second, third], busy=(0.0,)))
    assert found["ttft_ms"]["max"] == 5000.0 and found["ttft_later_ms"]["max"] == 300.0
    assert "ttft_later_ms" not in figures(Load([first], busy=(0.0,)))
    beside = compared("agents, history kept", "agents", found)
    assert beside["goal"]["ttft_later_p50"] == pytest.approx(found["ttft_later_ms"]["p50"] / 40)


def test_a_run_without_an_answer_has_figures() -> None:
    found = figures(Load([answer(1.0, [], [], "UNAVAILABLE", detail="gone")], busy=(0.0,)))
    assert (found["tokens_per_s"], found["ttft_ms"]["max"], found["errors"]) == (0.0, 0.0, {"UNAVAILABLE": 1})


def test_a_run_stands_beside_what_was_recorded() -> None:
    found = figures(Load([answer(0.0, [0.1, 0.2], [1, 1])], busy=(0.0,)))
    beside = compared("unshared", "unshared", {**found, "tokens_per_s": 3800.0})
    assert beside["goal"] == {"tokens_per_s": 1.0, "ttft_p50": 0.5, "ttft_p99": pytest.approx(0.067), "gap_max": 2.5}
    assert beside["vllm"]["tokens_per_s"] == pytest.approx(3800 / 3157, abs=1e-3)
    for run, goal in (("independent", 4000), ("exact", 750), ("exact, canonical order", 900)):
        beside = compared(f"rag, {run}", "rag", {**found, "tokens_per_s": goal})
        assert beside["goal"]["tokens_per_s"] == 1.0 and beside["vllm"]["tokens_per_s"] == round(goal / 603, 3)
    apart = compared("rag, exact", "rag", {**found, "tokens_per_s": 800.0}, two_cards=True)
    assert apart["goal"] == {"tokens_per_s": 1.0, "gap_p99": pytest.approx(100 / 15, abs=1e-3)}
    assert compared("rag, anchored", "rag", found).keys() == {"vllm"}
    assert compared("cold", "cold", found) == {"vllm": {"ttft_p50": 0.455}, "goal": {"ttft_p50": 0.417}}
    assert compared("agents, history as chunks", "agents", found)["before"]["ttft_p50"] == pytest.approx(0.599)


def test_arrivals_come_at_the_rate_that_was_asked_for() -> None:
    for name in ("unshared", "agents"):
        trace = TRACES[name](1.0)
        arrivals = arrivals_of(trace, 10.0)
        requests = sum(len(session) for session in trace.sessions[trace.warm_up :])
        assert len(arrivals) == len(trace.sessions) - trace.warm_up and list(arrivals) == sorted(arrivals)
        assert 0.6 < requests / arrivals[-1] / 10.0 < 1.6
        assert arrivals == arrivals_of(trace, 10.0) != arrivals_of(trace, 11.0)


def test_metrics_of_a_run_are_what_grew() -> None:
    before = {
        "decode": {"steps_total": 5.0, "batch_sum{}": 10.0, "batch_count{}": 2.0, "running": 3.0, "idle_total": 1.0}
    }
    after = {
        "decode": {"steps_total": 9.0, "batch_sum{}": 40.0, "batch_count{}": 7.0, "running": 8.0, "idle_total": 1.0}
    }
    assert services_between(before, after) == {"decode": {"steps_total": 4.0, "batch{}": {"mean": 6.0, "count": 5.0}}}
