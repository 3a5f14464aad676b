"""Finding out what a model does by watching it: KV geometry, rotation and window of each layer, limits.

A single token attends to nothing but itself, so its hidden states do not depend on its position, and what
differs between two positions in a layer's queries and keys is exactly what the layer does with positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chunk_store.layout import DTYPE_BYTES, KVLayout, LayerLayout
from engine.attention import Scores
from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.model.isolation import cap_by_numbers
from engine.model.limits import ContextLimit, declared_limit
from engine.model.numbered import first_scaled
from engine.model.rotary import Rotation, RotationUnknown, fit_rotation, frequency_tables
from engine.model.windows import cap_by_blocks, find_windows
from engine.plan import Window

PROBE_POSITIONS = (1, 2, 5, 33, 117)
ROTATION_TOLERANCE = {"float32": 2e-4, "bfloat16": 3e-2, "float16": 4e-3}
CONTEXT_LEAST = 4  # tokens of a context that can be checked at all


@dataclass(frozen=True)
class LayerCall:
    """One attention call of a single-token forward: q and k (heads, dim), and what came with them."""

    q: Tensor
    k: Tensor
    v_dim: int
    scores: Scores


@dataclass(frozen=True)
class Findings:
    """What a model was seen to do. ``rotation_refusal`` is "" if every layer's rotation is known.

    ``windows`` by layer say what a token sees there, None that it sees everything before it. ``deferred``: the model's
    own rotation was taken out; whoever attends turns queries and keys.
    """

    layout: KVLayout
    rotations: tuple[Rotation | None, ...]
    rotation_refusal: str
    limit: ContextLimit
    moved_limit: ContextLimit  # of contexts in which chunks stand elsewhere than they were computed
    deferred: bool
    windows: tuple[Window | None, ...]

    @property
    def context_length_max(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.limit.tokens


def examine(borrowed: BorrowedModel) -> Findings:
    """Probes the model. Raises ``ModelRefused`` if attention is not all that carries state between tokens."""
    borrowed.defers_rotation = False  # as an earlier look may have left it
    limit = declared_limit(borrowed.config.get_text_config())
    base = _first_look(borrowed)
    layout = KVLayout(
        borrowed.dtype_name, tuple(LayerLayout(call.k.shape[0], call.k.shape[1], call.v_dim) for call in base)
    )
    windows = find_windows(borrowed.layer_masks(), limit, borrowed.name, borrowed.device)
    limit = cap_by_numbers(borrowed, windows.limit)
    if limit.tokens < CONTEXT_LEAST:
        raise ModelRefused(f"model {borrowed.name}: a context of {limit} is too short to be served")
    # Where queries are scaled by their position too, rotations are looked for before that begins.
    plain = min(limit.tokens, first_scaled(borrowed.counting) or limit.tokens)
    rotations, refusal = _rotations(borrowed, base, plain)
    # Turned once more by us, a query would be rounded twice: nothing in float32, but not in a shorter dtype.
    wanted = borrowed.dtype_name != "float32" and borrowed.device.type == "cpu" and not refusal
    deferred = wanted and _defer(borrowed, base, rotations, plain)
    moved = cap_by_blocks(limit, windows.layers)
    return Findings(layout, rotations, refusal, limit, moved, deferred, windows.layers)


def _first_look(borrowed: BorrowedModel) -> list[LayerCall]:
    """One token's attention calls. Raises ``ModelRefused`` unless there is one a layer, in a dtype that is served."""
    if borrowed.dtype_name not in DTYPE_BYTES:
        raise ModelRefused(
            f"model {borrowed.name}: weights of {borrowed.dtype_name}; load it with one of {sorted(DTYPE_BYTES)}"
        )
    try:
        base = _single_token(borrowed, 0)
    except ModelRefused:
        raise
    except Exception as error:  # whatever modelling code raises when it is given no mask and no cache
        raise ModelRefused(
            f"model {borrowed.name} cannot be served: its forward fails without a mask and a cache "
            f"({type(error).__name__}: {error})"
        ) from error
    layers = getattr(borrowed.config.get_text_config(), "num_hidden_layers", len(base))
    if len(base) != layers:
        raise ModelRefused(
            f"model {borrowed.name}: {len(base)} attention calls for {layers} layers go through transformers' "
            "attention interface; there must be one a layer (others have an attention of their own, or carry state "
            "that a KV store does not hold, as linear attention and convolutions do)"
        )
    return base


