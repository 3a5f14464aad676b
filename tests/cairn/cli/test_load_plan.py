"""The jobs that `cairn bench serve`'s flags stand for, and flags that do not go together."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from cairn.cli.arguments import UsageError
from cairn.cli.connection import add_connection_flags
from cairn.cli.load_options import add_load_flags
from cairn.cli.load_plan import Plan, plan_of
from cairn.load.cairn_target import CairnTarget
from cairn.load.http_target import HttpTarget
from cairn.load.workload import Lengths, Seeded


def planned(*argv: str) -> Plan:
    parser = argparse.ArgumentParser()
    add_load_flags(parser)
    add_connection_flags(parser)
    return plan_of(parser.parse_args(argv))


def test_what_is_not_said_is_rag_for_a_minute() -> None:
    plan = planned()
    job = plan.job
    assert isinstance(job.workload, Seeded) and isinstance(job.target, CairnTarget)
    assert (job.workload.name, job.concurrency, job.arrivals, job.duration_s, job.first) == ("rag", 8, None, 60.0, 8)
    (before,) = plan.before
    assert (before.first, before.end, before.max_tokens, before.duration_s) == (0, 8, 4, None)
    assert (job.target.reuse, job.target.history, job.limit_s) == ("exact", "kept", 120.0)


def test_shapes_and_counts() -> None:
    shape = "rag --system-tokens 1 --document-tokens 2 --query-tokens 3 --output-tokens 4 --documents 9 --picked 2"
    more = "--zipf 0 --vocabulary 500 --seed 7 --requests 30 --concurrency 5 --ahead"
    plan = planned(*f"{shape} {more}".split())
    workload = plan.job.workload
    assert isinstance(workload, Seeded) and workload.lengths == Lengths(1, 2, 3, 4)
    assert (workload.count, workload.picked, workload.zipf, workload.vocabulary, workload.seed) == (9, 2, 0.0, 500, 7)
    assert (plan.job.first, plan.job.end, plan.job.duration_s) == (5, 35, None)
    about, _ = plan.before
    assert about.end == 10 and about.workload.session(3)[0].documents == (3,)
    assert planned("conversations", "--requests", "10").job.end == 8 + 2
    assert planned("conversations", "--reuse", "independent").settings["history"] == "chunks"
    json.dumps(plan.settings)


def test_requests_arrive_by_poissons_law() -> None:
    job = planned("--rate", "50", "--duration", "4").job
    assert job.arrivals is not None and len(job.arrivals) == job.end - job.first and job.arrivals[-1] < 4.0
    assert 120 < len(job.arrivals) < 290 and job.duration_s == 4.0
    counted = planned("conversations", "--rate", "5", "--requests", "12", "--warm-up", "0")
    assert len(counted.job.arrivals) == 2 and counted.before == ()


def trace(folder: Path, *lines: object) -> str:
    path = folder / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_a_trace_is_asked_as_it_says(tmp_path: Path) -> None:
    path = trace(tmp_path, *({"at": at, "query": "q"} for at in (5, 6, 9)))
    job = planned("--trace", path).job
    assert job.arrivals == (0.0, 1.0, 4.0) and job.duration_s is None and job.first == 0
    assert planned("--trace", path, "--speed", "2", "--warm-up", "1").job.arrivals == (0.0, 1.5)
    assert planned("--trace", path, "--concurrency", "2").job.arrivals is None
    assert len(planned("--trace", path, "--rate", "9").job.arrivals) == 3


def test_any_url(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("first salt\n")
    flags = ["--url", "http://h:1", "--token-file", str(tmp_path / "tokens"), "--body", '{"cairn": {}}', "--model", "m"]
    target = planned(*flags).job.target
    assert isinstance(target, HttpTarget)
    assert (target.url, target.api, target.token, target.more) == ("http://h:1/v1", "chat", "first", {"cairn": {}})
    other = planned("--url", "https://h/api/", "--vocabulary", "500").job.target
    assert isinstance(other, HttpTarget) and (other.url, other.api) == ("https://h/api", "completions")
    settings = planned(*flags).settings
    assert "first" not in json.dumps(settings) and settings["url"] == "http://h:1/v1"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--rate 3 --concurrency 4", "--rate"),
        ("--speed 2", "--speed"),
        ("--picked 4 --documents 3", "--picked"),
        ("--trace /nowhere", "--trace"),
        ("--trace T --document-tokens 9", "--document-tokens"),
        ("--trace T --warm-up 3", "--warm-up"),
        ("--trace T --turns 2", "--turns"),
        ("--api chat", "--api"),
        ("--history kept --reuse anchored", "--history"),
        ("--model m", "--model"),
        ("--url http://h --reuse anchored", "--reuse"),
        ("--url http://h --history tail", "--history"),
        ("--url http://h --vocabulary 500 --api chat", "--api"),
        ("conversations --url http://h --vocabulary 500", "--vocabulary"),
        ("--rate 0.001 --duration 0.001", "--rate"),
    ],
)
def test_flags_that_do_not_go_together_are_named(tmp_path: Path, flags: str, named: str) -> None:
    words = [trace(tmp_path, {"query": "q"}, {"query": "r"}) if word == "T" else word for word in flags.split()]
    with pytest.raises(UsageError) as caught:
        planned(*words)
    assert str(caught.value).startswith(named)
