"""The options that both services share: what they become, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.process.options import ServiceOptions, parse_options


def parse(*words: str) -> ServiceOptions:
    return parse_options(ServiceOptions, "decode", "", ["--model", "m", "--store", "file:///s", *words])


def test_options(tmp_path: Path) -> None:
    for name in ("c", "k"):
        (tmp_path / name).touch()
    tls = parse("--port", "7", "--tls-cert", str(tmp_path / "c"), "--tls-key", str(tmp_path / "k")).tls
    assert tls is not None and (tls.cert, tls.key) == (tmp_path / "c", tmp_path / "k")
    assert parse().tls is None


@pytest.mark.parametrize(
    "words",
    [("--port", "65536"), ("--threads", "0"), ("--tls-cert", "c"), ("--dtype", "int8"), ("--attention", "sdpa")],
)
def test_refused_options(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["cascade", "flashinfer"])
def test_kernels_of_a_gpu_are_refused_on_the_cpu(attention: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--attention", attention)
    said = f"--attention: {attention}'s kernels run on a GPU, and --device is cpu; give auto or torch"
    assert said in capsys.readouterr().err
    assert parse("--attention", attention, "--device", "cuda").attention == attention
    assert parse("--attention", "torch").attention == "torch"
