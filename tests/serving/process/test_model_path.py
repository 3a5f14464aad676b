"""A model that cannot be there is refused before anything is loaded."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

from serving.process.model_path import check_model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with models/fable in it, and no hub."""
    model = tmp_path / "models" / "fable"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_directory_with_a_model(here):
    for word in ("models/fable", "./models/fable", "models/fable/", str(here / "models" / "fable")):
        assert check_model(word) == word


@pytest.mark.parametrize("word", ["modles/fable", "models/fabel", "./models/fabel", "model/fable", "models/Fable"])
def test_a_typing_error(here, word):
    with pytest.raises(ValueError, match=f"{word} does not exist; did you mean .*models/fable"):
        check_model(word)


def test_an_absolute_typing_error(here):
    with pytest.raises(ValueError, match=r"did you mean .*models/fable"):
        check_model(str(here / "models" / "fabel"))


@pytest.mark.parametrize(
    "word", ["models/other", "/nowhere/at/all", "../nowhere", "a/b/c", "with space", "~nobody42/x"]
)
def test_a_path_to_nothing(here, word):
    with pytest.raises(ValueError, match="does not exist; name a model directory or a hub id"):
        check_model(word)


def test_nothing_at_all(here):
    with pytest.raises(ValueError, match="it is empty"):
        check_model("")


def test_a_directory_or_a_file_that_is_no_model(here):
    with pytest.raises(ValueError, match=r"without a config\.json"):
        check_model("empty")
    with pytest.raises(ValueError, match="is a file"):
        check_model("weights.safetensors")


def test_a_hub_id_without_a_hub(here):
    with pytest.raises(ValueError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        check_model("Qwen/Qwen3-8B")


def test_a_hub_that_has_no_address(here, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    with pytest.raises(ValueError, match=r"not in the cache, and hub\.invalid cannot be reached"):
        check_model("Qwen/Qwen3-8B")


def test_a_hub_id_that_is_cached(here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(here / "models/fable/config.json"))
    assert check_model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
