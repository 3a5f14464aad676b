"""The options that both services share: what they become, and what is refused by name."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from serving.process.options import add_service_options, service_options


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
