"""Pieces that are verified reach the planes, those that are not do not, and nothing is on its way afterwards."""

from __future__ import annotations

import pytest
import torch

from engine.kv import bounce as bounce_module
from engine.kv.bounce import Bounce
from engine.kv.copier import Copier
from engine.kv.device_landing import DeviceLanding

PLANES = ((3, 2, 4), (3, 1, 5), (3, 2, 4))  # of float32: 96, 60 and 96 bytes
NBYTES = 252


def landing_in(planes: list[torch.Tensor], bounce: Bounce, kept: torch.Tensor | None = None) -> DeviceLanding:
    return DeviceLanding(planes, bounce, Copier("cpu"), stream=None, kept=kept)


def blank() -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in PLANES]


def content(planes: list[torch.Tensor]) -> bytes:
    return b"".join(plane.numpy().tobytes() for plane in planes)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("step", [7, 96, 100, 252])
def test_pieces_of_any_size_reach_their_place(step: int, keep: bool) -> None:
    planes, kept = blank(), torch.zeros(NBYTES, dtype=torch.uint8) if keep else None
    landing = landing_in(planes, Bounce("cpu", pieces=2, piece_nbytes=100), kept)
    assert landing.sizes == (96, 60, 96) and landing.piece_nbytes == 100
    whole = bytes(range(NBYTES))
    for start in reversed(range(0, NBYTES, step)):
        with landing.piece(start, min(step, NBYTES - start)) as views:
            at = start
            for view in views:
                view[:] = whole[at : at + view.nbytes]
                at += view.nbytes
    landing.wait()
    assert content(planes) == whole
    assert kept is None or bytes(kept.numpy()) == whole


def test_a_piece_that_turned_out_wrong_goes_nowhere_and_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounce_module, "WAIT_S", 0.01)
    planes = blank()
    landing = landing_in(planes, Bounce("cpu", pieces=1, piece_nbytes=NBYTES))
    for _ in range(2):
        with pytest.raises(ValueError, match="checksum"), landing.piece(0, NBYTES) as (view,):
            view[:] = b"\x01" * NBYTES
            raise ValueError("checksum")
    landing.wait()
    assert content(planes) == bytes(NBYTES)


def test_a_copy_that_failed_fails_the_load() -> None:
    planes = blank()
    planes[1] = planes[1].transpose(0, 2)  # no view of its bytes
    landing = landing_in(planes, Bounce("cpu", pieces=1, piece_nbytes=NBYTES))
    with landing.piece(0, NBYTES):
        pass
    with pytest.raises(RuntimeError):
        landing.wait()
