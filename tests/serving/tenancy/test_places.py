"""Places and turns of tenants."""

from __future__ import annotations

import pytest

from chunk_store.tenant import Tenant
from serving.tenancy.places import Places, PlacesFull, Rotation, TenantPlaces
from serving.tenancy.quotas import Quotas, TenantQuotas

A, B, C = (Tenant(name) for name in "abc")


def test_a_flood_refuses_itself_only() -> None:
    places = Places(4)
    for _ in range(4):
        places.take(A)
    with pytest.raises(PlacesFull):
        places.take(A)
    places.take(B)
    places.take(B)
    with pytest.raises(PlacesFull):
        places.take(B)  # it has its share
    places.take(C)
    for number in range(places.most * 2 - places.taken):
        places.take(Tenant(f"t{number}"))
    with pytest.raises(PlacesFull):
        places.take(Tenant("one too many"))
    for _ in range(4):
        places.leave(A)
    assert places.of(A) == 0 and places.taken == 4


@pytest.mark.parametrize(
    ("quotas", "taken", "named"),
    [
        (Quotas(running=2), 2, "quota running: .* 2"),
        (Quotas(running=2, waiting=3), 5, "quota waiting: .* 3"),
        (Quotas(waiting=3), 3, "quota waiting: .* 3"),
    ],
)
def test_quotas_of_requests(quotas: Quotas, taken: int, named: str) -> None:
    places = TenantPlaces(100, TenantQuotas({A: quotas}))
    for _ in range(taken):
        places.take(A)
    with pytest.raises(PlacesFull, match=named):
        places.take(A)
    places.take(B)
    if quotas.running:
        for _ in range(quotas.running):
            assert places.may_run(A)
            places.admit(A)
        assert not places.may_run(A) and places.may_run(B)
        with pytest.raises(PlacesFull, match=named):
            places.take(A)
        places.put_back(A)
        assert places.may_run(A)
        places.leave(A)
        places.end(A)
        places.take(A)
        places.take(A)
    assert places.of(B) == (0, 1)


def test_turns() -> None:
    rotation = Rotation()
    assert rotation.order([A, A, A]) == [0, 1, 2]
    assert rotation.order([A, A, B, A, C, B]) == [0, 2, 4, 1, 5, 3]
    rotation.served(A)
    assert rotation.order([A, A, B]) == [2, 0, 1]
