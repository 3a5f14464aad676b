"""The start check on right models and on planted faults: what tells them apart, at several scales of weights.

    python -m bench.start_check [--device cuda] [--architectures 3]

Small random bf16 models. A row a model, scale and fault: the structure's error in standard deviations of the logits
(bound 1e-3), R (bound 2.5) and, on CUDA, the kernels' distance (bound 2.5), the largest of all modes, and whether the
start check refuses a mode. Scales are of the matrices' deviation, 1 is 0.02.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from bench.models import random_model
from engine.attention import Scores
from engine.attention.partial import merge
from engine.check.start import KERNEL_MAX, ROUNDING_MAX, STRUCTURE_MAX, check_structure, measure
from engine.device import current
from engine.model.borrowed import BorrowedModel
from engine.model.probe import examine
from engine.plan import CascadePlan, ChunkRead, plan_step
from engine.run import planning
from engine.run.choice import decide_and_try
from engine.run.cuda.cascade.launch import CascadeWork
from engine.run.eager import attention as torch_attention
from engine.run.eager.attention import TorchAttention
from engine.served import check_runners, checked_weights, use_stable_products_on

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", HEADS),
    "qwen2": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "llama yarn": ("llama", HEADS | {"rope_parameters": YARN}),
    "gemma2": ("gemma2", HEADS),
    "gpt-oss": ("gpt_oss", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "cohere2": ("cohere2", HEADS),
    "mixtral": ("mixtral", HEADS | {"num_local_experts": 4}),
}
SCALES = (0.25, 1.0, 4.0)


def _each_read(change: Callable[[ChunkRead], ChunkRead | None]) -> Callable[..., CascadePlan]:
    def planned(*arguments: Any, **options: Any) -> CascadePlan:
        plan = plan_step(*arguments, **options)
        levels = tuple(tuple(r for r in map(change, level) if r is not None) for level in plan.levels)
        return replace(plan, levels=levels)

    return planned


def _shifted_tail(*arguments: Any, **options: Any) -> CascadePlan:
    """Decode steps stand one position too far."""
    plan = plan_step(*arguments, **options)
    return replace(plan, positions=tuple(p + 1 for p in plan.positions)) if plan.tails[0].rows == 1 else plan


@contextmanager
def planned(by: Callable[..., CascadePlan]) -> Iterator[None]:
    """Every plan made by ``by``."""
    with mock.patch.object(planning, "plan_step", by):
        yield


@contextmanager
def attended(
    *,
    scores: Callable[[Scores], Scores] = lambda s: s,
    queries: Callable[[Any], Any] = lambda q: q,
    chunks: float = 1.0,
) -> Iterator[None]:
    """Attention of the torch backend and of the kernels with something changed; ``chunks`` weigh so much more."""
    torch_attend, launch = TorchAttention.attend, CascadeWork.launch

    def merged(outs: Any, lses: Any, sinks: Any) -> Any:
        return merge(outs, [lses[0], *(lse + math.log(chunks) for lse in lses[1:])], sinks)

    def attend(self: Any, step: Any, layer: int, q: Any, k: Any, v: Any, given: Scores) -> Any:
        return torch_attend(self, step, layer, queries(q), k, v, scores(given))

    def launched(self: Any, keys: Any, values: Any, q: Any, into: Any, *, scaling: float, **options: Any) -> None:
        launch(self, keys, values, queries(q).contiguous(), into, scaling=scores(Scores(scaling)).scaling, **options)
        if chunks != 1.0:  # the kernels merge inside: a fault of the same size in what comes out
            into.mul_(chunks)

    patches = [
        (TorchAttention, "attend", attend),
        (CascadeWork, "launch", launched),
        (torch_attention, "merge", merged),
    ]
    with ExitStack() as ends:
        for owner, name, by in patches:
            ends.enter_context(mock.patch.object(owner, name, by))
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "none": lambda: planned(plan_step),
    "rotation off by one": lambda: planned(
        _each_read(lambda r: replace(r, offsets=tuple(o + 1 if o else 0 for o in r.offsets)))
    ),
    "one-token chunk missing": lambda: planned(_each_read(lambda r: None if r.tokens == 1 else r)),
    "a token hidden": lambda: planned(_each_read(lambda r: replace(r, tokens=r.tokens - 1) if r.tokens > 6 else r)),
    "decode one position off": lambda: planned(_shifted_tail),
    "chunks weigh 1 % more": lambda: attended(chunks=1.01),
    "scores scaled by 1.05": lambda: attended(scores=lambda s: replace(s, scaling=1.05 * s.scaling)),
    "heads of a neighbour": lambda: attended(queries=lambda q: q.roll(1, dims=1)),
}


def model_of(name: str, scale: float, device: str) -> BorrowedModel:
    kind, settings = ARCHITECTURES[name]
    return BorrowedModel(random_model(kind, settings, deviation=0.02 * scale).bfloat16().to(device), name=name)


def row(borrowed: BorrowedModel, fault: str) -> tuple[float, float, float]:
    """Structure, R and kernels, the largest of all modes; NaN for what was not measured."""
    with torch.inference_mode(), current(borrowed.device), FAULTS[fault]():
        use_stable_products_on(borrowed.device)
        findings = examine(borrowed)
        layers = borrowed.decoder_layers()
        structure = check_structure(borrowed, findings)
        decision = decide_and_try(borrowed, structure.findings)
        weights, _ = checked_weights(borrowed, structure.findings, decision)
        make_runner = check_runners(borrowed, structure.findings, weights, decision)
        checks = measure(borrowed, structure, make_runner, layers).values()
    parts = [[getattr(check, part) for check in checks] for part in ("structure", "rounding", "kernels")]
    structure_error, rounding, kernels = (
        max((math.inf if x != x else x for x in part if x is not None), default=math.nan) for part in parts
    )
    return structure_error, rounding, kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--architectures", type=int, default=len(ARCHITECTURES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    right: list[tuple[float, ...]] = []
    wrong: list[tuple[float, ...]] = []
    passed: list[str] = []
    for name in list(ARCHITECTURES)[: options.architectures]:
        for scale in SCALES:
            borrowed = model_of(name, scale, options.device)
            for fault in FAULTS:
                started = time.perf_counter()
                found = row(borrowed, fault)
                refused = found[0] > STRUCTURE_MAX or found[1] > ROUNDING_MAX or found[2] > KERNEL_MAX
                (right if fault == "none" else wrong).append(found)
                if refused is (fault == "none"):
                    passed.append(f"{name} x{scale:g} {fault}")
                print(
                    f"{name:11s} x{scale:<5g}{fault:25s} structure {found[0]:.1e}  R {found[1]:6.2f}  kernels "
                    f"{found[2]:6.2f}  {'refused' if refused else 'served'}  {time.perf_counter() - started:.1f} s",
                    flush=True,
                )
    for kind, rows in (("right", right), ("faults", wrong)):
        spans = [f"{min(column):.2g} .. {max(column):.2g}" for column in zip(*rows, strict=True)]
        print(f"{kind}: structure {spans[0]}, R {spans[1]}, kernels {spans[2]}")
    print("judged wrongly:", passed or "none")


if __name__ == "__main__":
    main()
