"""Answers whose pages run out, priorities and starts in time, through the real services."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import cairn
from cairn import Client
from decode_service.scheduling.sequence import Sequence
from protos import chunks_pb2, decode_pb2
from tests.decode_service.models import loaded, tokens
from tests.decode_service.packing import packing
from tests.decode_service.pair import Pair, pair, raw_status, wait_until

DOCUMENT = tokens(1, 40)
PAGE = 8


def requests() -> list[tuple[list[Any], dict[str, Any]]]:
    made: list[tuple[list[Any], dict[str, Any]]] = []
    for index in range(10):
        options: dict[str, Any] = {"max_tokens": 70 - index % 4, "priority": (0, 0, 7)[index % 3]}
        if index % 2:
            options |= {"temperature": 0.9, "seed": index, "logprobs": True}
        if index % 3 == 1:
            options |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
        made.append(([DOCUMENT, tokens(50 + index, 1 + index % 9)], options))
    return made


@pytest.mark.parametrize("packs", [False, True], ids=["pieces", "packed"])
@pytest.mark.parametrize("aside", [0, 2**30], ids=["computed again", "from host memory"])
def test_answers_are_those_of_a_large_pool(folder: Path, tmp_path: Path, aside: int, packs: bool) -> None:
    """Under ``strict``, where a row has the same bits in any step: the log-probabilities are equal, too."""
    store = tmp_path / "store"
    options: dict[str, Any] = {"page_size": PAGE, "batch_max": 8, "strict": True}

    def decode() -> Any:
        return packing(loaded(folder, "decode")) if packs else loaded(folder, "decode")

    with pair(loaded(folder, "prefill"), decode(), store, kv_pages=512, **options) as large:
        expected = large.together_each(requests())
        assert large.metric("cairn_preemptions_total") == 0
    with pair(loaded(folder, "prefill"), decode(), store, kv_pages=2 * 26, host_tails=aside, **options) as small:
        results = small.together_each(requests())
        assert small.metric("cairn_preemptions_total") == sum(result.preemptions for result in results) > 0
        for one, want in zip(results, expected, strict=True):
            assert (one.token_ids, one.finish_reason) == (want.token_ids, want.finish_reason)
            assert packs or one.logprobs == want.logprobs
            assert one.usage == want.usage or one.usage.prompt_tokens == want.usage.prompt_tokens
        made = sum(len(result.token_ids) for result in results)
        assert small.metric("cairn_generation_tokens_total") == made, "none is drawn twice"
        small.check_idle()


def test_a_turn_is_kept_whose_pages_were_given_up(folder: Path, tmp_path: Path) -> None:
    decode, store = packing(loaded(folder, "decode")), tmp_path / "store"
    with pair(loaded(folder, "prefill"), decode, store, kv_pages=80, page_size=PAGE, batch_max=6) as on:
        parts = [[DOCUMENT, tokens(90 + index, 5)] for index in range(6)]
        results = on.together(parts, 100, keep=True, seed=3)
        assert sum(result.preemptions for result in results) > 0
        for part, result in zip(parts, results, strict=True):
            assert result.kept is not None and result.kept.registered
            answer = list(result.token_ids)
            again = on.generate([DOCUMENT, cairn.ChunkRef(result.kept.id), tokens(7, 3)], 8)
            fresh = on.generate([DOCUMENT, [*part[1], *answer], tokens(7, 3)], 8, cache="bypass")
            assert again.token_ids == fresh.token_ids
        on.check_idle()


@pytest.fixture(scope="module")
def one_place(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A service that answers one request at a time."""
    store = tmp_path_factory.mktemp("turns")
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store, batch_max=1) as services:
        yield services


def begun(services: Pair, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of requests in the order in which they reach their first token."""
    order: list[str] = []
    metrics = services.decode.worker.metrics
    real = metrics.prefilled

    def prefilled(sequence: Sequence) -> None:
        order.append(sequence.request_id)
        real(sequence)

    monkeypatch.setattr(metrics, "prefilled", prefilled)
    return order


def test_the_higher_priority_goes_first_and_within_one_who_came_first(
    one_place: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = begun(one_place, monkeypatch)
    with ThreadPoolExecutor(6) as threads, one_place.held_decode():
        for count, (name, priority) in enumerate([("a", 0), ("b", 3), ("c", 9), ("d", 3), ("e", 0)], start=1):
            threads.submit(one_place.generate, [tokens(ord(name), 4)], 3, priority=priority, request_id=name)
            wait_until(lambda count=count: one_place.client.loads().waiting == count)  # type: ignore[misc]
    assert order == ["c", "b", "d", "a", "e"]
    one_place.check_idle()


def test_what_is_not_begun_in_time_fails_and_what_is_begun_goes_on(one_place: Pair) -> None:
    with one_place.client.generate([tokens(5, 4)], max_tokens=400, ignore_eos=True, start_within_s=30.0) as stream:
        next(iter(stream))
        with pytest.raises(cairn.DeadlineExceeded, match="start_within_s") as caught:
            one_place.generate([tokens(6, 4)], 3, start_within_s=0.05)
        assert "not begun in time" in str(caught.value)
    assert one_place.generate([tokens(6, 4)], 3, start_within_s=20.0).finish_reason == "length"
    assert one_place.generate([tokens(6, 4)], 3, n=2, start_within_s=20.0).finish_reason == "length"
    one_place.check_idle()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("priority", value) for value in (10, 2**32 - 1)),
        *(("start_within_s", value) for value in (-1.0, float("nan"), float("inf"), 1e9)),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "Explain"])
def test_what_is_out_of_range_is_refused_with_the_field(one_place: Pair, method: str, field: str, value: Any) -> None:
    segment = decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=[5]))
    status, details = raw_status(one_place, decode_pb2.GenerateRequest(segments=[segment], **{field: value}), method)
    assert status is grpc.StatusCode.INVALID_ARGUMENT and details.startswith(field)


@pytest.mark.parametrize(
    ("field", "value"), [("priority", 10), ("priority", -1), ("start_within_s", 0), ("start_within_s", -1.0)]
)
def test_a_client_refuses_what_no_service_takes(one_place: Pair, field: str, value: Any) -> None:
    options: dict[str, Any] = {field: value}
    with pytest.raises(cairn.InvalidRequest, match=field):
        one_place.client.generate([[5]], **options)


def test_a_priority_is_worth_nothing_among_other_tenants(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each tenant in turn, whatever they ask for; what is waited for is told to nobody else."""
    token_file = tmp_path / "tokens"
    token_file.write_text("own\nloud-token loud\nquiet-token quiet\n")
    options: dict[str, Any] = {"prefill_token": "own", "prefill_token_file": None, "token_file": token_file}
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "store", batch_max=1, **options) as on:
        at = on.prefill_address, on.decode_address
        clients = {name: Client(*at, token=f"{name}-token") for name in ("loud", "quiet")}
        operator = Client(*at, token="own")

        order = begun(on, monkeypatch)

        def ask(name: str, number: int) -> None:
            asked: dict[str, Any] = {"priority": 9 if name == "loud" else 0, "request_id": f"{name}{number}"}
            clients[name].generate([tokens(9, 4)], max_tokens=2, ignore_eos=True, **asked).finish()

        with ThreadPoolExecutor(8) as threads, on.held_decode():
            for count, name in enumerate(["loud", "loud", "loud", "quiet"], start=1):
                threads.submit(ask, name, count)
                wait_until(lambda count=count: operator.loads().waiting == count)  # type: ignore[misc]
        assert order == ["loud1", "quiet4", "loud2", "loud3"]
        for client in (*clients.values(), operator):
            client.close()
