"""Sizes, rates and durations as people write and read them."""

from __future__ import annotations

import pytest

from chunk_store.quantities import (
    human_age,
    human_bytes,
    human_seconds,
    parse_nbytes,
    parse_rate,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GiB", 10 << 30),
        ("500 MB", 500_000_000),
        ("7", 7),
        ("1e9", 10**9),
        ("1.5KiB", 1536),
        ("64mb", 64_000_000),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_nbytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "0", "1XB", "-1", "0.5", "10Gbit", "10GB/s", "1e999", "nan", "1.2.3MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write for example 10GiB"):
        parse_nbytes(text)


@pytest.mark.parametrize(
    ("text", "rate"), [("25Gbit/s", 3.125e9), ("3GB/s", 3e9), ("800MiB", 800 * 2**20), ("8 Kbit/s", 1e3)]
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "3", "0GB/s", "GB/s", "-1GB/s", "3 parsecs", "8kbps", "1e999GB/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="is not a bandwidth; write for example"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("1.5", 1.5),
        ("500ms", 0.5),
        ("15m", 900),
        ("15min", 900),
        ("2h", 7200),
        ("7d", 604800),
        ("1e2 s", 100),
    ],
)
def test_durations(text: str, expected: float) -> None:
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "inf", "nan", "2 weeks", "h", "1e400", "--", "0x9" * 1000])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_seconds(text)
    assert len(str(caught.value)) < 300


def test_sizes_for_people() -> None:
    assert [human_bytes(size) for size in (0, 1023, 1024, 1536 * 1024, 2**50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "1024.0 TiB",
    ]


def test_times_for_people() -> None:
    shown = [human_seconds(s) for s in (0.0, 0.0123, 0.99994, 0.99996, 1.0, 59.94, 59.96, 125, 12000, 446400)]
    assert shown == [
        *("0.0 ms", "12.3 ms", "999.9 ms", "1.0 s", "1.0 s", "59.9 s", "1 min"),
        *("2 min 5 s", "3 h 20 min", "5 d 4 h"),
    ]
    assert [human_age(s) for s in (-1, 0.4, 3599.6, 86400)] == ["0 s", "0 s", "1 h", "1 d"]
