"""``cairn chunks`` against scripted services."""

from __future__ import annotations

import json

import pytest

from protos import prefill_pb2
from tests.cairn.cairn_fakes import digits

CHUNK_1 = digits("chunk 001")


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


def test_show_is_for_people(cairn):
    code, out, _ = cairn("chunks", "show", ":doc-1")
    assert code == 0
    assert "2.0 KiB" in out and " ago)" in out and "never" in out
    assert "1970-01-01" in out or "1969-12-31" in out, "by the clock of this machine"
    assert "1000.0" not in out and "2048" not in out
