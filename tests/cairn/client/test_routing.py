"""Where requests go: order, bounds, failures, models; and what of a request decides it. No network."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from cairn.client.affinity import Affinity, affinity_of
from cairn.client.errors import Unsupported
from cairn.client.requests import generate_request
from cairn.client.routing import LIGHT, Router, Seen
from cairn.client.types import ChunkRef
from protos import decode_pb2

pytestmark = pytest.mark.unit

ADDRESSES = ("a:1", "b:1", "c:1")
MODEL = ("m", "t")


def key(number: int) -> Affinity:
    return Affinity(keys=(number.to_bytes(16, "little"),))


def home(router: Router, affinity: Affinity) -> int:
    """Where a request goes that is over at once."""
    chosen = router.choose(affinity)
    router.ended(chosen)
    return chosen


def test_a_key_has_one_home_which_all_clients_agree_on() -> None:
    one, other = Router(ADDRESSES), Router(tuple(reversed(ADDRESSES)))
    homes = [ADDRESSES[home(one, key(n))] for n in range(300)]
    assert homes == [tuple(reversed(ADDRESSES))[home(other, key(n))] for n in range(300)]
    assert min(Counter(homes).values()) > 70


def test_only_the_keys_of_the_dead_move() -> None:
    router = Router(ADDRESSES)
    before = [home(router, key(n)) for n in range(200)]
    router.away(1, "gone")
    after = [home(router, key(n)) for n in range(200)]
    assert 1 not in after
    assert all(now == then for now, then in zip(after, before, strict=True) if then != 1)
    assert {now for now, then in zip(after, before, strict=True) if then == 1} == {0, 2}
    router.heard(1, Seen(0, MODEL, "x"))
    assert [home(router, key(n)) for n in range(200)] == before


def test_a_light_load_spills_nothing_and_a_heavy_one_stays_in_bounds() -> None:
    router = Router(ADDRESSES)
    assert len({router.choose(key(7)) for _ in range(LIGHT)}) == 1
    router = Router(ADDRESSES)
    for number in range(300):
        router.choose(key(number % 2))  # two keys, three replicas
    loads = [each.own for each in router._replicas]
    assert max(loads) <= 1.25 * 100 + 1 and min(loads) > 40


def test_requests_without_a_key_are_spread_evenly() -> None:
    router = Router(ADDRESSES)
    for _ in range(30):
        router.choose(Affinity())
    assert [each.own for each in router._replicas] == [10, 10, 10]


def test_the_load_of_others_counts() -> None:
    router = Router(ADDRESSES)
    busy = home(router, key(3))
    for replica in range(3):
        router.heard(replica, Seen(40 if replica == busy else 5, MODEL, "x"))
    assert home(router, key(3)) != busy
    router.heard(busy, Seen(6, MODEL, "x"))
    assert home(router, key(3)) == busy


def test_what_everybody_shares_decides_nothing_under_load() -> None:
    """One system prompt, twenty documents: the documents decide, and each stays in one place."""
    router = Router(ADDRESSES)
    homes: dict[int, Counter[int]] = {}
    running: list[int] = []
    for number in range(600):
        document = number * 7 % 20
        affinity = Affinity(keys=(b"system".ljust(16), document.to_bytes(16, "little")))
        chosen = router.choose(affinity)
        running.append(chosen)
        if len(running) > 24:
            router.ended(running.pop(0))
        if number > 100:
            homes.setdefault(document, Counter())[chosen] += 1
    at_home = sum(max(each.values()) for each in homes.values())
    assert at_home > 0.85 * 499


def test_a_conversation_stays_while_its_replica_lives() -> None:
    router = Router(ADDRESSES)
    for number in range(50):
        router.answered(number % 3, [b"turn %d" % number])
    later = [Affinity(keys=key(1).keys, turns=(b"not known", b"turn %d" % n)) for n in range(50)]
    for _ in range(20):  # however busy it is
        router.choose(later[0])
    assert [home(router, each) for each in later] == [n % 3 for n in range(50)]
    router.away(0, "gone")
    assert home(router, later[0]) != 0 and home(router, later[1]) == 1


def test_nobody_known_to_be_there_is_better_asked_than_nobody() -> None:
    router = Router(ADDRESSES)
    for replica in range(3):
        router.away(replica, "gone")
    first = router.choose(key(1))
    rest = {router.choose(key(1), tried=(first,)), router.choose(key(1), tried=(0, 1, 2))}
    assert first >= 0 and -1 in rest


def test_one_that_does_not_answer_gets_nothing_new_and_then_loses_what_waits() -> None:
    router = Router(ADDRESSES)
    assert not router.missed(0, "late")
    assert 0 not in {home(router, key(n)) for n in range(50)}
    assert router.missed(0, "late")
    router.heard(0, None)
    assert 0 in {home(router, key(n)) for n in range(50)}
    assert not router.missed(0, "late")


@pytest.mark.parametrize(("other", "said"), [(("n", "t"), "model"), (("m", "u"), "tokenizer")])
def test_replicas_of_different_models_are_refused(other: tuple[str, str], said: str) -> None:
    router = Router(ADDRESSES)
    router.away(2, "gone")
    router.heard(0, Seen(0, MODEL, "x"))
    router.heard(1, Seen(0, other, "y"))
    with pytest.raises(Unsupported, match=r"decode: .*a:1 serves x.*b:1 serves y"):
        router.choose(key(1))
    router.heard(1, Seen(0, MODEL, "x"))
    assert home(router, key(1)) >= 0
    router.heard(2, Seen(0, other, "z"))  # comes back as another one: the others go on without it
    assert 2 not in {home(router, key(n)) for n in range(50)}
    assert router.known()[2][0] == "differs" and said in router.known()[2][1]
    for replica in (0, 1):
        router.away(replica, "gone")
    router.heard(2, Seen(0, other, "z"))  # nobody has the old one any more
    assert home(router, key(1)) == 2


# -- what decides --------------------------------------------------------------------------------------
def segments(*parts: Any, **options: Any) -> Affinity:
    return affinity_of(generate_request(list(parts), **options), {"big": 3000, "small": 10})


def test_the_most_expensive_chunk_comes_first() -> None:
    big, small, query = ChunkRef("big"), ChunkRef("small"), "a question"
    independent = segments(small, big, query, reuse="independent")
    assert independent.keys[0] == segments(big, query, reuse="independent").keys[0]
    assert segments(small, "w" * 40_000, query, reuse="independent").keys[0] not in independent.keys
    assert segments([1] * 50, [2] * 60, query).keys[1] == segments([1] * 50, query).keys[0]


def test_in_exact_mode_a_chunk_is_known_under_what_stands_before_it() -> None:
    big, small = ChunkRef("big"), ChunkRef("small")
    assert segments(big, small, "q").keys[0] == segments(big, "q").keys[0]
    assert segments(small, big, "q").keys[0] != segments(big, "q").keys[0]
    canonical = [segments(*order, "q", order="canonical").keys[0] for order in ((small, big), (big, small))]
    assert canonical[0] == canonical[1]


def test_the_query_decides_nothing_nor_does_what_is_not_cached() -> None:
    assert segments("q").keys == ()
    assert segments("d" * 400, "q").keys == segments("d" * 400, "r").keys != ()
    assert segments("d" * 400, "q", cache="bypass") == Affinity()


def test_tenants_share_nothing() -> None:
    request = generate_request(["d" * 400, "q"])
    assert affinity_of(request, {}, "one").keys != affinity_of(request, {}, "other").keys


def chat(*messages: tuple[str, str], tools: tuple[str, ...] = ()) -> Affinity:
    said = [
        decode_pb2.ChatMessage(role=role, content=[decode_pb2.ContentPart(text=text)] if text else [])
        for role, text in messages
    ]
    return affinity_of(decode_pb2.GenerateRequest(chat=decode_pb2.Chat(messages=said, tools=tools)), {})


SYSTEM = ("system", "You are terse. " * 50)


def test_chats_with_the_same_beginning_share_a_key_and_each_has_one_of_its_own() -> None:
    one, other = chat(SYSTEM, ("user", "Who?")), chat(SYSTEM, ("user", "When?"))
    assert one.keys[0] == other.keys[0] and one.keys[-1] != other.keys[-1]
    assert chat(SYSTEM, ("user", "Who?"), tools=('{"name": "t"}',)).keys[0] != one.keys[0]


def test_a_longer_conversation_is_known_by_the_shorter_one() -> None:
    first = chat(SYSTEM, ("user", "Who?"))
    second = chat(SYSTEM, ("user", "Who?"), ("assistant", "Tarn."), ("user", "When? " * 900))
    assert first.here[0] in second.turns and second.here[0] not in second.turns
    assert first.keys == second.keys
    assert first.here[0] not in chat(SYSTEM, ("user", "Whom?"), ("assistant", "Tarn."), ("user", "x")).turns
