"""The service as a process: ready line, health, TLS and tokens by option, draining, kill -9 and what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chunk_store.key import ChunkKey
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore
from protos import prefill_pb2, prefill_pb2_grpc
from tests.nursery import Child, nursery

START_S = 60
TEXT = "The town of Crystalton is located in Nebulonia. " * 4


@dataclass
class Running:
    process: subprocess.Popen[str] | Child
    ready: dict[str, Any]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ready['port']}"


@contextmanager
def started(model: Path, store: Path, *words: str, hash_seed: str = "") -> Iterator[Running]:
    """The command itself with this ``hash_seed``; without one it is forked from the nursery."""
    arguments = ["--model", str(model), "--store", f"file://{store}", *words]
    process: subprocess.Popen[str] | Child
    if hash_seed:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "prefill_service", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    else:
        process = nursery().start("prefill_service", arguments)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # the test's own time limit ends a start that hangs
        assert line, f"the service ended with {process.wait(START_S)}"
        yield Running(process, json.loads(line))
    finally:
        process.kill()
        process.wait(START_S)


def prefill(channel: grpc.Channel, **fields: Any) -> Any:
    return prefill_pb2_grpc.PrefillServiceStub(channel).PrefillChunk(
        prefill_pb2.PrefillChunkRequest(**fields), timeout=20
    )


@pytest.mark.timeout(120)
def test_life_of_a_process(model_dir: Path, store: Path) -> None:
    with started(model_dir, store, hash_seed="1") as one:
        assert (one.ready["event"], one.ready["service"]) == ("ready", "prefill")
        assert one.ready["dtype"] == "float32" and one.ready["dtype_reason"]
        assert one.ready["same_bits"] is True and "a forward of its own" in one.ready["same_bits_reason"]
        assert one.ready["seconds"]["total"] >= one.ready["seconds"]["load"] > 0
        with grpc.insecure_channel(one.address) as channel:
            status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status
            assert status == health_pb2.HealthCheckResponse.SERVING
            first = prefill(channel, text=TEXT, role="document", durable=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{one.ready['metrics_port']}/metrics", timeout=5) as reply:
            metrics = reply.read().decode()
        assert f'cairn_prefill_tokens_total{{model_name="tiny",source="computed"}} {first.tokens:.1f}' in metrics
        one.process.kill()  # -9: no goodbye
        one.process.wait(START_S)

    left = open_store(f"file://{store}")
    claim = left.begin("c" * 64)  # type: ignore[arg-type]
    with started(model_dir, store, hash_seed="2") as two:
        with grpc.insecure_channel(two.address) as channel:
            again = prefill(channel, text=TEXT, role="document", durable=True)
            assert (again.key, again.computed_tokens, again.reused_tokens) == (first.key, 0, first.tokens)
        two.process.send_signal(signal.SIGTERM)
        assert two.process.wait(20) == 0
    claim.abort()  # type: ignore[union-attr]
    left.close()


@pytest.mark.timeout(120)
def test_what_is_written_behind_survives_sigterm_and_kill_9_leaves_nothing_half(model_dir: Path, store: Path) -> None:
    """The entries have the bits of a service that waits for each of its writes."""
    texts = [f"Number {number}. {TEXT}" for number in range(8)]
    with started(model_dir, store) as killed, grpc.insecure_channel(killed.address) as channel:
        keys = [prefill(channel, text=text).key for text in texts]
        killed.process.kill()  # -9, while entries are on their way
        killed.process.wait(START_S)
    left = open_store(f"file://{store}")
    whole = [bits(left, key) for key, info in zip(keys, left.lookup(keys), strict=True) if info is not None]
    assert None not in whole, "an entry that is there is whole"
    with started(model_dir, store) as drained, grpc.insecure_channel(drained.address) as channel:
        assert [prefill(channel, text=text).key for text in texts] == keys, "what the dead had claimed is computed"
        drained.process.send_signal(signal.SIGTERM)
        assert drained.process.wait(30) == 0
    stored = [bits(left, key) for key in keys]
    left.close()
    assert None not in stored, "SIGTERM writes out what was computed"
    with started(model_dir, store.with_name("other"), "--durable") as waiting:
        with grpc.insecure_channel(waiting.address) as channel:
            replies = [prefill(channel, text=text) for text in texts]
            assert all(reply.durable and reply.computed_tokens for reply in replies)
        other = open_store(f"file://{store.with_name('other')}")
        assert [bits(other, key) for key in keys] == stored
        other.close()


def bits(store: SharedStore, key: ChunkKey) -> bytes | None:
    """An entry's KV as it is stored, if it is readable and passes every check."""
    (info,) = store.lookup([key])
    if info is None:
        return None
    placed = store.ledger.entries.locate(key)
    assert placed is not None
    header = store.blobs.frame(placed.blob).header
    buffers = [bytearray(size) for size in header.layout.plane_nbytes(info.tokens)]
    reason = store.load(key, header.token_ids, [memoryview(buffer) for buffer in buffers])
    return None if reason is not None else b"".join(buffers)


@pytest.mark.timeout(120)
def test_tls_and_tokens_by_option(model_dir: Path, store: Path, tmp_path: Path) -> None:
    cert, key, tokens = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "tokens"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    tokens.write_text("stone tenant\n")
    words = ("--tls-cert", str(cert), "--tls-key", str(key), "--token-file", str(tokens))
    with started(model_dir, store, *words) as running:
        trust = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(running.address, trust) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                prefill(channel, text=TEXT)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with_token = grpc.composite_channel_credentials(trust, grpc.access_token_call_credentials("stone"))
        with grpc.secure_channel(running.address, with_token) as channel:
            assert prefill(channel, text=TEXT).computed_tokens > 0
        with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
            prefill(channel, text=TEXT)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "nowhere", "--store", "file:///tmp/cairn-never-made"), "nowhere"),
        (("--model", "MODEL", "--store", "redis:///x"), "store URL: must be redis://"),
    ],
)
def test_what_cannot_start_says_why(model_dir: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    arguments = [word.replace("MODEL", str(model_dir)) for word in words]
    with (tmp_path / "said").open("w") as stderr:
        ended = nursery().start("prefill_service", arguments, stderr.fileno(), HF_HUB_OFFLINE="1")
        assert ended.stdout.read() == "" and ended.wait(START_S) == 1
    told = (tmp_path / "said").read_text()
    assert said in told and "Traceback" not in told
