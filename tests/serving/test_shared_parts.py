"""Options, sizes, wire tables, stage timer, metrics endpoint: the small parts that both services share."""

from __future__ import annotations

import argparse
import urllib.request
from pathlib import Path

import pytest
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter

from chunk_store.key import ChunkType
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.store import MissReason
from engine.reuse import Exactness, ReuseMode
from protos import chunks_pb2
from serving.process.loading import pool_pages
from serving.process.metrics_endpoint import MetricsEndpoint
from serving.process.options import add_service_options, nbytes, service_options
from serving.rpc import wire
from serving.rpc.errors import RequestError
from serving.trace import STAGES, StageTimer


def parse(*words: str) -> object:
    parser = argparse.ArgumentParser()
    add_service_options(parser)
    return service_options(parser, parser.parse_args(["--model", "m", "--store", "file:///s", *words]))


def test_options() -> None:
    assert parse("--port", "7", "--tls-cert", "c", "--tls-key", "k").tls.cert == Path("c")  # type: ignore[attr-defined]
    assert parse().tls is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [("--port", "65536"), ("--threads", "0"), ("--tls-cert", "c"), ("--dtype", "int8")])
def test_refused_options(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("10GiB", 10 << 30), ("500 MB", 500_000_000), ("7", 7), ("1.5KiB", 1536)])
def test_sizes(text: str, size: int) -> None:
    assert nbytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "0", "1XB", "-1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        nbytes(text)


def test_every_enum_of_the_domain_has_a_number() -> None:
    assert {wire.chunk_type(wire.chunk_type_out(kind)) for kind in ChunkType} == set(ChunkType)
    assert {wire.reuse_mode(wire.reuse_mode_out(mode)) for mode in ReuseMode} == set(ReuseMode)
    assert len({wire.exactness_out(kind) for kind in Exactness}) == len(Exactness)
    assert len({wire.miss_reason_out(reason) for reason in (None, *MissReason)}) == len(MissReason) + 1
    for reason in MissReason:
        assert chunks_pb2.MissReason.Name(wire.miss_reason_out(reason)) == f"MISS_REASON_{reason.name}"


def test_unspecified_and_unknown_numbers() -> None:
    assert wire.chunk_type(0) is ChunkType.CONTEXT
    assert wire.chunk_type(0, unspecified=ChunkType.QUERY) is ChunkType.QUERY
    assert wire.reuse_mode(0) is ReuseMode.EXACT
    for parse_number in (wire.chunk_type, wire.reuse_mode):
        with pytest.raises(RequestError) as caught:
            parse_number(99)
        assert caught.value.code is StatusCode.INVALID_ARGUMENT and "99" in caught.value.message


def test_stages_are_the_fields_of_the_message() -> None:
    assert {f"{stage}_ns" for stage in STAGES} == set(chunks_pb2.StageTimings.DESCRIPTOR.fields_by_name)
    timer = StageTimer()
    with timer.stage("load"), timer.stage("publish"):
        pass
    timer.add("load", 1000)
    message = wire.timings_out(timer.spent_ns())
    assert message.total_ns >= message.load_ns > 1000
    with pytest.raises(ValueError, match="lunch"), timer.stage("lunch"):
        pass


def test_pool_pages() -> None:
    layout = KVLayout("float32", (LayerLayout(2, 8, 8),))
    assert pool_pages(layout, 16, 33) == 3
    assert pool_pages(layout, 16, 10**9, nbytes_max=10 * layout.nbytes(16)) == 10
    assert pool_pages(layout, 16, 33, nbytes_max=1) == 1


def test_metrics_are_served_from_their_own_registry_and_stop() -> None:
    registry = CollectorRegistry()
    Counter("cairn_stones", "Stones.", registry=registry).inc(3)
    endpoint = MetricsEndpoint.start(registry, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{endpoint.port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as reply:
        text = reply.read().decode()
    assert "cairn_stones_total 3.0" in text and "python_info" not in text
    with pytest.raises(OSError, match="in use"):
        MetricsEndpoint.start(registry, "127.0.0.1", endpoint.port)
    endpoint.stop()
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=5)
