"""Trace files: JSON lines that say what is asked and when. docs/bench.md has the format.

A line is a document, a request, or a request of the published Mooncake traces, which say lengths and which blocks of
512 tokens prompts share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from cairn.load.workload import Content, Listed, Request, words

BLOCK = 512  # tokens of a Mooncake block
MAX_TOKENS = 128  # where a request does not say
DOCUMENT_KEYS = {"document", "text", "ids", "system"}
REQUEST_KEYS = {"at", "session", "documents", "query", "max_tokens"}
MOONCAKE_KEYS = {"timestamp", "input_length", "output_length", "hash_ids"}


class TraceError(ValueError):
    """What is wrong with a trace file, and in which line."""


@dataclass(frozen=True)
class TraceFile:
    """``arrivals``: when each session begins (s), if the file says so."""

    workload: Listed
    arrivals: tuple[float, ...] | None

    @property
    def turns(self) -> int:
        """Of the longest session."""
        return max(map(len, self.workload.sessions))


@dataclass
class _Reading:
    """What was read so far."""

    documents: list[Content] = field(default_factory=list)
    systems: list[int] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    sessions: dict[str, list[Request]] = field(default_factory=dict)
    arrivals: list[float | None] = field(default_factory=list)


def read_trace(path: Path) -> TraceFile:
    """The whole file. Raises ``TraceError`` and ``OSError``."""
    reading = _Reading()
    for number, line in _lines(path):
        try:
            _read_line(json.loads(line), reading, number)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            words = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise TraceError(f"{path}:{number}: {words}") from error
    if not reading.sessions:
        raise TraceError(f"{path}: holds no request")
    return _whole(reading, path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def _read_line(entry: Any, reading: _Reading, number: int) -> None:
    if not isinstance(entry, dict):
        raise ValueError("is no JSON object")
    if "document" in entry:
        _check_keys(entry, DOCUMENT_KEYS)
        _read_document(entry, reading)
    elif "hash_ids" in entry:
        _read_mooncake(entry, reading, number)
    else:
        _check_keys(entry, REQUEST_KEYS)
        _read_request(entry, reading, number)


def _read_document(entry: dict[str, Any], reading: _Reading) -> None:
    name = entry["document"]
    if not isinstance(name, str) or name in reading.places:
        raise ValueError(f"document: {name!r} is no name, or was given before")
    if ("text" in entry) == ("ids" in entry):
        raise ValueError("document: give it a text or ids")
    kind = "text" if "text" in entry else "ids"
    reading.places[name] = len(reading.documents)
    if entry.get("system", False):
        reading.systems.append(len(reading.documents))
    reading.documents.append(_content(entry[kind], kind))


def _read_request(entry: dict[str, Any], reading: _Reading, number: int) -> None:
    names = entry.get("documents", [])
    if not isinstance(names, list):
        raise ValueError("documents: give a list of names")
    for name in names:
        if name not in reading.places:
            raise ValueError(f"documents: no document {name!r} stands before this line")
    places = tuple(reading.places[name] for name in names)
    request = Request(
        places, _content(entry["query"], "query"), _count(entry.get("max_tokens", MAX_TOKENS), "max_tokens")
    )
    session = str(entry.get("session", f"line {number}"))
    if session not in reading.sessions:
        reading.arrivals.append(_seconds(entry["at"], "at") if "at" in entry else None)
    reading.sessions.setdefault(session, []).append(request)


def _read_mooncake(entry: dict[str, Any], reading: _Reading, number: int) -> None:
    """Whole blocks are documents, what is left of the prompt is the query: the same words for the same hash."""
    length, output = _count(entry["input_length"], "input_length"), _count(entry["output_length"], "output_length")
    blocks = entry["hash_ids"]
    if not isinstance(blocks, list):
        raise ValueError("hash_ids: give a list")
    shared = blocks[: max(0, (length - 1) // BLOCK)]
    for block in shared:
        if (name := f"block {block}") not in reading.places:
            reading.places[name] = len(reading.documents)
            reading.documents.append(words(Random(name), BLOCK))
    rest = words(Random(f"rest of line {number}"), length - len(shared) * BLOCK)
    places = tuple(reading.places[f"block {block}"] for block in shared)
    reading.sessions[f"line {number}"] = [Request(places, rest, output)]
    reading.arrivals.append(_seconds(entry["timestamp"], "timestamp") / 1e3 if "timestamp" in entry else None)


def _whole(reading: _Reading, path: Path) -> TraceFile:
    """System prompts first, and sessions as they arrive."""
    order = [*reading.systems, *(place for place in range(len(reading.documents)) if place not in set(reading.systems))]
    moved = {place: at for at, place in enumerate(order)}
    sessions = [
        tuple(Request(tuple(moved[each] for each in turn.documents), turn.query, turn.max_tokens) for turn in session)
        for session in reading.sessions.values()
    ]
    kinds = {type(each) for each in (*reading.documents, *(turn.query for session in sessions for turn in session))}
    if len(kinds) > 1:
        raise TraceError(f"{path}: documents and queries are texts or ids, not both")
    times = [at for at in reading.arrivals if at is not None]
    if times and len(times) < len(sessions):
        raise TraceError(f"{path}: some sessions say when they arrive and some do not (at)")
    if times:
        arriving = sorted(zip(times, sessions, strict=True), key=lambda pair: pair[0])
        times, sessions = [at - arriving[0][0] for at, _ in arriving], [session for _, session in arriving]
    documents = tuple(reading.documents[place] for place in order)
    workload = Listed(f"trace {path}", documents, tuple(sessions), len(reading.systems))
    return TraceFile(workload, tuple(times) if times else None)


def _check_keys(entry: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"{unknown[0]}: is not known here; known are {', '.join(sorted(known))}")


def _content(value: Any, field: str) -> Content:
    if isinstance(value, str) and value and field != "ids":
        return value
    if isinstance(value, list) and field != "text":
        ids = tuple(each for each in value if type(each) is int and each >= 0)
        if len(ids) == len(value) > 0:
            return ids
    wanted = {"text": "a text", "ids": "token ids"}.get(field, "a text or token ids")
    raise ValueError(f"{field}: give {wanted}, not empty")


def _count(value: Any, field: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{field}: {value!r} is not a whole number of at least 1")
    return value


def _seconds(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{field}: {value!r} is not a time of at least 0")
    return float(value)
