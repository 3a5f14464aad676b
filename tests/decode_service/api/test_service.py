"""The handlers of the decode service over a scripted worker: text, stops, aborts, whose request, what is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from chunk_store.open import open_store
from chunk_store.tenant import Tenant
from decode_service.api.service import DecodeService
from decode_service.metrics import Steps
from decode_service.prompt.resolver import Resolver
from decode_service.sequence import Failed, Finished, FinishReason, Tokens
from engine.sampling.params import Choice
from protos import decode_pb2
from serving.errors import Conflict, DeadlineExceeded, InternalFault, InvalidRequest, Overloaded, RequestError
from serving.rpc.access import Access
from serving.trace.stages import StageClock
from tests.fakes import FakeServed, codec

Script = Callable[[Any], None]


def choices(text: str) -> tuple[Choice, ...]:
    return tuple(Choice(token, None) for token in codec().encode(text))


def says(*texts: str, end: FinishReason = FinishReason.LENGTH) -> Script:
    """A batch of tokens for each text, then the end."""

    def script(sequence: Any) -> None:
        sequence.clock.first_token = 1
        for text in texts:
            sequence.deliver([Tokens(choices(text))])
        sequence.deliver([Finished(end)])

    return script


def silent(sequence: Any) -> None:
    """No event ever, unless it is ended."""


class ScriptedWorker:
    def __init__(self) -> None:
        self.script: Script = silent
        self.places_taken = 0
        self.refuses: RequestError | None = None
        self.too_large: RequestError | None = None
        self.sequences: list[Any] = []
        self.ended: list[tuple[str, FinishReason, Tenant]] = []
        self.over: list[Any] = []
        self.finished: list[tuple[Any, FinishReason]] = []
        self.submitted = asyncio.Event()
        self.metrics = SimpleNamespace(first_token_sent=self._first_token, steps=Steps(3, 40, 50))
        self.first_tokens: list[StageClock] = []
        self.waiting_max, self.batch_max = 7, 3
        self.residents = SimpleNamespace(pool=SimpleNamespace(page_size=4))
        self.places = SimpleNamespace(of=lambda tenant: (1, 2))
        self.stopped = False

    def _first_token(self, clock: StageClock) -> None:
        self.first_tokens.append(clock)

    def start(self, deliver: Callable[[Any], None]) -> None:
        self.deliver = deliver

    def stop(self) -> None:
        self.stopped = True

    def take_place(self, tenant: Tenant, answers: int) -> None:
        if self.refuses:
            raise self.refuses
        self.places_taken += answers

    def leave_place(self, tenant: Tenant) -> None:
        self.places_taken -= 1

    def check_size(self, sequence: Any) -> None:
        if self.too_large:
            raise self.too_large

    def submit(self, *sequences: Any) -> None:
        self.sequences += sequences
        self.submitted.set()
        for sequence in sequences:
            self.script(sequence)

    def end(self, request_id: str, reason: FinishReason, owner: Tenant) -> None:
        self.ended.append((request_id, reason, owner))
        for sequence in self.sequences:
            if (sequence.request_id, sequence.owner) == (request_id, owner) and sequence not in self.over:
                self.finish(sequence, reason)

    def finish(self, sequence: Any, reason: FinishReason) -> None:
        self.over.append(sequence)
        self.finished.append((sequence, reason))
        sequence.deliver([Finished(reason)])

    def occupancy(self) -> Any:
        pages = {"free": 6, "chunk": 1, "tail": 1}
        return SimpleNamespace(running=2, waiting=5, chunks_resident=4, pages=pages, usage=0.25)


class Call:
    def __init__(self, token: str = "", left_s: float | None = None) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._left_s = left_s

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def set_trailing_metadata(self, metadata: object) -> None: ...

    def time_remaining(self) -> float | None:
        return self._left_s


def request(*texts: str, **fields: Any) -> decode_pb2.GenerateRequest:
    segments = [decode_pb2.Segment(text=text) for text in texts or ("why?",)]
    return decode_pb2.GenerateRequest(segments=segments, **fields)


class Desk:
    """A service over a scripted worker; with ``tokens`` it asks who calls."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = open_store(f"file://{root / 'store'}")
        self.worker: Any = None
        self.service: Any = None

    def run(self, body: Callable[[], Awaitable[None]], *, tokens: str = "", timeout_s: float = 30.0) -> None:
        file = self.root / "tokens"
        file.write_text(tokens)
        access = Access.from_file(file) if tokens else Access()
        served: Any = FakeServed()

        async def main() -> None:
            self.worker = ScriptedWorker()
            self.service = DecodeService(
                self.worker, Resolver(served, codec(), self.store), access, CollectorRegistry(),
                model_name="tiny", request_timeout_s=timeout_s, close=lambda: None,
            )  # fmt: skip
            await self.service.start()
            await body()
            assert not self.service._active and not self.service._aborted
            await self.service.stop()
            assert self.worker.stopped

        asyncio.run(asyncio.wait_for(main(), 60))

    async def answer(self, asked: decode_pb2.GenerateRequest, call: Any = None) -> tuple[str, Any, Sequence[Any]]:
        """Text, completion, deltas."""
        replies = [reply async for reply in self.service.Generate(asked, call or Call())]
        deltas = [reply.delta for reply in replies[:-1]]
        assert all(reply.WhichOneof("event") == "delta" for reply in replies[:-1])
        return "".join(delta.text for delta in deltas), replies[-1].complete, deltas


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


