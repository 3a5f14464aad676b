"""`cairn bench serve` against real services: every workload, every way of arriving, both protocols, and too much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.gateway.conftest import ROOT, Served

SCHEMA = Draft202012Validator(json.loads((ROOT / "docs" / "bench.schema.json").read_text()))
SMALL = ("--system-tokens", "8", "--document-tokens", "24", "--query-tokens", "6", "--output-tokens", "5")


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text("slate\n")
    return str(path)


def measured(*flags: str) -> dict[str, Any]:
    """The figures of a run, which must be whole and without an error."""
    argv = [sys.executable, "-m", "cairn.cli", "bench", "serve", *flags, "--json", "--timeout", "120"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CAIRN_")}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    SCHEMA.validate(result)
    found: dict[str, Any] = result["figures"]
    assert found["errors"] == {} and found["ok"] == found["requests"] > 0, found
    assert found["tokens"] == 5 * found["ok"] and found["finished"] == {"length": found["ok"]}, found
    assert sum(found["prompt_tokens_by_source"].values()) == found["prompt_tokens"] > 0
    assert 0 < found["ttft_ms"]["p50"] <= found["e2e_ms"]["max"] and found["tokens_per_s"] > 0
    return found


@pytest.mark.parametrize("workload", ["shared", "rag", "conversations", "unshared"])
@pytest.mark.parametrize("protocol", ["gRPC", "chat", "completions"])
def test_every_workload_over_both_protocols(served: Served, token: str, workload: str, protocol: str) -> None:
    whom = ("--decode", served.decode) if protocol == "gRPC" else ("--url", served.url, "--api", protocol)
    shape = {"rag": ("--documents", "4", "--picked", "2"), "conversations": ("--turns", "2")}.get(workload, ())
    flags = (*whom, "--token-file", token, "--requests", "6", "--concurrency", "3", "--warm-up", "3", *SMALL, *shape)
    found = measured(workload, *flags, "--seed", str(["gRPC", "chat", "completions"].index(protocol)))
    sources = found["prompt_tokens_by_source"]
    if protocol == "gRPC" and workload != "unshared":
        assert sources["device"] >= 6 * 8, sources
    if protocol == "gRPC":
        assert found["stages_mean_ms"]["total"] > 0
    if workload == "unshared" and protocol == "completions":
        assert sources.get("cached", 0) == 0


def test_requests_that_arrive_and_traces(served: Served, token: str, tmp_path: Path) -> None:
    found = measured(
        *("rag", "--decode", served.decode, "--token-file", token, "--vocabulary", "2000", *SMALL, "--rate", "20"),
        *("--requests", "8", "--warm-up", "0", "--ahead", "--reuse", "independent", "--goodput", "ttft:100000"),
    )
    assert found["requests"] == 8 and found["goodput"]["share"] == 1.0
    assert found["prompt_tokens_by_source"]["device"] == 8 * (8 + 4 * 24)
    trace = tmp_path / "trace.jsonl"
    asked = [{"at": at / 10, "documents": ["a"], "query": "Why? ", "max_tokens": 5} for at in range(3)]
    trace.write_text("\n".join(map(json.dumps, [{"document": "a", "text": "Long. "}, *asked])))
    for whom in (("--decode", served.decode), ("--url", served.url)):
        assert measured("--trace", str(trace), *whom, "--token-file", token)["requests"] == 3


def test_who_is_not_known_is_counted_as_such(served: Served) -> None:
    argv = [sys.executable, "-m", "cairn.cli", "bench", "serve", "--url", served.url, "--model", "fable", "--json"]
    done = subprocess.run([*argv, "--requests", "2"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and json.loads(done.stdout)["figures"]["errors"] == {"HTTP 401": 2}
