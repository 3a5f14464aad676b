"""``cairn generate`` against scripted services."""

from __future__ import annotations

import json

import grpc
import pytest

from protos import chunks_pb2, decode_pb2
from tests.cairn.cairn_fakes import digits

CHUNK_1 = digits("chunk 001")


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


def test_generate_takes_biases_and_the_number_of_likeliest_tokens(cairn, services):
    code, _, _ = cairn("generate", "q", "--top-logprobs", "2", "--logit-bias", "5=1.5", "--logit-bias", "7=-100")
    sampling = services.script.requests[-1].sampling
    assert (code, dict(sampling.logit_bias)) == (0, {5: 1.5, 7: -100.0})
    assert sampling.logprobs and sampling.top_logprobs == 2


def test_generate_takes_every_sampling_parameter(cairn, services):
    given = {
        "frequency-penalty": ("frequency_penalty", 0.5),
        "presence-penalty": ("presence_penalty", -0.5),
        "repetition-penalty": ("repetition_penalty", 1.25),
        "min-tokens": ("min_tokens", 3),
    }
    options = [word for flag, (_, value) in given.items() for word in (f"--{flag}", str(value))]
    stops = ("--stop", ".", "--include-stop", "--stop-token-id", "4", "--stop-token-id", "6")
    assert cairn("generate", "q", "--quiet", *options, *stops)[0] == 0
    sampling = services.script.requests[-1].sampling
    assert {name: getattr(sampling, name) for name, _ in given.values()} == dict(given.values())
    assert (list(sampling.stop), sampling.include_stop, list(sampling.stop_token_ids)) == (["."], True, [4, 6])


def test_generate_tells_several_answers_one_behind_the_other(cairn, services):
    code, out, err = cairn("generate", "q", "--n", "2", "--quiet")
    assert (code, out, err) == (0, "[0] Cairn is stone.\n[1] Cairn is stone.\n", "")
    assert services.script.requests[-1].sampling.n == 2
    code, out, _ = cairn("generate", "q", "--n", "2", "--json")
    assert [json.loads(line)["index"] for line in out.splitlines()] == [0, 1]


@pytest.mark.parametrize(
    ("flags", "form", "source"),
    [
        (("--regex", "a+"), "regex", "a+"),
        (("--json-object",), "json_object", True),
        (("--json-schema", "FILE"), "json_schema", '{"type": "object"}'),
        (("--lark", "FILE"), "lark", '{"type": "object"}'),
    ],
)
def test_generate_takes_a_grammar(cairn, services, tmp_path, flags, form, source):
    (tmp_path / "file").write_text('{"type": "object"}')
    words = [str(tmp_path / "file") if word == "FILE" else word for word in flags]
    assert cairn("generate", "q", *words)[0] == 0
    grammar = services.script.requests[-1].grammar
    assert (grammar.WhichOneof("form"), getattr(grammar, form)) == (form, source)


def test_generate_takes_one_grammar_from_a_file_that_is_there(cairn, tmp_path):
    assert cairn("generate", "q", "--regex", "a", "--json-object")[0] == 2
    code, _, err = cairn("generate", "q", "--lark", str(tmp_path / "none"))
    assert code == 2 and "cannot read" in err


def test_generate_names_the_turn_that_it_keeps(cairn, services):
    code, out, err = cairn("generate", "q", "--keep", "--quiet")
    assert (code, out, err) == (0, "Cairn is stone.\n", f"kept as {digits('turn')} (KV computing)\n")
    assert services.script.requests[-1].keep
    code, out, err = cairn("generate", "q", "--keep", "--json")
    assert json.loads(out)["kept"]["id"] == digits("turn")
    _, _, err = cairn("generate", "q", "--keep", "--quiet", "--request-id", "full")
    assert err == "not kept (store_full)\n"


@pytest.mark.parametrize("bias", ["5", "=", "a=1", "5=b"])
def test_a_bias_that_is_none_is_named(cairn, bias):
    code, _, err = cairn("generate", "q", "--logit-bias", bias)
    assert code == 2 and "--logit-bias" in err and repr(bias) in err


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


@pytest.mark.parametrize("command", ["generate", "explain"])
def test_short_ids_in_prompts(cairn, services, command):
    code, _, err = cairn(command, CHUNK_1[:18], "--query", "why?")
    assert code == 0, err
    assert services.script.requests[-1].segments[0].chunk_id == CHUNK_1
    code, out, err = cairn(command, "0123456789ab", "--query", "why?")
    assert (code, out) == (2, "") and "text:0123456789ab" in err
    assert not hasattr(services.script.requests[-1], "segments"), "nothing is sent"


def test_generate_asks_for_an_order(cairn, services):
    assert cairn("generate", "a", "b", "q", "--order", "canonical")[0] == 0
    assert services.script.requests[-1].order == decode_pb2.CHUNK_ORDER_CANONICAL
    assert cairn("explain", "a", "b", "q")[0] == 0
    assert services.script.requests[-1].order == decode_pb2.CHUNK_ORDER_GIVEN


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "chunk", "name": "doc"}, "?"]},
]


@pytest.mark.parametrize("command", ["generate", "explain"])
def test_a_chat_comes_from_a_file(cairn, services, tmp_path, command):
    file = tmp_path / "chat.json"
    for given in (CHAT, {"messages": CHAT, "tools": [{"name": "f"}], "template_arguments": {"x": 1}}):
        file.write_text(json.dumps(given))
        code, out, err = cairn(command, "--messages", str(file))
        assert code == 0 and "rendered in 2 pieces; rendered again: messages[1]" in out + err
    chat = services.script.requests[-1].chat
    assert [message.role for message in chat.messages] == ["system", "user"]
    assert [part.WhichOneof("part") for part in chat.messages[1].content] == ["chunk_name", "text"]
    assert list(chat.tools) == ['{"name": "f"}'] and chat.template_arguments == '{"x": 1}'


def test_a_file_that_is_no_chat_is_named(cairn, tmp_path):
    file = tmp_path / "chat.json"
    for text, says in (
        ("{", "is no JSON"),
        ('{"a": 1}', "is no chat"),
        ('{"messages": [], "colour": 1}', "is no chat"),
    ):
        file.write_text(text)
        code, _, err = cairn("generate", "--messages", str(file))
        assert code == 2 and says in err
    file.write_text(json.dumps(CHAT))
    code, _, err = cairn("generate", "--messages", str(file), "--query", "x")
    assert code == 2 and "either --messages" in err
