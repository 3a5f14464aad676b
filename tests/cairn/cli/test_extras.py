"""What is said where the server side is not installed."""

from __future__ import annotations

import pytest

from cairn.cli import extras


def test_the_extra_is_named_for_what_it_brings() -> None:
    for name in ("torch", "prometheus_client.exposition"):
        words = extras.remedy(ModuleNotFoundError("", name=name), "up")
        package = name.partition(".")[0]
        assert words == f'cairn up needs the server side, and {package} is not installed: pip install "cairn[server]"'


@pytest.mark.parametrize("name", ["redis", "torchvision", "", None])
def test_what_the_extra_does_not_bring_is_not_promised(name: str | None) -> None:
    assert extras.remedy(ModuleNotFoundError("", name=name), "up") == ""


def test_the_first_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("numpy", "xxhash") else object())
    with pytest.raises(ModuleNotFoundError) as caught:
        extras.require_server()
    assert caught.value.name == "numpy"
    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    extras.require_server()


@pytest.mark.parametrize(("name", "extra"), [("httpx", "load"), ("matplotlib.pyplot", "plot")])
def test_smaller_extras_are_named_too(name: str, extra: str) -> None:
    words = extras.remedy(ModuleNotFoundError("", name=name), "bench")
    assert words.startswith(f"cairn bench needs {name.partition('.')[0]}") and f'"cairn[{extra}]"' in words
