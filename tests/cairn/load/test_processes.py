"""The load generator's processes: they share sessions, learn from each other, stop when told, and say why they fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cairn.load.answer import CUT, OK, Progress
from cairn.load.cairn_target import CairnTarget
from cairn.load.http_target import HttpTarget
from cairn.load.job import Job
from cairn.load.messages import Counter
from cairn.load.processes import LoadFailed, LoadGenerator
from cairn.load.workload import WORKLOADS, Lengths
from protos import decode_pb2
from tests.cairn.cairn_fakes import FakeServices, digits
from tests.cairn.load.openai_server import OpenAI, serving

RAG = replace(WORKLOADS["rag"], lengths=Lengths(3, 4, 2, 3), count=1, picked=1)


@pytest.fixture(scope="module")
def generator() -> Iterator[LoadGenerator]:
    with LoadGenerator(2) as generator:
        yield generator


def test_sessions_are_shared_and_what_one_process_learnt_all_know_in_the_next_job(
    generator: LoadGenerator, services: FakeServices
) -> None:
    job, shown = Job(CairnTarget(services.address), RAG, 0, 1, concurrency=2), list[Progress]()
    assert len(generator.run(job).answers) == 1
    load = generator.run(replace(job, first=1, end=9, concurrency=3), shown.append)
    assert sorted(answer.session for answer in load.answers) == list(range(1, 9))
    assert {answer.status for answer in load.answers} == {OK} and len(load.busy) == 2
    assert all(load.began <= answer.asked <= load.began + load.seconds for answer in load.answers)
    asked = [each for each in services.script.requests if isinstance(each, decode_pb2.GenerateRequest)]
    assert asked[0].segments[0].text and {each.segments[0].chunk_id for each in asked[1:]} == {digits("a")}


def test_arrivals_are_shared_out(generator: LoadGenerator, services: FakeServices) -> None:
    due = (0.0, 0.05, 0.1, 0.15)
    load = generator.run(Job(CairnTarget(services.address), RAG, 20, 24, arrivals=due))
    asked = {answer.session: answer.asked - load.began for answer in load.answers}
    assert [asked[number] for number in range(20, 24)] == pytest.approx(due, abs=1e-6)


def test_told_to_stop_they_give_what_they_have(generator: LoadGenerator) -> None:
    service = OpenAI(held=threading.Event())
    with serving(service) as url:

        def show(progress: Progress) -> None:
            if progress.tokens == 3:
                generator.stop()

        load = generator.run(Job(HttpTarget(url), RAG, 0, 100, concurrency=3), show)
    assert [(answer.status, answer.counts) for answer in load.answers] == [(CUT, [1])] * 3


def test_a_target_that_is_not_there_is_said(services: FakeServices) -> None:
    services.stop()
    job = Job(CairnTarget(services.address, timeout_s=5.0), RAG, 0, 1)
    with LoadGenerator() as generator, pytest.raises(LoadFailed, match=services.address):
        generator.run(job)


def test_a_process_that_dies_is_said() -> None:
    with serving(OpenAI(held=threading.Event())) as url, LoadGenerator() as generator:

        def show(progress: Progress) -> None:
            if progress.tokens:
                generator._processes[0].kill()

        with pytest.raises(LoadFailed, match="has died"):
            generator.run(Job(HttpTarget(url), RAG, 0, 1), show)


def test_a_number_is_given_to_one_alone() -> None:
    counter, taken = Counter.new(), list[int]()
    counter.set(5)
    try:
        taken += [counter.next() for _ in range(3)]
    finally:
        counter.close()
    assert taken == [5, 6, 7]
