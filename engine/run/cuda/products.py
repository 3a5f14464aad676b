"""Matrix products whose rows have the same bits whatever the number of rows: how they are asked for.

cuBLASLt without split-K sums a row along K in one order for every number of rows, as far as was ever measured; NVIDIA
promises nothing, so ``engine.check.rows`` measures the loaded weights at every start. Where a product fails, its rows
are given to the library in fixed numbers (``Way``): in products of one shape a row's bits depend on that row alone.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Torch reads both once, at its first product. 128 KiB and 1 KiB: with the usual 32 MiB the library splits K for few
# rows, and where it may not, it takes a kernel that is three times as slow.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
# Of a step's rows. A product of 384 rows takes four fifths of the time of 512, of 768 about three quarters of 1024.
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024)
ROWS_MAX = BUCKETS[-1]  # forwards of more rows are a long piece's own


def use_stable_products(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Has this process multiply as above; to be called before anything is computed on a device, again: harmless.

    What an operator set otherwise is left, and returned: a line each.
    """
    lines = []
    for name, wanted in ENVIRONMENT.items():
        found = environment.setdefault(name, wanted)
        if found != wanted:
            lines.append(
                f"{name} is {found!r}, not {wanted!r}: products of few rows may be slower, and their bits may depend "
                "on the number of rows; unset it unless something else needs it"
            )
    matmul = torch.backends.cuda.matmul
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        setattr(matmul, name, (False, False))  # the second is split-K
    if torch.version.cuda is not None:  # a torch without it refuses the name, and has nothing to compute with it
        torch.backends.cuda.preferred_blas_library("cublaslt")
    return lines


def settings(environment: MutableMapping[str, str] = os.environ) -> str:
    """What ``use_stable_products`` left set, for the model identity."""
    return " ".join(["cublaslt", *(environment.get(name, "") for name in ENVIRONMENT)])


@dataclass(frozen=True)
class Way:
    """How many rows the library is given at once: fewer than ``least`` are padded, more than ``most`` are cut."""

    least: int = 1
    most: int | None = None

    def __str__(self) -> str:
        if self.most is not None:
            return f"in blocks of {self.most} rows"
        return "as it comes" if self.least == 1 else f"with at least {self.least} rows"


PLAIN = Way()


@dataclass(frozen=True)
class Ways:
    """The way of each product of a plain decoder."""

    qkv: Way = PLAIN
    o: Way = PLAIN
    gate_up: Way = PLAIN
    down: Way = PLAIN
    head: Way = PLAIN


AS_THEY_COME = Ways()


def product(x: Tensor, weight: Tensor, out: Tensor, *, bias: Tensor | None = None, way: Way = PLAIN) -> None:
    """out = x @ weight.T + bias for x (rows, in), weight (out, in), out (rows, out), bias (out,); may be captured.

    More than ``ROWS_MAX`` rows are one product, whatever the way.
    """
    rows = x.shape[0]
    block = rows if way.most is None or rows > ROWS_MAX else way.most
    for at in range(0, rows, block):
        part, result = x[at : at + block], out[at : at + block]
        count = part.shape[0]
        if count >= way.least:
            multiply(part, weight, result, bias)
        else:
            padded, products = x.new_zeros(way.least, x.shape[1]), out.new_empty(way.least, out.shape[1])
            padded[:count].copy_(part)
            multiply(padded, weight, products, bias)
            result.copy_(products[:count])


def multiply(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
    """One product of the library."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
