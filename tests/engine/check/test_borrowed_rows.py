"""What is found of rows of a model's own code, and what steps keep to because of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from engine.check import borrowed_rows
from engine.check.borrowed_rows import WholeRowBits, check_rows_of
from engine.check.rows import ProductRows
from engine.model.borrowed import BorrowedModel
from engine.model.probe import examine
from engine.run.cuda import products
from engine.run.cuda.borrowed import CapturedModel
from engine.run.cuda.products import BUCKETS, Way
from tests.architectures import build_named


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> CapturedModel:
    """A model whose rows are computed one after the other, so that none depends on others."""

    def one_by_one(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
        out.copy_((x.double() @ weight.double().t() + (0 if bias is None else bias.double())).to(out.dtype))

    monkeypatch.setattr(products, "multiply", one_by_one)
    monkeypatch.setattr(borrowed_rows, "ROWS_CHECKED", (1, 3, 64, 65))
    monkeypatch.setattr(borrowed_rows, "FORWARDS", 1)
    monkeypatch.setattr("engine.check.rows.ROWS_CHECKED", (1, 3, 64, 65))
    monkeypatch.setattr("engine.check.rows.PRODUCTS_MAX", 2)
    borrowed = BorrowedModel(build_named("starcoder2"), name="starcoder2")
    return CapturedModel.of(borrowed, examine(borrowed))


def test_a_product_that_differs_is_computed_in_its_way_and_a_whole_that_differs_is_said(
    model: CapturedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = products.multiply

    def planted(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
        library(x, weight, out, bias)
        if weight.shape == (96, 64) and len(x) <= 3:  # the MLP's first product
            out += 1

    monkeypatch.setattr(products, "multiply", planted)
    found, bits = check_rows_of(model)
    (pinned,) = [one for one in bits.products if one.way != Way()]
    assert pinned == ProductRows("mlp.c_fc", (1, 3), Way(least=8)) and "mlp.c_fc would differ at 1, 3" in bits.reason
    assert len(found.forwards) > len(model.forwards), "by a forward that pads its rows"


def test_rows_that_differ_in_the_whole_are_computed_alone(model: CapturedModel) -> None:
    mlp = model.borrowed.module.model.layers[1].mlp  # type: ignore[union-attr,index]

    def odd(x: Tensor) -> Tensor:
        return type(mlp).forward(mlp, x) + (x.shape[1] == 65)

    bits = check_rows_of(replace(model, forwards={**model.forwards, mlp: odd}))[1]
    assert 65 in bits.apart and not bits.equal and bits.buckets == BUCKETS
    assert "differs at" in bits.reason and "chunks and prompts are computed alone" in bits.reason
    assert bits.numerics.startswith("rows apart")


def test_words_and_names_of_what_was_found() -> None:
    sound = WholeRowBits((ProductRows("q_proj"),))
    assert sound.equal and sound.buckets == BUCKETS and sound.numerics == "rows equal"
    assert sound.reason == "rows of the model's own code have the same bits at 1 to 1024 rows"
    still = WholeRowBits((ProductRows("o_proj", (1, 8), Way(256, 256), (8,)),))
    assert not still.equal and "the product o_proj" in still.reason and still.numerics == "rows apart o_proj 256-256"