def test_tokens_become_text_and_the_completion_is_last(desk: Desk) -> None:
    async def body() -> None:
        desk.worker.script = says("a heap ", "of €")
        text, complete, deltas = await desk.answer(request(request_id="r", sampling={"seed": 7}))
        assert text == "a heap of €" and complete.finish_reason == "length"
        assert (complete.request_id, complete.seed, complete.model_name) == ("r", 7, "tiny")
        counted = sum(len(delta.token_ids) for delta in deltas)
        assert complete.usage.completion_tokens == counted == len(choices("a heap ")) + len(choices("of €"))
        assert len(desk.worker.first_tokens) == 1
        assert desk.worker.ended == [("r", FinishReason.ABORT, "")], "however it ends, its pages come back"

    desk.run(body)


def test_a_stop_string_ends_the_request_and_is_not_shown(desk: Desk) -> None:
    async def body() -> None:
        def script(sequence: Any) -> None:
            sequence.clock.first_token = 1
            for text in ("one <", "/s", "> two", " three"):
                sequence.deliver([Tokens(choices(text))])

        desk.worker.script = script
        text, complete, _ = await desk.answer(request(request_id="r", sampling={"stop": ["</s>"]}))
        assert (text, complete.finish_reason) == ("one ", "stop")
        assert desk.worker.finished == [(desk.worker.sequences[0], FinishReason.STOP)]

    desk.run(body)


def test_text_that_was_held_back_comes_at_the_end(desk: Desk) -> None:
    async def body() -> None:
        desk.worker.script = says("one <", "/")
        text, complete, _ = await desk.answer(request(sampling={"stop": ["</s>"]}))
        assert (text, complete.finish_reason) == ("one </", "length")

    desk.run(body)


def test_a_failure_is_raised_as_it_is(desk: Desk) -> None:
    async def body() -> None:
        desk.worker.script = lambda sequence: sequence.deliver([Failed(InternalFault("lost"))])
        with pytest.raises(InternalFault, match="lost"):
            await desk.answer(request())

    desk.run(body)


@pytest.mark.parametrize("where", ["place", "segments", "size"])
def test_a_refusal_keeps_no_place(desk: Desk, where: str) -> None:
    async def body() -> None:
        asked = request()
        if where == "place":
            desk.worker.refuses = Overloaded("full", retry_after_s=1.0)
        elif where == "size":
            desk.worker.too_large = Overloaded("larger than the pool")
        else:
            asked = request("")
        with pytest.raises(Overloaded if where != "segments" else InvalidRequest):
            await desk.answer(asked)
        assert desk.worker.places_taken == 0 and not desk.worker.sequences

    desk.run(body)


def test_an_answer_has_an_end(desk: Desk) -> None:
    async def body() -> None:
        with pytest.raises(DeadlineExceeded, match=r"longer than 0\.05 s"):
            await desk.answer(request(request_id="r"))
        assert desk.worker.ended == [("r", FinishReason.ABORT, "")]

    desk.run(body, timeout_s=0.05)


def test_the_callers_deadline_is_the_sequences(desk: Desk) -> None:
    async def body() -> None:
        desk.worker.script = says("a")
        await desk.answer(request(), Call(left_s=5.0))
        await desk.answer(request(), Call(left_s=500.0))
        near, far = (sequence.deadline for sequence in desk.worker.sequences)
        assert 20.0 < far - near <= 25.5

    desk.run(body)


async def running(desk: Desk, request_id: str, call: Any = None) -> asyncio.Task[Any]:
    desk.worker.submitted.clear()
    task = asyncio.create_task(desk.answer(request(request_id=request_id), call))
    await asyncio.wait_for(desk.worker.submitted.wait(), 20)
    return task


