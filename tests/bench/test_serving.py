"""The serving benchmark as it is run, small: the real services with the shipped model on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.serving import main

RUNS = [
    *("doc_qa", "doc_qa_sampled", "unshared", "agents, history as chunks", "agents, history in the tail"),
    "agents, history kept",
    *("rag, independent", "rag, exact", "rag, exact, canonical order", "cold"),
    *("busy_prefill, undisturbed", "busy_prefill, beside a busy prefill service"),
]


def check(run: dict[str, Any]) -> None:
    """What is so of every run."""
    found = run["figures"]
    assert found["errors"] == {} and found["details"] == [] and found["ok"] == found["requests"] > 6, run
    assert found["tokens"] == 8 * found["requests"] and found["finished"] == {"length": found["ok"]}
    assert min(found["tokens_per_s"], found["itl_mean_ms"], found["gap_ms"]["max"]) > 0
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"] <= found["ttft_ms"]["max"]
    assert sum(found["prompt_tokens_by_source"].values()) == found["prompt_tokens"] > 0
    assert run["services"]["decode"]["steps"] > 0


def test_every_trace_runs_through_the_services(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = "--scale 0.005 --generators 2 --decode-kv-pages 1024"
    main([*small.split(), "--order", "given", "canonical", "--profile", "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "serving.json").read_text())["runs"]
    assert [run["run"] for run in runs] == RUNS
    for run in runs:
        check(run)
    reused = {run["run"]: run["figures"]["prompt_tokens_by_source"] for run in runs}
    assert "device" in reused["doc_qa"] and "device" not in reused["unshared"]
    assert reused["agents, history as chunks"]["device"] > reused["agents, history in the tail"]["device"]
    computed = reused["agents, history kept"]["computed"] / reused["agents, history as chunks"]["computed"]
    assert computed <= 1.0, "no more than its turns, which a CPU computes once more"
    assert reused["cold"]["computed"] == sum(reused["cold"].values()), "nobody has seen any of it"
    assert sum(reused["rag, exact"].values()) == sum(reused["rag, exact, canonical order"].values())
    later = {run["trace"] for run in runs if "ttft_later_ms" in run["figures"]}
    assert later == {"agents"}, "no other trace has a second turn"
    closed = {run["run"]: run["compared"] for run in runs}
    assert list(closed["doc_qa_sampled"]) == ["goal"] and not closed["doc_qa"]  # records are of whole traces on a card
    beside = closed[RUNS[-1]]["undisturbed"]
    assert beside.keys() == {"itl_mean", "gap_p50", "gap_p99", "gap_max"} and closed[RUNS[-1]]["goal"]
    busy = next(run["figures"] for run in runs if run["run"] == RUNS[-1])
    assert busy["registered_per_s"] > 0 and not busy["not_registered"]
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith('{"run"')]
    assert lines == runs
    assert (tmp_path / "serving.md").read_text().count("\n| ") == 2 + len(runs)  # a row each, and the table's head
    profile = (tmp_path / "serving_profile.txt").read_text()
    assert profile.count("MainThread: ") > 0 and profile.count('"cairn_decode_steps_total"') == len(runs)
    assert (tmp_path / "serving.png").stat().st_size > 10_000


def test_both_services_in_one_process(tmp_path: Path) -> None:
    """Turns that are kept are computed behind, and what a turn computes is its own query. In a closed loop and as they
    arrive, but for a trace that makes sense in a closed loop only."""
    small = "--scale 0.005 --generators 1 --one-process --traces agents cold --history kept --rate 3x"
    main([*small.split(), "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "serving_one_process.json").read_text())["runs"]
    assert [(run["trace"], run["rate"] is None) for run in runs] == [
        ("agents", True),
        ("agents", False),
        ("cold", True),
    ]
    for run in runs:
        check(run)
        assert run["services"].keys() == {"prefill", "decode"}
    for run in runs[:2]:
        assert 0 < run["figures"]["prompt_tokens_by_source"]["computed"] < run["figures"]["prompt_tokens"] / 2
    with pytest.raises(SystemExit):
        main(["--one-process", "--device", "cuda", "--prefill-device", "cuda:1"])


def test_a_service_that_does_not_start_is_told_with_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--scale", "0.005", "--generators", "1", "--out", str(tmp_path), "--decode-args=--page-size 0"]
    with pytest.raises(Exception, match="decode service ended"):
        main(options)
    assert "--- decode service" in (said := capfd.readouterr().err) and "page-size" in said
