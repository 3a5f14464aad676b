"""Finding out what a model does by watching it: KV geometry, rotation of each layer, limits.

A single token attends to nothing but itself, so its hidden states do not depend on its position, and what
differs between two positions in a layer's queries and keys is exactly what the layer does with positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunk_store.layout import DTYPE_BYTES, KVLayout, LayerLayout
from engine.attention import Scores
from engine.model import BorrowedModel, ModelRefused
from engine.rotary import Rotation, RotationUnknown, fit_rotation, frequency_tables

PROBE_POSITIONS = (1, 2, 5, 33, 117)
ROTATION_TOLERANCE = {"float32": 2e-4, "bfloat16": 3e-2, "float16": 4e-3}
TABLES_THAT_CHANGE = ("dynamic", "longrope")


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

    ``deferred``: the model's own rotation was taken out; whoever attends turns queries and keys.
    """

    layout: KVLayout
    rotations: tuple[Rotation | None, ...]
    rotation_refusal: str
    context_length_max: int
    window: int | None
    deferred: bool


def examine(borrowed: BorrowedModel) -> Findings:
    """Probes the model. Raises ``ModelRefused`` if attention is not all that carries state between tokens."""
    text_config = borrowed.config.get_text_config()
    base = _single_token(borrowed, 0)
    layers = getattr(text_config, "num_hidden_layers", len(base))
    if len(base) != layers:
        raise ModelRefused(
            f"model {borrowed.name}: {len(base)} attention calls for {layers} layers go through transformers' "
            "attention interface; there must be one a layer (others have an attention of their own, or carry state "
            "that a KV store does not hold, as linear attention and convolutions do)"
        )
    if borrowed.dtype_name not in DTYPE_BYTES:
        raise ModelRefused(
            f"model {borrowed.name}: weights of {borrowed.dtype_name}; load it with one of {sorted(DTYPE_BYTES)}"
        )
    layout = KVLayout(
        borrowed.dtype_name, tuple(LayerLayout(call.k.shape[0], call.k.shape[1], call.v_dim) for call in base)
    )
    rotations, refusal = _rotations(borrowed, base)
    changing = _changing_rope(text_config)
    if changing and not refusal:
        refusal = f"rope type {changing[0]!r}: its frequencies depend on the length of the whole prompt"
    windows = [call.scores.window for call in base if call.scores.window]
    window = min([*windows, *_chunked_attention(text_config)], default=None)
    # Turned once more by us, a query would be rounded twice: nothing in float32, but not in a shorter dtype.
    wanted = borrowed.dtype_name != "float32" and borrowed.device.type == "cpu" and not refusal
    deferred = wanted and _defer(borrowed, base, rotations)
    limits = [_position_limit(text_config), window, changing[1] if changing else None]
    return Findings(layout, rotations, refusal, min(limit for limit in limits if limit), window, deferred)


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


def _rotations(borrowed: BorrowedModel, base: list[LayerCall]) -> tuple[tuple[Rotation | None, ...], str]:
    """The rotation of each layer; on failure no rotations and the reason."""
    tables = frequency_tables(borrowed.module)
    limit = _position_limit(borrowed.config.get_text_config())
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


def _defer(borrowed: BorrowedModel, base: list[LayerCall], rotations: tuple[Rotation | None, ...]) -> bool:
    """Takes the model's rotation out, if its queries and keys are then those of position 0, unscaled."""
    tolerance = ROTATION_TOLERANCE[borrowed.dtype_name]
    borrowed.defers_rotation = True
    for position in (0, PROBE_POSITIONS[-1]):
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


def _rope_settings(text_config: Any) -> list[dict[str, Any]]:
    """Rope settings of the configuration; one for each kind of layer where they differ."""
    settings = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


def _changing_rope(text_config: Any) -> tuple[str, int] | None:
    """The rope type whose table changes with length, and the length up to which it does not."""
    for settings in _rope_settings(text_config):
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind in TABLES_THAT_CHANGE:
            original = settings.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", None
            )
            return kind, int(original or _position_limit(text_config))
    return None


def _chunked_attention(text_config: Any) -> list[int]:
    chunk = getattr(text_config, "attention_chunk_size", None)
    return [int(chunk)] if chunk else []


def _position_limit(text_config: Any) -> int:
    """The longest context the configuration names, in tokens."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        limit = getattr(text_config, name, None)
        if limit:
            return int(limit)
    return 2**20
