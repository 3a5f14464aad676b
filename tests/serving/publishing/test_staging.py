"""Staging memory: bytes come out as they went in, places are used again, and who waits for one has a deadline."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from serving.publishing.staging import ALIGN_NBYTES, Staging

CPU = torch.device("cpu")


def later() -> float:
    return time.monotonic() + 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planes_are_copied_one_after_another(dtype: torch.dtype) -> None:
    staging = Staging(4 * ALIGN_NBYTES, CPU)
    planes = [torch.randn(3, 2, 5).to(dtype), torch.randn(7, 1).to(dtype)]
    region = staging.take(sum(plane.nbytes for plane in planes), later())
    buffers = staging.copy(planes, region)
    for plane, buffer in zip(planes, buffers, strict=True):
        assert bytes(buffer) == bytes(plane.reshape(-1).view(torch.uint8).numpy())
    staging.give_back(region)


def test_places_are_bounded_and_used_again() -> None:
    staging = Staging(3 * ALIGN_NBYTES + 5, CPU)
    first, second = staging.take(ALIGN_NBYTES + 1, later()), staging.take(ALIGN_NBYTES, later())
    assert (first.at, second.at) == (0, 2 * ALIGN_NBYTES)
    with pytest.raises(TimeoutError):
        staging.take(1, time.monotonic() + 0.01)
    threading.Timer(0.05, staging.give_back, [first]).start()
    third = staging.take(2 * ALIGN_NBYTES, later())
    assert third.at == 0 and third.memory.data_ptr() == first.memory.data_ptr()


def test_what_is_larger_than_all_of_it_gets_memory_of_its_own() -> None:
    staging = Staging(ALIGN_NBYTES, CPU)
    held = staging.take(ALIGN_NBYTES, later())
    large = staging.take(3 * ALIGN_NBYTES, later())
    assert large.memory.nbytes == 3 * ALIGN_NBYTES
    staging.give_back(large)
    staging.give_back(held)
    assert staging.take(ALIGN_NBYTES, later()).at == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_where_no_memory_can_be_pinned_plain_memory_does(caplog: pytest.LogCaptureFixture) -> None:
    staging = Staging(ALIGN_NBYTES, CPU, pinned=True)
    region = staging.take(12, later())
    assert bytes(staging.copy([torch.ones(3)], region)[0]) == torch.ones(3).numpy().tobytes()
    assert "cannot be pinned" in caplog.text
