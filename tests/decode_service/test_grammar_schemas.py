"""Sampled answers over thirty schemas parse and validate: a random model with the shipped tokenizer, real services."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cairn import Grammar, Result
from tests.decode_service.models import loaded
from tests.decode_service.packing import packing
from tests.decode_service.pair import Pair, pair
from tests.models_for_tests import tiny_model_dir

SHIPPED = Path(__file__).parent.parent.parent / "models" / "fable"
VOCABULARY = 2048
ANSWERS = 35  # of each schema, where all of them run
WORD = {"type": "string", "maxLength": 12}


def objects(properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False, **more}


def lists(items: Any, most: int = 4, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most, **more}


POINT = objects({"x": {"type": "integer", "minimum": -99, "maximum": 99}, "y": {"type": "integer", "minimum": 0}})
TREE = {
    **objects({"name": WORD, "left": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}}),
    "$defs": {"leaf": objects({"n": {"type": "integer"}})},
}
SCHEMAS: dict[str, Any] = {
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer", "minimum": -1000, "maximum": 1000},
    "multiple": {"type": "integer", "minimum": 0, "maximum": 500, "multipleOf": 7},
    "number": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
    "word": WORD,
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{2,5}-\\d{3}$"},
    "bounded pattern": {"type": "string", "pattern": "stone", "maxLength": 12},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "date-time", "maxLength": 40},
    "uuid": {"type": "string", "format": "uuid"},
    "address": {"type": "string", "format": "ipv4"},
    "enum": {"enum": ["granite", "limestone", 3, None, True, 2.5]},
    "const": {"const": {"a": [1, 2, {"b": "c"}]}},
    "point": POINT,
    "points": lists(POINT, 3, minItems=2),
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, WORD, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "optional": objects({"a": WORD, "b": {"type": "integer"}, "c": {"type": "null"}}, []),
    "some required": objects({"a": WORD, "b": {"type": "boolean"}, "c": {"type": "integer"}}, ["b"]),
    "nested": objects({"outer": objects({"inner": objects({"deep": lists({"type": "boolean"})})})}),
    "union": {"anyOf": [{"type": "integer"}, WORD, objects({"a": {"type": "null"}})]},
    "nullable": objects({"a": {"type": ["string", "null"], "maxLength": 5}, "b": {"type": ["integer", "null"]}}),
    "one of": {
        "oneOf": [
            objects({"kind": {"const": "circle"}, "r": {"type": "integer"}}),
            objects({"kind": {"const": "box"}, "w": {"type": "integer"}, "h": {"type": "integer"}}),
        ]
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"], "maxProperties": 2},
        ]
    },
    "reference": TREE,
    "recursive": {**objects({"v": {"type": "integer"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}})},
    "names": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "call": objects(
        {
            "name": {"enum": ["weather", "count"]},
            "arguments": objects({"town": WORD, "days": {"type": "integer", "minimum": 1, "maximum": 14}}),
        }
    ),
    "person": objects(
        {
            "name": WORD,
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "email": {"type": "string", "format": "email", "maxLength": 20},
            "tags": lists(WORD, 3),
        }
    ),
    "words with quotes": objects({'a "b"': {"enum": ['"', "\\", "/", "é\n"]}, "c/d~e": {"type": "boolean"}}),
    "several lists": objects(
        {
            "rows": lists(lists({"type": "integer", "minimum": 0, "maximum": 9}, 3), 3),
            "cells": lists({"enum": ["x", "o", " "]}, 5),
        }
    ),
}


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("schemas")
    model = tiny_model_dir(
        folder / "model", tokenizer=False, vocab_size=VOCABULARY, max_position_embeddings=1024, eos_token_id=1
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, model)
    with pair(None, packing(loaded(model, "decode")), folder / "store", kv_pages=2048) as services:
        yield services


def check(results: list[Result], schema: Any) -> int:
    """How many ended by themselves; each of them is what the schema allows. The others are its beginnings."""
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    ended = [result for result in results if result.finish_reason == "stop"]
    for result in ended:
        jsonschema.Draft202012Validator(schema, format_checker=formats).validate(json.loads(result.text))
    return len(ended)


def ask(services: Pair, schema: Any, answers: int) -> list[Result]:
    requests: list[tuple[Any, dict[str, Any]]] = [
        (
            [[100 + seed, 7, 9]],
            {
                "max_tokens": 400,
                "grammar": Grammar.json_schema(schema),
                "seed": seed,
                "temperature": 1.0,
                "ignore_eos": False,
            },
        )
        for seed in range(answers)
    ]
    return services.together_each(requests)


def test_there_are_thirty() -> None:
    assert len(SCHEMAS) == 30


def test_an_answer_of_each_schema_validates(services: Pair) -> None:
    ended = sum(check(ask(services, schema, 1), schema) for schema in SCHEMAS.values())
    assert ended >= len(SCHEMAS) - 2, "a random model may go on and on"
    services.check_idle()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_answers_validate(services: Pair) -> None:
    ended = {name: check(ask(services, schema, ANSWERS), schema) for name, schema in SCHEMAS.items()}
    print(ended)
    assert sum(ended.values()) >= 1000, ended
    services.check_idle()
