"""Answers that follow a grammar, through the real services: what they are, how they end, what is refused."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest

from cairn import Grammar, InvalidRequest, ServerError
from protos import decode_pb2
from tests.decode_service.models import loaded, tokens
from tests.decode_service.packing import packing
from tests.decode_service.pair import Pair, pair, raw_status
from text.codec import TextCodec

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["stone", "wood"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
SAMPLED = {"temperature": 1.0, "ignore_eos": False}


@pytest.fixture(scope="module", params=["stepwise", "packed"])
def services(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    decode = loaded(folder, "decode")
    made = packing(decode) if request.param == "packed" else decode
    with pair(loaded(folder, "prefill"), made, tmp_path_factory.mktemp(request.param)) as services:
        yield services


def test_an_answer_is_what_its_schema_allows_and_ends_with_it(services: Pair) -> None:
    for seed in range(4):
        result = services.generate(
            [tokens(1, 20), tokens(seed, 5)], 200, grammar=Grammar.json_schema(PERSON), seed=seed, **SAMPLED
        )
        assert result.finish_reason == "stop"
        jsonschema.validate(json.loads(result.text), PERSON)
    services.check_idle()


def generate_in(services: Pair, grammar: Grammar, *, seed: int = 0, max_tokens: int = 200, **options: Any) -> Any:
    return services.generate(
        [tokens(1, 20), tokens(seed, 5)], max_tokens, grammar=grammar, seed=seed, **{**SAMPLED, **options}
    )


def test_every_form(services: Pair) -> None:
    assert re.fullmatch(r"[ab]{2,5}-(stone|wood)", generate_in(services, Grammar.regex("[ab]{2,5}-(stone|wood)")).text)
    object_of = 'start: "<<" %json {"type": "boolean"} ">>"'
    assert generate_in(services, Grammar.lark(object_of)).text in ("<<true>>", "<<false>>")
    assert generate_in(services, Grammar.json_object(), max_tokens=8).text.startswith("{")


def test_the_same_seed_gives_the_same_answer_alone_and_beside_others(services: Pair) -> None:
    grammars = [Grammar.json_schema(PERSON), Grammar.regex("[a-f]{30}"), None, Grammar.json_schema({"type": "integer"})]
    requests: list[tuple[Any, dict[str, Any]]] = [
        (
            [tokens(1, 20), tokens(index, 5)],
            {"max_tokens": 40, "grammar": grammars[index % 4], "seed": index, **SAMPLED, "logprobs": index % 3 == 0},
        )
        for index in range(12)
    ]
    alone = [services.generate(parts, **options) for parts, options in requests]
    together = services.together_each(requests)
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert [result.finish_reason for result in together] == [result.finish_reason for result in alone]


def test_max_tokens_cuts_an_answer_off(services: Pair) -> None:
    result = generate_in(services, Grammar.json_schema(PERSON), max_tokens=5)
    assert (result.finish_reason, len(result.token_ids)) == ("length", 5)


@pytest.mark.parametrize(
    ("grammar", "complaint"),
    [
        (decode_pb2.Grammar(), "grammar: give one of"),
        (decode_pb2.Grammar(json_object=False), "grammar.json_object: is false"),
        (decode_pb2.Grammar(json_schema="{"), "grammar.json_schema: line 1, column 2"),
        (decode_pb2.Grammar(json_schema='{"properties": {"a": {"not": {}}}}'), "at /properties/a/not: "),
        (decode_pb2.Grammar(json_schema='{"properties": {"a": {"type": "strin"}}}'), "at /properties/a/type: "),
        (decode_pb2.Grammar(json_schema='{"patternProperties": {}}'), "at /patternProperties: "),
        (decode_pb2.Grammar(json_schema='{"items": {"pattern": "(?=a)b"}}'), "at /items: "),
        (decode_pb2.Grammar(json_schema='{"$ref": "#/$defs/a"}'), "at /$ref: "),
        (decode_pb2.Grammar(regex="ab(c"), "grammar.regex: character 3: unclosed group"),
        (decode_pb2.Grammar(regex=""), "grammar.regex: is empty"),
        (decode_pb2.Grammar(lark="start: b\nb: c"), "grammar.lark: line 2, column 4: unknown name"),
        (
            decode_pb2.Grammar(lark='start: "a" %json {"type": "x"}'),
            "grammar.lark: line 1, the schema behind %json: at /type",
        ),
        (decode_pb2.Grammar(regex="a" * 200_000), "200000 characters are more than"),
    ],
)
def test_what_is_refused_is_named(services: Pair, grammar: decode_pb2.Grammar, complaint: str) -> None:
    request = decode_pb2.GenerateRequest(segments=[decode_pb2.Segment(text="q")], grammar=grammar)
    code, details = raw_status(services, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and complaint in details
    assert "\n" not in details
    assert raw_status(services, request, "Explain") == (code, details)
    services.check_idle()


def test_a_model_without_a_tokenizer_refuses_grammars(folder: Path, tmp_path: Path) -> None:
    bare = dataclasses.replace(loaded(folder, "decode"), codec=TextCodec(None, "bare"))
    with (
        pair(None, bare, tmp_path / "store") as services,
        pytest.raises(InvalidRequest, match=r"grammar\.regex: model 'bare' has no tokenizer"),
    ):
        services.generate([tokens(0, 5)], 4, grammar=Grammar.regex("a"))


def test_an_answer_that_ends_in_the_middle_lets_its_grammar_go(services: Pair) -> None:
    """Aborted by its caller, and failed by a step."""
    grammar = Grammar.regex("[a-f]{1000}")
    met: list[weakref.ref[Any]] = []

    def note() -> None:
        scheduler = services.decode.worker.scheduler
        met.extend(weakref.ref(sequence.grammar) for sequence in scheduler.everyone if sequence.grammar is not None)

    with services.client.generate([tokens(2, 5)], max_tokens=900, grammar=grammar, request_id="long") as stream:
        next(iter(stream))
        services.in_device_thread(note)
        assert services.client.abort("long")
        assert stream.finish().finish_reason == "abort"
    services.check_idle()
    gc.collect()
    assert len(met) == 1 and met[0]() is None


def test_several_answers_to_one_prompt_follow_it_each(services: Pair) -> None:
    grammar = Grammar.json_schema(PERSON)
    stream = services.client.generate([tokens(3, 9)], max_tokens=200, grammar=grammar, seed=5, n=3, temperature=1.0)
    stream.finish()
    assert len({result.text for result in stream.results}) == 3
    for result in stream.results:
        jsonschema.validate(json.loads(result.text), PERSON)
    services.check_idle()


LONG_NAMES = {
    "type": "object",
    "properties": {
        "where Crystalton is located": {"const": "in Nebulonia, a heap of stones"},
        "carried one by one": {"type": "boolean"},
        "and that marks a place": {"enum": ["yes", "no"]},
    },
    "required": ["where Crystalton is located", "carried one by one", "and that marks a place"],
    "additionalProperties": False,
}


def test_forced_tokens_take_fewer_steps_and_are_the_same(folder: Path, tmp_path: Path) -> None:
    """Where rows of one sequence share a step several come at once, with what would have come one at a time."""
    grammar, counts, answers = Grammar.json_schema(LONG_NAMES), [], []
    for name, decode in (("packed", packing(loaded(folder, "decode"))), ("stepwise", loaded(folder, "decode"))):
        with pair(loaded(folder, "prefill"), decode, tmp_path / name) as services:
            answers.append([
                *(generate_in(services, grammar, seed=seed) for seed in range(3)),
                *(generate_in(services, grammar, seed=seed, logprobs=True) for seed in range(2)),
                *(generate_in(services, grammar, seed=seed, frequency_penalty=0.5) for seed in range(2)),
                *(generate_in(services, grammar, seed=1, max_tokens=most) for most in (1, 2, 7, 30)),
            ])  # fmt: skip
            before = services.metric("cairn_decode_steps_total")
            result = generate_in(services, grammar, seed=9)
            counts.append((services.metric("cairn_decode_steps_total") - before, len(result.token_ids)))
            services.check_idle()
    packed, stepwise = answers
    assert [result.token_ids for result in packed] == [result.token_ids for result in stepwise]
    assert [result.finish_reason for result in packed] == ["stop"] * 7 + ["length"] * 4
    assert [len(result.token_ids) for result in packed[-4:]] == [1, 2, 7, 30]
    assert packed[3].token_ids == packed[0].token_ids and len(packed[3].logprobs) == len(packed[3].token_ids)
    (few, tokens_packed), (many, tokens_stepwise) = counts
    assert tokens_packed == tokens_stepwise == many + 1
    assert few < tokens_packed / 3


def test_answers_that_give_way_go_on_in_their_grammar(folder: Path, tmp_path: Path) -> None:
    """Pages for a few of them, so that some give theirs up on the way; forced tokens need pages like any others."""
    grammar = Grammar.json_schema(LONG_NAMES)
    requests: list[tuple[Any, dict[str, Any]]] = [
        ([tokens(index, 5)], {"max_tokens": 120, "grammar": grammar, "seed": index, **SAMPLED}) for index in range(10)
    ]
    with pair(loaded(folder, "prefill"), packing(loaded(folder, "decode")), tmp_path / "many") as services:
        wanted = [services.generate(parts, **options) for parts, options in requests]
    with pair(
        loaded(folder, "prefill"), packing(loaded(folder, "decode")), tmp_path / "few", kv_pages=80, page_size=4
    ) as services:
        found = services.together_each(requests)
        services.check_idle()
        assert services.metric("cairn_preemptions_total") > 0
    assert [result.token_ids for result in found] == [result.token_ids for result in wanted]
    assert all(result.finish_reason == "stop" for result in found)


def test_a_grammar_ends_an_answer_before_its_least_tokens(services: Pair) -> None:
    """Nothing else can come; while something can, no end token does."""
    ended = generate_in(services, Grammar.regex("(stone|wood)"), min_tokens=20, max_tokens=40)
    assert (ended.finish_reason, ended.text in ("stone", "wood")) == ("stop", True)
    longer = generate_in(services, Grammar.regex("[a-z]{1,200}"), min_tokens=20, max_tokens=40)
    assert len(longer.token_ids) >= 20 and 1 not in longer.token_ids[:20]


def test_end_tokens_that_are_ignored_are_not_drawn(services: Pair) -> None:
    """The answer goes on as long as its grammar can, and ends with it."""
    result = generate_in(services, Grammar.regex("a+"), ignore_eos=True, max_tokens=9)
    assert (result.finish_reason, result.text, len(result.token_ids)) == ("length", "a" * len(result.text), 9)
    result = generate_in(services, Grammar.regex("a{4}b?"), ignore_eos=True, max_tokens=30)
    assert result.finish_reason == "stop" and result.text == "aaaab" and 1 not in result.token_ids
    may_end = generate_in(services, Grammar.regex("a{4}b?"), max_tokens=30, logit_bias={1: 100.0})
    assert (may_end.text, may_end.token_ids[-1], may_end.finish_reason) == ("aaaa", 1, "stop")


def test_stop_strings_and_stop_tokens_cut_an_answer_short(services: Pair) -> None:
    full = generate_in(services, Grammar.json_schema(LONG_NAMES))
    cut = generate_in(services, Grammar.json_schema(LONG_NAMES), stop=["Nebul"])
    assert cut.finish_reason == "stop" and cut.text == full.text[: full.text.index("Nebul")]
    token = full.token_ids[3]
    by_token = generate_in(services, Grammar.json_schema(LONG_NAMES), stop_token_ids=[token])
    assert by_token.token_ids == full.token_ids[: full.token_ids.index(token) + 1]


def test_biases_and_penalties_choose_among_what_may_come(services: Pair) -> None:
    grammar = Grammar.regex("[ab]{12}")
    tokens_of = {letter: generate_in(services, Grammar.regex(letter)).token_ids[0] for letter in "ab"}
    biased = generate_in(services, grammar, logit_bias={tokens_of["b"]: 100.0, 50: 100.0}, temperature=0.0)
    assert set(biased.text) == {"b"}, "a token that may not come does not, whatever its bias"
    balanced = generate_in(services, grammar, frequency_penalty=2.0, temperature=0.0, logit_bias={tokens_of["b"]: 9.0})
    assert set(balanced.text) == {"a", "b"}


def test_log_probabilities_are_those_of_the_model(services: Pair) -> None:
    """Before the grammar: they do not add up to one over what may come."""
    result = generate_in(services, Grammar.regex("ab"), logprobs=True, top_logprobs=5, temperature=0.0)
    assert len(result.logprobs) == len(result.token_ids) and all(value < -0.5 for value in result.logprobs)
    first = dict(result.top_logprobs[0])
    assert max(first.values()) > result.logprobs[0] and result.token_ids[0] not in first


def test_a_step_that_fails_lets_grammars_go(services: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[weakref.ref[Any]] = []
    runner = services.decode.worker.runner
    bitmasks = runner.bitmasks

    def broken(count: int) -> Any:
        scheduler = services.decode.worker.scheduler
        met.extend(weakref.ref(sequence.grammar) for sequence in scheduler.everyone if sequence.grammar is not None)
        if len(met) > 3:
            raise RuntimeError("no memory")
        return bitmasks(count)

    monkeypatch.setattr(runner, "bitmasks", broken)
    with pytest.raises(ServerError, match="a forward failed"):
        generate_in(services, Grammar.regex("[a-f]{100}"))
    monkeypatch.undo()
    services.check_idle()
    gc.collect()
    assert met and all(reference() is None for reference in met)
    assert generate_in(services, Grammar.regex("stone")).text == "stone"
