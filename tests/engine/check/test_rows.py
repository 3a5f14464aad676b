"""The check of rows: products whose rows depend on their number or place are found, pinned if that helps, and said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.check.rows import BLOCK, LAST_BLOCK, ROWS_CHECKED, RowBits, check_rows
from engine.model.borrowed import BorrowedModel
from engine.model.probe import Findings, examine
from engine.run.backends import Decision
from engine.run.cuda import products
from engine.run.cuda.products import BUCKETS, PLAIN, Way
from engine.run.cuda.weights import FusedWeights, merge_weights
from engine.served import look_into
from tests.architectures import build

# Whether a row at a place of so many is summed in another order.
Planted = Callable[[Tensor, int], Tensor]
DOWN = 96  # rows of down are the only ones of this width


@pytest.fixture(scope="module")
def weights() -> FusedWeights:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    model = build("qwen2", {**heads, "intermediate_size": DOWN, "num_hidden_layers": 2}).bfloat16()
    borrowed = BorrowedModel(model, name="plain")
    found = merge_weights(borrowed, replace(examine(borrowed), deferred=False))
    assert found.mlp == DOWN != found.hidden and found.layers[0].qkv_bias is not None
    return found


def library(planted: Planted, width: int = DOWN) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], None]:
    """A library whose rows are exact to bf16, but those that ``planted`` picks, whose K is split in two."""

    def multiply(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
        rows, k = x.shape
        first, second = (x[:, part].double() @ weight[:, part].double().T for part in (slice(k // 2), slice(k // 2, k)))
        result = first + second + (0.0 if bias is None else bias.double())
        if k == width:
            apart = first.bfloat16() + second.bfloat16()
            result = torch.where(planted(torch.arange(rows), rows)[:, None], apart.double(), result)
        out.copy_(result)

    return multiply


def found(monkeypatch: pytest.MonkeyPatch, weights: FusedWeights, planted: Planted) -> RowBits:
    monkeypatch.setattr(products, "multiply", library(planted))
    return check_rows(weights)


def few(most: int) -> Planted:
    return lambda places, rows: torch.full_like(places, rows <= most, dtype=torch.bool)


def test_rows_that_are_the_same_need_nothing(monkeypatch: pytest.MonkeyPatch, weights: FusedWeights) -> None:
    bits = found(monkeypatch, weights, few(0))
    assert bits.equal and bits.buckets == BUCKETS and bits.numerics == "rows equal"
    assert [(one.name, one.way) for one in bits.products] == [
        (name, PLAIN) for name in ("qkv", "o", "gate_up", "down", "head")
    ]
    assert bits.reason == "rows of qkv, o, gate_up, down, head have the same bits at 1 to 1024 rows"


@pytest.mark.parametrize(("most", "way"), [
    (1, Way(least=8)), (48, Way(least=64)), (127, Way(least=128)), (256, Way(BLOCK, BLOCK)), (768, Way(BLOCK, BLOCK)),
])  # fmt: skip
def test_rows_that_differ_among_few_are_pinned(
    monkeypatch: pytest.MonkeyPatch, weights: FusedWeights, most: int, way: Way
) -> None:
    bits = found(monkeypatch, weights, few(most))
    (down,) = [one for one in bits.products if one.way != PLAIN]
    assert (down.name, down.way, down.still) == ("down", way, ())
    assert down.differs_at == tuple(rows for rows in ROWS_CHECKED if rows <= most)
    assert bits.equal and bits.ways.down == way and bits.ways.o == PLAIN
    rows = "1" if most == 1 else f"up to {down.differs_at[-1]}"
    assert bits.reason.endswith(f"; down would differ at {rows} rows and is computed {way}")
    assert bits.numerics == f"rows equal down {way.least}-{way.most or ''}"


def test_a_large_number_alone_is_found(monkeypatch: pytest.MonkeyPatch, weights: FusedWeights) -> None:
    """The reference itself is the odd one."""
    bits = found(monkeypatch, weights, lambda places, rows: torch.full_like(places, rows >= 1024, dtype=torch.bool))
    assert bits.ways.down == Way(BLOCK, BLOCK) and bits.equal


def test_rows_that_depend_on_their_place_in_small_blocks_have_large_ones(
    monkeypatch: pytest.MonkeyPatch, weights: FusedWeights
) -> None:
    bits = found(monkeypatch, weights, lambda places, rows: (places == 63) & (rows < LAST_BLOCK))
    assert bits.ways.down == Way(LAST_BLOCK, LAST_BLOCK) and bits.equal and bits.buckets == BUCKETS


def test_a_difference_that_few_results_of_a_small_matrix_show_is_found(
    monkeypatch: pytest.MonkeyPatch, weights: FusedWeights
) -> None:
    """One result in a row of a hundred, among at most 16 rows."""
    exact = library(few(0))

    def multiply(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
        exact(x, weight, out, bias)
        if x.shape[0] <= 16 and x.shape[1] == DOWN:
            out[x[:, 0].view(torch.int16) % 97 == 0, 0] += 1.0

    monkeypatch.setattr(products, "multiply", multiply)
    assert check_rows(weights).ways.down == Way(least=32)


@pytest.mark.parametrize("place", [0, 63, 64, 127])
def test_rows_that_depend_on_their_place_are_found_and_steps_fall_back(
    monkeypatch: pytest.MonkeyPatch, weights: FusedWeights, place: int
) -> None:
    bits = found(monkeypatch, weights, lambda places, rows: places == place)
    assert not bits.equal and bits.buckets == BUCKETS[BUCKETS.index(256) :]
    assert bits.reason.startswith("a row of down depends on its place; steps have 256 rows or more")
    assert bits.numerics == "rows 256 down 256-256"


def test_what_is_served_is_computed_and_named_by_what_was_found(
    monkeypatch: pytest.MonkeyPatch, weights: FusedWeights
) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    model = build("qwen2", {**heads, "intermediate_size": DOWN, "num_hidden_layers": 2}).bfloat16()

    def merged(borrowed: BorrowedModel, findings: Findings, _: Decision) -> FusedWeights:
        return merge_weights(borrowed, replace(findings, deferred=False))

    monkeypatch.setattr("engine.served.choose_weights", merged)
    identities = set()
    for planted, way in ((few(0), PLAIN), (few(48), Way(least=64)), (few(256), Way(BLOCK, BLOCK))):
        monkeypatch.setattr(products, "multiply", library(planted))
        served = look_into(BorrowedModel(model, name="plain"))
        assert isinstance(served.weights, FusedWeights)
        assert served.weights.ways.down == served.row_bits.ways.down == way
        identities.add(served.identity)
    assert len(identities) == 3


def test_the_real_library_of_the_cpu_is_taken_as_it_is(weights: FusedWeights) -> None:
    """Whatever it gives, the verdict is one of the three, in words."""
    bits = check_rows(weights)
    assert bits.reason and bits.numerics.startswith("rows ")
