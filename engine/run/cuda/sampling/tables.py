"""What the device holds of each slot: small tables that kernels read, written on the current stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.run.cuda.inputs import PinnedRing
from engine.sampling.cut import QUOTIENT_MAX
from engine.sampling.params import BIASES_MAX, SamplingParams, SamplingRequest

COLUMNS = 8  # integers of a slot, and as many numbers
OPENING = 64  # slots whose entries may be on their way
PENALISES, BIASES, ALLOWS, STOPS = 1, 2, 4, 8  # flags, as in ``state``


class Tables:
    """One entry for each of ``slots`` slots, and one more that no request has, for rows that fill a step up.

    A copy of what is to be written is made in pinned memory, so that nothing here waits for the device.
    """

    def __init__(self, slots: int, vocabulary: int, block: int, device: torch.device) -> None:
        self.slots, self.vocabulary, self.device = slots, vocabulary, device
        self._block = block

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros((slots + 1, *shape), dtype=dtype, device=device)

        words, blocks = -(-vocabulary // 32), -(-vocabulary // block)
        self.last = empty(dtype=torch.int32)
        self._entries = empty(2 * COLUMNS, dtype=torch.int64)  # one copy opens a slot
        self._opening = PinnedRing((2 * COLUMNS,), torch.int64, device, depth=OPENING)
        self.integers, self.numbers = self._entries[:, :COLUMNS], self._entries.view(torch.float64)[:, COLUMNS:]
        self.counts = empty(vocabulary, dtype=torch.int32)  # of each token of the answer, while penalties need it
        self.prompts = empty(words, dtype=torch.int32)  # bits: tokens of the prompt
        self.allowed = empty(words, dtype=torch.int32)
        self.stops = empty(words, dtype=torch.int32)
        self.bias_tokens = empty(BIASES_MAX, dtype=torch.int32)  # in rising order
        self.biases = empty(BIASES_MAX, dtype=torch.float32)
        self.bias_starts = empty(blocks + 1, dtype=torch.int32)  # which of them are whose block's

    def open(self, slot: int, request: SamplingRequest) -> None:
        """Writes a slot's entries. Those that its flags do not name are left as they were."""
        params = request.params
        pinned = self._opening.take()
        pinned.values[:COLUMNS] = _integers(request, self.vocabulary)
        pinned.values.view(np.float64)[COLUMNS:] = _numbers(params)
        self._entries[slot].copy_(pinned.tensor, non_blocking=True)
        pinned.begun()
        if request.generated:
            self._write(self.last[slot : slot + 1], np.array(request.generated[-1:], np.int32))
        if params.min_tokens and request.stop_token_ids:
            self._write(self.stops[slot], self._bits(request.stop_token_ids))
        if params.penalises:
            self._count(slot, request)
        if params.logit_bias:
            self._bias(slot, params)

    def _count(self, slot: int, request: SamplingRequest) -> None:
        self._write(self.prompts[slot], self._bits(request.prompt))
        self.counts[slot].zero_()
        if request.generated:
            tokens, counts = np.unique(np.array(request.generated, np.int64), return_counts=True)
            at = self._pinned(tokens).to(self.device, non_blocking=True)
            self.counts[slot].index_copy_(
                0, at, self._pinned(counts.astype(np.int32)).to(self.device, non_blocking=True)
            )

    def _bias(self, slot: int, params: SamplingParams) -> None:
        tokens, biases = zip(*sorted(params.logit_bias), strict=True)
        ends = np.arange(self.bias_starts.shape[1]) * self._block
        self._write(self.bias_tokens[slot, : len(tokens)], np.array(tokens, np.int32))
        self._write(self.biases[slot, : len(tokens)], np.array(biases, np.float32))
        self._write(self.bias_starts[slot], np.searchsorted(tokens, ends).astype(np.int32))

    def _bits(self, tokens: Any) -> NDArray[np.int32]:
        """(ceil(vocabulary / 32),) with the bits of these tokens set, the lowest first."""
        bits = np.zeros(-(-self.vocabulary // 32) * 32, np.uint8)
        bits[np.fromiter(tokens, np.int64)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def _write(self, into: Tensor, values: NDArray[Any]) -> None:
        into.copy_(self._pinned(values), non_blocking=True)

    def _pinned(self, values: NDArray[Any]) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values))
        return host.pin_memory() if self.device.type == "cuda" else host


def _integers(request: SamplingRequest, vocabulary: int) -> list[int]:
    params = request.params
    flags = PENALISES * params.penalises | BIASES * bool(params.logit_bias) | STOPS * bool(request.stop_token_ids)
    flags |= ALLOWS * request.masked
    top_k = params.top_k if params.temperature > 0.0 and params.top_k < vocabulary else 0
    report = 1 + min(params.top_logprobs, vocabulary) if params.logprobs else 0
    return [flags, top_k, params.min_tokens, params.seed, report, 0, 0, 0]


def _numbers(params: SamplingParams) -> list[float]:
    coldness = min(1.0 / params.temperature, QUOTIENT_MAX) if params.temperature > 0.0 else 0.0
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    return [coldness, params.top_p, params.min_p, *penalties, 0.0, 0.0]
