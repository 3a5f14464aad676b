"""Table and plot of ``bench.serving``'s results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.serving_records import VLLM, goals_of

COLUMNS = (
    *("trace", "out tokens/s", "TTFT p50/p99/max ms", "of turn 2 on", "gap p50/p99/max ms", "ITL mean ms"),
    *("prompt tokens computed", "errors", "of vLLM's tokens/s", "of its TTFT p50, p99", "of the goals"),
)
NOTES = (
    "Ours over gRPC from processes of their own, vLLM 0.25.1 in process; of rates more is better, of times less. "
    "CUT: unanswered when the time for a run was over."
)


def table(settings: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Markdown: how it was measured, then a row a run."""
    words = ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, ""))
    head = [f"# Serving in traffic\n\n`python -m bench.serving`: {words}. {NOTES}\n", f"| {' | '.join(COLUMNS)} |"]
    return "\n".join([*head, f"|{' --- |' * len(COLUMNS)}", *(_row(run) for run in runs)]) + "\n"


def line(run: dict[str, Any]) -> str:
    """A run for the terminal."""
    found = run["figures"]
    goal = "  ".join(f"{name} {value:.2f}x of the goal" for name, value in run["compared"].get("goal", {}).items())
    return (
        f"{title(run):44s} {found['tokens_per_s']:8.0f} tokens/s  TTFT {_spread(found['ttft_ms'])} ms  "
        f"gap {_spread(found['gap_ms'])} ms  ITL {found['itl_mean_ms']:.1f} ms  errors {found['errors'] or 0}  {goal}"
    )


def title(run: dict[str, Any]) -> str:
    """What was run, in words."""
    return run["run"] if run["rate"] is None else f"{run['run']}, Poisson {run['rate']:.3g}/s"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Rates, times to first token and gaps of every run, beside vLLM's and the goals. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rates, firsts, gaps) = pyplot.subplots(1, 3, figsize=(16, 1.6 + 0.55 * len(runs)), layout="constrained")
    places = range(len(runs))
    traces = [run["trace"] if "vllm" in run["compared"] else "" for run in runs]
    goals = [goals_of(run["run"], trace) if trace else {} for run, trace in zip(runs, traces, strict=True)]
    found = [run["figures"] for run in runs]
    rates.barh(places, [each["tokens_per_s"] for each in found], color="tab:blue", label="Cairn")
    vllm = [VLLM.get(trace, {}) for trace in traces]
    _marks(rates, [each.get("tokens_per_s") for each in vllm], "tab:orange", "vLLM 0.25.1")
    _marks(rates, [goal.get("tokens_per_s") for goal in goals], "tab:green", "goal")
    rates.set_xlabel("tokens/s out")
    for axes, times, recorded, goal in (
        (firsts, "ttft_ms", [each.get("ttft_p99") for each in vllm], "ttft_p99"),
        (gaps, "gap_ms", [None] * len(runs), "gap_max"),
    ):
        for share, colour in (("max", "lightsteelblue"), ("p99", "cornflowerblue"), ("p50", "tab:blue")):
            axes.barh(places, [each[times][share] for each in found], color=colour, label=share)
        _marks(axes, recorded, "tab:orange", "vLLM 0.25.1, p99")
        _marks(axes, [each.get(goal) for each in goals], "tab:green", f"goal, {goal.rpartition('_')[2]}")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yticks([])
    firsts.set_xlabel("time to first token, ms")
    gaps.set_xlabel("between two tokens, ms")
    rates.set_yticks(places, [title(run) for run in runs])
    for axes in (rates, firsts, gaps):
        axes.invert_yaxis()
        axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=5)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _marks(axes: Any, values: Sequence[float | None], colour: str, label: str) -> None:
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    if known:
        places, at = zip(*known, strict=True)
        axes.scatter(at, places, marker="|", s=300, linewidths=3, color=colour, label=label, zorder=3)


def _row(run: dict[str, Any]) -> str:
    found, vllm, goal = run["figures"], run["compared"].get("vllm", {}), run["compared"].get("goal", {})
    errors = ", ".join(f"{status} {count}" for status, count in found["errors"].items()) or "0"
    firsts = ", ".join(f"{vllm[name]:.2f}" for name in ("ttft_p50", "ttft_p99") if name in vllm)
    goals = ", ".join(f"{name} {value:.2f}" for name, value in goal.items())
    if beside := run["compared"].get("undisturbed"):
        words = ", ".join(f"{name} {value:.2f}" for name, value in beside.items())
        goals = f"{goals} (of undisturbed: {words}; {found['registered_per_s']:.1f} chunks/s registered)"
    later = _spread(found["ttft_later_ms"]) if "ttft_later_ms" in found else ""
    cells = [title(run), f"{found['tokens_per_s']:.0f}", _spread(found["ttft_ms"]), later, _spread(found["gap_ms"])]
    computed = found["prompt_tokens_by_source"].get("computed", 0)
    cells += [f"{found['itl_mean_ms']:.1f}", f"{computed} of {found['prompt_tokens']}", errors]
    cells += [f"{vllm['tokens_per_s']:.2f}" if "tokens_per_s" in vllm else "", firsts, goals]
    return f"| {' | '.join(cells)} |"


def _spread(values: dict[str, float]) -> str:
    return " / ".join(
        f"{values[name]:.0f}" if values[name] >= 100 else f"{values[name]:.1f}" for name in ("p50", "p99", "max")
    )
