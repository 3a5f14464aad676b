"""What a service loads before it serves: the model, its tokenizer, and how many pages its pool may have."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import AutoConfig

from chunk_store.layout import KVLayout
from engine.model.borrowed import BorrowedModel
from engine.run.choice import check_device
from engine.served import ServedModel, serve
from serving.process.model_path import check_model
from serving.process.options import ServiceOptions
from serving.process.startup import Startup, weights_on_disk
from text.codec import TextCodec

log = logging.getLogger(__name__)

POOL_NBYTES_DEFAULT = 1 << 30
CUDA_POOL_SHARE = 0.4  # of the device memory that is free once the model is loaded; two services may share a device


@dataclass(frozen=True)
class Loaded:
    """A model that is ready, its text codec, and the start that it is part of."""

    served: ServedModel
    codec: TextCodec
    model_name: str
    startup: Startup


def load(options: ServiceOptions) -> Loaded:
    """Loads, examines and checks the model; sets torch's thread count for this process.

    Raises ``ModelRefused`` (a ``ValueError``) or ``ValueError`` with the reason.
    """
    check_model(options.model)
    check_device(options.attention, torch.device(options.device))
    torch.set_num_threads(options.threads)
    startup = Startup()
    with startup.stage("tokenizer", f"loading the tokenizer of {options.model}"):
        codec = TextCodec.load(options.model)
    size = weights_on_disk(options.model)
    with startup.stage("load", f"loading the weights{size and f', {size} on disk'}, to {options.device}"):
        borrowed = BorrowedModel.load(
            options.model, dtype=options.dtype, device=options.device, name=options.model_name, lora=options.lora
        )
    log.info("%s is served in %s: %s", borrowed.name, borrowed.dtype_name, borrowed.dtype_reason)
    for note in borrowed.notes:
        log.warning("model %s: %s", borrowed.name, note)
    if borrowed.adapter:
        log.info("model %s has the adapter %s merged in: %s", borrowed.name, options.lora, borrowed.adapter)
    if borrowed.quantization is not None:
        log.info("model %s is quantised: %s", borrowed.name, borrowed.quantization)
    with startup.stage("check", f"checking {borrowed.dtype_name} weights: every reuse mode against the model itself"):
        served = serve(borrowed, piece_tokens=options.piece_tokens, attention=options.attention)
    decision = served.decision
    log.info("attention: %s in the %s runner: %s", decision.attention, decision.runner, decision.reason)
    if served.row_bits is not None:
        log.log(logging.INFO if served.row_bits.equal else logging.WARNING, "products: %s", served.row_bits.reason)
    for line in restrictions(served):
        log.warning("%s", line)
    return Loaded(served, codec, borrowed.name, startup)


def configured_context(path_or_id: str) -> int | None:
    """Positions that a model's configuration speaks of, no fewer than are served; None where it cannot be read."""
    try:
        positions = getattr(AutoConfig.from_pretrained(path_or_id).get_text_config(), "max_position_embeddings", None)
    except Exception:  # whatever is wrong with it, loading the model will say so
        return None
    return positions if isinstance(positions, int) and positions > 0 else None


def restrictions(served: ServedModel) -> list[str]:
    """What the model is not served for, a line each: a shorter context than it names, modes that are refused."""
    name, limit = served.borrowed.name, served.limit()
    lines = [f"model {name}: the context is limited to {limit}"] if limit.because else []
    for mode, refusal in served.refusals.items():
        if refusal:
            lines.append(f"model {name}: reuse mode {mode.value} is refused: {refusal}")
        elif served.limit(mode) != limit:
            lines.append(f"model {name}: in reuse mode {mode.value} the context is limited to {served.limit(mode)}")
    return lines


def pool_nbytes_default(device: str) -> int:
    """Bytes of a pool whose size nobody gave: a share of what is free on a device, 1 GiB of host memory."""
    if torch.device(device).type != "cuda":
        return POOL_NBYTES_DEFAULT
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * CUDA_POOL_SHARE)


def pool_pages(layout: KVLayout, page_size: int, tokens: int, nbytes_max: int = POOL_NBYTES_DEFAULT) -> int:
    """Pages for ``tokens`` tokens, or as many as ``nbytes_max`` bytes hold if that is fewer; at least 1."""
    return max(1, min(-(-tokens // page_size), nbytes_max // layout.nbytes(page_size)))
