"""One event is one line, whatever is in it; every line bears its request; JSON is JSON, whoever wrote it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from serving.process.logs import JsonLines, TextLines
from serving.trace.printable import MESSAGE_CHARACTERS_MAX, printable

ROOT = Path(__file__).resolve().parents[3]
FORGED = "ok\n2026-11-21 12:00:00,000 INFO serving.calls [-] all is well"
NASTY = [FORGED, "a\r\nb", "\x1b[2J", "\u2028next", "\u202egnp", "\x00", "lone \udc80", "\x85", "tab\there"]


def record(message: str, request_id: str = "r", error: BaseException | None = None) -> logging.LogRecord:
    exc_info = (type(error), error, None) if error else None
    made = logging.LogRecord("name", logging.INFO, __file__, 1, message, None, exc_info)
    made.request_id = request_id
    return made


@pytest.mark.parametrize("text", NASTY)
def test_a_message_is_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()
    line = TextLines().format(record(text))
    assert line.isprintable() and line.count("INFO") <= 1 + text.count("INFO")
    parsed = json.loads(JsonLines("s").format(record(text)))
    assert parsed["message"].isprintable() and parsed["service"] == "s"


@pytest.mark.parametrize("text", NASTY)
def test_a_traceback_is_marked_line_by_line(text: str) -> None:
    lines = TextLines().format(record("it failed", error=ValueError(text))).split("\n")
    assert len(lines) > 1 and all(line.startswith("  | ") and line.isprintable() for line in lines[1:])
    assert "\n" not in JsonLines("s").format(record("it failed", error=ValueError(text)))


def test_everything_is_bounded() -> None:
    huge = "x" * 10_000_000
    assert len(printable(huge)) < MESSAGE_CHARACTERS_MAX + 50
    assert len(TextLines().format(record(huge, error=ValueError(huge)))) < 50_000
    assert len(JsonLines("s").format(record(huge, error=ValueError(huge)))) < 50_000
    assert printable("short", 10) == "short" and printable("x" * 11, 10) == "x" * 10 + "... (1 more characters)"


EVERYONE = """
import logging, os, sys, threading, warnings
from serving.process.logs import adopt_library_loggers, configure_logging
from serving.trace.request_id import set_request_id
configure_logging("info", "json", "test")
import torch, transformers, grpc
adopt_library_loggers()
set_request_id("r1")
logging.getLogger("ours").info("ours\\nforged")
logging.getLogger("torch.something").warning("from torch")
transformers.logging.get_logger("transformers.x").warning("from transformers")
logging.getLogger("grpc._cython.cygrpc").error("from grpc")
warnings.warn("a warning")
os.write(2, b"from native code\\n")
print("printed", file=sys.stderr)
threading.Thread(target=lambda: 1 / 0, name="worker").start()
raise RuntimeError("the end")
"""


def test_every_line_of_a_process_is_json() -> None:
    done = subprocess.run([sys.executable, "-c", EVERYONE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    messages = " ".join(line["message"] for line in lines)
    for said in ("ours\\nforged", "from torch", "from transformers", "from grpc", "a warning", "from native code"):
        assert said in messages
    for said in ("printed", "thread worker ended", "the process ends"):
        assert said in messages
    assert any("ZeroDivisionError" in line.get("exception", "") for line in lines)
    assert done.returncode == 1
    assert all({"time", "level", "logger", "thread", "request_id"} <= line.keys() for line in lines)
    assert next(line for line in lines if line["logger"] == "ours")["request_id"] == "r1"
