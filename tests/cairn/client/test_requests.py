"""Arguments become the right protobuf messages, and what no service could accept is refused before it is sent."""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import pytest

from cairn import ChunkRef, Grammar, InvalidRequest, Text, Tokens
from cairn.client.requests import chunk_id_of, generate_request, list_request, prefill_request
from protos import chunks_pb2, decode_pb2, prefill_pb2


def test_every_kind_of_part_becomes_its_segment():
    request = generate_request(
        [
            ChunkRef("abc"),
            "text",
            [1, 2],
            Tokens((3, 4), type="code"),
            cast(Any, np.array([5, 6])),
            Text("q", role="user"),
        ]
    )
    assert [segment.WhichOneof("content") for segment in request.segments] == [
        "chunk_id",
        "text",
        "token_ids",
        "token_ids",
        "token_ids",
        "text",
    ]
    assert request.segments[0].chunk_id == "abc"
    assert list(request.segments[3].token_ids.ids) == [3, 4]
    assert request.segments[3].type == chunks_pb2.CHUNK_TYPE_CODE
    assert list(request.segments[4].token_ids.ids) == [5, 6]
    assert request.segments[5].role == "user"
    assert request.segments[5].type == chunks_pb2.CHUNK_TYPE_UNSPECIFIED


def test_an_empty_token_list_is_still_token_ids():
    assert generate_request([[]]).segments[0].WhichOneof("content") == "token_ids"


def test_defaults_are_explicit_where_the_contract_names_them_and_unset_elsewhere():
    request = generate_request(["q"])
    assert request.reuse_mode == chunks_pb2.REUSE_MODE_EXACT
    assert request.cache_use == decode_pb2.CACHE_USE_SHARED
    assert not request.sampling.HasField("max_tokens")
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens", "seed"):
        assert not request.sampling.HasField(name)


def test_sampling_values_arrive_zero_included():
    sampling = generate_request(
        ["q"],
        temperature=0.0,
        seed=0,
        max_tokens=0,
        stop=["a", "b"],
        stop_token_ids=[7],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=3,
        logit_bias={7: 1.5, 0: -100},
    ).sampling
    assert sampling.HasField("temperature") and sampling.HasField("seed") and sampling.HasField("max_tokens")
    assert (list(sampling.stop), list(sampling.stop_token_ids)) == (["a", "b"], [7])
    assert (sampling.top_logprobs, dict(sampling.logit_bias)) == (3, {7: 1.5, 0: -100.0})
    assert sampling.ignore_eos and sampling.logprobs and not sampling.keep_special_tokens


def test_a_grammar_arrives_in_its_form():
    schema = {"type": "string"}
    for grammar in (Grammar.json_schema(schema), Grammar.json_schema(json.dumps(schema))):
        assert generate_request(["q"], grammar=grammar).grammar.json_schema == '{"type": "string"}'
    assert generate_request(["q"], grammar=Grammar.regex("a+")).grammar.regex == "a+"
    assert generate_request(["q"], grammar=Grammar.lark("start: A")).grammar.lark == "start: A"
    assert generate_request(["q"], grammar=Grammar.json_object()).grammar.json_object
    assert not generate_request(["q"]).HasField("grammar")


def test_one_stop_text_is_not_a_list_of_letters():
    assert list(generate_request(["q"], stop="end").sampling.stop) == ["end"]


