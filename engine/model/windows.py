"""What each layer lets a token see: its window, found in the mask functions that the model makes.

A mask function is the model's own word on any two positions, so a window that a small forward never meets is seen all
the same: where it begins to hide, which form explains that, and whether that form holds up to the full context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.model.borrowed import LayerMask, ModelRefused
from engine.model.limits import ContextLimit, spread
from engine.model.masks import MaskFunction, evaluate
from engine.plan import Window

NEAR = 2  # positions to either side of a window's border that are looked at


@dataclass(frozen=True)
class Windows:
    """The window of each layer, None where a token sees everything before it, and how far that was found to hold."""

    layers: tuple[Window | None, ...]
    limit: ContextLimit


def find_windows(masks: Sequence[LayerMask], limit: ContextLimit, name: str, device: torch.device) -> Windows:
    """The layers' windows; ``limit`` is cut where a mask hides what no window explains.

    Raises ``ModelRefused`` for a mask that shows a later token.
    """
    found: dict[int, Window | None] = {}
    for function in {id(mask.function): mask.function for mask in masks}.values():
        if function is not None:
            found[id(function)], limit = _window_of(function, limit, name, device)
    layers = tuple(found.get(id(mask.function)) for mask in masks)
    for window, mask in zip(layers, masks, strict=True):
        asked = mask.sliding_window
        if asked and window != Window(asked):
            why = f"a layer asks for a sliding window of {asked} tokens, which its mask does not have"
            limit = limit.capped(asked if window is None else min(asked, window.tokens), why)
    return Windows(tuple(w if w and w.tokens < limit.tokens else None for w in layers), limit)


def cap_by_blocks(limit: ContextLimit, windows: Sequence[Window | None]) -> ContextLimit:
    """``limit`` for contexts in which chunks stand elsewhere than they were computed: one block, since a chunk that is
    moved sees other borders of blocks."""
    for window in windows:
        if window is not None and window.chunked:
            at = window.tokens
            because = f"layers attend within blocks of {at} tokens, whose borders a moved chunk sees elsewhere"
            limit = limit.capped(at, f"{because}; use exact beyond")
    return limit


def _window_of(
    mask: MaskFunction, limit: ContextLimit, name: str, device: torch.device
) -> tuple[Window | None, ContextLimit]:
    """The window that a mask is, and ``limit``, cut if the mask is none."""
    queries = torch.arange(limit.tokens, device=device)
    hidden = ~evaluate(mask, queries, torch.zeros_like(queries))
    at = int(hidden.int().argmax()) if bool(hidden.any()) else 0
    candidates = [Window(at), Window(at, chunked=True)] if at else [None]
    wrong = [_first_wrong(mask, window, limit, device) for window in candidates]
    for window, first in zip(candidates, wrong, strict=True):
        if first is None:
            return window, limit
    if any(first is not None and first[1] > first[0] for first in wrong):
        raise ModelRefused(
            f"model {name} cannot be served exactly: its attention is not causal (a mask shows later tokens)"
        )
    if at:
        return None, limit.capped(at, f"a mask of the model hides tokens that are {at} or more back, and is no window")
    assert wrong[0] is not None
    return None, limit.capped(wrong[0][0], f"a mask of the model hides tokens from position {wrong[0][0]} on")


def _first_wrong(
    mask: MaskFunction, window: Window | None, limit: ContextLimit, device: torch.device
) -> tuple[int, int] | None:
    """The first (query, key) of those looked at for which ``mask`` is not ``window``; later keys before others."""
    last = limit.tokens - 1
    near = [] if window is None else [m for m in (1, 2, 3, last // window.tokens) if m]
    places = spread(last, [] if window is None else [m * window.tokens for m in near])
    points = torch.tensor(places, device=device)
    pairs = [torch.cartesian_prod(points, points)]
    for query in places:
        first = 0 if window is None else window.first(query)
        keys = torch.arange(max(first - NEAR, 0), min(first + NEAR, last) + 1, device=device)
        pairs.append(torch.stack((torch.full_like(keys, query), keys), dim=1))
    for query in {last, 0 if window is None else min(window.tokens, last)}:
        keys = torch.arange(limit.tokens, device=device)
        pairs.append(torch.stack((torch.full_like(keys, query), keys), dim=1))
    grid = torch.cat(pairs)
    allowed = evaluate(mask, grid[:, 0], grid[:, 1])
    wrong = grid[allowed != _shown(window, grid[:, 0], grid[:, 1])]
    if not len(wrong):
        return None
    later = wrong[wrong[:, 1] > wrong[:, 0]]
    of = later if len(later) else wrong
    row = of[int(of[:, 0].argmin())]
    return int(row[0]), int(row[1])


def _shown(window: Window | None, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    causal = keys <= queries
    if window is None:
        return causal
    if window.chunked:
        return causal & (keys // window.tokens == queries // window.tokens)
    return causal & (queries - keys < window.tokens)
