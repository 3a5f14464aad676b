"""Limits of a store, and what is said where they are none, or full."""

from __future__ import annotations

import pytest

from chunk_store.limits import CAPACITY_NBYTES_DEFAULT, RECORDS_MAX_DEFAULT, StoreLimits, quota_full


def test_what_is_not_given_is_the_stores_own_or_the_default() -> None:
    assert StoreLimits().given == {}
    assert StoreLimits(quarantine_s=0).given == {"quarantine_s": 0}
    assert StoreLimits(5).of_new_store == {"capacity_nbytes": 5, "records_max": RECORDS_MAX_DEFAULT}
    assert StoreLimits(records_max=5).of_new_store == {"capacity_nbytes": CAPACITY_NBYTES_DEFAULT, "records_max": 5}


@pytest.mark.parametrize("wrong", [{"capacity_nbytes": 0}, {"records_max": 0}, {"quarantine_s": -1}])
def test_a_limit_that_is_none_is_named(wrong: dict[str, int]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}: {value} is less than {value + 1}"):
        StoreLimits(**wrong)


@pytest.mark.parametrize(
    ("quota", "way"), [("chunks", "DeleteChunk"), ("pins", "UnpinChunk"), ("bytes", "with their KV")]
)
def test_a_full_quota_names_itself_its_limit_and_the_way_out(quota: str, way: str) -> None:
    error = quota_full(quota, 7)
    assert f"quota {quota}: the tenant may have 7" in error.problem and way in error.remedy and not error.retry
    assert str(error) == f"{error.problem}; {error.remedy}"
