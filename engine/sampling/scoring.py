"""Log-probabilities of given tokens under rows of logits, on the device where these are; a few rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.sampling.params import Choice

ROWS_AT_ONCE = 64  # what is held for a row are its logits, and a few times as much while they are looked at


@dataclass(frozen=True)
class PendingScores:
    """Scores on their way to the host: of each of ``wanted``, a place among the rows and a token."""

    wanted: Sequence[tuple[int, int]]
    logprobs: Tensor  # (wanted,) fp32
    top_ids: Tensor  # (rows, top) int64
    top_logprobs: Tensor  # (rows, top) fp32
    arrived: Any = None  # an event of CUDA

    def wait(self) -> list[Choice]:
        """One for each that was wanted, in order."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tops = [
            tuple(zip(ids, values, strict=True))
            for ids, values in zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        ]
        found = zip(self.wanted, self.logprobs.tolist(), strict=True)
        return [Choice(token, logprob, tops[place]) for (place, token), logprob in found]


def begin_scoring(logits: Tensor, wanted: Sequence[tuple[int, int]], top: int) -> PendingScores:
    """Begins to score ``logits`` (rows, vocabulary), which may be overwritten by what is launched afterwards.

    ``wanted``: place among the rows and token; ``top`` of the likeliest tokens of each row, of equals the lowest ids.
    The host waits for nothing.
    """
    with torch.inference_mode():
        logits, device = logits.float(), logits.device
        total = logits.logsumexp(dim=-1)
        index = torch.tensor(wanted, dtype=torch.int64, pin_memory=device.type == "cuda")
        places, tokens = index.to(device, non_blocking=True).unbind(1)
        logprobs = logits[places, tokens] - total[places]
        ids = _likeliest(logits, min(top, logits.shape[1]))
        values = logits.gather(1, ids) - total[:, None]
        if device.type != "cuda":
            return PendingScores(wanted, logprobs, ids, values)
        found = _to_host(logprobs), _to_host(ids), _to_host(values)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return PendingScores(wanted, *found, arrived)


def _likeliest(logits: Tensor, top: int) -> Tensor:
    """The ids (rows, top) of the largest, the largest first, of equals the lowest first."""
    rows, vocabulary = logits.shape
    if top == 0:
        return torch.empty(rows, 0, dtype=torch.int64, device=logits.device)
    last = logits.topk(top, dim=-1).values[:, -1:]
    above, ties = logits > last, logits == last
    room = top - above.sum(dim=-1, keepdim=True)
    kept = above | (ties & (ties.cumsum(dim=-1) <= room))
    # So many of each row, without waiting for how many: ids as numbers of which the lowest is the largest.
    falling = torch.arange(vocabulary, 0, -1, dtype=torch.int32, device=logits.device)
    ids = vocabulary - torch.where(kept, falling, 0).topk(top, dim=-1).values.long()
    ids = ids.clamp_(max=vocabulary - 1)  # of rows with NaN nothing is kept
    order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)


def _to_host(tensor: Tensor) -> Tensor:
    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return held.copy_(tensor, non_blocking=True)
