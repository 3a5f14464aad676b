"""OpenHandOver, and chunks that are lent with the answers of PrefillComposition: to whom, and to nobody else."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from grpc import StatusCode

from chunk_store.key import ChunkKey
from protos import prefill_pb2
from serving.handover.lent import Lent, NoSession, Offer
from serving.handover.session import NotOpened, Session, open_session
from serving.process.loading import Loaded
from tests.prefill_service.prefill_worker import DEADLINE_S, Worker, message, refusal, run, worker
from tests.prefill_service.test_prefill_composition import A, B, C, registered, walk
from tests.serving.handover.lending import same_bits

CPU = torch.device("cpu")


async def offered(w: Worker, borrower: str = "one", token: str = "") -> Offer:
    metadata = (("authorization", f"Bearer {token}"),) if token else None
    request = prefill_pb2.OpenHandOverRequest(borrower=borrower)
    reply = await w.stub.OpenHandOver(request, timeout=DEADLINE_S, metadata=metadata)
    return Offer(reply.pool, reply.socket, reply.ticket)


def opened(w: Worker, offer: Offer) -> Session:
    return open_session(offer, w.computer.served.layout, CPU)


def empty_planes(w: Worker, tokens: int) -> list[torch.Tensor]:
    pool = w.computer.residents.pool
    return [
        torch.empty(tokens, *plane.shape[1:], dtype=plane.dtype)
        for pair in zip(pool.keys, pool.values, strict=True)
        for plane in pair
    ]


async def ended(w: Worker, session: Session) -> None:
    """Closes a session, and waits until what it had borrowed is let go of."""
    session.close()
    while w.computer.residents.held:
        await asyncio.sleep(0.005)


def lent_of(reply: Any) -> Lent:
    return Lent(reply.lent.pool, reply.lent.lease, reply.lent.first_slot, reply.lent.tokens)


def test_chunks_are_lent_as_they_are_made_with_the_bits_that_the_store_has(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            session = opened(w, await offered(w))
            ids = await registered(w, A, B, C)
            made = await walk(w, chunk_ids=ids, wanted=[0, 2], borrower="one")
            for reply, content in zip(made, (A, C), strict=True):
                lent = lent_of(reply)
                assert lent.lease and lent.tokens == len(content)
                copied, stored = empty_planes(w, len(content)), empty_planes(w, len(content))
                assert session.copy(lent, copied, None) is None
                buffers = [plane.reshape(-1).view(torch.uint8).numpy().data for plane in stored]
                assert w.service.store.load(ChunkKey(reply.key), content, buffers) is None
                assert same_bits(copied, stored)
            assert w.value("cairn_hand_over_leases_total", end="returned") == 2
            await ended(w, session)

    run(body)


def test_without_a_session_or_a_borrower_nothing_is_lent(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            ids = await registered(w, A, B, C)
            (one,) = await walk(w, chunk_ids=ids, wanted=[0])
            assert not one.HasField("lent")
            (two,) = await walk(w, chunk_ids=ids, wanted=[1], borrower="nobody")
            assert two.lent.lease == 0 and two.lent.pool, "it says which pool could be opened"

    run(body)


def test_who_acts_for_one_tenant_gets_neither_a_ticket_nor_a_page_number(
    tiny: Loaded, store: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("everybody\nof-a-tenant its-salt\nadmin-of-a-tenant its-other-salt admin\n")

    async def body() -> None:
        async with worker(tiny, store, token_file=tokens) as w:
            for token in ("of-a-tenant", "admin-of-a-tenant"):
                code, words = await refusal(offered(w, token=token))
                assert code is StatusCode.PERMISSION_DENIED and "socket" not in words
            for token in ("", "wrong"):
                assert (await refusal(offered(w, token=token)))[0] is StatusCode.UNAUTHENTICATED
            session = opened(w, await offered(w, "one", "everybody"))
            for token, lends in (("of-a-tenant", False), ("everybody", True)):
                metadata = (("authorization", f"Bearer {token}"),)
                ids = []
                for content in (A, B):
                    reply = await w.stub.PrefillChunk(message(content), timeout=DEADLINE_S, metadata=metadata)
                    ids.append(reply.chunk_id)
                request = prefill_pb2.PrefillCompositionRequest(chunk_ids=ids, wanted=[1], borrower="one")
                (reply,) = [reply async for reply in w.stub.PrefillComposition(request, metadata=metadata)]
                assert reply.HasField("lent") is lends
            await ended(w, session)

    run(body)


def test_a_service_may_hand_nothing_over(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store, hand_over=False) as w:
            code, words = await refusal(offered(w))
            assert code is StatusCode.FAILED_PRECONDITION and "--hand-over" in words

    run(body)


@pytest.mark.parametrize("borrower", ["", "x" * 300])
def test_a_borrower_has_a_name(tiny: Loaded, store: Path, borrower: str) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            code, words = await refusal(offered(w, borrower))
            assert code is StatusCode.INVALID_ARGUMENT and words.startswith("borrower")

    run(body)


def test_the_socket_is_private_and_gone_at_the_end(tiny: Loaded, store: Path, tmp_path: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store, hand_over_dir=tmp_path) as w:
            offer = await offered(w)
            directory = Path(offer.socket).parent
            assert directory.parent == tmp_path
            assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
            opened(w, offer).close()
            with pytest.raises(NotOpened) as caught:
                opened(w, offer)
            assert caught.value.why is NoSession.TURNED_AWAY, "a ticket is for once"
        assert not directory.exists()
        with pytest.raises(NotOpened) as caught:
            opened(w, offer)
        assert caught.value.why is NoSession.UNREACHABLE

    run(body)


def test_where_no_socket_can_be_made_the_store_is_all_there_is(tiny: Loaded, store: Path, tmp_path: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store, hand_over_dir=tmp_path / "missing") as w:
            assert (await refusal(offered(w)))[0] is StatusCode.FAILED_PRECONDITION
            ids = await registered(w, A, B, C)
            assert len(await walk(w, chunk_ids=ids, wanted=[0, 1], borrower="one")) == 2
        assert not list(Path(tempfile.gettempdir()).glob("missing"))

    run(body)
