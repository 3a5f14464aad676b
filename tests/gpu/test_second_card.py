"""A model on another card than the first gives what it gives on the first, from a thread that never chose a card."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from engine.model.borrowed import BorrowedModel
from engine.served import serve
from tests.engine.composer import Composer
from tests.gpu.engine_models import tokens, twins

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["qwen3-ratio4-128", "phi3-ratio2-64"])
def test_the_second_card_in_a_fresh_thread(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found: dict[str, list[int]] = {}

    def run(device: str) -> None:
        model = copy.deepcopy(twins(name)[1]).to(device)
        served = serve(BorrowedModel(model, name=name), piece_tokens=24)
        request = ([tokens(1, 70), tokens(2, 33)], tokens(3, 20), "independent")
        found[device] = Composer(served, pages=512).generate([request], 6)[0][0]

    for device in ("cuda:0", "cuda:1"):
        thread = threading.Thread(target=run, args=(device,))
        thread.start()
        thread.join()
    assert found["cuda:0"] == found["cuda:1"]