@pytest.mark.parametrize(
    ("segments", "options", "complaint"),
    [
        ("just text", {}, "segments: give a list"),
        (ChunkRef("abc"), {}, "segments: give a list"),
        ([], {}, "segments: is empty"),
        (["q"], {"logit_bias": [3]}, "logit_bias: must map"),
        (["q"], {"logit_bias": {-3: 1.0}}, "logit_bias: token id -3"),
        (["q"], {"logit_bias": {"a": 1.0}}, "logit_bias: token ids must be integers"),
        ([3], {}, r"segments\[0\]: must be a chunk"),
        (["a", None], {}, r"segments\[1\]: must be a chunk"),
        (["a", [1, "2"]], {}, r"segments\[1\]: token ids must be integers"),
        ([[1, -1]], {}, "token id -1 is not in"),
        ([[2**32]], {}, "token id 4294967296 is not in"),
        ([ChunkRef("")], {}, r"segments\[0\]: must be a chunk or its id"),
        ([b"bytes"], {}, r"segments\[0\]: must be a chunk"),
        (["q"], {"reuse": "EXACT"}, "reuse: must be one of exact, anchored, independent"),
        (["q"], {"reuse": "blend"}, "reuse: must be one of"),
        (["q"], {"cache": "none"}, "cache: must be one of"),
        (["q"], {"max_tokens": -1}, "sampling: "),
        (["q"], {"grammar": "a+"}, "grammar: must be Grammar.json_schema"),
        (["q"], {"grammar": Grammar("yaml", "a")}, "grammar: must be Grammar.json_schema"),
        (["q"], {"grammar": Grammar("regex", cast(Any, b"a"))}, "grammar: its source must be text"),
        (["q"], {"temperature": "hot"}, "sampling: "),
        ([Text("q", type="poem")], {}, "type: must be one of"),
    ],
)
def test_refused_generate_requests(segments, options, complaint):
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        generate_request(segments, **options)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert isinstance(caught.value, ValueError)


def test_a_misspelt_option_is_a_type_error():
    with pytest.raises(TypeError, match="max_token"):
        generate_request(["q"], max_token=3)  # type: ignore[call-arg]


def test_prefill_request_carries_everything():
    request = prefill_request(
        Text("hello", type="code", role="system"),
        context=[ChunkRef("a"), "b"],
        reuse="independent",
        name="n",
        tags=["x", "y"],
        ttl_s=2.5,
        pin=True,
        salt="s",
        request_id="r",
    )
    assert request == prefill_pb2.PrefillChunkRequest(
        text="hello",
        type=chunks_pb2.CHUNK_TYPE_CODE,
        context_chunk_ids=["a", "b"],
        reuse_mode=chunks_pb2.REUSE_MODE_INDEPENDENT,
        name="n",
        tags=["x", "y"],
        ttl_s=2.5,
        pin=True,
        role="system",
        salt="s",
        request_id="r",
    )


def test_an_argument_wins_over_the_part():
    request = prefill_request(Text("hello", type="code", role="system"), type="context", role="document")
    assert (request.type, request.role) == (chunks_pb2.CHUNK_TYPE_CONTEXT, "document")


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        ([1, 2], {"role": "user"}, "role: only text"),
        (ChunkRef("abc"), {"role": "user"}, "role: only text"),
        ("t", {"context": "abc"}, "context: give a list"),
        ("t", {"context": [3]}, r"context\[0\]: must be a chunk"),
        ("t", {"tags": "abc"}, "tags: give a list"),
        ("t", {"ttl_s": 0}, "ttl_s: must be positive"),
        ("t", {"ttl_s": float("nan")}, "ttl_s: must be positive"),
        ("t", {"type": "nope"}, "type: must be one of"),
    ],
)
def test_refused_prefill_requests(content, options, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        prefill_request(content, **options)


def test_list_request():
    request = list_request(type="rag_result", tag="t", name="n", order="last_used", page_size=7, page_token="p")
    assert request == prefill_pb2.ListChunksRequest(
        type=chunks_pb2.CHUNK_TYPE_RAG_RESULT,
        tag="t",
        name="n",
        order=prefill_pb2.ListChunksRequest.ORDER_LAST_USED,
        page_size=7,
        page_token="p",
    )
    with pytest.raises(InvalidRequest, match="order"):
        list_request(order="size")
    for size in (0, 1001):
        with pytest.raises(InvalidRequest, match="page_size"):
            list_request(page_size=size)


def test_chunk_names():
    assert chunk_id_of("abc") == chunk_id_of(ChunkRef("abc")) == "abc"
    with pytest.raises(InvalidRequest):
        chunk_id_of("")
