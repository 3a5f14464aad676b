"""The identity changes with every byte that KV depends on, and with nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.model.identity import config_digest, numerics, staged_parts, weights_digest


def module(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    made.register_buffer("table", torch.arange(3.0))
    return made.to(dtype)


def test_weights_are_their_bytes_names_and_dtypes() -> None:
    same = weights_digest(module())
    assert weights_digest(module()) == same
    others = [module(1), module(dtype=torch.bfloat16)]
    with torch.no_grad():
        changed: Any = module()
        changed[0].weight[2, 1] += 1e-6
        buffered: Any = module()
        buffered.table[0] = 9
    reshaped = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    others += [changed, buffered, reshaped]
    assert len({same, *map(weights_digest, others)}) == 6


def test_weights_are_the_same_however_they_lie_in_memory() -> None:
    plain, strided = module(), module()
    first: Any = strided[0]  # type: ignore[index]
    first.weight = nn.Parameter(first.weight.detach().t().contiguous().t())
    assert not first.weight.is_contiguous() and weights_digest(strided) == weights_digest(plain)


@pytest.mark.parametrize("size", [1, 7, 16, 20, 21, 64])
def test_parts_through_memory_of_any_size_are_all_bytes_in_order(size: int) -> None:
    flat = torch.arange(20, dtype=torch.uint8)
    parts = [bytes(part.numpy().data) for part in staged_parts(flat, torch.empty(size, dtype=torch.uint8))]
    assert b"".join(parts) == bytes(range(20)) and max(map(len, parts)) <= size
    assert not list(staged_parts(flat[:0], torch.empty(0, dtype=torch.uint8)))


def config(**fields: Any) -> Any:
    return SimpleNamespace(to_dict=lambda: {"hidden_size": 8, "_name_or_path": "a", "dtype": "float32", **fields})


def test_a_configuration_is_what_is_computed_not_where_it_came_from() -> None:
    same = config_digest(config())
    assert config_digest(config(_name_or_path="b", dtype="bfloat16", transformers_version="9")) == same
    assert config_digest(config(hidden_size=16)) != same != config_digest(config(rope_theta=1.0))


def test_what_rounds_otherwise_has_another_name() -> None:
    cpu = torch.device("cpu")
    names = {numerics(cpu, "eager", 64), numerics(cpu, "fused", 64), numerics(cpu, "eager", 32)}
    assert len(names) == 3 and numerics(cpu, "eager", 64) in names
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert numerics(cpu, "eager", 64) not in names
    finally:
        torch.set_num_threads(threads)
