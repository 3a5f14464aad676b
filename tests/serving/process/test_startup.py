"""What a service says before it serves."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from serving.process.startup import Startup, seconds_since_start, weights_on_disk


def test_stages_are_said_as_they_begin_and_timed_together(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serving.process.startup")
    startup = Startup()
    with startup.stage("load", "loading the weights"):
        assert "loading the weights" in caplog.text, "before it is done"
    with pytest.raises(RuntimeError), startup.stage("load", "again"):
        raise RuntimeError
    with startup.stage("pool", "preparing"):
        pass
    assert list(startup.seconds) == ["load", "pool"] and all(0 <= s < 60 for s in startup.seconds.values())
    first = seconds_since_start()
    assert 0 < first <= seconds_since_start()


def test_the_size_of_the_weights_is_that_of_their_files(tmp_path: Path) -> None:
    assert weights_on_disk("somebody/model") == weights_on_disk(str(tmp_path)) == ""
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(4096))
    of_old = weights_on_disk(str(tmp_path))
    (tmp_path / "a.safetensors").write_bytes(bytes(1024))
    (tmp_path / "b.safetensors").write_bytes(bytes(1024))
    assert "4" in of_old and "2" in weights_on_disk(str(tmp_path)) != of_old
