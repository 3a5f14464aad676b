"""Skips tests marked ``gpu`` where there is no CUDA device; has products computed as services have them."""

from __future__ import annotations

import pytest
import torch

from engine.run.cuda.products import use_stable_products

if torch.cuda.is_available():
    use_stable_products()  # before any test multiplies on the device


@pytest.fixture(autouse=True)
def _needs_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