def _single_token(borrowed: BorrowedModel, position: int) -> list[LayerCall]:
    """The attention calls of one token at ``position``."""
    calls: list[LayerCall] = []

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        calls.append(LayerCall(q[0].clone(), k[0].clone(), v.shape[-1], scores))
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    token = min(11, borrowed.config.get_text_config().vocab_size - 1)
    device = borrowed.device
    borrowed.forward(
        torch.tensor([token], device=device),
        torch.tensor([position], device=device),
        watch,
        torch.tensor([0], device=device),
    )
    return calls


def _rotations(borrowed: BorrowedModel, base: list[LayerCall], limit: int) -> tuple[tuple[Rotation | None, ...], str]:
    """The rotation of each layer; on failure no rotations and the reason."""
    tables = frequency_tables(borrowed.module)
    seen = [(p, _single_token(borrowed, p)) for p in PROBE_POSITIONS if p < limit]
    tolerance = ROTATION_TOLERANCE[borrowed.dtype_name]
    known: list[Rotation] = []
    rotations: list[Rotation | None] = []
    for layer, call in enumerate(base):
        try:
            by_query = fit_rotation(call.q.cpu(), [(p, c[layer].q.cpu()) for p, c in seen], tables, tolerance=tolerance)
            by_key = fit_rotation(call.k.cpu(), [(p, c[layer].k.cpu()) for p, c in seen], tables, tolerance=tolerance)
        except RotationUnknown as error:
            return (None,) * len(base), f"layer {layer}: {error}"
        if not _same(by_query, by_key):
            return (None,) * len(base), f"layer {layer}: queries and keys turn differently"
        rotations.append(_shared(by_query, known))
    return tuple(rotations), ""


def _defer(borrowed: BorrowedModel, base: list[LayerCall], rotations: tuple[Rotation | None, ...], limit: int) -> bool:
    """Takes the model's rotation out, if its queries and keys are then those of position 0, unscaled."""
    tolerance = ROTATION_TOLERANCE[borrowed.dtype_name]
    borrowed.defers_rotation = True
    for position in (0, min(PROBE_POSITIONS[-1], limit - 1)):
        for before, raw, rotation in zip(base, _single_token(borrowed, position), rotations, strict=True):
            for seen, plain in ((before.q, raw.q), (before.k, raw.k)):
                expected = plain if rotation is None else _scaled(plain, rotation)
                difference = float((expected.float() - seen.float()).abs().max())
                if difference > tolerance * (float(seen.float().abs().max()) + 1e-30):
                    borrowed.defers_rotation = False
    return borrowed.defers_rotation


def _scaled(x: Tensor, rotation: Rotation) -> Tensor:
    """``x`` (heads, dim) as the model has it at position 0: the turned dimensions times the scale."""
    cos, sin = rotation.whole_table(torch.tensor([0]))
    return rotation.turn_back(x.cpu().float()[None], cos, sin)[0].to(x.device)


def _same(a: Rotation | None, b: Rotation | None) -> bool:
    if a is None or b is None:
        return a is b
    shape = (a.interleaved, a.first_dim, a.scale) == (b.interleaved, b.first_dim, b.scale)
    return shape and torch.equal(a.inv_freq, b.inv_freq)


def _shared(rotation: Rotation | None, known: list[Rotation]) -> Rotation | None:
    """One object for equal rotations, so that their tables are built once a step."""
    if rotation is None:
        return None
    for other in known:
        if _same(rotation, other):
            return other
    known.append(rotation)
    return rotation
