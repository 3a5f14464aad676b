"""Sampling the stacks of a process from within."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.stack_samples import between, sampling, words


def spin(ended: threading.Event) -> int:
    turns = 0
    while not ended.is_set():
        turns += 1
    return turns


def test_a_busy_thread_is_seen_where_it_is_busy(tmp_path: Path) -> None:
    file, ended, began = tmp_path / "stacks.jsonl", threading.Event(), time.monotonic()
    busy = threading.Thread(target=spin, args=(ended,), name="busy one")
    with sampling(file):
        busy.start()
        while time.monotonic() < began + 60 and not (file.exists() and file.read_text().count("\n") >= 2):
            time.sleep(0.05)
        ended.set()
        busy.join()
    seconds = time.monotonic() - began
    found = between(file, began, began + seconds)
    assert found["busy one"].samples > 0 and found["busy one"].cpu_s > 0
    assert found["busy one"].anywhere["bench/test_stack_samples.py spin"] == found["busy one"].samples
    assert "busy one: " in (said := words(found, seconds)) and "test_stack_samples.py spin:" in said
    assert between(file, 0.0, began) == {}
    with file.open("a") as out:  # a process that was killed while it wrote
        out.write(json.dumps({"at": began + seconds})[:-3])
    assert between(file, began, began + seconds) == found


def test_a_module_runs_as_without_it(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench.stack_samples", str(tmp_path / "stacks"), "json.tool", "--compact"]
    run = subprocess.run(argv, input='{"a": 1}', capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.strip()) == (0, '{"a":1}')
