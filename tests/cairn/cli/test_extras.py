"""What an installation lacks is named with what brings it."""

from __future__ import annotations

import pytest

from cairn.cli import extras


def test_a_missing_package_of_ours_is_named_with_its_extra() -> None:
    words = extras.remedy(ModuleNotFoundError(name="torch.nn"), "up")
    assert "cairn up" in words and "torch is not installed" in words and 'pip install "cairn[server]"' in words


@pytest.mark.parametrize("name", ["somebody_elses", "", None])
def test_another_missing_package_is_not_explained(name: str | None) -> None:
    assert extras.remedy(ModuleNotFoundError(name=name), "up") == ""


def test_what_the_server_needs_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    extras.require_server()
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "numpy" else object())
    with pytest.raises(ModuleNotFoundError) as caught:
        extras.require_server()
    assert caught.value.name == "numpy"
