"""What a composition's tokens leave in every layer: K, V and hidden states, by our engine or by eager attention.

A trace is indexed by the token's place in the composition, chunks and query in order. Keys are turned to where
a token stands: a chunk that a reuse mode moves was computed somewhere else, and its stored keys are turned by its
offset, in fp32, before they are compared; otherwise every moved chunk would differ from every other way of answering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from chunk_store.key import ChunkKey
from engine.block_mask import masked_sequence
from engine.kv.pages import PageRun
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunk, ResidentChunks
from engine.plan import behind_each_other
from engine.reuse import KeyedChunk, ReuseMode, key_composition
from engine.run.pieces import cuts, prefill_chunk, prefill_tail
from engine.run.protocol import WatchableRunner
from engine.served import ServedModel

# Fills a run with a chunk's stored KV; "" or why it is not there.
LoadStored = Callable[[ChunkKey, Sequence[int], PagedKVPool, PageRun], str]
MakeRunner = Callable[[PagedKVPool], WatchableRunner]

COMPUTED = "computed"
STORED = "stored"
PAGE_SIZE = 16


@dataclass(frozen=True)
class Trace:
    """Everything on the CPU in fp32, of all tokens of the chunks and the query.

    ``keys[layer]`` is (tokens, kv_heads, k_dim), ``values[layer]`` (tokens, kv_heads, v_dim), ``hidden[layer]``
    (tokens, width) what the layer hands on, where ``seen`` (layers, tokens) says that it was computed: that of loaded
    chunks is not. Keys and values are empty where they cannot be seen. ``logits`` (vocabulary,) follow the last token.
    ``sources[i]`` says where the KV of chunk i came from.
    """

    keys: list[Tensor]
    values: list[Tensor]
    hidden: list[Tensor]
    seen: Tensor
    logits: Tensor
    sources: list[str]


class HiddenStates:
    """What the decoder layers hand on, whichever code runs them."""

    def __init__(self, served: ServedModel) -> None:
        self._rows: list[list[Tensor]] = [[] for _ in served.layout.layers]

    def note(self, layer: int, hidden: Tensor) -> None:
        """Takes rows of one layer; to be called by what runs it."""
        self._rows[layer].append(hidden.detach().reshape(-1, hidden.shape[-1]).float().cpu())

    def take(self, pieces: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """The rows since the last time, of forwards of so many tokens each.

        By layer (tokens, width) fp32, and which of them there are (layers, tokens): rows that fill up a forward are
        dropped, and a last layer may have its last row alone, or none.
        """
        found = [_laid(rows, pieces) for rows in self._rows]
        for rows in self._rows:
            rows.clear()
        return [states for states, _ in found], torch.stack([seen for _, seen in found])


def _laid(rows: Sequence[Tensor], pieces: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One layer's rows of several forwards behind each other, and which of them there are."""
    states = torch.zeros(sum(pieces), rows[0].shape[-1] if rows else 1)
    seen = torch.zeros(len(states), dtype=torch.bool)
    end = 0
    for index, piece in enumerate(pieces):
        end += piece
        given = rows[index][:piece] if len(rows) == len(pieces) else states[:0]
        if len(given):
            states[end - len(given) : end] = given
            seen[end - len(given) : end] = True
    return states, seen


