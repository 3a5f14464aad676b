"""What cannot be answered ends with a clear status that names the field; nothing is lost by it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from transformers import AutoTokenizer

import cairn
from cairn import Client
from cairn.client.requests import generate_request
from chunk_store.tenant import DEFAULT_TENANT, Tenant
from protos import chunks_pb2, decode_pb2
from serving.errors import Overloaded
from serving.rpc.details import retry_after_s
from tests import oracle
from tests.decode_service.models import CONTEXT_LENGTH, loaded, model_dir, oracle_model, tokens
from tests.decode_service.pair import Pair, pair, wait_until
from tests.decode_service.pair import raw_status as raw
from tests.tokenizer_for_tests import VOCABULARY

Code = grpc.StatusCode


def segment(**fields: Any) -> decode_pb2.Segment:
    if "ids" in fields:
        fields["token_ids"] = chunks_pb2.TokenIds(ids=fields.pop("ids"))
    return decode_pb2.Segment(**fields)


BAD_SEGMENTS = {
    "none at all": ([], Code.INVALID_ARGUMENT, "segments: at least one"),
    "no content": ([segment()], Code.INVALID_ARGUMENT, "segments[0]: give one of"),
    "empty query": ([segment(text="")], Code.INVALID_ARGUMENT, "segments[0]: the query is empty"),
    "empty chunk": ([segment(ids=[]), segment(ids=[5])], Code.INVALID_ARGUMENT, "segments[0]: it is empty"),
    "unknown id": ([segment(chunk_id="0" * 64), segment(ids=[5])], Code.NOT_FOUND, "segments[0].chunk_id"),
    "not an id": ([segment(chunk_id="no\n"), segment(ids=[5])], Code.NOT_FOUND, "segments[0].chunk_id"),
    "outside the vocabulary": ([segment(ids=[VOCABULARY])], Code.INVALID_ARGUMENT, f"token id {VOCABULARY}"),
    "a token id of 32 bits": ([segment(ids=[2**32 - 1])], Code.INVALID_ARGUMENT, "token id 4294967295"),
    "unknown type": ([segment(ids=[5], type=77)], Code.INVALID_ARGUMENT, "type: 77"),
    "unknown role": ([segment(text="x", role="pirate")], Code.INVALID_ARGUMENT, "segments[0].role"),
    "too long": ([segment(ids=[5] * CONTEXT_LENGTH)], Code.INVALID_ARGUMENT, "no room for an answer"),
    "too many": ([segment(ids=[5])] * 1025, Code.INVALID_ARGUMENT, "segments: 1025"),
}


@pytest.mark.parametrize("method", ["Generate", "Explain"])
@pytest.mark.parametrize("name", BAD_SEGMENTS)
def test_bad_segments(services: Pair, name: str, method: str) -> None:
    segments, code, words = BAD_SEGMENTS[name]
    if (name, method) == ("too long", "Explain"):
        pytest.skip("Explain generates nothing and needs no room for an answer")
    found = raw(services, decode_pb2.GenerateRequest(segments=segments), method)
    assert found[0] is code and words in found[1], found


BAD_SAMPLING: dict[str, Any] = {
    "temperature": [-0.1, float("nan"), float("inf")],
    "top_p": [0.0, 1.1, float("nan")],
    "min_p": [-0.1, 1.5],
    "frequency_penalty": [3.0],
    "presence_penalty": [-3.0],
    "repetition_penalty": [0.0, -1.0],
    "max_tokens": [0, CONTEXT_LENGTH],
    "min_tokens": [129],
    "seed": [2**63],
    "stop": [[""], ["x"] * 17],
    "stop_token_ids": [[VOCABULARY]],
}


@pytest.mark.parametrize("field", BAD_SAMPLING)
def test_bad_sampling_fields(services: Pair, field: str) -> None:
    for value in BAD_SAMPLING[field]:
        sampling = decode_pb2.SamplingParams(**cast(Any, {field: value}))
        found = raw(services, decode_pb2.GenerateRequest(segments=[segment(ids=[5])], sampling=sampling))
        assert found[0] is Code.INVALID_ARGUMENT and f"sampling.{field}" in found[1], (value, found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_sampling_field_that_is_no_number(services: Pair, value: float) -> None:
    floats = [name for name, field in decode_pb2.SamplingParams.DESCRIPTOR.fields_by_name.items() if field.type == 2]
    assert len(floats) == 6
    for field in floats:
        sampling = decode_pb2.SamplingParams(**cast(Any, {field: value}))
        found = raw(services, decode_pb2.GenerateRequest(segments=[segment(ids=[5])], sampling=sampling))
        assert found[0] is Code.INVALID_ARGUMENT and f"sampling.{field}" in found[1], found


def test_a_minimum_that_no_token_can_reach(services: Pair) -> None:
    request = decode_pb2.GenerateRequest(segments=[segment(ids=[5])])
    request.sampling.stop_token_ids.extend(range(VOCABULARY))
    request.sampling.max_tokens = request.sampling.min_tokens = 3
    for temperature in (0.0, 1.0):
        request.sampling.temperature = temperature
        found = raw(services, request)
        assert found[0] is Code.INVALID_ARGUMENT and "sampling.min_tokens" in found[1], found
    assert services.generate([[5]], 3, stop_token_ids=range(VOCABULARY)).finish_reason == "stop"


def test_extreme_penalties_have_an_answer(services: Pair) -> None:
    for penalty, temperature, top_p in ((1e-38, 1.0, 0.9), (1e-45, 1e-45, 1e-45), (100.0, 100.0, 1.0)):
        sampling = {"repetition_penalty": penalty, "temperature": temperature, "top_p": top_p}
        answer = services.generate([[5, 6], [7]], 4, **sampling)
        assert len(answer.token_ids) == 4


def test_other_bad_fields(services: Pair) -> None:
    query = [segment(ids=[5])]
    assert (
        raw(services, decode_pb2.GenerateRequest(segments=query, reuse_mode=cast(Any, 4)))[0] is Code.INVALID_ARGUMENT
    )
    found = raw(services, decode_pb2.GenerateRequest(segments=query, request_id="x" * 257))
    assert found[0] is Code.INVALID_ARGUMENT and "request_id" in found[1]
    found = raw(services, decode_pb2.GenerateRequest(segments=query, salt="x" * 257))
    assert found[0] is Code.INVALID_ARGUMENT and "salt" in found[1]
    huge = decode_pb2.GenerateRequest(segments=[segment(text="a" * (17 << 20))])
    assert raw(services, huge)[0] is Code.RESOURCE_EXHAUSTED


def test_a_request_id_that_is_running(services: Pair) -> None:
    with services.client.generate([[5]], max_tokens=1000, ignore_eos=True, request_id="mine") as stream:
        next(stream)
        with pytest.raises(cairn.Conflict, match="mine"):
            services.generate([[5]], request_id="mine")
    wait_until(lambda: services.client.loads().running == 0)
    assert services.generate([[5]], request_id="mine").request_id == "mine"


def test_the_longest_answer_that_fits(services: Pair) -> None:
    prompt = tokens(1, CONTEXT_LENGTH - 3)
    assert len(services.generate([prompt], 3).token_ids) == 3
    with pytest.raises(cairn.InvalidRequest, match="at most 3 are left"):
        services.generate([prompt], 4)


def test_queue_and_pool_are_bounded(folder: Path, tmp_path: Path) -> None:
    with pair(
        loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", kv_pages=20, waiting_max=2, batch_max=1
    ) as services:
        with pytest.raises(cairn.Unsupported, match="segments: their chunks need 11 pages"):
            services.generate([tokens(2, 161), [5]])
        with pytest.raises(cairn.Unsupported, match=r"sampling.max_tokens: query and answer need 11 pages"):
            services.generate([[5]], 170)
        with ThreadPoolExecutor(2) as threads, services.held_decode():
            futures = [threads.submit(services.generate, [[5 + n]]) for n in range(2)]
            wait_until(lambda: services.client.loads().waiting == 2)
            with pytest.MonkeyPatch.context() as patched:
                patched.delattr(services.decode, "resolver")  # refused before anything is done for it
                with pytest.raises(grpc.RpcError) as caught:  # the client would come again
                    next(services.client._services["decode"].stubs[0].Generate(generate_request([[5]]), timeout=60))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "2 requests are waiting" in caught.value.details()
            assert (retry_after_s(caught.value.trailing_metadata()) or 0.0) >= 0.5
        assert all(future.result(60).token_ids for future in futures)
        services.check_idle()


def test_the_client_comes_again_when_it_was_told_to(folder: Path, tmp_path: Path) -> None:
    with pair(
        loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", waiting_max=1, batch_max=1
    ) as services:
        take, refused = services.decode.worker.take_place, threading.Event()

        def noted(tenant: Tenant = DEFAULT_TENANT, answers: int = 1) -> None:
            try:
                take(tenant, answers)
            except Overloaded:
                refused.set()
                raise

        services.decode.worker.take_place = noted
        with ThreadPoolExecutor(2) as threads:
            with services.held_decode():
                futures = [threads.submit(services.generate, [[5 + n]]) for n in range(2)]
                assert refused.wait(20)
            assert all(future.result(60).token_ids for future in futures)
        services.check_idle()


def test_modes_that_the_model_does_not_allow(tmp_path: Path) -> None:
    folder = model_dir(tmp_path / "gpt2", "gpt2-learned-positions")
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s") as services:
        chunk, query = tokens(3, 20), tokens(4, 5)
        expected, _ = oracle.greedy(oracle_model(folder), [chunk], query, "exact", 5)
        assert list(services.generate([chunk, query], 5).token_ids) == expected
        modes = {mode.mode: mode for mode in services.client.loads().modes}
        for mode in ("anchored", "independent"):
            assert not modes[mode].supported
            with pytest.raises(cairn.Unsupported) as caught:
                services.generate([chunk, query], reuse=mode)
            assert modes[mode].reason in caught.value.message and "use exact" in caught.value.message


def test_a_shortened_context_is_named_with_its_reason(tmp_path: Path) -> None:
    folder = model_dir(tmp_path / "phi3", "phi3-longrope")
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s") as services:
        loads = services.client.loads()
        assert (loads.context_length_max, loads.context_length_declared) == (256, 512)
        assert "longrope takes other frequencies" in loads.context_length_reason
        assert {mode.context_length_max for mode in loads.modes if mode.supported} == {256}
        said = f"256 of 512 tokens, because {loads.context_length_reason}"
        for ask in (
            lambda: services.generate([tokens(3, 120), tokens(4, 140)], 5),
            lambda: services.generate([tokens(3, 120), tokens(4, 120)], 20),
            lambda: services.client.prefill(tokens(5, 257)),
        ):
            with pytest.raises(cairn.InvalidRequest) as caught:
                ask()
            assert said in caught.value.message


def test_a_chunk_of_another_tokenizer(services: Pair, store: Path, tmp_path: Path) -> None:
    folder = model_dir(tmp_path / "other", "qwen3-ratio2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["cairnstone"])
    tokenizer.save_pretrained(folder)
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store) as other:
        theirs = other.client.prefill("A heap of stones.")
    with pytest.raises(cairn.Unsupported, match="tokenizer"):
        services.generate([theirs, [5]])


def test_a_prefill_service_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = model_dir(tmp_path / "other", seed=5)
    with pair(loaded(other, "prefill"), loaded(folder, "decode"), tmp_path / "s") as services:
        with pytest.raises(cairn.Unsupported, match="another model identity"):
            services.generate([tokens(5, 20), [5]])
        assert services.generate([tokens(5, 20), [5]], cache="bypass").token_ids
        services.check_idle()


def test_a_prefill_service_in_another_dtype(folder: Path, tmp_path: Path) -> None:
    """What two machines do on which auto chose differently: nothing is mixed, and the error says what to give."""
    prefill, decode = loaded(folder, "prefill", dtype="bfloat16"), loaded(folder, "decode")
    with pair(prefill, decode, tmp_path / "s") as services:
        services.client.prefill(tokens(5, 20))
        with pytest.raises(cairn.Unsupported, match=r"dtype.* a --dtype or --attention if auto chose differently"):
            services.generate([tokens(5, 20), [5]])
        loads = services.client.loads()
        assert (loads.dtype, loads.dtype_reason) == ("float32", "the checkpoint's own")
        assert (loads.attention, loads.attention_reason) == ("torch", "the device is cpu")


def test_salts_keep_tenants_apart(services: Pair) -> None:
    parts = [tokens(6, 20), [5]]
    first = services.generate(parts, salt="a")
    other = services.generate(parts, salt="b")
    again = services.generate(parts, salt="b")
    assert [r.reuse.segments[0].source for r in (first, other, again)] == ["computed", "computed", "device"]
    assert other.reuse.segments[0].miss_reason == "not_stored"
    assert first.token_ids == other.token_ids == again.token_ids


def test_the_salt_of_a_token_wins_over_what_is_asked_for(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("services-word\nword-of-a salt-a\nword-of-b salt-b\n")
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", token_file=file) as services:
        addresses = services.prefill_address, services.decode_address
        services.client.close()
        services.client = Client(*addresses, token="services-word", timeout_s=20)
        parts, sources = [tokens(7, 20), [5]], []
        for word, salt in (("word-of-a", "salt-b"), ("word-of-b", "salt-b"), ("word-of-b", ""), ("word-of-a", "")):
            with Client(*addresses, token=word, timeout_s=20) as client:
                sources.append(client.generate(parts, salt=salt, max_tokens=2).finish().reuse.segments[0].source)
        assert sources == ["computed", "computed", "device", "device"]
        with (
            Client(*addresses, token="word-of-a", timeout_s=20) as one,
            Client(*addresses, token="word-of-b", timeout_s=20) as other,
            one.generate([[5]], max_tokens=150, ignore_eos=True, request_id="of-a") as stream,
        ):
            next(iter(stream))
            assert not other.abort("of-a")
            assert len(stream.finish().token_ids) == 150
        for token in (None, "wrong"):
            with Client(*addresses, token=token, timeout_s=20) as client, pytest.raises(cairn.Unauthorized):
                client.generate(parts).finish()
        services.check_idle()
