"""A request becomes a sequence for each answer: its turn, its seeds, what is kept, what bypasses the caches."""

from __future__ import annotations

from typing import Any

import pytest

from decode_service.api import messages
from decode_service.scheduling.sequence import Sequence
from protos import decode_pb2
from serving.errors import InvalidRequest, Overloaded, RequestError
from serving.rpc.access import Caller
from serving.trace.stages import StageClock
from tests.decode_service.api.desk import Call, Desk, request

ARRIVED_NS = 1_000_000_000_000


def composed(desk: Desk, asked: decode_pb2.GenerateRequest, tail_tokens_max: int = 64) -> list[Sequence]:
    """The sequences of a request of its tenant's."""
    made: list[Sequence] = []

    async def body() -> None:
        desk.worker.tail_tokens_max = tail_tokens_max
        caller: Caller = desk.service.access.caller(Call().invocation_metadata(), "salted")
        sequences, _ = await desk.service.composer.sequences(asked, caller, "r", StageClock(arrived=ARRIVED_NS))
        made.extend(sequences)

    desk.run(body)
    return made


def test_answers_share_a_prompt_and_draw_with_seeds_of_their_own(desk: Desk) -> None:
    made = composed(desk, request(sampling={"seed": 7, "n": 3}, priority=4, start_within_s=2.5))
    assert [(each.answer, each.params.seed) for each in made] == [(0, 7), (1, 8), (2, 9)]
    assert len({id(each.prompt) for each in made}) == 1 and {each.request_id for each in made} == {"r"}
    assert {(each.priority, each.start_by) for each in made} == {(4, ARRIVED_NS + 2_500_000_000)}
    assert {each.salt for each in made} == {"salted"} and {each.tenant for each in made} != {""}
    assert all(each.keep is None and not each.bypass and each.grammar is None for each in made)
    assert all("tokenize" in each.clock.measured_ns for each in made)


def test_the_first_answer_alone_scores_its_prompt_and_bypasses_for_it(desk: Desk) -> None:
    made = composed(desk, request(sampling={"n": 2, "prompt_logprobs": 1}))
    assert [(each.bypass, each.scores is not None) for each in made] == [(True, True), (False, False)]
    made = composed(desk, request(cache_use=decode_pb2.CACHE_USE_BYPASS, sampling={"n": 2}))
    assert [(each.bypass, each.scores is not None) for each in made] == [(True, False), (True, False)]


def test_each_answer_keeps_its_own_turn_and_follows_its_own_grammar(desk: Desk) -> None:
    one, two = composed(desk, request(keep=True, grammar={"regex": "a heap"}, sampling={"n": 2}))
    assert one.keep is not None and two.keep is not None and one.keep is not two.keep
    assert one.grammar is not None and two.grammar is not None and one.grammar is not two.grammar
    assert one.sampling.masked and two.sampling.masked


def test_the_prompt_is_counted_where_repetition_costs(desk: Desk) -> None:
    (plain,) = composed(desk, request())
    (repeating,) = composed(desk, request(sampling={"repetition_penalty": 1.5}))
    assert not plain.sampling.prompt and list(repeating.sampling.prompt) == repeating.composition.token_ids()
    assert plain.params.max_tokens == min(messages.MAX_TOKENS_DEFAULT, 64 - plain.composition.prompt_tokens)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"grammar": {"regex": "("}}, "grammar.regex"),
        ({"priority": 99}, "priority"),
        ({"keep": True, "cache_use": decode_pb2.CACHE_USE_BYPASS}, "keep"),
        ({"order": 77}, "order"),
        ({"sampling": {"stop": [""]}}, "sampling.stop"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_explained_no_other_way(desk: Desk, asked: Any, field: str) -> None:
    async def body() -> None:
        caller = desk.service.access.caller(Call().invocation_metadata(), "")
        found: list[RequestError] = []
        for way in ("sequences", "prompt"):
            more = ("r", StageClock(arrived=ARRIVED_NS)) if way == "sequences" else ()
            with pytest.raises(InvalidRequest) as caught:
                await getattr(desk.service.composer, way)(request(**asked), caller, *more)
            found.append(caught.value)
        assert [str(each).startswith(field) for each in found] == [True, True] and str(found[0]) == str(found[1])

    desk.run(body)


def test_what_the_pool_could_never_hold_is_refused_before_it_waits(desk: Desk) -> None:
    async def body() -> None:
        desk.worker.too_large = Overloaded("larger than the pool")
        caller = desk.service.access.caller(Call().invocation_metadata(), "")
        with pytest.raises(Overloaded, match="larger than the pool"):
            await desk.service.composer.sequences(request(), caller, "r", StageClock(arrived=ARRIVED_NS))
        assert (await desk.service.composer.prompt(request(), caller)).prompt_tokens, "to explain it nothing is held"

    desk.run(body)
