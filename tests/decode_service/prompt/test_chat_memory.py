"""What is remembered of chats: chains of turns, within bounds, a tenant's own."""

from __future__ import annotations

import random
import threading

from chunk_store.key import ChunkType, pack_token_ids
from chunk_store.tenant import tenant_of
from decode_service.prompt.chat_memory import ENTRY_NBYTES, ChatMemory, KeptChat
from decode_service.prompt.chat_prompt import KeptSegment

A, B = tenant_of("a"), tenant_of("b")


def kept(before: str = "", tokens: int = 4, turns: int = 1) -> KeptChat:
    segment = KeptSegment(ChunkType.TURN, "", pack_token_ids(range(tokens)))
    return KeptChat(before, (segment,), turns, 1, text_length=0, text_digest="")


def test_a_chat_stands_on_what_it_goes_on_from() -> None:
    memory = ChatMemory()
    memory.remember(A, "1", kept(tokens=1))
    memory.remember(A, "2", kept("1", tokens=2, turns=2))
    memory.remember(A, "other 2", kept("1", tokens=3, turns=2))
    found = memory.find(A, "2")
    assert found is not None and found[0].turns == 2
    assert [len(segment.packed) // 4 for segment in found[1]] == [1, 2]
    other = memory.find(A, "other 2")
    assert other is not None and [len(segment.packed) // 4 for segment in other[1]] == [1, 3]
    assert memory.find(B, "2") is memory.find(A, "3") is memory.find(A, "") is None


def test_without_its_beginning_a_chat_is_unknown() -> None:
    one = kept().nbytes
    memory = ChatMemory(tenant_nbytes_max=2 * one)
    memory.remember(A, "1", kept())
    memory.remember(A, "2", kept("1"))
    memory.remember(A, "x", kept())  # the longer one goes before what it goes on from
    assert memory.find(A, "2") is None and memory.find(A, "1") is not None
    memory.remember(A, "lost", kept("2"))
    assert memory.find(A, "lost") is None
    memory.remember(A, "large", kept(tokens=ENTRY_NBYTES))
    assert memory.find(A, "large") is None and memory.find(A, "1") is not None


def test_of_all_tenants_whoever_holds_most_gives() -> None:
    one = kept().nbytes
    memory = ChatMemory(nbytes_max=4 * one)
    memory.remember(B, "b", kept())
    for name in "12345678":
        memory.remember(A, name, kept())
    assert memory.find(B, "b") is not None
    assert [name for name in "12345678" if memory.find(A, name) is not None] == ["6", "7", "8"]


def test_bounds_hold_whatever_is_remembered() -> None:
    one = kept().nbytes
    memory = ChatMemory(nbytes_max=9 * one, tenant_nbytes_max=6 * one)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            whose, name = rng.choice((A, B)), str(rng.randrange(12))
            before = str(rng.randrange(int(name))) if int(name) and rng.random() < 0.6 else ""
            memory.remember(whose, name, kept(before, tokens=rng.randrange(1, 40)))
            found = memory.find(whose, str(rng.randrange(12)))
            assert found is None or found[1]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = {tenant: sum(chat.nbytes for chat in chats.values()) for tenant, chats in memory._chats.items()}
    assert held == {tenant: nbytes for tenant, nbytes in memory._nbytes.items() if nbytes}
    assert sum(held.values()) <= 9 * one and max(held.values()) <= 6 * one
