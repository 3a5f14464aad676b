"""A job's figures for a person: a table, a plot, a line while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cairn.load.answer import OK, Answer, Progress
from cairn.load.figures import gaps_ms, percentile

TIMES = {
    "ttft_ms": "time to first token, ms",
    "ttft_later_ms": "  of later turns",
    "gap_ms": "between two tokens, ms",
    "tpot_ms": "a token of a request, ms",
    "e2e_ms": "a whole request, ms",
}
SPREAD = ("mean", "p50", "p90", "p99", "max")
BUSY = 0.7  # of a processor: from here on the load generator may be what is measured
LATE_MS = 20.0


def time_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each time that was measured: what it is, then ``SPREAD``."""
    return [(words, *(_number(found[name][each]) for each in SPREAD)) for name, words in TIMES.items() if name in found]


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What is no time: counts, rates, where prompt tokens came from, errors."""
    made = [
        ("requests", f"{found['ok']} answered of {found['requests']}, in {found['seconds']:.1f} s"),
        ("output", f"{found['tokens_per_s']:.1f} tokens/s, {found['requests_per_s']:.2f} requests/s"),
        ("input", f"{found['prompt_tokens_per_s']:.1f} tokens/s"),
    ]
    if goodput := found.get("goodput"):
        bounds = ", ".join(f"{name} <= {most:g} ms" for name, most in goodput["bounds_ms"].items())
        words = f"{goodput['requests_per_s']:.2f} requests/s, {goodput['share']:.1%} of those asked ({bounds})"
        made.append(("goodput", words))
    if sources := found["prompt_tokens_by_source"]:
        whole = max(1, sum(sources.values()))
        named = sorted(sources.items(), key=lambda each: -each[1])
        made.append(("prompt tokens", ", ".join(f"{name} {count} ({count / whole:.1%})" for name, count in named)))
    made += [("errors", _error(status, count, found)) for status, count in found["errors"].items()] or [("errors", "0")]
    if found["retry_after_s"]["count"]:
        hints = found["retry_after_s"]
        words = f"{hints['count']} were told to, in {hints['p50']:.2f} s (median), {hints['max']:.2f} s at most"
        made.append(("come again", words))
    own = found["generator"]
    words = f"{own['busiest']:.0%} of a processor in the busiest of {own['processes']}, {own['processors']:.2f} in all"
    made.append(("load generator", words))
    return made


def warnings(found: dict[str, Any], *, arriving: bool) -> list[str]:
    """Why the figures may be about the load generator."""
    own, said = found["generator"], []
    if own["busiest"] > BUSY:
        said.append(
            f"the load generator kept a processor {own['busiest']:.0%} busy: times may be its own; "
            "give more --processes"
        )
    if arriving and own["late_ms"]["p99"] > LATE_MS:
        said.append(
            f"requests left up to {own['late_ms']['p99']:.0f} ms (p99) after they were due; their waiting counts from "
            "when they were due"
        )
    return said


def line(progress: Progress, elapsed_s: float, tokens_per_s: float, first_s: Sequence[float]) -> str:
    """How far a job is, in a line."""
    first = f"first token {percentile(first_s, 0.5) * 1e3:.0f} ms" if first_s else "no first token"
    return (
        f"{elapsed_s:6.1f} s  {progress.running} running, {progress.answered} answered, {progress.failed} failed  "
        f"{tokens_per_s:.0f} tokens/s  {first}"
    )


def plot(answers: Sequence[Answer], began: float, path: Path, title: str) -> None:
    """Tokens and requests by the second, times to first token as requests came, and how times are spread. Needs
    matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heard = [answer for answer in answers if answer.times]
    figure, ((rates, firsts), (first_spread, gap_spread)) = pyplot.subplots(2, 2, figsize=(13, 8), layout="constrained")
    figure.suptitle(title)
    at = [time - began for answer in heard for time in answer.times]
    weights = [count for answer in heard for count in answer.counts]
    bins = range(int(max(at, default=0.0)) + 2)
    rates.hist(at, bins=bins, weights=weights, histtype="step")
    rates.set(xlabel="s", ylabel="tokens/s out")
    for status, colour in ((True, "tab:blue"), (False, "tab:red")):
        those = [answer for answer in heard if (answer.status == OK) is status]
        firsts.plot(
            [answer.asked - began for answer in those],
            [(answer.times[0] - answer.asked) * 1e3 for answer in those],
            ".",
            color=colour,
            label="answered" if status else "cut off or failed",
        )
    refused = [answer.asked - began for answer in answers if answer.status != OK and not answer.times]
    firsts.plot(refused, [0.0] * len(refused), "x", color="tab:red", label="no token")
    firsts.set(xlabel="asked, s", ylabel="time to first token, ms")
    firsts.legend(fontsize="small")
    for axes, values, words in (
        (first_spread, [(answer.times[0] - answer.asked) * 1e3 for answer in heard], "time to first token, ms"),
        (gap_spread, [gap for answer in heard for gap in gaps_ms(answer)], "between two tokens, ms"),
    ):
        if values:
            axes.ecdf(values)
        axes.set(xlabel=words, ylabel="share of all", xscale="symlog")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _error(status: str, count: int, found: dict[str, Any]) -> str:
    said = found["details"].get(status, [])
    return f"{status} {count}" + (f": {said[0]}" if said else "")


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
