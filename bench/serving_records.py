"""What ``bench.serving`` stands beside: recorded of vLLM and of us before on the same card and traces, and asked for.

One H200, Qwen3-8B's shape in bf16. vLLM 0.25.1 through AsyncLLM in process, prefix caching on. "before": ours of
2026-11-21, before mixed steps. tokens_per_s out; the rest in ms: time to first token (``ttft_later``: of turn 2 and
later of conversations), gaps between tokens, mean of each answer's mean gap.
"""

from __future__ import annotations

from typing import Any

Record = dict[str, float]


def _record(*values: float) -> Record:
    return dict(zip(("tokens_per_s", "ttft_p50", "ttft_p99", "itl_mean"), values, strict=False))


VLLM: dict[str, Record] = {
    "doc_qa": _record(1152, 518, 914, 47.3),
    "doc_qa_sampled": _record(1088, 502, 2307, 47.4),
    "unshared": {**_record(3157, 205, 1618, 16.5), "gap_max": 60},
    "agents": {**_record(2022, 100, 117, 6.8), "ttft_later_p50": 100},
    "rag": _record(603, 3842, 12646, 60.3),
    "cold": {"ttft_p50": 220},
}
BEFORE: dict[str, Record] = {
    "doc_qa": _record(3746, 798, 1002, 9.9),
    "doc_qa_sampled": _record(69, 3118, 3184, 754),
    "unshared": _record(3053, 420, 1683, 15.6),
    "agents": _record(1482, 167, 937, 8.2),
    "rag, exact": _record(196, 37439, 43113),
    "rag, independent": _record(2417, 448, 2493),
}
GOALS: dict[str, Record] = {
    "doc_qa": {"tokens_per_s": 5500, "ttft_p50": 250, "ttft_p99": 400},
    "unshared": {"tokens_per_s": 3800, "ttft_p50": 200, "ttft_p99": 1500, "gap_max": 40},
    "agents": {"tokens_per_s": 2500, "ttft_p50": 80, "ttft_p99": 150},
    "agents, history kept": {"tokens_per_s": 2500, "ttft_p50": 80, "ttft_p99": 150, "ttft_later_p50": 40},
    "rag, independent": {"tokens_per_s": 4000, "ttft_p50": 200, "ttft_p99": 600},
    "rag, exact": {"tokens_per_s": 750, "ttft_p50": 3000},
    "rag, exact, canonical order": {"tokens_per_s": 900},
    "cold": {"ttft_p50": 240},
}
GOALS_ON_TWO_CARDS: dict[str, Record] = {"rag, exact": {"tokens_per_s": 800, "gap_p99": 15}}
SAMPLED_SHARE = 0.95  # doc_qa_sampled's goal: of the tokens/s of doc_qa in the same run
GAP_BUSY = 1.1  # busy_prefill's goal: gaps of streams beside a busy prefill service, of those undisturbed, on two cards


def goals_of(run: str, trace: str, *, two_cards: bool = False) -> Record:
    """What is asked of a run, by its words, else by its trace."""
    everywhere = GOALS.get(run, GOALS.get(trace, {}) if trace != "rag" else {})
    return GOALS_ON_TWO_CARDS.get(run, everywhere) if two_cards else everywhere


def flat(found: dict[str, Any]) -> Record:
    """A run's figures by the names that are recorded."""
    later = {"ttft_later_p50": found["ttft_later_ms"]["p50"]} if "ttft_later_ms" in found else {}
    return {
        "tokens_per_s": found["tokens_per_s"],
        "ttft_p50": found["ttft_ms"]["p50"],
        "ttft_p99": found["ttft_ms"]["p99"],
        "itl_mean": found["itl_mean_ms"],
        "gap_p99": found["gap_ms"]["p99"],
        "gap_max": found["gap_ms"]["max"],
        **later,
    }


def compared(run: str, trace: str, found: dict[str, Any], *, two_cards: bool = False) -> dict[str, Record]:
    """``found`` as multiples of what was recorded and asked for: above 1 is better in rates, below 1 in times."""
    ours = flat(found)
    recorded = {
        "vllm": VLLM.get(trace, {}),
        "before": BEFORE.get(run, BEFORE.get(trace, {})),
        "goal": goals_of(run, trace, two_cards=two_cards),
    }
    beside = {
        side: {name: round(ours[name] / value, 3) for name, value in values.items() if name in ours}
        for side, values in recorded.items()
    }
    return {side: values for side, values in beside.items() if values}
