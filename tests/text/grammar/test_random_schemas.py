"""Random schemas: each is refused, or every answer that it allows is JSON that validates."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.text.grammar.answers import BYTE_LEVEL, END, compiler, mask
from text.errors import TextRefused
from text.json_schema import FORMATS

MOST = 500  # tokens of an answer that is looked at
NAMES = st.sampled_from(["a", "b", "c", "a/b", "é", "", " ", 'x"y', "\\", "a~b", "%41"])
INTEGERS = st.integers(-20, 20)
NUMBERS = INTEGERS | st.floats(-5, 5, allow_nan=False).map(lambda number: round(number, 2))
VALUES = (
    st.none() | st.booleans() | NUMBERS | st.text('abé"\\ \n/', max_size=4)
    | st.lists(INTEGERS, max_size=2) | st.dictionaries(NAMES, INTEGERS, max_size=2)
)  # fmt: skip
PATTERNS = ("^a+$", "b", "^[a-c]{2}", "x$", "^$", ".", "\\d+", "^a|b$", "\\w\\s", "[^a]", "é", "^\\p{L}+$", "(ab)+?c")
STRINGS = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={
        "minLength": st.integers(0, 4),
        "maxLength": st.integers(0, 6),
        "pattern": st.sampled_from(PATTERNS),
        "format": st.sampled_from(FORMATS),
    },
)
LIMITED = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number"])},
    optional={
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), NUMBERS),
        "multipleOf": st.integers(1, 7),
    },
)
TYPES = st.lists(
    st.sampled_from(["null", "string", "integer", "array", "object", "number"]), min_size=1, max_size=3, unique=True
)
LEAVES = (
    STRINGS
    | LIMITED
    | st.sampled_from([{"type": "null"}, {"type": "boolean"}, {}, True])
    | VALUES.map(lambda value: {"const": value})
    | st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values})
    | st.builds(
        lambda own, values: {**own, "enum": values}, STRINGS | LIMITED, st.lists(VALUES, min_size=1, max_size=4)
    )
    | st.just({"$ref": "#/$defs/r"})
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={
            "properties": st.dictionaries(NAMES, inner, max_size=3),
            "required": st.lists(NAMES, unique=True, max_size=2),
            "additionalProperties": st.booleans() | inner,
            "minProperties": st.integers(0, 2),
            "maxProperties": st.integers(0, 3),
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner | st.booleans(),
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "minItems": st.integers(0, 3),
            "maxItems": st.integers(0, 4),
        },
    )
    several = st.builds(
        lambda keyword, members: {keyword: members},
        st.sampled_from(["anyOf", "oneOf", "allOf"]),
        st.lists(inner, min_size=1, max_size=3),
    )

    def with_more(own: Any, more: dict[str, Any]) -> Any:
        return {**own, **more} if isinstance(own, dict) else more

    mixed = st.builds(with_more, inner, several | TYPES.map(lambda types: {"type": types}))
    untyped = (objects | arrays).map(lambda own: {name: value for name, value in own.items() if name != "type"})
    return objects | arrays | several | mixed | untyped


SCHEMAS = st.builds(
    lambda whole, named: {**whole, "$defs": {"r": named}} if isinstance(whole, dict) else whole,
    st.recursive(LEAVES, nested, max_leaves=6),
    STRINGS | LIMITED | st.fixed_dictionaries({"type": st.just("array"), "items": st.just({"$ref": "#/$defs/r"})}),
)
COMPILER = compiler()
END_ID = END[BYTE_LEVEL.name]


def check_one(schema: Any, seed: int) -> None:
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
        compiled = COMPILER.compile("json_schema", json.dumps(schema))
    except jsonschema.SchemaError:
        return
    except TextRefused as error:
        assert str(error).startswith("at "), error
        assert "Invalid URI" not in str(error)
        return
    source, matcher, tokens = random.Random(seed), compiled.matcher(), list[int]()
    while not matcher.is_over:
        may = mask(matcher)
        tokens.append(END_ID if END_ID in may and source.random() < 0.5 else source.choice(may))
        matcher.accept(tokens[-1])
        if len(tokens) == MOST:
            return  # a long text, or one that nests on and on
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=formats).validate(json.loads(BYTE_LEVEL.decode(tokens)))


QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=60, derandomize=True, **QUIET)
@given(SCHEMAS, st.integers(0, 1000))
def test_a_random_schema_is_refused_or_guaranteed(schema: Any, seed: int) -> None:
    check_one(schema, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=6000, **QUIET)
@given(SCHEMAS, st.integers(0, 1000))
def test_many_random_schemas_are_refused_or_guaranteed(schema: Any, seed: int) -> None:
    check_one(schema, seed)
