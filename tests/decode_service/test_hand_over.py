"""Both services on one host: computed chunks go from pool to pool, and where they cannot, the store has the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunk_store.key import ChunkKey
from decode_service.kv_source.fetcher import KVFetcher
from serving.handover.lent import Lent
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair, wait_until

PARTS = [tokens(1, 40), tokens(2, 20), tokens(3, 33), [5]]
MODES = ("exact", "anchored", "independent")


def source(services: Pair) -> KVFetcher:
    return services.decode.worker.loader.source


def connected(services: Pair) -> Pair:
    """The services, once decode has the other's pool open."""
    borrower = source(services).borrower
    assert borrower is not None
    wait_until(lambda: borrower.lenders == 1)
    return services


def borrowed(services: Pair, outcome: str = "borrowed") -> float:
    return services.metric("cairn_hand_over_chunks_total", outcome=outcome)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    """What the same requests give without hand-over."""
    prefill, decode = loaded(folder, "prefill"), loaded(folder, "decode")
    with pair(prefill, decode, tmp_path_factory.mktemp("s"), hand_over=False, of_prefill={"hand_over": False}) as both:
        found = {mode: tuple(both.generate(PARTS, reuse=mode).token_ids) for mode in MODES}
        assert "cairn_hand_over_chunks" not in {family.name for family in both.decode.registry.collect()}
    return found


def test_what_was_computed_comes_from_the_pool_with_the_same_answer(
    folder: Path, store: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store) as services:
        connected(services)
        for mode in MODES:
            result = services.generate(PARTS, reuse=mode)
            assert tuple(result.token_ids) == expected[mode]
            assert result.reuse.segments[2].source == "computed"
            services.forget()
            again = services.generate(PARTS, reuse=mode)  # from the store, where the same bytes are
            assert tuple(again.token_ids) == expected[mode] and again.usage.cached_tokens > 0
        assert borrowed(services) >= 3 + 2
        wait_until(lambda: services.metric("cairn_hand_over_leases_total", "prefill", end="returned") >= 3 + 2)
        assert services.metric("cairn_store_reads_total", outcome="verify_failed") == 0
        services.check_idle()


def copy_fails(lent: Lent, planes: Any, **_: Any) -> None:
    raise RuntimeError("CUDA has lost the other's memory")


def lease_lost(services: Pair) -> None:
    """What is lent is called back at once."""
    lender = services.prefill.lender
    lend = lender.lend

    def lost(borrower: str, chunk: Any) -> Lent:
        lent = lend(borrower, chunk)
        lender.call_back()
        return lent

    lender.lend = lost


def not_lent(services: Pair) -> None:
    services.prefill.lender._leases._leases_max = 0


def wrong_slots(services: Pair) -> None:
    lend = services.prefill.lender.lend

    def wrong(borrower: str, chunk: Any) -> Lent:
        lent = lend(borrower, chunk)
        return Lent(lent.pool, lent.lease, 1 << 40, lent.tokens)

    services.prefill.lender.lend = wrong


def session_gone(services: Pair) -> None:
    (session,) = source(services).borrower._sessions.values()
    session._connection.shutdown(2)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (lease_lost, "lease_lost"),
        (not_lent, "not_lent"),
        (wrong_slots, "not_copied"),
        (session_gone, "no_session"),
    ],
)
def test_where_a_chunk_cannot_be_taken_over_the_store_has_the_same(
    folder: Path, store: Path, expected: dict[str, tuple[int, ...]], trouble: Callable[[Pair], None], reason: str
) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store) as services:
        connected(services)
        trouble(services)
        result = services.generate(PARTS)
        assert tuple(result.token_ids) == expected["exact"]
        assert borrowed(services, reason) >= 1
        services.check_idle()


def test_a_session_that_was_lost_is_opened_again(folder: Path, store: Path) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store) as services:
        connected(services)
        session_gone(services)
        services.generate([tokens(7, 20), [5]])
        before = borrowed(services)
        for number in range(20):
            services.generate([tokens(100 + number, 20), [5]])
            if borrowed(services) > before:
                break
            connected(services)
        assert borrowed(services) > before
        services.check_idle()


@pytest.mark.parametrize(("of_decode", "of_prefill", "outcome"), [(True, False, "off"), (False, True, "")])
def test_one_side_may_want_none_of_it(
    folder: Path, store: Path, expected: dict[str, tuple[int, ...]], of_decode: bool, of_prefill: bool, outcome: str
) -> None:
    options: dict[str, Any] = {"hand_over": of_decode, "of_prefill": {"hand_over": of_prefill}}
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store, **options) as services:
        assert tuple(services.generate(PARTS).token_ids) == expected["exact"]
        if outcome:
            wait_until(lambda: services.metric("cairn_hand_over_sessions_total", outcome=outcome) >= 1)
            assert borrowed(services) == 0
        services.check_idle()


def test_pages_of_another_size_are_no_hindrance(
    folder: Path, store: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    options: dict[str, Any] = {"page_size": 4, "kv_pages": 1024}
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store, of_prefill=options) as services:
        connected(services)
        assert tuple(services.generate(PARTS).token_ids) == expected["exact"]
        assert borrowed(services) == 3
        services.check_idle()


def test_a_pool_that_is_full_of_what_is_lent_computes_on(
    folder: Path, store: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    """Leases that nobody gives back do not keep others waiting."""
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store, of_prefill={"kv_pages": 8}) as services:
        connected(services)
        borrower = source(services).borrower
        copy, kept = borrower.copy, []

        def keep(lent: Lent, planes: Any, **options: Any) -> Any:
            kept.append(ChunkKey("kept"))
            return borrower._copy(Lent(lent.pool, 0, 0, lent.tokens), planes, None)

        borrower.copy = keep
        for number in range(4):
            services.generate([tokens(200 + number, 100), [5]])
        borrower.copy = copy
        assert tuple(services.generate(PARTS).token_ids) == expected["exact"]
        assert len(kept) >= 4
        assert services.metric("cairn_hand_over_leases_total", "prefill", end="recalled") >= 3


def test_tokens_of_one_tenant_borrow_nothing(folder: Path, store: Path, tmp_path: Path) -> None:
    tokens_file = tmp_path / "tokens"
    tokens_file.write_text("everybody\nof-a-tenant its-salt\n")
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store, token_file=tokens_file) as services:
        connected(services)
        assert services.metric("cairn_hand_over_sessions_total", outcome="opened") == 1
    salted: dict[str, Any] = {"prefill_token_file": None, "prefill_token": "of-a-tenant"}
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store, token_file=tokens_file, **salted) as services:
        wait_until(lambda: services.metric("cairn_hand_over_sessions_total", outcome="not_allowed") >= 1)


def test_what_the_store_has_no_room_for_is_handed_over_all_the_same(
    folder: Path, store: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store, store_capacity=4096) as services:
        connected(services)
        result = services.generate(PARTS)
        assert tuple(result.token_ids) == expected["exact"]
        assert borrowed(services) == 3 and services.metric("cairn_unpublished_chunks_total") == 0
        services.check_idle()
