"""Whether a row of the loaded model's products has the same bits in every step, and what is done where it has not.

Each product is computed with few and many rows, and each row compared, to the bit, with the same row among the most.
Of every product the first and the last layer are taken: what the library chooses follows from shapes, not from values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.check.expert_rows import rows_that_differ
from engine.run.cuda.experts.layer import NAME, Experts
from engine.run.cuda.products import BUCKETS, PLAIN, ROWS_MAX, Way, Ways, product
from engine.run.cuda.weights import FusedWeights, Mlp

# Beside the buckets some numbers between them: rows that are sampled are no bucket's number.
ROWS_CHECKED = tuple(sorted({*BUCKETS, 2, 3, 4, 5, 24, 48, 63, 65, 96, 127, 192}))
# Results that are compared with every number of rows. Another order along K changes few of them, one in ten thousand
# where K is small; matrices of usual size have enough in a few products.
RESULTS, PRODUCTS_MAX = 1 << 21, 64
# Rows at once of a product that needs it: few rows cost little more, and a large step has few blocks. The second is
# the one number of rows that is tried last.
BLOCK, LAST_BLOCK = 128, 256


@dataclass(frozen=True)
class ProductRows:
    """A product, with how many rows a row's bits are others than among the most, and the way chosen because of it.

    ``still`` are those numbers of rows where that way does not help either.
    """

    name: str
    differs_at: tuple[int, ...] = ()
    way: Way = PLAIN
    still: tuple[int, ...] = ()

    def __str__(self) -> str:
        """What is done about it, in words."""
        rows = ", ".join(map(str, self.differs_at))
        if self.differs_at[2:] and self.differs_at == ROWS_CHECKED[: len(self.differs_at)]:
            rows = f"up to {self.differs_at[-1]}"
        return f"{self.name} would differ at {rows} rows and is computed {self.way}"


@dataclass(frozen=True)
class RowBits:
    """What the check found, and what steps must keep to.

    ``equal`` says whether the bits of a row depend on that row alone; where they do not, ``buckets``, the numbers of
    rows that steps are padded to, begin with one that holds every usual step.
    """

    products: tuple[ProductRows, ...]

    @property
    def equal(self) -> bool:
        return not any(one.still for one in self.products)

    @property
    def buckets(self) -> tuple[int, ...]:
        return BUCKETS if self.equal else BUCKETS[BUCKETS.index(LAST_BLOCK) :]

    @property
    def ways(self) -> Ways:
        return Ways(**{one.name: one.way for one in self.products if one.name in Ways.__dataclass_fields__})

    @property
    def reason(self) -> str:
        """Words for operators."""
        pinned = [str(one) for one in self.products if one.way != PLAIN]
        if self.equal:
            names = ", ".join(one.name for one in self.products)
            return "; ".join([f"rows of {names} have the same bits at 1 to {ROWS_MAX} rows", *pinned])
        failed = ", ".join(one.name for one in self.products if one.still)
        return "; ".join([f"a row of {failed} depends on its place; steps have {LAST_BLOCK} rows or more", *pinned])

    @property
    def numerics(self) -> str:
        """For the model identity."""
        ways = [f"{one.name} {one.way.least}-{one.way.most or ''}" for one in self.products if one.way != PLAIN]
        kernels = [NAME for one in self.products if one.name == "experts"]
        return " ".join(["rows equal" if self.equal else f"rows {self.buckets[0]}", *ways, *kernels])


@dataclass(frozen=True)
class Product:
    """A product's matrices (out, in) with their biases, and rows to multiply: (ROWS_MAX, in)."""

    name: str
    matrices: tuple[tuple[Tensor, Tensor | None], ...]
    rows: Tensor


@torch.inference_mode()
def check_rows(weights: FusedWeights) -> RowBits:
    """Checks every product and pins those that need it. Some 600 products: a fraction of a second for 8B weights."""
    order = torch.randperm(ROWS_MAX, generator=torch.Generator().manual_seed(0)).to(weights.embedding.device)
    return RowBits((*(pinned(one, order) for one in _products(weights)), *_experts(weights, order)))


