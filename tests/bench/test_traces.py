"""Traces: the same token ids for everybody who measures with them."""

from __future__ import annotations

import hashlib
import json

import pytest

from bench.traces import FIRST_ID, SPECIAL_IDS, TRACES, Trace, ids_of

pytestmark = pytest.mark.unit

# Of each request in order: its documents' and its query's ids as JSON, then its max_tokens. Figures that are recorded
# (``bench.serving_figures``) are of these traces: a trace that changes has none to stand beside.
DIGESTS = {
    "doc_qa": "ff9d8014aeba57879afc837f2983ef01ee5995a596077e4ec2238789e26fafbc",
    "doc_qa_sampled": "21e40cd8e2dba6034d78f051209d3834640c63fa963822ab3eabb838ce47d65d",
    "unshared": "a9f8baf41e193c4fb7a057d299e9a69ede62e6c22b8af213b3060a6160e6d0b5",
    "agents": "2461594c08aa02e25edd2807809e07a690658b957e671db080728943bbfaf22b",
    "cold": "466827ea714d858db3e1f6d8e2e1adb0afb70e00fa8df69aac0c45b1849aeef1",
    "busy_prefill": "9a191c7d6e826bf7194f554fbf57332040f99e627bd9276d8313cf4f231e298e",
    "rag": "f18ebb9e26dddc75f7c54e000f57e74a7a69fc6f72b74732917707be4824ac5f",
}
AT_ONCE = {"doc_qa": 64, "doc_qa_sampled": 64, "unshared": 64, "agents": 16, "rag": 64, "cold": 1, "busy_prefill": 64}


def digest(trace: Trace) -> str:
    """Each document's JSON is made once."""
    documents = [json.dumps(list(document)).encode() for document in trace.documents]
    found = hashlib.sha256()
    for request in (request for session in trace.sessions for request in session):
        for document in request.documents:
            found.update(documents[document])
        found.update(json.dumps(list(request.query)).encode())
        found.update(str(request.max_tokens).encode())
    return found.hexdigest()


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_is_always_the_same(name: str) -> None:
    trace = TRACES[name](1.0)
    assert (digest(trace), trace.concurrency) == (DIGESTS[name], AT_ONCE[name])
    assert trace.name == name and trace.sampled == name.endswith("sampled")


@pytest.mark.parametrize("name", TRACES)
def test_a_small_trace_for_a_small_vocabulary(name: str) -> None:
    trace = TRACES[name](0.01).within(2048)
    ids = [token for document in trace.documents for token in document]
    ids += [token for session in trace.sessions for request in session for token in ids_of(request.query)]
    assert min(ids) >= SPECIAL_IDS and max(ids) < 2048 and len(set(ids)) > 50
    assert 1 <= trace.warm_up < len(trace.sessions) <= 16 and trace.concurrency == min(4, AT_ONCE[name])
    assert all(0 <= document < len(trace.documents) for (first, *_) in trace.sessions for document in first.documents)


def test_a_trace_anew_has_the_same_shape_and_other_tokens() -> None:
    trace = TRACES["rag"](0.01)
    other, third = trace.anew(1), trace.anew(2)
    assert trace.anew(0) == trace and len({digest(each) for each in (trace, other, third)}) == 3
    assert [len(document) for document in other.documents] == [len(document) for document in trace.documents]
    assert (
        not {*other.documents} & {*trace.documents} and other.sessions[0][0].documents == trace.sessions[0][0].documents
    )
    assert (other.name, other.variant, trace.variant) == ("rag", 1, 0)
    assert min(token for document in other.documents for token in document) >= FIRST_ID


def test_every_document_is_asked_about_alone() -> None:
    trace = TRACES["rag"](0.01)
    known = trace.about_each_document()
    assert [request.documents for (request,) in known.sessions] == [(n,) for n in range(33)]
    assert known.documents == trace.documents and {request.max_tokens for (request,) in known.sessions} == {1}


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 150 tokens is too small"):
        TRACES["rag"](0.01).within(150)
