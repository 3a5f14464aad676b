"""A model of which every layer has a window, on the card: what is given back changes no bit, whoever has its pages."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cairn import Result
from serving.process.loading import load
from serving.process.options import ServiceOptions
from tests.decode_service.pair import Pair, pair
from tests.decode_service.windowed import keep_everything
from tests.models_for_tests import tiny_model_dir

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

SHAPE: Any = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 384}
WINDOW, PAGE, REQUESTS, TOKENS = 96, 16, 12, 300


def fresh(seed: int, count: int) -> list[int]:
    return [6 + (seed * 7919 + j * j * 13 + j * seed) % 370 for j in range(count)]


CHUNKS = [fresh(1, 333), fresh(2, 700), fresh(3, 20)]


def answers(services: Pair) -> list[Result]:
    def ask(n: int) -> Result:
        options: dict[str, Any] = {"logprobs": True, "keep": n % 4 == 0, "priority": n % 2}
        if n % 3:
            options |= {"temperature": 0.9, "seed": n}
        return services.generate([*CHUNKS[: n % 4], fresh(100 + n, 1 + 41 * n)], TOKENS - 7 * n, **options)

    with ThreadPoolExecutor(REQUESTS) as threads:
        return list(threads.map(ask, range(REQUESTS)))


@pytest.mark.parametrize("arch", ["mistral", "phi3"])
def test_answers_are_those_of_who_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """The one runs our forward, where its windows are taken, the other transformers' own, in captured steps."""
    limits: dict[str, Any] = {"sliding_window": WINDOW, "max_position_embeddings": 16384, "pad_token_id": 0}
    folder = tiny_model_dir(tmp_path / "model", arch, **SHAPE, **limits)
    device: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    of_model = ServiceOptions(model=str(folder), store="", model_name="tiny", **device)
    prefill, decode = load(of_model), load(of_model)
    options: dict[str, Any] = {**device, "of_prefill": device | {"kv_pages": 400}, "batch_max": 16, "page_size": PAGE}
    with monkeypatch.context() as patched:
        keep_everything(patched)
        with pair(prefill, decode, tmp_path / "all", kv_pages=1600, **options) as services:
            expected, same_bits = answers(services), services.client.loads().same_bits
            assert not services.metric("cairn_kv_pages_given_back_total")
            services.check_idle()
    print(arch, decode.served.decision, "same bits:", same_bits)
    for aside in (0, 2**28):
        with pair(
            prefill, decode, tmp_path / f"{aside}", kv_pages=230, chunk_page_ratio=0.8, host_tails=aside, **options
        ) as services:
            found = answers(services)
            parted = [
                n
                for n, (one, want) in enumerate(zip(found, expected, strict=True))
                if one.token_ids != want.token_ids or (same_bits and one.logprobs != want.logprobs)
            ]
            given_back = services.metric("cairn_kv_pages_given_back_total")
            print(arch, aside, "parted:", parted, "pages given back:", given_back, end=" ")
            print("preemptions:", services.metric("cairn_preemptions_total"))
            assert given_back > 100 and not (same_bits and parted)
            services.check_idle()
