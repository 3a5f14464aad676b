"""Figures of answers that are known, beside numpy where that has the same."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest

from cairn.load.answer import CUT, OK, Answer
from cairn.load.figures import figures, gaps_ms, meets, percentile, spread, token_ms
from cairn.load.processes import Load


def answered(asked: float, times: list[float], counts: list[int] | None = None, **more) -> Answer:
    made: dict[str, Any] = {"session": 0, "turn": 0, "sent": asked, "status": OK, "prompt_tokens": 10} | more
    return Answer(asked=asked, times=times, counts=counts or [1] * len(times), **made)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 997])
def test_percentiles_are_numpys(count: int) -> None:
    random = Random(count)
    values = [random.expovariate(0.01) for _ in range(count)]
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(np.percentile(values, share * 100))
    found = spread(values)
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-3) and found["max"] == pytest.approx(
        max(values), abs=1e-3
    )
    assert percentile([], 0.5) == 0.0 == spread([])["mean"]


def test_times_of_many_answers_are_numpys() -> None:
    random, answers = Random(5), []
    for number in range(300):
        asked = random.uniform(0, 10)
        times = list(asked + np.cumsum([random.expovariate(20) for _ in range(random.randrange(1, 9))]))
        answers.append(answered(asked, times, turn=number % 2))
    found = figures(Load(answers, 0.0, 20.0))
    first = [(each.times[0] - each.asked) * 1e3 for each in answers]
    gaps = np.concatenate([np.diff(each.times) * 1e3 for each in answers])
    each = [(one.times[-1] - one.times[0]) * 1e3 / (len(one.times) - 1) for one in answers if len(one.times) > 1]
    whole = [(one.times[-1] - one.asked) * 1e3 for one in answers]
    for name, values in (("ttft_ms", first), ("gap_ms", gaps), ("tpot_ms", each), ("e2e_ms", whole)):
        for at, key in ((50, "p50"), (90, "p90"), (99, "p99")):
            assert found[name][key] == pytest.approx(np.percentile(values, at), abs=1e-3)
        assert found[name]["mean"] == pytest.approx(np.mean(values), abs=1e-3)
    later = [ms for ms, one in zip(first, answers, strict=True) if one.turn]
    assert found["ttft_later_ms"]["p99"] == pytest.approx(np.percentile(later, 99), abs=1e-3)
    tokens = sum(len(one.times) for one in answers)
    assert found["tokens"] == tokens and found["tokens_per_s"] == pytest.approx(tokens / 20, abs=1e-3)
    assert found["requests_per_s"] == 15.0 and found["prompt_tokens_per_s"] == 150.0


def test_rates_are_of_the_window_and_what_came_later_is_told_beside() -> None:
    load = Load([answered(0.0, [1.0, 2.0, 3.0]), answered(2.0, [3.0, 5.0])], 0.0, 5.0)
    found = figures(load, window_s=4.0)
    assert (found["seconds"], found["window_s"], found["tokens"]) == (5.0, 4.0, 5)
    assert found["tokens_per_s"] == 1.0 and found["requests_per_s"] == 0.25
    assert figures(load, window_s=60.0)["tokens_per_s"] == 1.0 and figures(Load([]))["tokens_per_s"] == 0.0


def test_errors_are_counted_by_kind_with_what_they_said() -> None:
    refused = [
        answered(0.0, [], status="RESOURCE_EXHAUSTED", detail=f"full {n}", retry_after_s=1.0 + n) for n in range(9)
    ]
    load = Load([*refused, answered(0.0, [1.0], status=CUT), answered(0.0, [1.0, 2.0])], 0.0, 2.0)
    found = figures(load)
    assert found["errors"] == {"RESOURCE_EXHAUSTED": 9, CUT: 1} and (found["requests"], found["ok"]) == (11, 1)
    assert found["details"] == {"RESOURCE_EXHAUSTED": [f"full {n}" for n in range(5)]}
    assert found["retry_after_s"]["count"] == 9 and found["retry_after_s"]["p50"] == 5.0
    assert found["tokens"] == 3 and found["prompt_tokens"] == 10


def test_tokens_of_one_message_have_no_gap_and_the_servers_count_is_the_count() -> None:
    bundled = answered(0.0, [1.0, 3.0], [1, 4])
    assert gaps_ms(bundled) == [2000.0, 0.0, 0.0, 0.0] and token_ms(bundled) == 500.0
    counted = answered(0.0, [1.0, 3.0], tokens=5)  # of HTTP: two events, five tokens
    assert token_ms(counted) == 500.0 and figures(Load([counted], 0.0, 2.0))["tokens_per_s"] == 1.25
    assert token_ms(answered(0.0, [1.0])) is None
    found = figures(Load([bundled, counted], 0.0, 3.0))
    assert found["tokens"] == 10 and found["tokens_a_message"] == 2.5


def test_goodput_counts_those_within_every_bound() -> None:
    quick, slow, broken = (
        answered(0.0, [0.1, 0.2, 0.3]),
        answered(0.0, [0.1, 0.9, 1.0]),
        answered(0.0, [], status="UNKNOWN"),
    )
    assert meets(quick, {"ttft": 100.001, "tpot": 101, "gap": 101, "e2e": 300.001})
    assert not meets(quick, {"ttft": 99}) and not meets(quick, {"e2e": 299})
    assert meets(slow, {"tpot": 451}) and not meets(slow, {"tpot": 449}) and not meets(slow, {"gap": 700})
    found = figures(Load([quick, slow, broken], 0.0, 2.0), goodput={"gap": 150.0})
    assert found["goodput"] == {
        "bounds_ms": {"gap": 150.0},
        "requests_per_s": 0.5,
        "share": pytest.approx(1 / 3, abs=1e-4),
    }
    assert "goodput" not in figures(Load([quick]))


def test_the_generators_own_share_and_lateness() -> None:
    late = [answered(float(n), [n + 0.5], sent=n + 0.01 * n) for n in range(1, 11)]
    own = figures(Load(late, 0.0, 10.0, (0.25, 0.5)))["generator"]
    assert (own["processes"], own["busiest"], own["processors"]) == (2, 0.5, 0.75)
    assert own["late_ms"]["max"] == pytest.approx(100.0)


def test_sources_and_stages_are_added_up() -> None:
    one = answered(0.0, [1.0], reused={"device": 4, "computed": 6}, stages_ms={"queue": 1.0})
    two = answered(0.0, [1.0], reused={"store": 8, "computed": 2})
    found = figures(Load([one, two], 0.0, 1.0))
    assert found["prompt_tokens_by_source"] == {"device": 4, "computed": 8, "store": 8}
    assert found["stages_mean_ms"] == {"queue": 0.5}