def test_an_id_runs_once_at_a_time(desk: Desk) -> None:
    async def body() -> None:
        first = await running(desk, "r")
        with pytest.raises(Conflict, match="'r' is running"):
            await desk.answer(request(request_id="r"))
        assert (await desk.service.Abort(decode_pb2.AbortRequest(request_id="r"), Call())).found
        _, complete, _ = await first
        assert complete.finish_reason == "abort" and complete.usage == decode_pb2.Usage()
        assert not (await desk.service.Abort(decode_pb2.AbortRequest(request_id="r"), Call())).found
        desk.worker.script = says("again")
        assert (await desk.answer(request(request_id="r")))[0] == "again"

    desk.run(body)


def test_a_caller_that_goes_away_gives_everything_back(desk: Desk) -> None:
    async def body() -> None:
        task = await running(desk, "r")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert desk.worker.ended == [("r", FinishReason.ABORT, "")]

    desk.run(body)


def test_an_abort_before_the_worker_has_it_is_not_lost(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        resolve, entered, go_on = desk.service._resolve, asyncio.Event(), asyncio.Event()

        async def slow(*args: Any) -> Any:
            entered.set()
            await go_on.wait()
            return await resolve(*args)

        monkeypatch.setattr(desk.service, "_resolve", slow)
        task = asyncio.create_task(desk.answer(request(request_id="r")))
        await asyncio.wait_for(entered.wait(), 20)
        assert (await desk.service.Abort(decode_pb2.AbortRequest(request_id="r"), Call())).found
        go_on.set()
        assert (await task)[1].finish_reason == "abort"

    desk.run(body)


TOKENS = "ann salt-a\nbob salt-b\nboss - admin\n"


def test_one_tenants_ids_say_nothing_of_anothers(desk: Desk) -> None:
    async def body() -> None:
        anns, bobs = await running(desk, "r", Call("ann")), await running(desk, "r", Call("bob"))
        assert not (await desk.service.Abort(decode_pb2.AbortRequest(request_id="r"), Call("boss"))).found
        assert (await desk.service.Abort(decode_pb2.AbortRequest(request_id="r"), Call("bob"))).found
        owners = {owner for _, _, owner in desk.worker.ended}
        assert len(owners) == 1 and "" not in owners
        for task in (anns, bobs):
            task.cancel()
        await asyncio.gather(anns, bobs, return_exceptions=True)
        assert {s.salt for s in desk.worker.sequences} == {"salt-a", "salt-b"}

    desk.run(body, tokens=TOKENS)


def test_loads_of_everybody_are_for_who_may_see_all(desk: Desk) -> None:
    async def body() -> None:
        desk.service.resolver.served.refusals = {
            mode: "positions are learned" if mode == "anchored" else ""
            for mode in desk.service.resolver.served.refusals
        }
        mine = await desk.service.GetLoads(decode_pb2.GetLoadsRequest(), Call("ann"))
        assert (mine.running, mine.waiting, mine.pages_total, mine.pages_free, mine.chunks_resident) == (1, 2, 8, 0, 0)
        assert (mine.steps, mine.step_bytes_read, mine.step_bytes_flat) == (0, 0, 0)
        everybodys = await desk.service.GetLoads(decode_pb2.GetLoadsRequest(), Call("boss"))
        assert (everybodys.running, everybodys.waiting, everybodys.pages_free) == (2, 5, 6)
        assert (everybodys.steps, everybodys.step_bytes_read, everybodys.step_bytes_flat) == (3, 40, 50)
        assert (everybodys.waiting_max, everybodys.batch_max, everybodys.page_size) == (7, 3, 4)
        modes = {mode.mode: (mode.supported, mode.reason, mode.context_length_max) for mode in everybodys.modes}
        assert sorted(modes.values()) == [(False, "positions are learned", 0), (True, "", 64), (True, "", 64)]

    desk.run(body, tokens=TOKENS)


def test_log_probabilities_come_where_they_were_asked_for(desk: Desk) -> None:
    async def body() -> None:
        def script(sequence: Any) -> None:
            tops = ((5, -0.5), (9, -2.0)), ((7, -0.25), (6, -1.0))
            tokens = Tokens((Choice(5, -0.5, tops[0]), Choice(6, -1.0, tops[1])))
            sequence.deliver([tokens, Finished(FinishReason.STOP)])

        desk.worker.script = script
        _, complete, (delta,) = await desk.answer(request())
        assert list(delta.logprobs) == [-0.5, -1.0] and list(delta.token_ids) == [5, 6]
        assert [(list(top.token_ids), list(top.logprobs)) for top in delta.top_logprobs] == [
            ([5, 9], [-0.5, -2.0]),
            ([7, 6], [-0.25, -1.0]),
        ]
        desk.worker.script = says("a")
        bare = (await desk.answer(request()))[2][0]
        assert not bare.logprobs and not bare.top_logprobs
        assert complete.finish_reason == "stop"

    desk.run(body)
