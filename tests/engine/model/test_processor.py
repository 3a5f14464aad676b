"""The processor and its memory, read from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.model.processor import Processor, memory_nbytes, read_processor


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        ("model name\t: A\nflags\t\t: fpu avx2 amx_bf16 sse\nmodel name\t: B\n", "A", ("avx2", "amx_bf16")),
        ("Features\t: fp asimdhp bf16\n", None, ("bf16", "asimdhp")),
        ("", None, ()),
    ],
)
def test_names_and_features_of_the_first_processor(
    tmp_path: Path, text: str, name: str | None, features: tuple[str, ...]
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    found = read_processor(tmp_path / "cpuinfo")
    assert found.features == features and (name is None or found.name == name)
    assert (f"({', '.join(features)})" if features else "features unknown") in str(found)


def test_a_system_that_does_not_say() -> None:
    assert read_processor(Path("/nowhere")).features == ()
    assert memory_nbytes(Path("/nowhere")) is None


def test_which_products_are_fast() -> None:
    plain, matrix, half = (Processor("p", f) for f in (("avx2",), ("amx_bf16",), ("avx512_fp16",)))
    assert all(processor.multiplies("float32") for processor in (plain, matrix, half))
    assert [p.multiplies("bfloat16") for p in (plain, matrix, half)] == [False, True, False]
    assert [p.multiplies("float16") for p in (plain, matrix, half)] == [False, False, True]


@pytest.mark.parametrize(
    ("limit", "nbytes"), [("max\n", 2048 << 10), ("1048576\n", 1 << 20), ("9999999999\n", 2 << 20)]
)
def test_a_containers_limit_counts_where_it_is_less(tmp_path: Path, limit: str, nbytes: int) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:        2048 kB\nMemFree: 1 kB\n")
    (tmp_path / "limit").write_text(limit)
    assert memory_nbytes(tmp_path / "meminfo", tmp_path / "limit") == nbytes
