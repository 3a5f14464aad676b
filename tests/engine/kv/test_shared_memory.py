"""Memory that other processes may read: planes at aligned places, one writer, a size that stays."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from engine.kv.shared_memory import ALIGN_NBYTES, MappedMemory, PlanePlace, SharedMemory, places_of


def test_planes_stand_behind_each_other_at_aligned_places() -> None:
    places = places_of([10, ALIGN_NBYTES, ALIGN_NBYTES + 1, 1])
    assert [place.at // ALIGN_NBYTES for place in places] == [0, 1, 2, 4]
    assert [place.nbytes for place in places] == [10, ALIGN_NBYTES, ALIGN_NBYTES + 1, 1]


def test_what_one_writes_the_other_reads_from_then_on() -> None:
    memory = SharedMemory(places_of([24, 40]))
    planes = [memory.tensor(0, (3, 4), torch.int16), memory.tensor(1, (5, 2), torch.float32)]
    assert all(not plane.any() and plane.is_contiguous() for plane in planes)
    read = MappedMemory(memory.fd, memory.nbytes).bytes
    planes[0][2, 3] = 0x0102
    planes[1][:] = 1.0
    assert bytes(read[22:24]) == b"\x02\x01"
    assert bytes(read[ALIGN_NBYTES : ALIGN_NBYTES + 4]) == torch.ones(1).numpy().tobytes()


def test_nobody_else_writes_and_the_file_keeps_its_size() -> None:
    memory = SharedMemory(places_of([100]))
    for attempt in (
        lambda: mmap.mmap(memory.fd, 100),
        lambda: os.pwrite(memory.fd, b"x", 0),
        lambda: os.ftruncate(memory.fd, 10),
        lambda: os.ftruncate(memory.fd, 10_000),
    ):
        with pytest.raises(OSError):
            attempt()


def test_a_file_that_could_shrink_under_its_reader_is_not_opened() -> None:
    fd = os.memfd_create("any", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 100)
    with pytest.raises(ValueError, match="keeps its size"):
        MappedMemory(fd, 100)
    os.close(fd)
    memory = SharedMemory(places_of([100]))
    with pytest.raises(ValueError, match="memory file of 101 bytes"):
        MappedMemory(memory.fd, 101)


def test_the_memory_lives_as_long_as_a_tensor_of_it_and_its_descriptor_as_long_as_itself() -> None:
    memory = SharedMemory([PlanePlace(0, 8)])
    fd, plane = memory.fd, memory.tensor(0, (8,), torch.uint8)
    del memory
    with pytest.raises(OSError):
        os.fstat(fd)
    plane.fill_(7)
    assert plane.sum() == 56


def test_without_memory_files_there_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="no memory files"):
        SharedMemory([PlanePlace(0, 8)])
