"""Both services on the card over FlashInfer: they say so, and answer alike cold, warm, stored and bypassed.

Its kernels are compiled when first used, which takes minutes: ``python -m bench.flashinfer_build 128``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cairn
from cairn import Client, Result
from cairn.local.processes import free_port
from tests.end_to_end.processes import Process
from tests.models_for_tests import tiny_model_dir

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]
pytest.importorskip("flashinfer")

SHAPE: Any = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
CHUNKS = [[6 + (7 * i + 31 * j) % 370 for j in range(200 + 117 * i)] for i in range(3)]
QUERY = [9, 8, 7, 300, 12]
MODES = ("exact", "anchored", "independent")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("flashinfer")
    tiny_model_dir(made / "model", "qwen3", **SHAPE, vocab_size=384, max_position_embeddings=4096)
    return made


def words(folder: Path, attention: str) -> list[str]:
    shared = ["--model", str(folder / "model"), "--store", f"file://{folder / 'store'}", "--kv-pages", "2000"]
    return [*shared, "--device", "cuda", "--dtype", "bfloat16", "--attention", attention]


@pytest.fixture(scope="module")
def services(folder: Path) -> Iterator[tuple[Process, Process]]:
    prefill = Process("prefill_service", words(folder, "flashinfer"), free_port("127.0.0.1"))
    told = [*words(folder, "flashinfer"), "--prefill", prefill.address]
    decode = Process("decode_service", told, free_port("127.0.0.1"))
    try:
        for process in (prefill, decode):
            process.launch()
        for process in (prefill, decode):
            process.wait_ready()
        yield prefill, decode
    finally:
        for process in (decode, prefill):
            process.end()


def ask(client: Client, reuse: str, cache: str = "shared") -> Result:
    return client.generate([*CHUNKS, QUERY], max_tokens=16, reuse=reuse, cache=cache, ignore_eos=True).finish()


def test_they_say_so(services: tuple[Process, Process]) -> None:
    prefill, decode = services
    for process in services:
        assert process.ready["attention"] == "flashinfer"
        assert process.ready["attention_reason"] == "--attention flashinfer"
    assert decode.ready["same_bits"] is False and "FlashInfer" in decode.ready["same_bits_reason"]
    with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        loads = client.loads()
    assert (loads.attention, loads.attention_reason) == ("flashinfer", "--attention flashinfer")


def test_answers_do_not_depend_on_where_kv_comes_from(services: tuple[Process, Process]) -> None:
    prefill, decode = services
    with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        cold = {reuse: ask(client, reuse).token_ids for reuse in MODES}
        for reuse, cache in itertools.product(MODES, ("shared", "bypass")):
            assert ask(client, reuse, cache).token_ids == cold[reuse], (reuse, cache)
        crowd = [client.generate([*CHUNKS, [i, 7]], max_tokens=8, ignore_eos=True) for i in range(9)]
        assert all(len(each.finish().token_ids) == 8 for each in crowd)
    decode.kill()
    decode.revive()
    with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        for reuse in MODES:
            stored = ask(client, reuse)
            assert "store" in {segment.source for segment in stored.reuse.segments[:-1]}
            assert stored.token_ids == cold[reuse]


def test_a_decode_service_of_another_backend_is_another_model(services: tuple[Process, Process], folder: Path) -> None:
    prefill, decode = services
    other = Process("decode_service", [*words(folder, "torch"), "--prefill", prefill.address], free_port("127.0.0.1"))
    other.launch()
    try:
        other.wait_ready()
        addresses = (prefill.address, decode.address), (prefill.address, other.address)
        identities = set()
        for first, second in addresses:
            with Client(prefill=first, decode=second, timeout_s=60) as client:
                identities.add(client.loads().model_identity)
        assert len(identities) == 2
        with (
            Client(prefill=prefill.address, decode=other.address, timeout_s=60) as client,
            pytest.raises(cairn.CairnError, match="another model identity"),
        ):
            ask(client, "exact")
    finally:
        other.end()
