"""A model's chat template, run in a sandbox within bounds of time and size.

A template is code that came with a model, and what it works on came from a caller. It gets plain data (strings,
numbers, lists, dictionaries), can change nothing and reach nothing; the names and filters that it finds are those that
published templates are written against (``transformers``).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

REPEATED_MAX = 1 << 20  # characters or items that "*" may make
POWER_BITS_MAX = 4096
WIDTH_DIGITS_MAX = 3  # of a number in a format


class TooMuch(TemplateError):
    """A rendering went over a bound."""


class Generation(Extension):
    """``{% generation %}``: marks what a model would have written; to a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class PlainNamespace(Namespace):
    """Names that begin with an underscore lead into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name a field "self"
        itself, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(itself, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("a name of a namespace must not begin with an underscore")


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The environment. Thread-safe: each rendering's deadline is its thread's own.

    Whatever a template does that can be repeated without end looks something up or calls something, so the deadline is
    looked at there.
    """

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation], cache_size=0
        )
        self._own = threading.local()
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_raise,
            strftime_now=lambda form: self._own.now.strftime(form),
            dict=lambda *args, **kwargs: dict(*args, **kwargs),
            namespace=PlainNamespace,
        )

    def begin(self, seconds: float, now: datetime) -> None:
        """What this thread renders from now on has so many seconds of its own time: a busy machine refuses nobody."""
        self._own.now = now
        self._own.deadline = time.thread_time() + seconds

    def _check_time(self) -> None:
        if time.thread_time() > getattr(self._own, "deadline", float("inf")):
            raise TooMuch("the chat template takes too long")

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._check_time()
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._check_time()
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if abs(right) * left.bit_length() > POWER_BITS_MAX:
                raise TooMuch("a number is too large")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)


def _check_product(left: Any, right: Any) -> None:
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > REPEATED_MAX:
            raise TooMuch("a text or list is repeated too often")


def _check_format(form: str) -> None:
    """Widths like that of ``"%99999999d"`` are texts of that length."""
    digits = 0
    for character in form:
        digits = digits + 1 if character.isdigit() else 0
        if digits > WIDTH_DIGITS_MAX or character == "*":
            raise TooMuch("a format is too wide")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it: nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Sandbox:
    """One template, compiled."""

    def __init__(self, source: str) -> None:
        """Raises ``jinja2.TemplateError`` for a source that is no template."""
        self._environment = BoundedSandbox()
        self._template = self._environment.from_string(source)

    def render(
        self, variables: Mapping[str, Any], *, characters_max: int, seconds: float, now: datetime | None = None
    ) -> str:
        """The rendering, as of ``now``. Raises ``TooMuch`` over a bound, and whatever the template raises."""
        self._environment.begin(seconds, now or datetime.now())
        blocks: list[str] = []
        length = 0
        for block in self._template.generate(dict(variables)):
            length += len(block)
            if length > characters_max:
                raise TooMuch(f"the chat template makes more than {characters_max} characters of this")
            self._environment._check_time()
            blocks.append(block)
        return "".join(blocks)
