"""What ``bench.serving`` says of a run, and what was recorded of vLLM and of us before, on the same card and traces."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.load_generator import Load
from bench.serving_load import Answer

# One H200, Qwen3-8B's shape in bf16. vLLM 0.25.1 through AsyncLLM in process, prefix caching on; "before": ours of
# 2026-11-21, before mixed steps. tokens/s out, time to first token p50 and p99 ms, mean time between tokens ms.
_NAMES = ("tokens_per_s", "ttft_p50", "ttft_p99", "itl_mean")
VLLM = {
    "doc_qa": (1152, 518, 914, 47.3),
    "doc_qa_sampled": (1088, 502, 2307, 47.4),
    "unshared": (3157, 205, 1618, 16.5),
    "agents": (2022, 100, 117, 6.8),
    "rag": (603, 3842, 12646, 60.3),
}
VLLM_BATCH_INVARIANT = {
    "doc_qa": (1006, 494, 750, 54.0),
    "unshared": (1924, 255, 2048, 27.1),
    "agents": (742, 137, 159, 19.4),
}
BEFORE = {
    "doc_qa": (3746, 798, 1002, 9.9),
    "doc_qa_sampled": (69, 3118, 3184, 754),
    "unshared": (3053, 420, 1683, 15.6),
    "agents": (1482, 167, 937, 8.2),
    "rag, exact": (196, 37439, 43113),
    "rag, independent": (2417, 448, 2493),
}
GOALS = {
    "doc_qa": {"tokens_per_s": 5500, "ttft_p50": 250, "ttft_p99": 400},
    "unshared": {"tokens_per_s": 3800, "ttft_p50": 200, "ttft_p99": 1500, "gap_max": 40},
    "agents": {"tokens_per_s": 2500, "ttft_p50": 80, "ttft_p99": 150},
    "rag, independent": {"tokens_per_s": 4000, "ttft_p50": 200, "ttft_p99": 600},
}
GAP_MAX_VLLM = {"unshared": 60}
SAMPLED_SHARE = 0.95  # doc_qa_sampled's goal: of the tokens/s of doc_qa in the same run


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
        "gap_ms": _spread(gaps),
        "itl_mean_ms": round(statistics.fmean(each), 2) if each else 0.0,
        "tokens_a_message": round(tokens / max(1, sum(len(answer.counts) for answer in began)), 2),
        "finished": dict(Counter(answer.finish_reason for answer in ok)),
        "prompt_tokens": sum(answer.prompt_tokens for answer in ok),
        "prompt_tokens_by_source": dict(reused),
        "stages_mean_ms": _stages(ok),
        "generator_busy": round(load.busy, 2),
    }


def compared(run: str, trace: str, found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """``found`` as multiples of what was recorded and asked for: above 1 is better in rates, below 1 in times."""
    flat = {
        "tokens_per_s": found["tokens_per_s"],
        "ttft_p50": found["ttft_ms"]["p50"],
        "ttft_p99": found["ttft_ms"]["p99"],
        "itl_mean": found["itl_mean_ms"],
        "gap_max": found["gap_ms"]["max"],
    }
    recorded: dict[str, dict[str, float]] = {
        "vllm": dict(zip(_NAMES, VLLM[trace], strict=False)),
        "before": dict(zip(_NAMES, BEFORE.get(run, BEFORE.get(trace, ())), strict=False)),
        "goal": dict(GOALS.get(run, GOALS.get(trace, {}) if trace != "rag" else {})),
    }
    if trace in GAP_MAX_VLLM:
        recorded["vllm"]["gap_max"] = GAP_MAX_VLLM[trace]
    return {
        side: {name: round(flat[name] / value, 3) for name, value in values.items()}
        for side, values in recorded.items()
        if values
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
