"""Trace files: what a line means, and what is said of a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cairn.load.trace_file import TraceError, read_trace
from cairn.load.workload import Request

DOCUMENT = {"document": "a", "text": "Long."}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n\n")
    return path


def test_sessions_arrive_when_they_say_and_system_prompts_stand_first(tmp_path: Path) -> None:
    trace = read_trace(
        written(
            tmp_path,
            DOCUMENT,
            {"document": "rules", "text": "Be kind.", "system": True},
            {"at": 12.5, "documents": ["rules", "a"], "query": "Late?", "max_tokens": 7},
            {"at": 10, "session": "talk", "documents": ["rules"], "query": "First?"},
            {"session": "talk", "documents": ["rules"], "query": "Second?", "at": 11},
        )
    )
    assert trace.arrivals == (0.0, 2.5) and trace.turns == 2
    assert (trace.workload.documents, trace.workload.systems) == (("Be kind.", "Long."), 1)
    first, late = trace.workload.sessions
    assert [request.query for request in first] == ["First?", "Second?"]
    assert late == (Request((0, 1), "Late?", 7),)


def test_a_trace_without_times_and_of_token_ids(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, {"document": "a", "ids": [1, 2]}, {"documents": ["a"], "query": [3]}))
    assert trace.arrivals is None and trace.workload.sessions == ((Request((0,), (3,), 128),),)


def test_mooncake_traces_share_blocks(tmp_path: Path) -> None:
    first = {"timestamp": 2000, "input_length": 1200, "output_length": 9, "hash_ids": [0, 1, 2]}
    second = {"timestamp": 3500, "input_length": 1024, "output_length": 3, "hash_ids": [0, 5]}
    trace = read_trace(written(tmp_path, first, second))
    one, two = (session[0] for session in trace.workload.sessions)
    assert trace.arrivals == (0.0, 1.5)
    assert one.documents == (0, 1) and two.documents == (0,) and (one.max_tokens, two.max_tokens) == (9, 3)
    assert [len(str(each).split()) for each in trace.workload.documents] == [512, 512]
    assert (len(str(one.query).split()), len(str(two.query).split())) == (1200 - 1024, 512)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "holds no request"),
        (["{"], ":1: "),
        (["[1]"], "is no JSON object"),
        ([DOCUMENT, DOCUMENT], ":2: document: 'a' is no name, or was given before"),
        ([{"document": "a"}], "give it a text or ids"),
        ([{"document": "a", "text": ""}], "text: give a text, not empty"),
        ([{"document": "a", "ids": [1, -1]}], "ids: give token ids"),
        ([{"query": "q", "documents": ["a"]}], "documents: no document 'a' stands before"),
        ([{"query": "q", "documents": "a"}], "documents: give a list"),
        ([{"query": "q", "docs": []}], "docs: is not known here"),
        ([{"query": [True]}], "query: give a text or token ids"),
        ([{"documents": []}], "query is missing"),
        ([{"query": "q", "max_tokens": 0}], "max_tokens: 0 is not"),
        ([{"query": "q", "at": -1}], "at: -1 is not a time"),
        ([{"query": "q", "at": True}], "at: True is not a time"),
        ([{"query": "q", "at": 1}, {"query": "q"}], "some sessions say when they arrive"),
        ([DOCUMENT, {"query": [1], "documents": ["a"]}], "texts or ids, not both"),
        ([{"hash_ids": [1], "input_length": 5}], "output_length is missing"),
        ([{"hash_ids": 1, "input_length": 5, "output_length": 1}], "hash_ids: give a list"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: list[Any], words: str) -> None:
    with pytest.raises(TraceError) as caught:
        read_trace(written(tmp_path, *lines))
    assert words in str(caught.value) and "trace.jsonl" in str(caught.value)
