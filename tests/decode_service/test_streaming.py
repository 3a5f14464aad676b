"""What a stream shows: text, stops, log-probabilities, seeds; and the life of the service around it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import cairn
from cairn import ChunkRef, Result, Text
from protos import decode_pb2
from tests import oracle
from tests.decode_service.models import loaded, oracle_model, tokens
from tests.decode_service.pair import Pair, pair, raw_status, servers, wait_until
from tests.tokenizer_for_tests import byte_level_tokenizer

DOCUMENT, QUERY = tokens(1, 30), tokens(2, 7)


@pytest.fixture(scope="module")
def plain(running: Pair) -> Result:
    """A long answer of random bytes: full of characters that take several tokens, or never come about."""
    return running.generate([DOCUMENT, QUERY], 200)


def test_deltas_add_up_to_the_text_of_all_tokens(services: Pair, plain: Result) -> None:
    for sampling in ({}, {"temperature": 3.0, "seed": 1}, {"temperature": 3.0, "seed": 2, "keep_special_tokens": True}):
        stream = services.client.generate([DOCUMENT, QUERY], max_tokens=200, ignore_eos=True, **cast(Any, sampling))
        deltas = list(stream)
        ids = [token for delta in deltas for token in delta.token_ids]
        assert len(ids) == 200 and ids == list(stream.result.token_ids)
        expected = byte_level_tokenizer().decode(ids, skip_special_tokens="keep_special_tokens" not in sampling)
        assert "".join(delta.text for delta in deltas) == expected
    assert len(deltas) > 20


def test_characters_of_several_tokens_come_whole(services: Pair) -> None:
    """The answer is steered to the bytes of a word: each character appears at once, and complete."""
    word = "Čaj ☕ 茶 🍵!"
    ids = byte_level_tokenizer().encode(word, add_special_tokens=False)
    codec = services.decode.resolver.codec
    stream = codec.stream()
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == word
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_strings_across_token_borders_are_never_shown(services: Pair, plain: Result) -> None:
    draw = random.Random(5)
    text = plain.text
    starts = [draw.randrange(10, len(text) - 12) for _ in range(8)]
    for start in starts:
        stop = text[start : start + draw.randint(1, 9)]
        if "\ufffd" in stop:
            continue
        stream = services.client.generate(
            [DOCUMENT, QUERY], max_tokens=200, ignore_eos=True, stop=[stop, "never there"]
        )
        shown = "".join(delta.text for delta in stream)
        assert shown == text[: text.index(stop)] == stream.result.text
        assert stream.result.finish_reason == "stop"
        assert stream.result.usage.completion_tokens == len(stream.result.token_ids) <= 200
        assert stream.result.token_ids == plain.token_ids[: len(stream.result.token_ids)]


def test_what_only_began_like_a_stop_string_is_shown_in_the_end(services: Pair, plain: Result) -> None:
    result = services.generate([DOCUMENT, QUERY], 200, stop=[plain.text[-3:] + "and more"])
    assert (result.text, result.finish_reason) == (plain.text, "length")


def test_stop_tokens_min_tokens_and_eos(services: Pair, plain: Result) -> None:
    ids = plain.token_ids
    at = next(n for n in range(5, 100) if ids[n] not in ids[:n])
    stopped = services.generate([DOCUMENT, QUERY], 200, stop_token_ids=[ids[at]])
    assert (stopped.token_ids, stopped.finish_reason) == (ids[: at + 1], "stop")
    longer = services.generate([DOCUMENT, QUERY], at + 9, stop_token_ids=[ids[at]], min_tokens=at + 5)
    assert longer.token_ids[:at] == ids[:at] and len(longer.token_ids) >= at + 5
    assert ids[at] not in longer.token_ids[: at + 5]
    ended = [
        services.generate([DOCUMENT, QUERY], 400, temperature=2.0, seed=seed, ignore_eos=False) for seed in range(4)
    ]
    assert any(result.finish_reason == "stop" for result in ended)
    for result in ended:
        assert (result.finish_reason == "stop") == (result.token_ids[-1] == 1)
        assert 1 not in result.token_ids[:-1]
    ignored = services.generate([DOCUMENT, QUERY], 400, temperature=2.0, seed=0)
    assert len(ignored.token_ids) == 400


def test_a_stop_string_waits_for_min_tokens(services: Pair, plain: Result) -> None:
    stop = plain.text[6:9]
    early = services.generate([DOCUMENT, QUERY], 60, stop=[stop])
    assert len(early.token_ids) < 30
    late = services.generate([DOCUMENT, QUERY], 60, stop=[stop], min_tokens=30)
    assert len(late.token_ids) >= 30


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_are_the_oracles(services: Pair, folder: Path, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "seed": 3}
    result = services.generate([DOCUMENT, QUERY], 6, logprobs=True, top_logprobs=4, **options)
    ids = list(result.token_ids)
    logits = oracle.logits(oracle_model(folder), [DOCUMENT], QUERY + ids[:-1], "exact")[-6:]
    expected = logits.log_softmax(-1)[range(6), ids].tolist()
    assert result.logprobs == pytest.approx(expected, abs=1e-4)
    assert all(math.isfinite(value) for value in result.logprobs)
    likeliest = logits.log_softmax(-1).topk(4)
    for found, values, ids in zip(result.top_logprobs, likeliest.values, likeliest.indices, strict=True):
        assert [value for _, value in found] == pytest.approx(values.tolist(), abs=1e-4)
        assert [token for token, _ in found] == ids.tolist()
    plain = services.generate([DOCUMENT, QUERY], 6, **options)
    assert not plain.logprobs and not plain.top_logprobs


def test_a_bias_bans_a_token_or_forces_it(services: Pair, plain: Result) -> None:
    first = plain.token_ids[0]
    banned = services.generate([DOCUMENT, QUERY], 20, logit_bias={first: -100.0}, ignore_eos=True)
    assert first not in banned.token_ids
    forced = services.generate([DOCUMENT, QUERY], 5, logit_bias={first: 100.0}, ignore_eos=True)
    assert forced.token_ids == (first,) * 5


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"logit_bias": {1 << 20: 1.0}}, "sampling.logit_bias: 1048576 is outside the model's vocabulary"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.5)}, "sampling.logit_bias"),
        ({"logit_bias": {5: 101.0}}, "sampling.logit_bias"),
        ({"stop_token_ids": [1 << 20]}, "sampling.stop_token_ids: 1048576 is outside"),
        ({"logprobs": True, "top_logprobs": 21}, "sampling.top_logprobs: 21"),
        ({"top_logprobs": 3}, "sampling.top_logprobs: 3 must be 0 without logprobs"),
    ],
)
def test_what_sampling_refuses_names_the_field(services: Pair, options: dict[str, Any], field: str) -> None:
    with pytest.raises(cairn.InvalidRequest, match=field):
        services.generate([QUERY], **options)


def test_twenty_likeliest_tokens_and_their_probabilities(services: Pair) -> None:
    result = services.generate([DOCUMENT, QUERY], 5, logprobs=True, top_logprobs=20)
    assert [len(top) for top in result.top_logprobs] == [20] * 5
    for token, logprob, top in zip(result.token_ids, result.logprobs, result.top_logprobs, strict=True):
        assert top[0] == (token, logprob) and [value for _, value in top] == sorted((v for _, v in top), reverse=True)


def test_a_seed_repeats_an_answer_and_another_does_not(services: Pair) -> None:
    def draw(**options: Any) -> Result:
        return services.generate([DOCUMENT, QUERY], 20, temperature=1.0, **options)

    free = draw()
    assert draw(seed=free.seed).token_ids == free.token_ids
    assert len({draw(seed=seed).token_ids for seed in range(5)}) == 5
    assert (
        services.together([[DOCUMENT, QUERY]] * 9, 20, temperature=1.0, seed=free.seed)[4].token_ids == free.token_ids
    )


@pytest.mark.parametrize("mode", ["exact", "anchored", "independent"])
def test_explain_agrees_with_generate(services: Pair, mode: str) -> None:
    draw = random.Random(mode)
    documents = [tokens(100 + draw.randrange(10**6), draw.choice((1, 16, 30))) for _ in range(3)]
    query = services.client.prefill(tokens(200, 12))
    for round in range(8):
        parts = [*draw.choices(documents, k=draw.randint(0, 3)), query if round % 2 else QUERY]
        if round == 5:
            services.forget()
        said = services.client.explain(parts, reuse=mode)
        done = services.generate(parts, 3, reuse=mode)
        usage = done.usage
        assert (said.prompt_tokens, said.cached_tokens, said.computed_tokens) == (
            *(usage.prompt_tokens, usage.cached_tokens),
            usage.computed_tokens,
        )
        for expected, found in zip(said.reuse.segments, done.reuse.segments, strict=True):
            names = ("chunk_id", "tokens", "cached_tokens", "source", "miss_reason", "exactness", "offset", "type")
            assert [getattr(expected, name) for name in names] == [getattr(found, name) for name in names]
        assert said.reuse.exactness == done.reuse.exactness


def test_an_unknown_chunk_in_explain(services: Pair) -> None:
    with pytest.raises(cairn.NotFound):
        services.client.explain([ChunkRef("f" * 64), QUERY])


def test_roles_render_turns(services: Pair) -> None:
    parts = [Text("Short.", role="system"), Text("Where?", role="user")]
    result = services.generate(parts, 2)
    template = "<|system|>Short.<end><|user|>Where?<end><|assistant|>"
    assert result.usage.prompt_tokens == len(byte_level_tokenizer().encode(template, add_special_tokens=False))


def test_health_and_reflection(services: Pair) -> None:
    with grpc.insecure_channel(services.decode_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "cairn.v1.DecodeService"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol="cairn.v1.DecodeService")
        reply = next(stub.ServerReflectionInfo(iter([ask]), timeout=5))
        assert reply.file_descriptor_response.file_descriptor_proto


@pytest.fixture
def draining(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s") as services:
        yield services


def test_draining_lets_running_streams_finish_and_refuses_new_ones(draining: Pair) -> None:
    stream = draining.client.generate([DOCUMENT, QUERY], max_tokens=1500, ignore_eos=True)
    next(stream)
    with ThreadPoolExecutor(1) as threads:
        drained = threads.submit(servers().run, draining.decode_server.drain(30.0))
        wait_until(lambda: draining.decode_server.gate._closed_because != "")
        status = raw_status(draining, decode_pb2.GenerateRequest(segments=[decode_pb2.Segment(text="x")]))
        assert status[0] is grpc.StatusCode.UNAVAILABLE and "shutting down" in status[1]
        assert len(stream.finish().token_ids) == 1500
        assert drained.result(30)


def test_stopping_the_worker_ends_running_streams(draining: Pair) -> None:
    stream = draining.client.generate([DOCUMENT, QUERY], max_tokens=1500, ignore_eos=True)
    next(stream)
    draining.decode.worker.stop()
    with pytest.raises(cairn.Unavailable, match="shutting down"):
        stream.finish()
