"""Names of the attention backends that can be asked for, and what of a device decides between them. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass

AUTO, CASCADE, FLASHINFER, TORCH = "auto", "cascade", "flashinfer", "torch"
FA3 = "fa3"  # FlashInfer's kernels for long pieces on compute capability 9
ATTENTIONS = (AUTO, CASCADE, FLASHINFER, TORCH)


class AttentionRefused(ValueError):
    """The backend that was asked for cannot serve the model on this device; the message says why and what can."""


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of a device before anything runs on it.

    ``hopper``: compute capability 9, which the stream kernel is written for; elsewhere the same lists run in portable
    Triton tiles. ``flashinfer``: why FlashInfer cannot be used there, "" if it can.
    """

    cuda: bool
    hopper: bool = True
    flashinfer: str = ""


CPU = DeviceFacts(cuda=False, hopper=False, flashinfer="the device is cpu")


@dataclass(frozen=True)
class Decision:
    """What runs a model: the ``runner`` ("fused", "captured" or "eager"), the ``attention`` backend, and why.

    ``pieces``: what computes the attention of long pieces beside captured steps, "" for torch's library attention.
    """

    runner: str
    attention: str
    reason: str
    pieces: str = ""