@torch.inference_mode()
def trace_engine(
    served: ServedModel,
    chunks: Sequence[tuple[int, ...]],
    query: Sequence[int],
    mode: ReuseMode,
    *,
    salt: str = "",
    load: LoadStored | None = None,
    make_runner: MakeRunner | None = None,
) -> Trace:
    """Our own answer's trace: chunks loaded by ``load`` where it has them, otherwise computed, then the query.

    ``make_runner`` replaces the runner that serves. Raises ``ValueError`` for a mode that the model does not have.
    """
    if mode is not ReuseMode.EXACT and served.findings.rotation_refusal:
        raise ValueError(f"{mode.value}: chunks of this model cannot be moved: {served.findings.rotation_refusal}")
    keyed = key_composition(served.identity, list(chunks), mode, salt)
    chunk_pages = sum(-(-len(chunk) // PAGE_SIZE) for chunk in chunks)
    pages = chunk_pages + -(-len(query) // PAGE_SIZE)
    device = served.borrowed.device
    pool = PagedKVPool(served.layout, pages=pages, chunk_pages=chunk_pages, page_size=PAGE_SIZE, device=device)
    runner = make_runner(pool) if make_runner else served.make_runner(pool, **_seen_into(served))
    hidden = HiddenStates(served)
    residents = ResidentChunks(pool)
    held: list[_Held] = []
    for chunk in keyed:
        held.append(_hold(chunk, held, residents, runner, hidden, load))
    placed = behind_each_other((h.resident.first_slot(PAGE_SIZE), h.resident.tokens, h.keyed.offset) for h in held)
    tail = pool.allocate_pages(pool.pages_for(len(query))) or []
    with runner.watching_layers(hidden.note):
        logits = prefill_tail(runner, query, placed, tail, start=sum(map(len, chunks)))
    pieces = [cut.rows for cut in cuts(runner, placed, len(query), chunk=False)]
    states = [*(h.hidden for h in held), hidden.take(pieces)]
    slots = [page * PAGE_SIZE + at for page in tail for at in range(PAGE_SIZE)][: len(query)]
    keys, values = _gather(served, pool, held, slots)
    return Trace(
        keys=keys,
        values=values,
        hidden=_join([of_part for of_part, _ in states]),
        seen=torch.cat([seen for _, seen in states], dim=1),
        logits=logits.float().cpu(),
        sources=[h.source for h in held],
    )


@dataclass(frozen=True)
class _Held:
    keyed: KeyedChunk
    resident: ResidentChunk
    hidden: tuple[list[Tensor], Tensor]
    source: str


def _hold(
    keyed: KeyedChunk,
    held: list[_Held],
    residents: ResidentChunks,
    runner: WatchableRunner,
    hidden: HiddenStates,
    load: LoadStored | None,
) -> _Held:
    """A chunk in the pool, computed at its own place unless it is there already or can be loaded."""
    same = next((h for h in held if h.keyed.key == keyed.key), None)
    if same is not None:
        return _Held(keyed, same.resident, same.hidden, same.source)
    resident = residents.reserve(keyed.key, len(keyed.token_ids))
    resident.ready = True
    missing = "" if load is None else load(keyed.key, keyed.token_ids, residents.pool, resident.run)
    if load is not None and not missing:
        return _Held(keyed, resident, hidden.take([len(keyed.token_ids)]), STORED)
    seen = (held[i].resident for i in keyed.context)
    context = behind_each_other((each.first_slot(PAGE_SIZE), each.tokens, 0) for each in seen)
    with runner.watching_layers(hidden.note):
        prefill_chunk(runner, keyed.token_ids, context, resident.run)
    states = hidden.take([cut.rows for cut in cuts(runner, context, len(keyed.token_ids), chunk=True)])
    return _Held(keyed, resident, states, f"{COMPUTED} ({missing})" if missing else COMPUTED)


def _seen_into(served: ServedModel) -> dict[str, Any]:
    """Options of a runner that can be watched: a captured step runs without us."""
    return {"graphs": False} if served.weights is not None else {}


def _gather(
    served: ServedModel, pool: PagedKVPool, held: list[_Held], tail_slots: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """K turned to where every token stands, and V, by layer."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer in range(len(served.layout.layers)):
        k_parts, v_parts = [], []
        for h in held:
            slots = slice(h.resident.first_slot(PAGE_SIZE), h.resident.first_slot(PAGE_SIZE) + h.resident.tokens)
            k_parts.append(_moved(served, layer, pool.keys[layer][slots].float().cpu(), h.keyed.offset))
            v_parts.append(pool.values[layer][slots].float().cpu())
        keys.append(torch.cat([*k_parts, pool.keys[layer][tail_slots].float().cpu()]))
        values.append(torch.cat([*v_parts, pool.values[layer][tail_slots].float().cpu()]))
    return keys, values


def _moved(served: ServedModel, layer: int, k: Tensor, offset: int) -> Tensor:
    rotation = served.findings.rotations[layer]
    if offset == 0 or rotation is None:
        return k
    return rotation.turn_back(k, *rotation.table(torch.tensor([-offset])))


def _join(parts: list[list[Tensor]]) -> list[Tensor]:
    """Hidden states of all parts by layer; a part that has none takes the others' width."""
    joined = []
    for of_layer in zip(*parts, strict=True):
        width = max(part.shape[-1] for part in of_layer)
        joined.append(torch.cat([part if part.shape[-1] == width else part.expand(-1, width) for part in of_layer]))
    return joined


@torch.inference_mode()
def trace_eager(served: ServedModel, chunks: Sequence[tuple[int, ...]], query: Sequence[int], mode: ReuseMode) -> Trace:
    """The trace of the plain forward that a mode stands for, by the model's own code and its eager attention."""
    device = served.borrowed.device
    lengths = [*map(len, chunks), len(query)]
    tokens = torch.tensor([*(token for chunk in chunks for token in chunk), *query], device=device)
    plain = masked_sequence(lengths, mode)
    cache = DynamicCache()
    hidden = HiddenStates(served)
    with served.borrowed.watching_layers(hidden.note):
        logits = served.borrowed.eager_forward(
            tokens[plain.source.to(device)], plain.positions.to(device), plain.allowed, cache=cache
        )
    states, seen = hidden.take([len(plain.source)])
    rows = plain.allowed[-1].nonzero()[:, 0]  # all but the copies that a moved chunk sees of its context
    keys = [layer.keys[0].transpose(0, 1) for layer in cache.layers]
    ours = [(layer.kv_heads, layer.k_dim) for layer in served.layout.layers]
    same = [tuple(k.shape[1:]) for k in keys] == ours  # latent attention keeps latents there, from which KV is made
    return Trace(
        keys=[k.float().cpu()[rows] for k in keys] if same else [],
        values=[layer.values[0].transpose(0, 1).float().cpu()[rows] for layer in cache.layers] if same else [],
        hidden=[of_layer[rows] for of_layer in states],
        seen=seen[:, rows],
        logits=logits[-1].cpu(),
        sources=[COMPUTED] * len(chunks),
    )
