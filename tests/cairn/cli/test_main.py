"""The command line against scripted services: what is parsed, what is printed, and the exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "command",
    [
        "",
        "up",
        "demo",
        "prefill",
        "generate",
        "explain",
        "abort",
        "health",
        "chunks",
        "store",
        "plan",
        "bench",
        "bench serve",
    ]
    + [f"chunks {action}" for action in ("list", "show", "rm", "pin", "unpin")]
    + [f"store {action}" for action in ("stats", "verify", "gc", "export", "import", "rm")],
)
def test_help(cairn, command):
    code, out, _ = cairn(*command.split(), "--help")
    assert code == 0
    assert out.startswith(f"usage: cairn {command}".rstrip())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["chunks"], "required: ACTION"),
        (["generate", "q", "--reuse", "blend"], "invalid choice: 'blend'"),
        (["generate", "q", "--max-tokens", "many"], "invalid int value"),
        (["generate", "q", "--timeout", "0"], "must be a positive number of seconds"),
        (["generate"], "give a query"),
        (["generate", "@/nowhere", "--query", "q"], "cannot read /nowhere"),
        (["generate", ":missing", "--query", "q"], "':missing' stands for 0 chunks"),
        (["prefill", "t", "--token-file", "/nowhere"], "cannot read /nowhere"),
        (["chunks", "show", ""], "give a chunk's name"),
        (["chunks", "list", "--by", "size"], "invalid choice: 'size'"),
        (["chunks", "rm"], "name chunks (CHUNK ...) or give --tag TAG"),
        (["chunks", "rm", "--tag", ""], "no chunk bears ''"),
    ],
)
def test_a_wrong_command_line_exits_with_2(cairn, services, argv, words):
    code, out, err = cairn(*argv)
    assert (code, out) == (2, "")
    assert words in err
    assert not [request for request in services.script.requests if hasattr(request, "segments")]


def test_a_reader_that_goes_away_is_not_an_accident(services):
    services.script.chunks = 5000
    argv = [sys.executable, "-m", "cairn.cli", "chunks", "list", "--json", "--prefill", services.address]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=20) == 1
        assert process.stderr.read() == b""