def _experts(weights: FusedWeights, order: Tensor) -> Iterator[ProductRows]:
    """The experts of the first and of the last layer that has some. They are computed in one way alone."""
    layers = [layer for layer in weights.layers if isinstance(layer.mlp, Experts)]
    if layers:
        still: set[int] = set()
        for layer in {id(layer): layer for layer in (layers[0], layers[-1])}.values():
            assert isinstance(layer.mlp, Experts)
            still.update(rows_that_differ(layer.mlp, _normed(weights, layer.post_norm), order, ROWS_CHECKED))
        differs_at = tuple(sorted(still))
        yield ProductRows("experts", differs_at, PLAIN, differs_at)


def pinned(one: Product, order: Tensor) -> ProductRows:
    """The first way that holds: as it comes, padded to where the rest begins, in blocks; the last one if none does."""
    found = ProductRows(one.name, _differing(one, order, PLAIN))
    if not found.differs_at:
        return found
    enough = next((rows for rows in BUCKETS if rows > found.differs_at[-1]), ROWS_MAX)
    padded = (Way(least=enough),) if enough <= BLOCK else ()
    for way in (*padded, *(Way(least=rows, most=rows) for rows in (BLOCK, LAST_BLOCK))):
        found = replace(found, way=way, still=_differing(one, order, way))
        if not found.still:
            break
    return found


def _differing(one: Product, order: Tensor, way: Way) -> tuple[int, ...]:
    """With how many rows, of ``ROWS_CHECKED``, some row has other bits than among all rows in their own order.

    The rows are the first ones, the last ones, which so stand at other places, and some drawn at random, as many as
    ``RESULTS`` asks for, in ``PRODUCTS_MAX`` products at most.
    """
    found = []
    for weight, bias in one.matrices:
        whole = _multiplied(one.rows, weight, bias, way)
        for rows in ROWS_CHECKED:
            apart = [
                (
                    _multiplied(one.rows[picked], weight, bias, way).view(torch.int16)
                    != whole[picked].view(torch.int16)
                ).any()
                for picked in _picked(order, rows, weight.shape[0])
            ]
            found.append(torch.stack(apart).any())
    differs = torch.stack(found).view(len(one.matrices), len(ROWS_CHECKED)).any(dim=0).tolist()
    return tuple(rows for rows, apart in zip(ROWS_CHECKED, differs, strict=True) if apart)


def _picked(order: Tensor, rows: int, width: int) -> Iterator[Tensor]:
    """Which rows are multiplied together, ``rows`` at a time, for ``width`` results each."""
    count = torch.arange(ROWS_MAX, device=order.device)
    yield count[:rows]
    yield count[-rows:]
    wanted = min(-(-RESULTS // (rows * width)), PRODUCTS_MAX)
    yield from (order[at : at + rows] for at in range(0, ROWS_MAX - rows + 1, rows)[:wanted])


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    product(x, weight, out, bias=bias, way=way)
    return out


def _products(weights: FusedWeights) -> Iterator[Product]:
    """The products, with rows at the scale that the model gives them; seeded."""
    ends = (weights.layers[0], weights.layers[-1])
    like, first = weights.embedding, weights.layers[0]
    generator = torch.Generator(like.device).manual_seed(0)

    def draw(width: int) -> Tensor:
        return torch.randn(ROWS_MAX, width, generator=generator, device=like.device)

    attended = (0.5 * draw(first.o.shape[1])).to(like.dtype)
    yield Product("qkv", tuple((layer.qkv, layer.qkv_bias) for layer in ends), _normed(weights, first.input_norm))
    yield Product("o", tuple((layer.o, None) for layer in ends), attended)
    dense = [(layer.mlp, layer.post_norm) for layer in weights.layers if isinstance(layer.mlp, Mlp)]
    if dense:
        mlps = (dense[0][0], dense[-1][0])
        gated = (torch.nn.functional.silu(draw(weights.mlp)) * draw(weights.mlp)).to(like.dtype)
        yield Product("gate_up", tuple((mlp.gate_up, None) for mlp in mlps), _normed(weights, dense[0][1]))
        yield Product("down", tuple((mlp.down, None) for mlp in mlps), gated)
    yield Product("head", ((weights.head, None),), _normed(weights, weights.final_norm))


def _normed(weights: FusedWeights, norm: Tensor) -> Tensor:
    """Rows as they come out of that norm: (ROWS_MAX, hidden); seeded."""
    generator = torch.Generator(norm.device).manual_seed(1)
    rows = torch.randn(ROWS_MAX, weights.hidden, generator=generator, device=norm.device)
    return (rows * norm.float()).to(weights.embedding.dtype)
