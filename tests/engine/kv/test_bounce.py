"""Memory that loads pass through: few pieces, each with one user at a time."""

from __future__ import annotations

import pytest

from engine.kv import bounce as module
from engine.kv.bounce import Bounce


def test_pieces_have_one_user_each_and_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bounce = Bounce("cpu", pieces=2, piece_nbytes=8)
    one, two = bounce.take(8), bounce.take(1)
    one.view[:] = b"12345678"
    two.view[:] = b"abcdefgh"
    assert bytes(one.memory.numpy()) == b"12345678" and bytes(two.memory.numpy()) == b"abcdefgh"
    monkeypatch.setattr(module, "WAIT_S", 0.01)
    with pytest.raises(TimeoutError, match="no memory to read into"):
        bounce.take(3)
    bounce.give_back(two)
    assert bounce.take(3) is two


def test_what_is_larger_has_memory_of_its_own() -> None:
    bounce = Bounce("cpu", pieces=1, piece_nbytes=8)
    ours, large = bounce.take(8), bounce.take(9)
    assert large.memory.nbytes == 9
    bounce.give_back(large)
    bounce.give_back(ours)
    assert bounce.take(8) is ours
