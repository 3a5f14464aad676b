"""The oracle: transformers' own eager attention with an explicit mask and explicit positions.

Nothing here imports our packages. For a composition of chunks and a query under a mode it lays out what the
mode means, as plain rows: which token, at which position, seeing which rows.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


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
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[None, None]
    output = model(
        input_ids=torch.tensor([tokens]), position_ids=torch.tensor([positions]), attention_mask=mask, use_cache=False
    )
    model.set_attn_implementation(before)
    return output.logits[0, -len(query) :].float()


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
