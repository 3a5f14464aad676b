"""Which JSON schemas can be guaranteed, and where one that cannot goes wrong.

A schema is checked before it becomes a grammar: what llguidance gets wrong, or leaves out without a word, is refused
here, with the place as a JSON pointer. Keywords that JSON Schema does not know are ignored, as it says.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

from text.errors import TextRefused

DEPTH_MAX = 64  # of a schema; llguidance refuses what nests deeper than about twice that
MULTIPLE_MAX = 1000  # the states of a number's grammar are as many, and take as long
PLACES_MAX = 1000  # that are looked at for the one that cannot be compiled
PLACES_S = 2.0  # of the thread's own time for that; then the whole is named
TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")

EMPTY = "Unsatisfiable"  # how llguidance begins to say that a schema allows nothing
_WHOLE = "/$defs/whole"
_WAY = re.compile(rf"while processing json-schema:///#{re.escape(_WHOLE)}(\S*)")
_IN_POINTERS = "/~$"
_OF_ONE = ("items", "additionalProperties")  # keywords whose value is a schema
_OF_LIST = ("prefixItems", "anyOf", "oneOf", "allOf")
_OF_NAMES = ("properties", "$defs", "definitions")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_REFUSED = {
    "patternProperties": "names by pattern",
    "propertyNames": "names by schema",
    "unevaluatedProperties": "what other schemas left over",
    "unevaluatedItems": "what other schemas left over",
    "dependentRequired": "what depends on other properties",
    "dependentSchemas": "what depends on other properties",
    "dependencies": "what depends on other properties",
    "not": "what must not hold",
    "if": "conditions",
    "then": "conditions",
    "else": "conditions",
    "contains": "that some item holds",
    "minContains": "that some item holds",
    "maxContains": "that some item holds",
    "$dynamicRef": "references that depend on the way",
    "$dynamicAnchor": "references that depend on the way",
    "$recursiveRef": "references that depend on the way",
    "$recursiveAnchor": "references that depend on the way",
    "$anchor": "names of places",
    "additionalItems": "items of older drafts; use prefixItems and items",
    "x-guidance": "how the grammar is made",
}


def parse(source: str) -> Any:
    """The schema as Python's values. Raises ``TextRefused`` naming line and column."""
    try:
        return json.loads(source, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise TextRefused(f"line {error.lineno}, column {error.colno}: {error.msg}, so it is no JSON") from None
    except RecursionError:
        raise TextRefused(f"nests deeper than {DEPTH_MAX} levels") from None
    except ValueError as error:  # a number of thousands of digits
        raise TextRefused(f"is no JSON: {error}") from None


def _no_constant(name: str) -> Any:
    raise TextRefused(f"{name} is no JSON")


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise TextRefused(f"the number {digits[:40]} is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise TextRefused(f"names {twice[:80]!r} twice in one object")
    return made


def check(schema: Any) -> None:
    """Raises ``TextRefused`` naming the place that is malformed, or asks for what could not be guaranteed."""
    for pointer, node in places(schema):
        _check_node(pointer, node, schema)


def places(schema: Any, pointer: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every schema in a schema, itself first, with the JSON pointer of its place.

    Raises ``TextRefused`` where a keyword holds something that is no schema, or nests too deep.
    """
    if depth > DEPTH_MAX:
        raise _refused(pointer[:200], f"nests deeper than {DEPTH_MAX} levels")
    if not isinstance(schema, dict | bool):
        raise _refused(pointer, "a schema must be an object, true or false")
    yield pointer, schema
    if isinstance(schema, bool):
        return
    for below, inner in _inside(schema, pointer):
        yield from places(inner, below, depth + 1)


def _inside(schema: Mapping[str, Any], pointer: str) -> Iterator[tuple[str, Any]]:
    for keyword in _OF_ONE:
        if keyword in schema:
            if isinstance(schema[keyword], list):
                raise _refused(f"{pointer}/{keyword}", "a list is of older drafts; use prefixItems and items")
            yield f"{pointer}/{keyword}", schema[keyword]
    for keyword in _OF_LIST:
        members = schema.get(keyword, ())
        if not isinstance(members, list | tuple) or (keyword in schema and not members):
            raise _refused(f"{pointer}/{keyword}", "must be a list with at least one schema")
        yield from ((f"{pointer}/{keyword}/{index}", member) for index, member in enumerate(members))
    for keyword in _OF_NAMES:
        named = schema.get(keyword, {})
        if not isinstance(named, dict):
            raise _refused(f"{pointer}/{keyword}", "must be an object of schemas")
        yield from ((f"{pointer}/{keyword}/{escaped(name)}", member) for name, member in named.items())


def escaped(name: str) -> str:
    """A name as part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _refused(pointer: str, problem: str) -> TextRefused:
    return TextRefused(f"at {pointer or 'the root'}: {problem}")


def _check_node(pointer: str, node: Any, root: Any) -> None:
    if isinstance(node, bool):
        return
    for keyword, value in node.items():
        at = f"{pointer}/{escaped(keyword)}"
        if keyword in _REFUSED:
            raise _refused(at, f"cannot be guaranteed ({_REFUSED[keyword]})")
        if keyword == "uniqueItems" and value is not False:
            raise _refused(at, "cannot be guaranteed (that no item comes twice)")
        check_value = _VALUES.get(keyword)
        if check_value is not None and (problem := check_value(value)):
            raise _refused(at, problem)
    if "$id" in node and pointer:
        raise _refused(f"{pointer}/$id", "only the whole schema may have an id")
    if "$ref" in node:
        _check_ref(f"{pointer}/$ref", node["$ref"], root)
    if "required" in node and isinstance(node["required"], list) and len(set(node["required"])) < len(node["required"]):
        raise _refused(f"{pointer}/required", "names a property twice")


def _check_ref(at: str, ref: Any, root: Any) -> None:
    if not isinstance(ref, str) or not re.fullmatch(r"#(/.*)?", ref, re.DOTALL):
        raise _refused(at, "must be a place in this schema, # or #/...")
    found = root
    for part in unquote(ref).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and len(name) < 10 and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            raise _refused(at, f"{ref[:80]!r} is no place in this schema")
    if not isinstance(found, dict | bool):
        raise _refused(at, f"{ref[:80]!r} is no schema")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _of_type(value: Any) -> str:
    types = value if isinstance(value, list) else [value]
    if not types or any(not isinstance(name, str) or name not in TYPES for name in types):
        return f"must be one or more of {', '.join(TYPES)}"
    return "" if len(set(types)) == len(types) else "names a type twice"


def _is_whole(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


def _of_count(value: Any) -> str:
    return "" if _is_whole(value) and value >= 0 else "must be a whole number, 0 or more"


def _of_limit(value: Any) -> str:
    return "" if _is_number(value) else "must be a number"


def _of_multiple(value: Any) -> str:
    if not _is_whole(value) or not 1 <= value <= MULTIPLE_MAX:
        return f"must be a whole number in 1..{MULTIPLE_MAX} to be guaranteed"
    return ""


def _of_names(value: Any) -> str:
    return "" if isinstance(value, list) and all(isinstance(name, str) for name in value) else "must be a list of names"


def _of_values(value: Any) -> str:
    return "" if isinstance(value, list) and value else "must be a list of at least one value"


def _of_pattern(value: Any) -> str:
    return "" if isinstance(value, str) else "must be a regular expression"


def _of_format(value: Any) -> str:
    return "" if value in FORMATS else f"cannot be guaranteed; the formats are {', '.join(FORMATS)}"


_VALUES: dict[str, Callable[[Any], str]] = {
    "type": _of_type,
    "enum": _of_values,
    "required": _of_names,
    "pattern": _of_pattern,
    "format": _of_format,
    "multipleOf": _of_multiple,
    **dict.fromkeys(_COUNTS, _of_count),
    **dict.fromkeys(_LIMITS, _of_limit),
}


def place_of_failure(schema: Any, said_of_all: str, failing: Callable[[Any], str]) -> tuple[str, str]:
    """The JSON pointer of the innermost schema that ``failing`` has a word against, and the word.

    ``failing`` is given schemas that mean what they mean at their place, and has ``said_of_all`` of the whole schema.
    """
    whole_is_empty = said_of_all.startswith(EMPTY)
    below: list[str] = []
    whole = _with_refs_below(schema)
    for count, (pointer, node) in enumerate(places(schema)):
        if count == PLACES_MAX:
            break
        if not isinstance(node, bool):  # false is meant
            below.append(pointer)
    ends = time.thread_time() + PLACES_S
    for pointer in sorted(below, key=lambda at: at.count("/"), reverse=True):
        if time.thread_time() > ends:
            break
        problem = failing({"$ref": f"#{_WHOLE}{quote(pointer, safe=_IN_POINTERS)}", "$defs": {"whole": whole}})
        # What allows nothing harms nothing where it need not be.
        if problem and (whole_is_empty or not problem.startswith(EMPTY)):
            said = _WAY.search(problem)  # a reference may lead on
            return unquote(said[1]) if said else pointer, _WAY.sub("", problem).strip()
    return "", ""


def _with_refs_below(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_refs_below(member) for member in node]
    if not isinstance(node, dict):
        return node
    return {
        name: f"#{_WHOLE}{value[1:]}"
        if name == "$ref" and isinstance(value, str) and value.startswith("#")
        else _with_refs_below(value)
        for name, value in node.items()
    }
