"""Schemas are refused at the place that is wrong; which they are is said before anything is compiled."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from text import json_schema
from text.errors import TextRefused
from text.json_schema import DEPTH_MAX, check, parse, place_of_failure, places

DEEP: dict[str, Any] = {}
for _ in range(DEPTH_MAX + 1):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("", "line 1, column 1: "),
        ('{\n "a": }', "line 2, column 7: "),
        ('{"type": "string"} x', "line 1, column 20: "),
        ('{"minimum": NaN}', "NaN is no JSON"),
        ('{"type": "string", "type": "number"}', "names 'type' twice"),
        ("[" * 100_000, "nests deeper"),
        ('{"maxLength": 1e400}', "the number 1e400 is too large"),
        ('{"enum": [-1E999]}', "the number -1E999 is too large"),
    ],
)
def test_what_is_no_json_is_refused(source: str, complaint: str) -> None:
    with pytest.raises(TextRefused) as caught:
        parse(source)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        (3, "at the root: a schema must be"),
        ({"properties": {"a/b": 3}}, "at /properties/a~1b: a schema must be"),
        ({"properties": []}, "at /properties: must be an object"),
        ({"anyOf": []}, "at /anyOf: must be a list with"),
        ({"items": [{"type": "string"}]}, "at /items: a list is of older drafts"),
        ({"properties": {"a": {"type": "strin"}}}, "at /properties/a/type: must be one or more of"),
        ({"type": []}, "at /type: must be one or more of"),
        ({"anyOf": [{}, {"enum": []}]}, "at /anyOf/1/enum: must be a list of at least one"),
        ({"items": {"maxLength": -1}}, "at /items/maxLength: must be a whole number"),
        ({"maxItems": 1.5}, "at /maxItems: must be a whole number"),
        ({"minimum": "3"}, "at /minimum: must be a number"),
        ({"exclusiveMinimum": True}, "at /exclusiveMinimum: must be a number"),
        ({"multipleOf": 999_983}, "at /multipleOf: must be a whole number in 1..1000"),
        ({"multipleOf": 0.1}, "at /multipleOf: must be a whole number in 1..1000"),
        ({"required": "a"}, "at /required: must be a list of names"),
        ({"required": ["a", "a"]}, "at /required: names a property twice"),
        ({"format": "idn-email"}, "at /format: cannot be guaranteed; the formats are"),
        ({"uniqueItems": True}, "at /uniqueItems: cannot be guaranteed"),
        ({"$ref": "https://example.org/schema"}, "at /$ref: must be a place in this schema"),
        ({"$ref": "#/$defs/none"}, "at /$ref: '#/$defs/none' is no place"),
        ({"properties": {"a": {"$id": "x"}}}, "at /properties/a/$id: only the whole schema"),
        (DEEP, "nests deeper than"),
        *(({"$defs": {"d": {name: {}}}}, f"at /$defs/d/{name}: cannot be guaranteed") for name in (
            "patternProperties", "propertyNames", "not", "if", "contains", "dependentRequired", "unevaluatedProperties",
            "$dynamicRef", "x-guidance",
        )),
    ],
)  # fmt: skip
def test_what_cannot_be_guaranteed_is_refused_by_place(schema: Any, complaint: str) -> None:
    with pytest.raises(TextRefused) as caught:
        check(schema)
    assert complaint in str(caught.value)


def test_what_json_schema_ignores_is_ignored() -> None:
    check({"title": "T", "$schema": "x", "$id": "y", "examples": [1], "nullable": True, "uniqueItems": False})
    check({"properties": {"not": {"type": "string"}, "if": {}}, "enum": [{"not": 1}], "default": {"if": 2}})
    check(True)


def test_places_are_json_pointers() -> None:
    schema = {"properties": {"a": {"items": {}}, "b~/": True}, "anyOf": [{}], "$defs": {"d": {}}}
    found = [pointer for pointer, _ in places(schema)]
    assert found == ["", "/anyOf/0", "/properties/a", "/properties/a/items", "/properties/b~0~1", "/$defs/d"]


def test_the_innermost_failure_is_named() -> None:
    schema = {"properties": {"a": {"items": {"$ref": "#/$defs/bad"}}}, "$defs": {"bad": {"minLength": 5}}}

    def failing(wrapped: Any) -> str:
        at = wrapped["$ref"].removeprefix("#/$defs/whole")
        whole = json.dumps(wrapped["$defs"]["whole"])
        assert '"#/$defs/whole/$defs/bad"' in whole
        return "too long" if at in ("/$defs/bad", "") else ""

    assert place_of_failure(schema, "too long", failing) == ("/$defs/bad", "too long")
    assert place_of_failure(schema, "", lambda _: "") == ("", "")
    empty = {"properties": {"a": {"minimum": 1, "maximum": 0}}, "items": {"pattern": "["}}

    def harmless_and_harmful(wrapped: Any) -> str:
        place = wrapped["$ref"].removeprefix("#/$defs/whole")
        return {"/properties/a": "Unsatisfiable: x", "/items": "unclosed", "": "unclosed"}.get(place, "")

    assert place_of_failure(empty, "unclosed", harmless_and_harmful)[0] == "/items"


@pytest.mark.parametrize("keyword", ["maxLength", "minItems", "multipleOf"])
def test_schemas_of_tools_may_have_numbers_that_json_has_not(keyword: str) -> None:
    with pytest.raises(TextRefused, match=rf"at /{keyword}: must be a whole number"):
        check({keyword: math.inf})


def test_a_place_with_more_digits_than_a_number_may_have_is_none() -> None:
    with pytest.raises(TextRefused, match=r"at /\$ref: .* is no place"):
        check({"anyOf": [{}], "$ref": "#/anyOf/" + "1" * 5000})


def test_the_place_of_a_failure_is_not_looked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_schema, "PLACES_S", -1.0)
    assert place_of_failure({"items": {"pattern": "("}}, "no", lambda _: "no") == ("", "")
