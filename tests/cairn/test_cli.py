"""The command line against scripted services: what is parsed, what is printed, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import grpc
import pytest

from cairn.cli import main as cli
from protos import chunks_pb2, prefill_pb2
from tests.cairn.cairn_fakes import digits
from tests.cairn.on_terminal import on_a_terminal

CHUNK_1 = digits("chunk 001")


@pytest.fixture
def cairn(services, capsys, monkeypatch):
    """Run a command against the fakes: (exit code, standard output, standard error)."""
    monkeypatch.setenv("CAIRN_PREFILL", services.address)
    monkeypatch.setenv("CAIRN_DECODE", services.address)
    monkeypatch.delenv("CAIRN_TOKEN", raising=False)

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    "command",
    ["", "up", "demo", "prefill", "generate", "explain", "abort", "health", "chunks", "store", "plan"]
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
        (["up"], "--model: is required"),
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


def test_generate_streams_text_and_reports(cairn, services, tmp_path):
    document = tmp_path / "doc.txt"
    document.write_text("Facts.")
    code, out, err = cairn(
        *("generate", CHUNK_1, ":doc-2", f"@{document}", "more", "--query", "why?", "--query-role", "user"),
        *("--segment-role", "document", "--reuse", "anchored", "--max-tokens", "5", "--seed", "3", "--ignore-eos"),
    )
    assert (code, out) == (0, "Cairn is stone.\n")
    assert "9 prompt tokens (7 cached, 2 computed), 3 generated" in err
    assert "store" in err and "not_stored" in err
    request = services.script.requests[-1]
    first, second, third, fourth, query = request.segments
    assert (first.chunk_id, second.chunk_id) == (CHUNK_1, digits("chunk 002"))
    assert (third.text, third.role, fourth.text) == ("Facts.", "document", "more")
    assert (query.text, query.role) == ("why?", "user")
    assert request.reuse_mode == chunks_pb2.REUSE_MODE_ANCHORED
    assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.ignore_eos) == (5, 3, True)


def test_generate_takes_the_last_part_as_the_query_and_can_be_quiet(cairn, services):
    code, out, err = cairn("generate", "context", "query", "--quiet")
    assert (code, out, err) == (0, "Cairn is stone.\n", "")
    assert [segment.text for segment in services.script.requests[-1].segments] == ["context", "query"]


def test_generate_json_is_one_object(cairn):
    code, out, err = cairn("generate", "q", "--json", "--logprobs")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["text"], result["token_ids"], result["finish_reason"]) == ("Cairn is stone.", [0, 1, 2], "stop")
    assert result["usage"]["prompt_tokens"] == 9
    assert result["reuse"]["segments"][0]["source"] == "store"
    assert result["logprobs"] == [-0.5] * 3


def test_a_failed_request_exits_with_1(cairn, services):
    services.script.fail = [(grpc.StatusCode.FAILED_PRECONDITION, "another model")] * 2
    code, out, err = cairn("generate", "q")
    assert (code, out) == (1, "")
    assert "FAILED_PRECONDITION" in err and "another model" in err
    code, out, err = cairn("generate", "q", "--json")
    assert (code, out) == (1, "")
    assert json.loads(err)["error"] == {
        "code": "FAILED_PRECONDITION",
        "message": "another model",
        "source": f"decode service at {services.address}",
    }


def test_prefill_text_file_and_context(cairn, services, tmp_path):
    document = tmp_path / "doc.txt"
    document.write_text("Facts.")
    code, out, err = cairn(
        *("prefill", f"@{document}", "inline", "--role", "document", "--tag", "a", "--tag", "b"),
        *("--context", "doc-1", "--ttl", "9", "--pin", "--type", "rag_result"),
    )
    assert code == 0
    assert "doc.txt" in out and "computed" in out
    assert digits("Facts.") in err
    request = services.script.requests[-2]
    assert (request.text, request.name, request.role, list(request.tags)) == (
        "Facts.",
        "doc.txt",
        "document",
        ["a", "b"],
    )
    assert (list(request.context_chunk_ids), request.ttl_s, request.pin) == ([CHUNK_1], 9.0, True)
    assert services.script.requests[-1].name == ""


def test_prefill_json_prints_a_line_for_each(cairn):
    code, out, err = cairn("prefill", "one", "two", "--json")
    assert (code, err) == (0, "")
    assert [json.loads(line)["id"] for line in out.splitlines()] == [digits("one"), digits("two")]


def test_explain(cairn):
    code, out, _ = cairn("explain", "a", "--query", "q")
    assert code == 0
    assert "9 prompt tokens: 7 cached, 2 to compute" in out and "load 2.0 KiB" in out
    code, out, _ = cairn("explain", "a", "--query", "q", "--json")
    assert json.loads(out)["bytes_read_per_step"] == 4096


def test_chunks_list(cairn):
    code, out, _ = cairn("chunks", "list", "--order", "name")
    assert code == 0
    assert all(f"doc-{number}" in out for number in range(5)) and "2.0 KiB" in out
    code, out, _ = cairn("chunks", "list", "--json", "--limit", "2")
    assert [json.loads(line)["name"] for line in out.splitlines()] == ["doc-0", "doc-1"]


@pytest.mark.parametrize(
    ("word", "order"),
    [
        ("created", prefill_pb2.ListChunksRequest.ORDER_CREATED),
        ("last-used", prefill_pb2.ListChunksRequest.ORDER_LAST_USED),
        ("last_used", prefill_pb2.ListChunksRequest.ORDER_LAST_USED),
        ("name", prefill_pb2.ListChunksRequest.ORDER_NAME),
    ],
)
@pytest.mark.parametrize("flag", ["--by", "--order"])
def test_chunks_list_by(cairn, services, flag, word, order):
    assert cairn("chunks", "list", flag, word)[0] == 0
    assert services.script.requests[-1].order == order


def test_chunks_rm_by_tag(cairn, services):
    code, out, _ = cairn("chunks", "rm", "doc-1", "--tag", "demo", "--json")
    assert code == 0
    removed = [json.loads(line)["id"] for line in out.splitlines()]
    assert removed == [CHUNK_1, *(digits(f"chunk 00{number}") for number in (0, 2, 3, 4))], "each once"
    asked = [request for request in services.script.requests if hasattr(request, "page_token")]
    assert asked[-1].tag == "demo"


def test_chunks_show_by_name_by_id_and_by_the_start_of_an_id(cairn):
    for word in ("doc-1", CHUNK_1, CHUNK_1[:22]):
        code, out, _ = cairn("chunks", "show", word, "--json", "--text", "--token-ids")
        assert code == 0
        shown = json.loads(out)
        assert (shown["id"], shown["text"], shown["token_ids"]) == (CHUNK_1, "the text", [1, 2, 3])
    code, out, _ = cairn("chunks", "show", "doc-1", "--text")
    assert "the text" in out and "token_ids" not in out
    code, out, err = cairn("chunks", "show", CHUNK_1[:12])
    assert (code, out) == (2, "") and "stands for 5 chunks" in err


def test_an_unknown_chunk_is_a_failed_request(cairn):
    code, _, err = cairn("chunks", "show", "f" * 64)
    assert code == 1 and "NOT_FOUND" in err


def test_chunks_rm_pin_unpin(cairn):
    code, out, _ = cairn("chunks", "rm", "doc-1", "doc-2")
    assert code == 0 and out.count("removed") == 2 and "4.0 KiB" in out
    code, out, _ = cairn("chunks", "pin", "doc-1", "--json")
    assert json.loads(out)["pinned"] is True
    code, out, _ = cairn("chunks", "unpin", "doc-1")
    assert "not pinned" in out


def test_the_token_comes_from_the_environment_or_a_file(cairn, services, tmp_path, monkeypatch):
    monkeypatch.setenv("CAIRN_TOKEN", "from-environment")
    cairn("chunks", "list")
    assert services.script.metadata[-1]["authorization"] == "Bearer from-environment"
    file = tmp_path / "token"
    file.write_text("from-file\n")
    cairn("chunks", "list", "--token-file", str(file))
    assert services.script.metadata[-1]["authorization"] == "Bearer from-file"


def test_the_services_own_token_file_will_do(cairn, services, tmp_path):
    file = tmp_path / "tokens"
    file.write_text("# tenants\n\nstone red\nslate blue\n")
    cairn("chunks", "list", "--token-file", str(file))
    assert services.script.metadata[-1]["authorization"] == "Bearer stone"
    file.write_text("# nobody\n")
    code, _, err = cairn("chunks", "list", "--token-file", str(file))
    assert code == 2 and "holds no token" in err


def test_abort(cairn):
    code, out, _ = cairn("abort", "running", "gone")
    assert (code, out) == (1, "running aborted\ngone is not waiting or running\n")
    code, out, _ = cairn("abort", "running", "--json")
    assert (code, json.loads(out)) == (0, {"request_id": "running", "found": True})


def test_show_is_for_people(cairn):
    code, out, _ = cairn("chunks", "show", ":doc-1")
    assert code == 0
    assert "2.0 KiB" in out and " ago)" in out and "never" in out
    assert "1970-01-01" in out or "1969-12-31" in out, "by the clock of this machine"
    assert "1000.0" not in out and "2048" not in out


@pytest.mark.parametrize("command", ["generate", "explain"])
def test_short_ids_in_prompts(cairn, services, command):
    code, _, err = cairn(command, CHUNK_1[:18], "--query", "why?")
    assert code == 0, err
    assert services.script.requests[-1].segments[0].chunk_id == CHUNK_1
    code, out, err = cairn(command, "0123456789ab", "--query", "why?")
    assert (code, out) == (2, "") and "text:0123456789ab" in err
    assert not hasattr(services.script.requests[-1], "segments"), "nothing is sent"


def test_short_ids_to_prefill(cairn, services):
    assert cairn("prefill", CHUNK_1[:18], "--context", CHUNK_1[:18], "--ttl", "2h")[0] == 0
    request = services.script.requests[-1]
    assert (request.chunk_id, list(request.context_chunk_ids), request.ttl_s) == (CHUNK_1, [CHUNK_1], 7200.0)
    assert cairn("prefill", "0123456789ab")[0] == 2


def test_health(cairn, services):
    code, out, _ = cairn("health")
    assert (code, out) == (0, f"{services.address} SERVING\n" * 2)
    code, out, _ = cairn("health", services.address, "127.0.0.1:1", "--json")
    assert code == 1
    assert [json.loads(line)["status"] for line in out.splitlines()] == ["SERVING", "UNAVAILABLE"]
    services.health.set("", 2)
    code, out, _ = cairn("health", "--wait", "0.3")
    assert code == 1 and "NOT_SERVING" in out


def test_colours_only_on_a_terminal_and_not_with_no_color(services, cairn):
    argv = ["generate", "q", "--prefill", services.address, "--decode", services.address]
    assert b"\x1b[1m" in on_a_terminal(argv, {})
    coloured = on_a_terminal(["chunks", "list", *argv[2:]], {"NO_COLOR": "1"})
    assert b"\x1b[3" not in coloured
    _, out, err = cairn(*argv)
    assert "\x1b" not in out + err


def test_a_reader_that_goes_away_is_not_an_accident(services):
    services.script.chunks = 5000
    argv = [sys.executable, "-m", "cairn.cli", "chunks", "list", "--json", "--prefill", services.address]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=20) == 1
    assert process.stderr.read() == b""
