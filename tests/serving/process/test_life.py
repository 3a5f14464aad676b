"""How a service process ends: its exit code for what went wrong, and its ready line."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chunk_store.errors import StoreUnavailable
from engine.run.backends import Decision
from serving.process import life
from serving.process.options import ServiceOptions
from serving.process.same_bits import SameBits


@pytest.fixture(autouse=True)
def usual_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(
    ("raised", "code", "traceback"),
    [
        (None, 0, False),
        (ValueError("model: m does not exist"), 1, False),
        (OSError("address in use"), 1, False),
        (StoreUnavailable("gone"), 1, False),
        (KeyError("a fault of ours"), 1, True),
        (KeyboardInterrupt(), 130, False),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    raised: BaseException | None,
    code: int,
    traceback: bool,
) -> None:
    async def run_services(*_: Any) -> bool:
        if raised is not None:
            raise raised
        return True

    unused: Any = None
    listed = [life.Listed("prefill", "x.Y", unused)]
    monkeypatch.setattr(life, "run_services", run_services)
    assert life.run_main(listed, unused) == code
    assert any(record.exc_info for record in caplog.records) == traceback
    if code == 1:
        assert str(raised) in caplog.text and "prefill service" in caplog.text


def test_calls_that_had_to_be_cancelled_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_services(*_: Any) -> bool:
        return False

    unused: Any = None
    monkeypatch.setattr(life, "run_services", run_services)
    assert life.run_main([], unused) == 1


def test_a_service_hands_the_interpreter_over_sooner_than_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its device thread would wait for the event loop, or for who publishes, each time as long as a step."""
    intervals: list[float] = []

    async def run_services(*_: Any) -> bool:
        intervals.append(sys.getswitchinterval())
        return True

    unused: Any = None
    monkeypatch.setattr(life, "run_services", run_services)
    assert life.run_main([], unused) == 0 and intervals[0] <= 0.0005


def test_the_ready_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    borrowed = SimpleNamespace(dtype_name="float32", dtype_reason="because")
    decision = Decision("eager", "torch", "the device is cpu")
    loaded: Any = SimpleNamespace(
        served=SimpleNamespace(borrowed=borrowed, decision=decision), startup=SimpleNamespace(seconds={"load": 1.5})
    )
    life.announce("decode", 7, 8, loaded, SameBits(True, "one size"), 2.5)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "event": "ready",
        "service": "decode",
        "port": 7,
        "metrics_port": 8,
        "dtype": "float32",
        "dtype_reason": "because",
        "attention": "torch",
        "attention_reason": "the device is cpu",
        "same_bits": True,
        "same_bits_reason": "one size",
        "seconds": {"load": 1.5, "total": 2.5},
    }


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_products_on_a_device_are_seen_to_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, device: str
) -> None:
    """And what an operator set otherwise is said, before anything is loaded."""
    monkeypatch.setattr(life, "use_stable_products", lambda: ["CUBLASLT_WORKSPACE_SIZE is '7'"])
    options = ServiceOptions(
        model=str(tmp_path / "none"), store="", device=device, token_file=tmp_path / "absent", insecure=True
    )
    unused: Any = None

    async def main() -> None:
        await life.run_services([life.Listed("decode", "x.Y", options)], unused, asyncio.Event())

    with pytest.raises(OSError, match="absent"):
        asyncio.run(main())
    assert ("CUBLASLT_WORKSPACE_SIZE is '7'" in caplog.text) == (device != "cpu")


def test_the_first_signal_drains_and_the_second_is_as_usual() -> None:
    async def main() -> None:
        usual = signal.getsignal(signal.SIGTERM)
        stopping = life.stop_on_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stopping.wait(), 20)
        assert signal.getsignal(signal.SIGTERM) in (usual, signal.SIG_DFL)

    asyncio.run(main())


def test_it_takes_as_many_descriptors_as_it_may() -> None:
    life.allow_many_connections()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard


def test_what_was_loaded_is_left_out_of_later_collections() -> None:
    loaded = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    try:
        life.leave_to_the_end()
        assert gc.get_freeze_count() > 1000
        assert not any(one is loaded for one in gc.get_objects())  # which are those that a collection visits
        later: list[object] = []
        assert any(one is later for one in gc.get_objects())
    finally:
        gc.unfreeze()
