"""``cairn up`` with stand-ins for the two services: readiness, logs, death, draining, killing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cairn.cli.commands import up as up_command
from cairn.demo.shipped import MODEL
from cairn.local.processes import free_port
from cairn.local.services import Settings, default_store, service_commands
from decode_service.options import DecodeOptions
from prefill_service.options import PrefillOptions
from serving.process.sources import Sources

HERE = Path(__file__).parents[2]

STAND_IN = '''
"""Stands in for a service: behaves as the environment says, keeps the flags it was given."""
import argparse, json, os, pathlib, signal, sys, time
from cairn_fakes import FakeServices

NAME = pathlib.Path(__file__).parent.name.removesuffix("_service")
BEHAVIOUR = os.environ.get(f"FAKE_{NAME.upper()}", "")
flags = argparse.ArgumentParser()
flags.add_argument("--port", type=int)
flags.add_argument("--metrics-port", type=int)
args, others = flags.parse_known_args()
print(f"{NAME} got {' '.join(others)}", file=sys.stderr, flush=True)
print(f"{NAME} pid={os.getpid()}", file=sys.stderr, flush=True)
if BEHAVIOUR == "fails":
    sys.exit(3)
if BEHAVIOUR == "hangs":
    time.sleep(60)
fakes = FakeServices(args.port)
places = {"port": args.port, "metrics_port": args.metrics_port}
attention = {"attention": "torch", "attention_reason": "the device is cpu"}
bits = {"same_bits": NAME == "decode", "same_bits_reason": f"{NAME} says so"}
print(json.dumps({"event": "ready", "service": NAME, **places, **attention, **bits}), flush=True)
if BEHAVIOUR == "dies":
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: None if BEHAVIOUR == "stubborn" else stopped.append(1))
while not stopped:
    time.sleep(0.02)
print(f"{NAME} drained", file=sys.stderr, flush=True)
fakes.stop()
'''


@pytest.fixture
def up(tmp_path):
    """Start ``cairn up --json`` over the stand-ins; everything is ended afterwards."""
    for name in ("prefill_service", "decode_service"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f"__path__.append({str(HERE.parent.parent / name)!r})"
        )  # its options
        (tmp_path / name / "__main__.py").write_text(STAND_IN)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    started: list[subprocess.Popen[str]] = []

    def start(*flags: str, **behaviour: Any) -> subprocess.Popen[str]:
        argv = [
            sys.executable,
            "-m",
            "cairn.cli",
            "up",
            "--json",
            "--model",
            "m",
            "--store",
            f"file://{tmp_path}",
            *flags,
        ]
        for port in ("--prefill-port", "--decode-port", "--prefill-metrics-port", "--decode-metrics-port"):
            argv += [port, "0"]
        process = subprocess.Popen(
            argv,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{HERE}:{HERE.parent.parent}", **behaviour},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def _event(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def _pids(log: str) -> list[int]:
    return [int(line.rpartition("=")[2]) for line in log.splitlines() if "pid=" in line]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ready_then_drained(up, number):
    process = up("--strict", "--decode-kv-pages", "64", "--threads", "1", "--attention", "torch")
    ready = _event(process)
    assert ready["event"] == "ready"
    assert (ready["same_bits"], ready["same_bits_reason"]) == (True, "decode says so")
    assert (ready["attention"], ready["attention_reason"]) == ("torch", "the device is cpu")
    prefill, decode = ready["prefill"]["address"], ready["decode"]["address"]
    checked = subprocess.run([sys.executable, "-m", "cairn.cli", "health", prefill, decode], capture_output=True)
    assert checked.returncode == 0
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out) == {"event": "stopped", "reason": "asked", "clean": True}
    assert "prefill | prefill drained" in err and " decode | decode drained" in err
    assert err.index("decode drained") < err.index("prefill drained"), "decode needs prefill while it drains"
    assert f"--prefill {prefill}" in err and "--kv-pages 64" in err and err.count("--attention torch") == 2
    assert '"event"' not in err
    assert not any(_alive(pid) for pid in _pids(err))


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"FAKE_PREFILL": "fails"}, "the prefill service ended with exit code 3"),
        ({"FAKE_DECODE": "fails"}, "the decode service ended with exit code 3"),
        ({"FAKE_DECODE": "dies"}, "the decode service was ended by SIGKILL"),
    ],
)
def test_one_death_stops_the_other(up, behaviour, words):
    process = up(**behaviour)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(out.splitlines()[-1])["reason"] == words
    assert not any(_alive(pid) for pid in _pids(err))


def test_a_service_that_never_becomes_ready(up):
    process = up("--start-timeout", "1", "--drain-s", "1", FAKE_DECODE="hangs")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(out)["reason"] == "prefill and decode were not ready within 1 s"


def test_a_service_that_cannot_be_asked_over_tls_says_why(up, tmp_path):
    for name in ("cert.pem", "key.pem"):  # the stand-ins serve in the clear
        (tmp_path / name).write_text("")
    process = up("--tls-cert", "cert.pem", "--tls-key", "key.pem", "--start-timeout", "8", "--drain-s", "1")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    reason = json.loads(out)["reason"]
    assert reason.startswith("prefill and decode were not ready within 8 s; prefill: ") and "; decode: " in reason


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tls-cert", "c"], "--tls-cert and --tls-key: give both or neither"),
        (["--tls-ca", "c"], "--tls-ca: belongs to --tls-cert and --tls-key"),
        (["--tls-cert", "/nowhere", "--tls-key", "/nowhere"], "--tls-cert: cannot read /nowhere"),
        (["--token-file", "/nowhere"], "--token-file: cannot read /nowhere"),
    ],
)
def test_files_that_cannot_be_used_stop_everything(up, flags, words):
    process = up(*flags)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert words in err and "pid=" not in err


def test_a_service_that_does_not_drain_is_killed(up):
    process = up("--drain-s", "0.5", FAKE_PREFILL="stubborn")
    assert _event(process)["event"] == "ready"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(out) == {"event": "stopped", "reason": "asked", "clean": False}
    assert not any(_alive(pid) for pid in _pids(err))


def test_a_second_signal_kills_at_once(up):
    process = up("--drain-s", "300", FAKE_PREFILL="stubborn")
    _event(process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert any("decode drained" in line for line in process.stderr)  # the first one has been heard
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)


def test_interrupted_while_starting(up):
    process = up(FAKE_DECODE="hangs")
    assert process.stderr is not None
    process.stderr.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out)["reason"] == "asked"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses PR_SET_PDEATHSIG")
def test_the_services_end_when_up_is_killed(up):
    process = up()
    _event(process)
    process.kill()
    _, err = process.communicate(timeout=60)
    ends_at = time.monotonic() + 60
    while any(_alive(pid) for pid in _pids(err)) and time.monotonic() < ends_at:
        time.sleep(0.05)
    assert len(_pids(err)) == 2
    assert not any(_alive(pid) for pid in _pids(err))


def test_what_is_not_told_comes_with_the_installation():
    settings = Settings.read(Sources({}, {}))
    for service in (settings.prefill.options, settings.decode.options):
        assert service.model == str(MODEL) and (MODEL / "model.safetensors").is_file()
        assert service.store == default_store()
    assert Settings.read(Sources({}, {"CAIRN_MODEL": "m"})).decode.options.model == "m"


def test_flags_reach_the_service_they_are_for():
    port = free_port("127.0.0.1")
    prefill, decode = service_commands(
        PrefillOptions(model="m", store="file:///s", port=port, records_max=9),
        DecodeOptions(model="m", store="file:///s", prefill="", port=port + 1, strict=True, batch_max=8),
    )
    assert prefill.argv[prefill.argv.index("-m") :][:4] == ("-m", "prefill_service", "--model", "m")
    assert prefill.environment is not None and prefill.environment["CAIRN_STORE"] == "file:///s"
    assert "--strict" not in prefill.argv and "--strict" in decode.argv
    assert "--records-max" in prefill.argv and "--records-max" not in decode.argv
    assert decode.argv[decode.argv.index("--batch-max") + 1] == "8"
    assert decode.argv[decode.argv.index("--prefill") + 1] == prefill.address == f"127.0.0.1:{port}"
    assert "--dtype" not in decode.argv, "what was not asked for is left to the service"


@pytest.mark.parametrize("word", ["modles", "./m2", "/nowhere"])
def test_a_mistyped_model_path_fails_before_anything_starts(up, tmp_path, word):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "config.json").write_text("{}")
    process = up("--model", word)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"cairn: --model: {word} does not exist") and len(err.splitlines()) == 1
    assert ("did you mean models?" in err) == (word == "modles")


def test_services_that_chose_different_dtypes_are_not_kept():
    assert not up_command._differ({"prefill": {"dtype": "float32"}, "decode": {"dtype": "float32"}})
    words = up_command._differ({"prefill": {"dtype": "float32"}, "decode": {"dtype": "bfloat16"}})
    assert words == "the services chose different dtypes (prefill float32, decode bfloat16); give --dtype"
    words = up_command._differ({"prefill": {"attention": "cascade"}, "decode": {"attention": "flashinfer"}})
    assert words.endswith("different attention kernels (prefill cascade, decode flashinfer); give --attention")
