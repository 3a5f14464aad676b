"""What is remembered of content: up to a bound, the newest, and each tenant its own."""

from __future__ import annotations

from chunk_store.key import ChunkId, ChunkKey
from chunk_store.tenant import SHARED_TENANT, Tenant, tenant_of
from decode_service.prompt.memory import KeyMemory, RecordMemory
from tests.decode_service.prompt.test_resolver import MINE, record


def test_memory_holds_the_newest_up_to_its_tokens() -> None:
    memory = RecordMemory(5)
    old, new, large = record(1, 1), record(2, 2, 2), record(*[3] * 6)
    for each in (old, new, large):
        memory.remember(MINE, each.chunk_id, each)
    assert memory.find(MINE, old.chunk_id) == old and memory.find(MINE, large.chunk_id) is None
    assert memory.find(Tenant("other"), old.chunk_id) is None
    memory.remember(MINE, old.chunk_id, old)
    memory.remember(MINE, ChunkId("one more"), record(4))
    assert memory.find(MINE, new.chunk_id) is None and memory.find(MINE, old.chunk_id) == old
    memory.remember(MINE, old.chunk_id, None)
    assert memory.find(MINE, old.chunk_id) is None
    memory.remember(MINE, new.chunk_id, new)
    assert memory.find(MINE, ChunkId("one more")) is not None, "what was forgotten takes no room"


def test_a_shared_record_is_remembered_once_for_all_and_an_own_one_for_its_tenant() -> None:
    memory, yours = RecordMemory(100), tenant_of("yours")
    own, everybodys = record(1, 1), record(2, 2, tenant=SHARED_TENANT)
    memory.remember(MINE, own.chunk_id, own)
    memory.remember(MINE, everybodys.chunk_id, everybodys)
    assert memory.find(yours, own.chunk_id) is None and memory.find(yours, everybodys.chunk_id) == everybodys
    mine_too = record(2, 2)
    memory.remember(MINE, mine_too.chunk_id, mine_too)
    assert memory.find(MINE, mine_too.chunk_id) == mine_too, "the tenant's own first, as in the store"
    memory.remember(MINE, mine_too.chunk_id, everybodys)
    assert memory.find(MINE, mine_too.chunk_id) == everybodys, "its own is gone"
    memory.remember(yours, everybodys.chunk_id, None)
    assert memory.find(MINE, everybodys.chunk_id) is None


def test_what_is_worked_out_has_a_bound() -> None:
    memory, made = KeyMemory(3), list[int]()

    def key(number: int) -> ChunkKey:
        def make() -> ChunkKey:
            made.append(number)
            return ChunkKey(str(number))

        return memory.key(ChunkId(str(number)), [], "", make)

    for number in (1, 2, 3, 1, 4, 1, 2):  # 2 goes for 4, which came when 1 had been used again
        assert key(number) == str(number)
    assert made == [1, 2, 3, 4, 2] and len(memory._keys) == 3
