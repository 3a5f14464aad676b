"""The oracle: transformers' own eager attention with an explicit mask and explicit positions.

Nothing here imports our packages. For a composition of chunks and a query under a mode it lays out what the
mode means, as plain rows: which token, at which position, seeing which rows. What windows and blocks hide besides
is asked of the mask functions that the model's own code makes for each of its layers, at the rows' positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


def rows_of(chunks: list[list[int]], query: list[int], mode: str) -> tuple[list[int], list[int], torch.Tensor]:
    """Token ids, positions and the boolean mask (rows, rows) of a composition; the query's rows come last.

    ``exact``: causal. ``independent``: a chunk sees itself. ``anchored``: a chunk sees the first chunk directly
    before itself, so one that stands further on gets a copy of the first chunk at that distance, which the
    query does not see.
    """
    tokens: list[int] = []
    positions: list[int] = []
    groups: list[tuple[range, list[range]]] = []  # own rows, rows seen besides
    shown: list[range] = []  # the chunks' rows that the query sees
    start = 0
    for index, chunk in enumerate(chunks):
        seen: list[range] = []
        if mode == "exact":
            seen = list(shown)
        elif mode == "anchored" and index == 1:
            seen = [shown[0]]
        elif mode == "anchored" and index > 1:
            copy = range(len(tokens), len(tokens) + len(chunks[0]))
            tokens += chunks[0]
            positions += range(start - len(chunks[0]), start)
            groups.append((copy, []))
            seen = [copy]
        own = range(len(tokens), len(tokens) + len(chunk))
        tokens += chunk
        positions += range(start, start + len(chunk))
        groups.append((own, seen))
        shown.append(own)
        start += len(chunk)
    own = range(len(tokens), len(tokens) + len(query))
    tokens += query
    positions += range(start, start + len(query))
    groups.append((own, shown))
    allowed = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for own, seen in groups:
        for row in own:
            allowed[row, own.start : row + 1] = True
            for other in seen:
                allowed[row, other.start : other.stop] = True
    return tokens, positions, allowed


@torch.inference_mode()
def logits(model: PreTrainedModel, chunks: list[list[int]], query: list[int], mode: str) -> torch.Tensor:
    """Logits (query tokens, vocabulary) of the query's rows."""
    tokens, positions, allowed = rows_of(chunks, query, mode)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids, places = torch.tensor([tokens]), torch.tensor([positions])
    with seen_by_layers(allowed, places[0]) as asked:
        output = model(input_ids=ids, position_ids=places, attention_mask=torch.ones_like(ids), use_cache=False)
    if not asked:  # modelling code that makes its masks itself, none of which has windows
        mask = hidden(allowed, torch.float32)
        output = model(input_ids=ids, position_ids=places, attention_mask=mask, use_cache=False)
    model.set_attn_implementation(before)
    return output.logits[0, -len(query) :].float()


def hidden(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


@contextmanager
def seen_by_layers(allowed: torch.Tensor, positions: torch.Tensor) -> Iterator[list[Callable[..., Any]]]:
    """Eager attention under ``allowed`` and, of each layer, what its mask function shows at ``positions``.

    The ones that are given as mask keep the library from taking rows that stand apart for packed sequences.
    """
    asked: list[Callable[..., Any]] = []

    def make(*, mask_function: Callable[..., Any], dtype: torch.dtype, **arguments: Any) -> torch.Tensor:
        asked.append(mask_function)
        first = torch.tensor(0)
        return hidden(allowed & mask_function(first, first, positions[:, None], positions[None, :]), dtype)

    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = make
    try:
        yield asked
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]


def greedy(
    model: PreTrainedModel, chunks: list[list[int]], query: list[int], mode: str, count: int
) -> tuple[list[int], torch.Tensor]:
    """The ``count`` greedy tokens after the query, and the logits (count, vocabulary) they were picked from."""
    generated: list[int] = []
    picked = []
    for _ in range(count):
        last = logits(model, chunks, query + generated, mode)[-1]
        picked.append(last)
        generated.append(int(last.argmax()))
    return generated, torch.stack(picked)
