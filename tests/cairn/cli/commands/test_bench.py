"""`cairn bench serve` against scripted services: table, JSON, files, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from jsonschema import Draft202012Validator

from tests.cairn.load.openai_server import OpenAI, serving
from tests.cairn.on_terminal import on_a_terminal

SCHEMA = json.loads((Path(__file__).parents[4] / "docs" / "bench.schema.json").read_text())
SHORT = ("--requests", "6", "--concurrency", "2", "--warm-up", "1", "--document-tokens", "4")


def test_a_table_and_files(cairn, tmp_path: Path) -> None:
    out, records, plot = tmp_path / "o.json", tmp_path / "r.jsonl", tmp_path / "p.png"
    files = ("--out", str(out), "--records", str(records), "--plot", str(plot))
    code, said, err = cairn("bench", "serve", "rag", *SHORT, *files, "--goodput", "ttft:60000")
    assert (code, err) == (0, "")
    for words in ("time to first token, ms", "6 answered of 6", "store 42", "goodput", "load generator"):
        assert words in said
    found = json.loads(out.read_text())
    Draft202012Validator(SCHEMA).validate(found)
    assert found["figures"]["tokens"] == 18 and found["figures"]["goodput"]["share"] == 1.0
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [line["status"] for line in lines] == ["OK"] * 6 and all(
        0 <= line["asked"] <= line["times"][0] for line in lines
    )
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("more", [(), ("--rate", "200", "--processes", "2"), ("conversations", "--turns", "2")])
def test_json_is_what_the_schema_says(cairn, more: tuple[str, ...]) -> None:
    flags = [flag for flag in SHORT if "--rate" not in more or flag not in ("--concurrency", "2")]
    code, out, _ = cairn("bench", "serve", *more, *flags, "--json")
    assert code == 0
    Draft202012Validator(SCHEMA).validate(json.loads(out))


def test_http_and_errors_by_kind(cairn) -> None:
    service = OpenAI(refusals=[(429, {"Retry-After": "2"}, {"error": {"message": "full"}})] * 2)
    with serving(service) as url:
        code, out, _ = cairn("bench", "serve", *SHORT, "--warm-up", "0", "--url", url, "--json")
    found = json.loads(out)
    Draft202012Validator(SCHEMA).validate(found)
    assert code == 0 and found["figures"]["errors"] == {"HTTP 429": 2} and found["figures"]["ok"] == 4
    assert found["figures"]["retry_after_s"]["count"] == 2
    assert found["figures"]["prompt_tokens_by_source"] == {"cached": 28, "computed": 52}


def test_when_nobody_answers_the_exit_code_is_1(cairn, services, tmp_path: Path) -> None:
    original = services.script.enter

    def enter(request, context):
        original(request, context)
        if hasattr(request, "segments"):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    services.script.enter = enter
    code, out, _ = cairn("bench", "serve", *SHORT, "--json")
    assert code == 1 and json.loads(out)["figures"]["errors"] == {"RESOURCE_EXHAUSTED": 6}
    services.stop()
    code, _, err = cairn("bench", "serve", *SHORT, "--timeout", "5")
    assert code == 1 and services.address in err
    code, _, err = cairn("bench", "serve", "--out", "/nowhere/o.json")
    assert code == 2 and "--out: /nowhere is no folder" in err


def test_ctrl_c_gives_what_there_is() -> None:
    service = OpenAI(held=threading.Event())
    argv = [sys.executable, "-m", "cairn.cli", "bench", "serve", *SHORT, "--warm-up", "0", "--json"]
    with (
        serving(service) as url,
        subprocess.Popen([*argv, "--url", url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):
        deadline = time.monotonic() + 120
        while len(service.requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # the first words are on their way
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    found = json.loads(out)
    assert (process.returncode, found["interrupted"], err) == (130, True, "")
    assert found["figures"]["errors"] == {"CUT": 2} and found["figures"]["requests"] == 2


def test_a_terminal_is_told_how_far_it_is(services) -> None:
    services.script.delay_s = 0.4
    written = on_a_terminal(["bench", "serve", *SHORT], {"CAIRN_DECODE": services.address, "PATH": os.environ["PATH"]})
    assert b"running" in written and b"6 answered of 6" in written
