"""``cairn prefill`` against scripted services."""

from __future__ import annotations

import json

from tests.cairn.cairn_fakes import digits

CHUNK_1 = digits("chunk 001")


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


def test_short_ids_to_prefill(cairn, services):
    assert cairn("prefill", CHUNK_1[:18], "--context", CHUNK_1[:18], "--ttl", "2h")[0] == 0
    request = services.script.requests[-1]
    assert (request.chunk_id, list(request.context_chunk_ids), request.ttl_s) == (CHUNK_1, [CHUNK_1], 7200.0)
    assert cairn("prefill", "0123456789ab")[0] == 2


def test_durable_waits_and_without_it_the_table_says_what_is_not_stored_yet(cairn, services):
    services.script.durable = False
    code, out, _ = cairn("prefill", "one")
    assert code == 0 and "computed, being stored" in out and not services.script.requests[-1].durable
    services.script.durable = True
    code, out, _ = cairn("prefill", "one", "--durable")
    assert code == 0 and "being stored" not in out and services.script.requests[-1].durable
