"""Beyond this machine a service listens only with tokens or TLS, or when it was told that it may do without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cairn.local.services import service_commands
from decode_service.options import DecodeOptions
from prefill_service.options import PrefillOptions
from serving.rpc.addresses import resolves_to_loopback
from serving.rpc.exposure import exposure_refusal, exposure_warning

INSIDE = ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "::ffff:127.0.0.1", "localhost"]
OUTSIDE = ["0.0.0.0", "::", "[::]", "10.0.0.5", "fe80::1%eth0", "::ffff:10.0.0.5", "", "0", "no such name.invalid"]


@pytest.mark.parametrize("host", INSIDE)
def test_loopback_needs_nothing(host: str) -> None:
    assert resolves_to_loopback(host)
    assert exposure_refusal(host, tokens=False, tls=False, insecure=False) == ""
    assert exposure_warning(host, tokens=False, tls=False, insecure=False) == ""


@pytest.mark.parametrize("host", OUTSIDE)
def test_other_addresses_need_tokens_or_tls(host: str) -> None:
    assert not resolves_to_loopback(host)
    assert "--insecure" in exposure_refusal(host, tokens=False, tls=False, insecure=False)
    for tokens, tls in ((True, False), (False, True), (True, True)):
        assert exposure_refusal(host, tokens=tokens, tls=tls, insecure=False) == ""
        assert bool(exposure_warning(host, tokens=tokens, tls=tls, insecure=False)) == (tokens != tls)
    assert exposure_refusal(host, tokens=False, tls=False, insecure=True) == ""


COMMANDS = {
    "prefill": ["-m", "prefill_service", "--store", "file:///tmp/none", "--port", "1"],
    "decode": ["-m", "decode_service", "--store", "file:///tmp/none", "--prefill", "127.0.0.1:1"],
    "up": ["-m", "cairn.cli", "up"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_with_the_remedy(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    argv = [sys.executable, *COMMANDS[name], "--model", str(tmp_path), "--host", "0.0.0.0"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "500"})
    assert done.returncode == 2, done
    assert all(word in done.stderr for word in ("0.0.0.0", "--token-file", "--tls-cert", "--insecure")), done.stderr
    assert "Traceback" not in done.stderr


def test_up_hands_the_choice_on() -> None:
    for insecure in (True, False):
        shared: dict[str, Any] = {"model": "m", "store": "s", "host": "127.0.0.1", "insecure": insecure}
        commands = service_commands(PrefillOptions(**shared), DecodeOptions(**shared, prefill=""))
        assert [("--insecure" in command.argv) for command in commands] == [insecure] * 2
