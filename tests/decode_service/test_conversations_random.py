"""Random conversations of two tenants in a small pool: branches, ends of all kinds, evictions; answers as if anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cairn import Client, Conversation, Tokens
from cairn.client.conversation import Turn
from tests.decode_service.models import loaded, tokens
from tests.decode_service.packing import packing
from tests.decode_service.pair import DEADLINE_S, Pair, pair

EOS = 1
OPENING = [tokens(71, 20), tokens(72, 45)]
TENANTS = ("first", "second")


@dataclass
class Talks:
    """Both services, and a client of each tenant."""

    services: Pair
    clients: list[Client]

    def begin(self, tenant: int) -> Conversation:
        return self.clients[tenant].conversation(None, OPENING, ignore_eos=True, logprobs=True)


@pytest.fixture(scope="module", params=["packed", "stepwise"])
def talks(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talks]:
    decode = loaded(folder, "decode")
    decode = packing(decode) if request.param == "packed" else decode
    path = tmp_path_factory.mktemp("random")
    (path / "tokens").write_text("all\n" + "".join(f"{name} salt-{name}\n" for name in TENANTS))
    # Some 22 pages of 16 tokens for chunks: a conversation of few turns fits, two do not.
    options: dict[str, Any] = {"token_file": path / "tokens", "kv_pages": 44}
    with pair(loaded(folder, "prefill"), decode, path / "store", **options) as services:
        services.client.close()
        addresses = (services.prefill_address, services.decode_address)
        services.client = Client(*addresses, token="all", timeout_s=DEADLINE_S)
        clients = [Client(*addresses, token=name, timeout_s=DEADLINE_S) for name in TENANTS]
        yield Talks(services, clients)
        for client in clients:
            client.close()
        services.check_idle()


ENDINGS: list[dict[str, Any]] = [
    {"max_tokens": 1},
    {"max_tokens": 2},
    {"max_tokens": 15},
    {"max_tokens": 16},
    {"max_tokens": 12, "stop": ["e", "t", "a"]},
    {"max_tokens": 12, "stop_token_ids": list(range(10, 200))},
    {"max_tokens": 12, "ignore_eos": False, "logit_bias": {EOS: 100.0}},
    {"max_tokens": 12, "temperature": 2.0, "seed": 5},
]

steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "retry", "edit", "branch", "forget", "delete", "switch"]),
        st.integers(1, 40),  # tokens of a question
        st.sampled_from(ENDINGS),
        st.integers(0, 5),
    ),
    min_size=3,
    max_size=10,
)


def check(talks: Talks, tenant: int, talk: Conversation, at: int, options: dict[str, Any]) -> None:
    """A turn's answer is what the same tokens give without caches; what was kept of it is what it was."""
    turn: Turn = talk.turns[at]
    before = [Tokens(each.token_ids, type="turn") for each in talk.turns[:at]]
    given: dict[str, Any] = {"ignore_eos": True, "logprobs": True, **options, "cache": "bypass"}
    anew = talks.clients[tenant].generate([*OPENING, *before, list(turn.kept.query_token_ids)], **given).finish()
    assert anew.token_ids == turn.result.token_ids and anew.text == turn.answer
    assert anew.logprobs == pytest.approx(turn.result.logprobs, abs=1e-4)
    assert turn.result.usage.prompt_tokens == anew.usage.prompt_tokens
    assert turn.token_ids == (*turn.kept.query_token_ids, *turn.result.token_ids)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(steps=steps, seed=st.integers(0, 10**6))
def test_every_answer_is_that_of_its_tokens(talks: Talks, steps: list[Any], seed: int) -> None:
    open_talks: list[tuple[int, Conversation]] = [(0, talks.begin(0)), (1, talks.begin(1))]
    now = 0
    for number, (step, length, options, pick) in enumerate(steps):
        tenant, talk = open_talks[now]
        query = tokens(seed + number, length)
        if step == "ask" or not talk.turns:
            talk.ask(query, **options)
            check(talks, tenant, talk, len(talk.turns) - 1, options)
        elif step == "retry":
            talk.retry(**options)
            check(talks, tenant, talk, len(talk.turns) - 1, options)
        elif step == "edit":
            place = pick % len(talk.turns)
            talk.edit(place, query, **options)
            check(talks, tenant, talk, place, options)
        elif step == "branch":
            open_talks.append((tenant, talk.branch(pick % (len(talk.turns) + 1))))
        elif step == "forget":
            talks.services.forget()
        elif step == "delete":
            forget_chunk(talks.clients[tenant], talk.turns[pick % len(talk.turns)])
        now = pick % len(open_talks) if step in ("switch", "branch") else now


def forget_chunk(client: Client, turn: Turn) -> None:
    """Deletes a turn; another conversation of the tenant may have done so before."""
    if any(chunk.id == turn.id for chunk in client.chunks(type="turn")):
        client.delete(turn.id)


def test_a_tenants_turns_are_its_own(talks: Talks) -> None:
    mine, theirs = talks.begin(0), talks.begin(1)
    query = tokens(99, 9)
    mine.ask(query, max_tokens=5)
    stolen: list[Any] = [*OPENING, mine.turns[0].kept, [9]]
    with pytest.raises(Exception, match="NOT_FOUND"):
        talks.clients[1].generate(stolen, max_tokens=1).finish()
    theirs.ask(query, max_tokens=5)
    assert theirs.turns[0].result.token_ids == mine.turns[0].result.token_ids
    assert theirs.turns[0].result.usage.cached_tokens <= 65, "what the first one kept is nobody else's"
    listed = [{chunk.id for chunk in client.chunks(type="turn")} for client in talks.clients]
    assert mine.turns[0].id in listed[0] and theirs.turns[0].id in listed[1]
    talks.clients[0].delete(mine.turns[0].id)
    theirs.ask([8, 9], max_tokens=5)
    check(talks, 1, theirs, 1, {"max_tokens": 5})
