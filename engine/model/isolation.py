"""What a model does besides attention, seen while every token attends to itself alone.

Attention must be all that carries information between tokens: a KV store holds nothing else. And what a layer makes
of a token may depend on the token's position alone, in ways that are known: not on its number in a forward, and
for chunks that move only by rotation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.attention import Scores
from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.model.limits import ContextLimit, spread
from engine.model.numbered import first_scaled, scaled_early
from engine.model.rotary import Rotation

MOVED_MAX = 1e-4  # of logits, in their standard deviations; in float32 right models move by rounding, 1e-6
MOVED_MAX_DEEP = 2e-3  # the same in a whole model, whose weights may magnify what rounding changes
ROW_TOLERANCE = 1e-4  # of queries and keys, relative to the largest element
ANGLE_ROUNDING = 2.0**-22  # of a position: models compute angles in float32
ROUNDED_TOLERANCE = 3e-2  # the same in a dtype that rounds what rotations give
NUMBERED_ROWS = 12
CHANGED_ROW = 3
ROWS = 24

Calls = list[tuple[Tensor, Tensor]]  # by layer: queries and keys (rows, heads, dim)


def alone(borrowed: BorrowedModel, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, Calls]:
    """Logits (rows, vocabulary), queries and keys of a forward in which each token attends to itself alone."""
    calls: Calls = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        calls.append((q.clone(), k.clone()))
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    rows = torch.arange(len(token_ids), device=borrowed.device)
    return borrowed.forward(token_ids.to(borrowed.device), positions.to(borrowed.device), attend, rows), calls


def check_isolation(borrowed: BorrowedModel, limit: int, *, most: float) -> None:
    """Raises ``ModelRefused`` if a token's logits change with another token that it does not attend to."""
    rows = min(ROWS, limit)
    changed = min(CHANGED_ROW, rows // 2)
    vocabulary = borrowed.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(21))
    other = ids.clone()
    other[changed] = (ids[changed] + 1 + vocabulary // 2) % vocabulary
    before, _ = alone(borrowed, ids, torch.arange(rows))
    after, _ = alone(borrowed, other, torch.arange(rows))
    moved = (before - after).abs().amax(-1)
    moved[changed] = 0
    seen = float(moved.max() / before.std(dim=-1).mean())
    if not seen <= most:  # NaN too
        raise ModelRefused(
            f"model {borrowed.name} cannot be served exactly: information passes between tokens outside of attention "
            f"(a token's logits move by {seen:.2g} standard deviations with a token that it does not attend to), as "
            "state space layers, convolutions and mixtures over a sequence do; a KV store holds no such state"
        )


def cap_by_numbers(borrowed: BorrowedModel, limit: ContextLimit) -> ContextLimit:
    """``limit``, cut where layers scale queries by a row's number in the forward, unless they can be told its position.

    That is looked at where scaling begins after a few tokens: rows that stand in order are what the same rows are in
    another order.
    """
    borrowed.tells_positions = True
    if not borrowed.counting:
        return limit
    order = torch.arange(NUMBERED_ROWS)
    ids = torch.full((NUMBERED_ROWS,), _token(borrowed))
    with scaled_early(borrowed.counting):
        _, turned = alone(borrowed, ids, order.flip(0))
        borrowed.tells_positions = False
        _, plain = alone(borrowed, ids, order)
    tolerance = ROW_TOLERANCE if borrowed.dtype_name == "float32" else ROUNDED_TOLERANCE
    apart = [
        float((x.flip(0) - y).abs().max()) > tolerance * float(y.abs().max())
        for calls in zip(turned, plain, strict=True)
        for x, y in zip(*calls, strict=True)
    ]
    borrowed.tells_positions = not any(apart)
    if borrowed.tells_positions:
        return limit
    first = first_scaled(borrowed.counting) or 0
    return limit.capped(first, f"layers without rotation scale queries from position {first} on")


def cap_by_rows(borrowed: BorrowedModel, limit: ContextLimit, rows_max: int) -> ContextLimit:
    """``limit`` cut where queries or keys begin to depend on a token's number in the forward.

    In a forward of ours that number is not the token's position. ``rows_max`` rows are looked at.
    """
    rows = min(limit.tokens, rows_max)
    _, calls = alone(borrowed, torch.full((rows,), _token(borrowed)), torch.zeros(rows, dtype=torch.int64))
    for q, k in calls:
        for x in (q, k):
            apart = (x - x[:1]).abs().flatten(1).amax(-1) > ROW_TOLERANCE * float(x[0].abs().max())
            if bool(apart.any()):
                at = int(apart.int().argmax())
                limit = limit.capped(at, f"from token {at} on layers compute with a token's number in the forward")
    return limit


def moved_limit(borrowed: BorrowedModel, limit: ContextLimit, rotations: tuple[Rotation | None, ...]) -> ContextLimit:
    """``limit`` cut where queries and keys begin to differ from position 0's by more than their rotation."""
    first = _first_unexplained(borrowed, spread(limit.tokens - 1), rotations)
    if first is None:
        return limit
    good = max(p for p in spread(limit.tokens - 1) if p < first[0])
    bad = first
    while bad[0] - good > 1:
        middle = (good + bad[0]) // 2
        found = _first_unexplained(borrowed, [0, middle], rotations)
        good, bad = (middle, bad) if found is None else (good, found)
    return replace(limit, tokens=bad[0], because=f"from position {bad[0]} on {bad[1]}; use exact beyond")


def _first_unexplained(
    borrowed: BorrowedModel, positions: list[int], rotations: tuple[Rotation | None, ...]
) -> tuple[int, str] | None:
    """The first of ``positions`` (from 0 on) that a layer's rotation does not explain, and what differs there."""
    places = torch.tensor(positions)
    _, calls = alone(borrowed, torch.full((len(positions),), _token(borrowed)), places)
    tolerance = (ROW_TOLERANCE + ANGLE_ROUNDING * places).to(borrowed.device)
    worst: tuple[int, str] | None = None
    for (q, k), rotation in zip(calls, rotations, strict=False):
        for name, x in (("queries", q), ("keys", k)):
            expected = x[:1].expand_as(x)
            if rotation is not None:
                expected = rotation.turn_back(expected, *rotation.table(-places, x.device))
            apart = (x - expected).abs().flatten(1).amax(-1) > tolerance * float(x[0].abs().max())
            if bool(apart.any()):
                at = int(apart.int().argmax())
                if worst is None or positions[at] < worst[0]:
                    longer = float(x[at].norm() / x[0].norm())
                    how = f"scaled by their position (x{longer:.3g})" if abs(longer - 1) > 1e-3 else "turned otherwise"
                    worst = positions[at], f"{name} are {how}"
    return worst


def _token(borrowed: BorrowedModel) -> int:
    return int(min(11, borrowed.config.get_text_config().vocab_size - 1))
