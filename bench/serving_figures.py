"""What ``bench.serving`` says of a run."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.load_generator import Load
from bench.serving_load import Answer


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def figures(load: Load) -> dict[str, Any]:
    """Rates, times (ms) and counts of a job. Gaps lie between tokens: those of one message have none between them."""
    began = [answer for answer in load.answers if answer.times]
    ok = [answer for answer in load.answers if answer.status == "OK"]
    start = min((answer.asked for answer in load.answers), default=0.0)
    wall = max((answer.times[-1] for answer in began), default=start) - start
    tokens = sum(sum(answer.counts) for answer in began)
    ttft = [(answer.times[0] - answer.asked) * 1e3 for answer in began]
    gaps = [gap for answer in began for gap in _gaps_ms(answer)]
    each = [(answer.times[-1] - answer.times[0]) * 1e3 / (sum(answer.counts) - 1) for answer in began
            if sum(answer.counts) > 1]  # fmt: skip
    later = [(answer.times[0] - answer.asked) * 1e3 for answer in began if answer.turn]
    reused = sum((Counter(answer.reused) for answer in ok), Counter[str]())
    return {
        "requests": len(load.answers),
        "ok": len(ok),
        "errors": dict(Counter(answer.status for answer in load.answers if answer.status != "OK")),
        "details": sorted({answer.detail for answer in load.answers if answer.detail})[:5],
        "wall_s": round(wall, 3),
        "tokens": tokens,
        "tokens_per_s": round(tokens / wall, 1) if wall else 0.0,
        "requests_per_s": round(len(ok) / wall, 3) if wall else 0.0,
        "ttft_ms": _spread(ttft),
        **({"ttft_later_ms": _spread(later)} if later else {}),
        "gap_ms": _spread(gaps),
        "itl_mean_ms": round(statistics.fmean(each), 2) if each else 0.0,
        "tokens_a_message": round(tokens / max(1, sum(len(answer.counts) for answer in began)), 2),
        "finished": dict(Counter(answer.finish_reason for answer in ok)),
        "prompt_tokens": sum(answer.prompt_tokens for answer in ok),
        "prompt_tokens_by_source": dict(reused),
        "stages_mean_ms": _stages(ok),
        "generator_busy": round(load.busy, 2),
    }


def services_between(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What each service's counters grew by; a histogram's as its mean and count."""
    grown: dict[str, Any] = {}
    for service, values in after.items():
        change = {name: value - before[service].get(name, 0.0) for name, value in values.items()}
        ours: dict[str, Any] = {}
        grown[service] = ours
        for name, value in change.items():
            if not value:
                continue
            if "_count" in name and (total := change.get(name.replace("_count", "_sum"))) is not None:
                ours[name.replace("_count", "")] = {"mean": total / value, "count": value}
            elif "_total" in name:
                ours[name] = value
    return grown


def _gaps_ms(answer: Answer) -> list[float]:
    between = [(after - before) * 1e3 for before, after in itertools.pairwise(answer.times)]
    return between + [0.0] * (sum(answer.counts) - len(answer.counts))


def _spread(values: Sequence[float]) -> dict[str, float]:
    named = {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values, default=0.0)}
    return {name: round(value, 2) for name, value in named.items()}


def _stages(answers: Sequence[Answer]) -> dict[str, float]:
    names = {name for answer in answers for name in answer.stages_ms}
    return {
        name: round(statistics.fmean(answer.stages_ms.get(name, 0.0) for answer in answers), 3)
        for name in sorted(names)
    }
