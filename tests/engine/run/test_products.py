"""Products in their ways: padded and cut rows give what one product gives, and the settings that keep rows' bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.run.cuda import products
from engine.run.cuda.products import PLAIN, ROWS_MAX, Way, product, settings, use_stable_products


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    matmul, library = torch.backends.cuda.matmul, torch.backends.cuda.preferred_blas_library()
    yield
    if torch.version.cuda is not None:
        torch.backends.cuda.preferred_blas_library(library)
    matmul.allow_bf16_reduced_precision_reduction = True
    matmul.allow_fp16_reduced_precision_reduction = True


def test_the_settings_are_made_and_an_operators_own_are_left_and_said() -> None:
    environment: dict[str, str] = {}
    assert use_stable_products(environment) == []
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
    assert use_stable_products(environment) == [], "again is harmless"
    matmul = torch.backends.cuda.matmul
    if torch.version.cuda is not None:
        assert torch.backends.cuda.preferred_blas_library() == torch._C._BlasBackend.Cublaslt
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        assert (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) == (False, False)
    own = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    (line,) = use_stable_products(own)
    assert own["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and own["CUBLASLT_WORKSPACE_SIZE"] == "1"
    assert "CUBLAS_WORKSPACE_CONFIG is ':4096:8', not ':16:8'" in line and "unset it" in line
    assert settings(environment) == "cublaslt :16:8 1" != settings(own), "they are part of the model identity"


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, ROWS_MAX, ROWS_MAX + 5])
@pytest.mark.parametrize("way", [PLAIN, Way(least=8), Way(least=8, most=8)])
@pytest.mark.parametrize("biased", [False, True])
def test_every_way_gives_the_product(monkeypatch: pytest.MonkeyPatch, rows: int, way: Way, biased: bool) -> None:
    taken, library = [], products.multiply

    def counted(*arguments: torch.Tensor) -> None:
        taken.append(len(arguments[0]))
        library(*arguments)

    monkeypatch.setattr(products, "multiply", counted)
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, 12), (5, 12), (5,)))
    out = torch.full((rows, 5), float("nan"))
    product(x, weight, out, bias=bias if biased else None, way=way)
    torch.testing.assert_close(out, x @ weight.T + (bias if biased else 0.0))
    if rows > ROWS_MAX or way.most is None:
        assert taken == [max(rows, way.least)]
    else:
        assert taken == [8] * -(-rows // 8)
