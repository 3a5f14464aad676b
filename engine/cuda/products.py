"""The matrix products of a step: cuBLAS, and kernels of our own where there is a single row.

With one row a product is bound by reading the weights, and what decides is that the reads never pause: these kernels
begin to read theirs while the kernel before them ends. Widths that no power of two of at least ``BLOCK_MIN`` divides,
and more rows, are cuBLAS's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_MIN = 256
GATE_BLOCK = 1024


@dataclass(frozen=True)
class RowTuning:
    """Outputs a program of ``row_product`` and ``row_gate``, most elements of a row it reads at once, warps."""

    outs: int = 8
    gate_outs: int = 4
    block_max: int = 1024
    warps: int = 4


class Products:
    """Products into given outputs; ``options`` are the kernels' launch options."""

    def __init__(self, options: dict[str, bool], tuning: RowTuning | None = None) -> None:
        self.options = options
        self.tuning = tuning or RowTuning()

    def into(self, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """out (rows, outputs) = x (rows, width) @ weight (outputs, width).t() + bias."""
        block = self._block(x, weight.shape[1])
        if block and weight.shape[0] % self.tuning.outs == 0:
            from engine.cuda import kernels

            kernels.row_product[(weight.shape[0] // self.tuning.outs,)](
                x, weight, weight if bias is None else bias, out, BIAS=bias is not None, WIDTH=weight.shape[1],
                OUTS=self.tuning.outs, BLOCK=block, num_warps=self.tuning.warps, **self.options,
            )  # fmt: skip
        elif bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)

    def gated(self, x: Tensor, weight: Tensor, both: Tensor, out: Tensor) -> None:
        """out (rows, outputs) = silu(gate) * up, of weight = gate (outputs, width) on up; ``both`` may be used."""
        from engine.cuda import kernels

        outputs, block = out.shape[1], self._block(x, weight.shape[1])
        if block and outputs % self.tuning.gate_outs == 0:
            kernels.row_gate[(outputs // self.tuning.gate_outs,)](
                x, weight, out, outputs, WIDTH=weight.shape[1], OUTS=self.tuning.gate_outs, BLOCK=block,
                num_warps=self.tuning.warps, **self.options,
            )  # fmt: skip
            return
        torch.mm(x, weight.t(), out=both)
        grid = (x.shape[0], -(-outputs // GATE_BLOCK))
        kernels.gate[grid](both, out, WIDTH=outputs, BLOCK=GATE_BLOCK, num_warps=4, **self.options)

    def _block(self, x: Tensor, width: int) -> int:
        """Elements of a row read at once by the single-row kernels; 0 for a product that is cuBLAS's."""
        if x.shape[0] != 1:
            return 0
        block = self.tuning.block_max
        while block >= BLOCK_MIN and width % block:
            block //= 2
        return block if block >= BLOCK_MIN else 0

