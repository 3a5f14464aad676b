"""Workloads: the same for a seed, other ones for another, documents by Zipf's law."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from cairn.load.workload import FIRST_ID, WORDS, WORKLOADS, About, Lengths, joined


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("vocabulary", [None, 2048])
def test_a_seed_is_a_workload(name: str, vocabulary: int | None) -> None:
    workload = replace(WORKLOADS[name], vocabulary=vocabulary)
    same, other = replace(workload), replace(workload, seed=1)
    assert list(workload.documents) == list(same.documents) and workload.session(7) == same.session(7)
    assert workload.key == same.key != other.key
    assert other.session(7) != workload.session(7) != workload.session(8)
    assert not set(other.documents) & set(workload.documents)
    for content in (*workload.documents, *(request.query for request in workload.session(7))):
        if vocabulary is None:
            assert isinstance(content, str) and set(content.split()) <= set(WORDS)
        else:
            assert all(FIRST_ID <= int(token) < vocabulary for token in content)


def test_lengths_are_those_that_were_asked_for() -> None:
    workload = replace(WORKLOADS["rag"], vocabulary=2048, lengths=Lengths(5, 6, 7, 8))
    system, *documents = workload.documents
    assert (len(system), {len(each) for each in documents}) == (5, {6})
    (request,) = workload.session(0)
    assert (len(request.query), request.max_tokens, request.documents[0], len(request.documents)) == (7, 8, 0, 5)
    assert len(str(replace(workload, vocabulary=None).documents[1]).split()) == 6


def test_each_workload_shares_what_its_name_says() -> None:
    shared, unshared, talk = (WORKLOADS[name] for name in ("shared", "unshared", "conversations"))
    assert shared.session(0)[0].documents == shared.session(1)[0].documents == (0,)
    assert unshared.session(0)[0].documents == () == tuple(unshared.documents)
    assert [request.documents for request in talk.session(3)] == [(0,)] * 6 and talk.systems == 1
    assert len({request.query for request in talk.session(3)}) == 6


def test_documents_are_drawn_by_zipfs_law_and_never_twice() -> None:
    rag = replace(WORKLOADS["rag"], picked=1)
    drawn = Counter(rag.session(number)[0].documents[1] for number in range(4000))
    expected = [1 / rank for rank in range(1, 33)]
    for place in (1, 2, 8):
        share = drawn[place] / 4000
        assert share == pytest.approx(expected[place - 1] / sum(expected), rel=0.25)
    even = replace(rag, zipf=0.0)
    assert max(Counter(even.session(number)[0].documents[1] for number in range(4000)).values()) < 200
    for number in range(200):
        places = WORKLOADS["rag"].session(number)[0].documents
        assert len(set(places)) == 5


def test_a_session_about_each_document() -> None:
    rag = WORKLOADS["rag"]
    about = About(rag, "What?")
    assert [about.session(number)[0].documents for number in range(33)] == [(number,) for number in range(33)]
    assert (about.key, about.systems, about.documents) == (rag.key, rag.systems, rag.documents)


def test_contents_are_put_together_as_what_they_are() -> None:
    assert joined(["a ", "b"]) == "a b" and joined([(1, 2), (3,)]) == (1, 2, 3)
