"""Whether a model can be meant at all, told before anything is loaded: a typing error costs no minute."""

from __future__ import annotations

import difflib
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_model(word: str) -> str:
    """``word`` if it is a model directory or may be a hub id. Raises ``ValueError`` with the remedy.

    A hub id that is not in the local cache needs a hub that can be reached.
    """
    path = Path(word)
    if not word:
        raise ValueError("it is empty; name a model directory or a hub id")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{word} is a directory without a config.json; name a model directory or a hub id")
        return word
    if path.is_file():
        raise ValueError(f"{word} is a file; name the model's directory or a hub id")
    like = _like(path)
    if _is_hub_id(word) and not like:
        why = _hub_refusal(word)
        if why:
            raise ValueError(f"{word} is no directory here, and as a hub id it cannot be had: {why}")
        return word
    meant = f"; did you mean {like}?" if like else "; name a model directory or a hub id such as Qwen/Qwen3-0.6B"
    raise ValueError(f"{word} does not exist{meant}")


def _is_hub_id(word: str) -> bool:
    """Ids are NAME or OWNER/NAME; one whose owner is a directory here was meant as a path."""
    owner, slash, _ = word.partition("/")
    return _HUB_ID.fullmatch(word) is not None and not word.startswith(".") and not (slash and Path(owner).is_dir())


def _like(path: Path) -> str:
    """A model directory here whose path is almost this one, or "". Each part may have a typing error."""
    places = [Path(path.anchor or ".")]
    for part in path.parts[1:] if path.anchor else path.parts:
        if part in ("..", "."):
            places = [place / part for place in places]
            continue
        near: list[Path] = []
        for place in places:
            try:
                names = [entry.name for entry in place.iterdir() if entry.is_dir()]
            except OSError:
                continue
            near += [place / name for name in difflib.get_close_matches(part, names, n=3, cutoff=0.7)]
        places = near
    return next((str(place) for place in places if (place / "config.json").is_file()), "")


def _hub_refusal(model_id: str) -> str:
    """Why a hub id cannot be loaded: "" if it is in the cache or the hub's name can be resolved."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model_id, "config.json"), str):
        return ""
    if constants.HF_HUB_OFFLINE:
        return "it is not in the cache, and HF_HUB_OFFLINE is set"
    place = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(place.hostname, place.port or 443)
    except OSError:
        return f"it is not in the cache, and {place.hostname} cannot be reached from here"
    return ""
