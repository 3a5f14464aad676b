"""What ``bench.serving`` says of a run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cairn.load.figures import gaps_ms, spread, stages_mean_ms, token_ms
from cairn.load.processes import Load


def figures(load: Load) -> dict[str, Any]:
    """Rates, times (ms) and counts of a job. Gaps lie between tokens: those of one message have none between them."""
    began = [answer for answer in load.answers if answer.times]
    ok = [answer for answer in load.answers if answer.status == "OK"]
    start = min((answer.asked for answer in load.answers), default=0.0)
    wall = max((answer.times[-1] for answer in began), default=start) - start
    tokens = sum(sum(answer.counts) for answer in began)
    ttft = [(answer.times[0] - answer.asked) * 1e3 for answer in began]
    gaps = [gap for answer in began for gap in gaps_ms(answer)]
    each = [ms for answer in began if (ms := token_ms(answer)) is not None]
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
        "stages_mean_ms": stages_mean_ms(ok),
        "generator_busy": round(max(load.busy), 2),
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


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in spread(values).items() if name in ("p50", "p99", "max")}
