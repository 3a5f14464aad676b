"""The byte geometry of an entry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunk_store.layout import DTYPE_BYTES, KVLayout, LayerLayout

LAYERS = st.lists(st.builds(LayerLayout, st.integers(0, 9), st.integers(0, 300), st.integers(0, 300)), max_size=5)


def test_planes_stand_in_file_order() -> None:
    layout = KVLayout("bfloat16", (LayerLayout(2, 8, 4), LayerLayout(1, 16, 16)))
    assert layout.plane_nbytes(3) == [3 * 2 * 8 * 2, 3 * 2 * 4 * 2, 3 * 16 * 2, 3 * 16 * 2]
    assert layout.nbytes(3) == sum(layout.plane_nbytes(3)) and layout.nbytes(0) == 0


@given(st.sampled_from(sorted(DTYPE_BYTES)), LAYERS)
def test_a_layout_survives_its_canonical_text(dtype: str, layers: list[LayerLayout]) -> None:
    layout = KVLayout(dtype, tuple(layers))
    assert KVLayout.from_canonical(layout.canonical()) == layout


@pytest.mark.parametrize("text", ["", "float32", "int3:1,2,3"])
def test_a_dtype_that_is_none_is_named(text: str) -> None:
    if text == "float32":
        assert KVLayout.from_canonical(text).layers == ()
        return
    with pytest.raises(ValueError, match="dtype"):
        KVLayout.from_canonical(text)


@pytest.mark.parametrize("text", ["float32:1,2", "float32:a,b,c", "float32:1,2,3,4"])
def test_a_text_that_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):  # decode_header makes one error of both
        KVLayout.from_canonical(text)
