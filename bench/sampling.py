"""``python -m bench.sampling``: microseconds of drawing tokens on the card, ours beside plain torch.

Ours is a captured graph of what a step launches. Plain torch is not the same work: a sort, a top 1024, a softmax, a
Gumbel argmax with noise from torch's generator, an argmax. Logits are bf16: ``flat`` normal with deviation 1, as a
random model gives them, ``peaked`` with deviation 4, where a few tokens have most of the mass.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.run.cuda.sampling.slots import DeviceSlots
from engine.sampling.params import Draw, SamplingParams, SamplingRequest

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_p 0.5": {"temperature": 0.8, "top_p": 0.5},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "everything": {
        **{"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1},
        **{"frequency_penalty": 0.5, "min_tokens": 100, "logit_bias": ((5, 1.0),)},
        **{"logprobs": True, "top_logprobs": 20},
    },
}
FLUSH_BYTES = 256 << 20


def microseconds(run: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of a run on the device, its inputs no longer in the cache from the run before."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1000 for start, end in pairs)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()

    replay.run = run  # type: ignore[attr-defined]  # keeps what the graph reads and writes
    return replay


def ours(logits: Tensor, fields: dict[str, Any]) -> Callable[[], Any]:
    """A captured draw of every row with these parameters."""
    rows, vocabulary = logits.shape
    slots = DeviceSlots(vocabulary, slots=rows, rows=rows, device="cuda")
    for slot in range(rows):
        params = SamplingParams(max_tokens=10**6, seed=slot, **fields)
        slots.open(slot, SamplingRequest(params, range(100, 1100), frozenset([0])))
    kind = slots.stage([Draw(slot, 5, 1000) for slot in range(rows)], rows)
    return captured(lambda: slots.launch(logits, kind))


def plain(logits: Tensor) -> dict[str, Callable[[], Any]]:
    """What plain torch takes for parts of the same."""
    wide = logits.float()
    noise = torch.empty_like(wide)
    return {
        "torch sort": captured(lambda: torch.sort(wide, dim=-1, descending=True)),
        "torch topk 1024": captured(lambda: torch.topk(wide, 1024, dim=-1)),
        "torch softmax": captured(lambda: torch.softmax(wide, dim=-1)),
        "torch gumbel argmax": captured(
            lambda: torch.argmax(torch.softmax(wide / 0.8, dim=-1).div_(noise.exponential_()), dim=-1)
        ),
        "torch argmax": captured(lambda: torch.argmax(logits, dim=-1)),
    }


def measure(vocabulary: int, batches: list[int]) -> list[dict[str, Any]]:
    found = []
    for rows in batches:
        for name, deviation in (("flat", 1.0), ("peaked", 4.0)):
            generator = torch.Generator("cuda").manual_seed(0)
            logits = (torch.randn(rows, vocabulary, device="cuda", generator=generator) * deviation).bfloat16()
            runs = {kind: ours(logits, fields) for kind, fields in KINDS.items()}
            for kind, run in {**runs, **plain(logits)}.items():
                found.append({"rows": rows, "logits": name, "what": kind, "us": round(microseconds(run), 1)})
                print(f"{rows:4d} rows  {name:7s}  {kind:20s} {found[-1]['us']:9.1f} us", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--json", help="where the figures go")
    arguments = parser.parse_args()
    found = measure(arguments.vocabulary, arguments.rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "figures": found}, file, indent=1)


if __name__ == "__main__":
    main()
