"""What a process of the load generator says on its pipe, and when it ends."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest

from cairn.load.answer import OK, Progress
from cairn.load.cairn_target import CairnTarget
from cairn.load.http_target import HttpTarget
from cairn.load.job import Job
from cairn.load.messages import READY, STOP, Counter, Result
from cairn.load.worker import serve
from cairn.load.workload import WORKLOADS
from tests.cairn.cairn_fakes import FakeServices
from tests.cairn.load.openai_server import OpenAI, serving

pytestmark = pytest.mark.unit
RAG = replace(WORKLOADS["rag"], count=1, picked=1)


@pytest.fixture
def pipe() -> Iterator[Connection]:
    """To a worker, in a thread; its next session is 3."""
    here, there = multiprocessing.Pipe()
    counter = Counter.new()
    counter.set(3)
    thread = threading.Thread(target=serve, args=(there, counter, 0, 1), daemon=True)
    thread.start()
    yield here
    here.close()
    thread.join(30)
    assert not thread.is_alive()
    counter.close()


def heard(pipe: Connection) -> Any:
    """The next word that is no progress."""
    while True:
        assert pipe.poll(60)
        said = pipe.recv()
        if not isinstance(said, Progress):
            return said


def test_a_job_is_begun_when_the_word_is_given(pipe: Connection, services: FakeServices) -> None:
    pipe.send((Job(CairnTarget(services.address), RAG, 3, 5), {}))
    assert heard(pipe) == READY and not [r for r in services.script.requests if hasattr(r, "segments")]
    begin = time.monotonic()
    pipe.send(begin)
    result = heard(pipe)
    assert isinstance(result, Result) and [answer.session for answer in result.answers] == [3, 4]
    assert {answer.status for answer in result.answers} == {OK} and result.ended > begin and result.known


def test_stop_ends_a_job_and_means_nothing_between_two(pipe: Connection) -> None:
    pipe.send(STOP)
    with serving(OpenAI(held=threading.Event())) as url:
        pipe.send((Job(HttpTarget(url), RAG, 3, 5), {}))
        assert heard(pipe) == READY
        pipe.send(time.monotonic())
        while not pipe.recv().tokens:  # a progress
            pass
        pipe.send(STOP)
        assert [len(answer.times) for answer in heard(pipe).answers] == [1]


def test_what_fails_is_said_in_words(pipe: Connection) -> None:
    with serving(OpenAI()) as url:
        pass
    pipe.send((Job(HttpTarget(url), RAG, 3, 5), {}))
    assert "cannot be reached" in heard(pipe)
