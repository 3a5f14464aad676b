"""Where requests go: order, bounds, failures, models. No network."""

from __future__ import annotations

from collections import Counter

import pytest

from cairn.client.affinity import Affinity
from cairn.client.errors import Unsupported
from cairn.client.routing import BALANCE, LIGHT, Report, Router

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
    router.heard(1, Report(0, MODEL, "x"))
    assert [home(router, key(n)) for n in range(200)] == before


def test_a_light_load_spills_nothing_and_a_heavy_one_stays_in_bounds() -> None:
    router = Router(ADDRESSES)
    assert len({router.choose(key(7)) for _ in range(LIGHT)}) == 1
    router = Router(ADDRESSES)
    for number in range(300):
        router.choose(key(number % 2))  # two keys, three replicas
    loads = [each.own for each in router._replicas]
    assert max(loads) <= BALANCE * 100 + 1


def test_requests_without_a_key_are_spread_evenly() -> None:
    router = Router(ADDRESSES)
    for _ in range(30):
        router.choose(Affinity())
    assert [each.own for each in router._replicas] == [10, 10, 10]


def test_the_load_of_others_counts() -> None:
    router = Router(ADDRESSES)
    busy = home(router, key(3))
    for replica in range(3):
        router.heard(replica, Report(40 if replica == busy else 5, MODEL, "x"))
    assert home(router, key(3)) != busy
    router.heard(busy, Report(6, MODEL, "x"))
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
    router.heard(0, Report(0, MODEL, "x"))
    router.heard(1, Report(0, other, "y"))
    with pytest.raises(Unsupported, match=r"decode: .*a:1 serves x.*b:1 serves y"):
        router.choose(key(1))
    router.heard(1, Report(0, MODEL, "x"))
    assert home(router, key(1)) >= 0
    router.heard(2, Report(0, other, "z"))  # comes back as another one: the others go on without it
    assert 2 not in {home(router, key(n)) for n in range(50)}
    assert router.known()[2][0] == "differs" and said in router.known()[2][1]
    for replica in (0, 1):
        router.away(replica, "gone")
    router.heard(2, Report(0, other, "z"))  # nobody has the old one any more
    assert home(router, key(1)) == 2
