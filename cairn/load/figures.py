"""What a job's answers come to: rates, times, counts. Plain Python, so that a load generator needs no numpy."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cairn.load.answer import OK, Answer
from cairn.load.processes import Load

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
BOUNDS = ("ttft", "tpot", "gap", "e2e")  # what goodput may ask of a request, ms
DETAILS = 5


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0..1) of them do not exceed, interpolated between neighbours; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum."""
    found = {"mean": statistics.fmean(values) if values else 0.0}
    found |= {name: percentile(values, share) for name, share in SHARES.items()}
    return {name: round(value, 3) for name, value in (found | {"max": max(values, default=0.0)}).items()}


def figures(load: Load, window_s: float | None = None, goodput: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Rates, times (ms) and counts of a job.

    Rates are over the job's first ``window_s``, if that is given and it ran for longer: what ends a job, the last
    requests alone, is not its rate. ``goodput``: upper bounds (ms) by the names of ``BOUNDS``.
    """
    ok = [answer for answer in load.answers if answer.status == OK]
    heard = [answer for answer in load.answers if answer.times]
    seconds = load.seconds if window_s is None else min(window_s, load.seconds)
    until = load.began + seconds
    within = [answer for answer in ok if answer.times and answer.times[-1] <= until]
    tokens = sum(_tokens_until(answer, until) for answer in heard)
    reused = sum((Counter(answer.reused) for answer in ok), Counter[str]())
    return {
        "requests": len(load.answers),
        "ok": len(ok),
        "errors": dict(Counter(answer.status for answer in load.answers if answer.status != OK)),
        "details": _details(load.answers),
        "retry_after_s": _hints(load.answers),
        "seconds": round(load.seconds, 3),
        "window_s": round(seconds, 3),
        "tokens": sum(answer.generated for answer in heard),
        "tokens_per_s": _rate(tokens, seconds),
        "requests_per_s": _rate(len(within), seconds),
        "prompt_tokens_per_s": _rate(sum(answer.prompt_tokens for answer in within), seconds),
        **_times(heard, ok),
        **({} if goodput is None else {"goodput": _goodput(within, len(load.answers), seconds, goodput)}),
        "tokens_a_message": round(sum(map(_generated, heard)) / max(1, sum(len(each.times) for each in heard)), 2),
        "finished": dict(Counter(answer.finish_reason for answer in ok)),
        "prompt_tokens": sum(answer.prompt_tokens for answer in ok),
        "prompt_tokens_by_source": dict(reused),
        "stages_mean_ms": stages_mean_ms(ok),
        "generator": _generator(load),
    }


def meets(answer: Answer, bounds: Mapping[str, float]) -> bool:
    """Whether a request was answered within all bounds (ms)."""
    measured = {
        "ttft": (answer.times[0] - answer.asked) * 1e3 if answer.times else math.inf,
        "tpot": token_ms(answer) or 0.0,
        "gap": max(gaps_ms(answer), default=0.0),
        "e2e": (answer.times[-1] - answer.asked) * 1e3 if answer.times else math.inf,
    }
    return answer.status == OK and all(measured[name] <= most for name, most in bounds.items())


def gaps_ms(answer: Answer) -> list[float]:
    """Between an answer's tokens, ms: those that came together have none between them."""
    between = [(after - before) * 1e3 for before, after in itertools.pairwise(answer.times)]
    return between + [0.0] * (sum(answer.counts) - len(answer.counts))


def token_ms(answer: Answer) -> float | None:
    """From the first to the last token, by each token behind the first; None of fewer than two."""
    if not answer.times or answer.generated < 2:
        return None
    return (answer.times[-1] - answer.times[0]) * 1e3 / (answer.generated - 1)


def _times(heard: Sequence[Answer], ok: Sequence[Answer]) -> dict[str, Any]:
    """By request: to the first token, of which that of later turns, a token, in all; and between tokens."""
    first = [(answer.times[0] - answer.asked) * 1e3 for answer in heard]
    later = [(answer.times[0] - answer.asked) * 1e3 for answer in heard if answer.turn]
    each = [ms for answer in heard if (ms := token_ms(answer)) is not None]
    return {
        "ttft_ms": spread(first),
        **({"ttft_later_ms": spread(later)} if later else {}),
        "gap_ms": spread([gap for answer in heard for gap in gaps_ms(answer)]),
        "tpot_ms": spread(each),
        "e2e_ms": spread([(answer.times[-1] - answer.asked) * 1e3 for answer in ok if answer.times]),
    }


def _goodput(within: Sequence[Answer], asked: int, seconds: float, bounds: Mapping[str, float]) -> dict[str, Any]:
    good = sum(meets(answer, bounds) for answer in within)
    return {
        "bounds_ms": dict(bounds),
        "requests_per_s": _rate(good, seconds),
        "share": round(good / asked, 4) if asked else 0.0,
    }


def _generator(load: Load) -> dict[str, Any]:
    """What the load generator itself took and how late it was: if that is much, the rest is about it."""
    late = [max(0.0, answer.sent - answer.asked) * 1e3 for answer in load.answers if answer.sent]
    return {
        "processes": len(load.busy),
        "busiest": round(max(load.busy, default=0.0), 3),
        "processors": round(sum(load.busy), 3),
        "late_ms": spread(late),
    }


def _details(answers: Sequence[Answer]) -> dict[str, list[str]]:
    """What was said of each kind of error, a few of each."""
    said: dict[str, dict[str, None]] = {}
    for answer in answers:
        if answer.status != OK and answer.detail:
            said.setdefault(answer.status, {})[answer.detail] = None
    return {status: list(details)[:DETAILS] for status, details in said.items()}


def _hints(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of those who were turned away: how many were told when to come again, and when."""
    hints = [answer.retry_after_s for answer in answers if answer.retry_after_s is not None]
    return {"count": len(hints), **(spread(hints) if hints else {})}


def _tokens_until(answer: Answer, until: float) -> float:
    """Tokens that had come by then; those the server counts and no message brought are spread over all of them."""
    came = sum(count for at, count in zip(answer.times, answer.counts, strict=True) if at <= until)
    return came * answer.generated / max(1, sum(answer.counts))


def _generated(answer: Answer) -> int:
    return answer.generated


def _rate(count: float, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


def stages_mean_ms(answers: Sequence[Answer]) -> dict[str, float]:
    """What the service says each stage of a request took, on average."""
    names = {name for answer in answers for name in answer.stages_ms}
    return {
        name: round(statistics.fmean(answer.stages_ms.get(name, 0.0) for answer in answers), 3)
        for name in sorted(names)
    }
