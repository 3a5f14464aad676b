"""Answers that a grammar allows: a JSON schema, a regular expression or a Lark grammar, compiled by llguidance.

    compile(form, source) -> Compiled, kept for the next request     a thread of few, bounded in time and size
    Compiled.matcher() -> Matcher, one answer                        fill(row) -> draw -> accept(token) -> ...

Tokens that a grammar forces come as they would be tokenized; which ones they are follows from the tokens before them
alone. JSON is written in one form, ``{"a": 1, "b": [2, 3]}``, so that only values are drawn.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from text import json_schema
from text.errors import TextBusy, TextRefused

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

    from text.codec import TextCodec

Form = Literal["json_schema", "regex", "lark", "json_object"]
Bits = NDArray[np.int32]

SOURCE_CHARACTERS_MAX = 128 * 1024
COMPILERS = 2
WAITING_MAX = 32  # grammars that wait to be compiled, or are
OWN_WAITING_MAX = 16  # of them one owner's
WAIT_S = 10.0
KEPT_MAX = 64  # compiled grammars
SAID_MAX = 200  # characters of the library's own words
KEPT_CHARACTERS_MAX = 1 << 20  # of their sources
# A mask or a token of an ambiguous grammar takes 2 s with the library's 50000 items, and every step would wait for it;
# with these about 20 ms at most, over 150 thousand tokens.
LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=5000, max_lexer_states=60_000, verbose_errors=False)
WRITING: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
_PLACE = re.compile(r"^at (\d+)\((\d+)\): (.*)$", re.DOTALL)
_DRAWING = "\n   1 |"
_INLINE = re.compile(r"%json\s*")


class GrammarFailed(ValueError):
    """A grammar turned out to be too complex on the way."""


class Matcher:
    """Where one answer stands in its grammar. One thread at a time; ``is_over``: nothing can come any more."""

    def __init__(self, state: LLMatcher, ends: Collection[int]) -> None:
        """``ends``: tokens that end an answer for the grammar, and are not to come unless nothing else can."""
        self._state = state
        self._ends = tuple(ends)
        self._forced: deque[int] = deque()
        self.is_over = False
        self._look()

    def accept(self, token_id: int) -> None:
        """A token was drawn that the mask allowed. Raises ``GrammarFailed`` if the grammar is too complex to go on."""
        if not self._state.consume_token(token_id):
            raise GrammarFailed(_said(self._state.get_error()))
        if self._forced:
            self._forced.popleft()
        self.is_over = self._state.is_stopped()
        self._look()

    def forced(self) -> list[int]:
        """The tokens that come next whatever is drawn; empty if there is a choice."""
        return list(self._forced)

    def _look(self) -> None:
        """Kept until they have come, so that one at a time gives what all at once would."""
        if not self._forced and not self.is_over:
            self._forced += self._state.compute_ff_tokens()

    def fill(self, row: Bits) -> None:
        """Writes which tokens may come next: (ceil(vocabulary / 32),) int32, the lowest bit first."""
        fill_rows([self], row[None], None)

    def _fill_forced(self, row: Bits) -> bool:
        if self._forced:
            row[:] = 0
            row.view(np.uint32)[self._forced[0] // 32] = 1 << self._forced[0] % 32
        return bool(self._forced)

    def _settle(self, row: Bits) -> None:
        """Behind the mask of the grammar: the end tokens that are none here. Raises ``GrammarFailed``."""
        if self._state.is_error():
            raise GrammarFailed(_said(self._state.get_error()))
        if not self._ends:
            return
        words = row.view(np.uint32)
        before = [(token // 32, words[token // 32]) for token in self._ends]
        for token in self._ends:
            words[token // 32] &= ~np.uint32(1 << token % 32)
        if not words.any():
            for word, bits in before:
                words[word] |= bits


def fill_rows(
    matchers: Sequence[Matcher | None], rows: Bits, executor: LLExecutor | None
) -> list[GrammarFailed | None]:
    """Writes a mask for each matcher into its row, in parallel; every token may come where there is no matcher.

    ``rows`` (matchers, ceil(vocabulary / 32)) int32, contiguous. What failed is told by place, and may draw anything.
    """
    there = [
        (matcher, index)
        for index, matcher in enumerate(matchers)
        if matcher is not None and not matcher.is_over and not matcher._fill_forced(rows[index])
    ]
    for index, matcher in enumerate(matchers):
        if matcher is None or matcher.is_over:
            rows[index] = -1
    nbytes = rows.shape[1] * 4
    if executor is not None and len(there) > 1:
        executor.unsafe_compute_mask_ptr(
            [(matcher._state, index) for matcher, index in there], rows.ctypes.data, nbytes, len(rows)
        )
    else:
        for matcher, index in there:
            matcher._state.unsafe_compute_mask_ptr(rows[index].ctypes.data, nbytes)
    failed: list[GrammarFailed | None] = [None] * len(matchers)
    for matcher, index in there:
        try:
            matcher._settle(rows[index])
        except GrammarFailed as error:
            failed[index] = error
            rows[index] = -1
    return failed


class Compiled:
    """A grammar that matchers are made of, in any thread."""

    def __init__(self, state: LLMatcher, ends: Collection[int], made_up: Collection[int]) -> None:
        self._state = state
        self._ends = ends
        self._made_up = made_up
        self._lock = threading.Lock()

    def matcher(self, *, ignore_ends: bool = False) -> Matcher:
        """One at its beginning. ``ignore_ends``: the model's end tokens end nothing, so that only the grammar does."""
        with self._lock:
            state = self._state.deep_copy()
        return Matcher(state, self._ends if ignore_ends else self._made_up)


class GrammarCompiler:
    """Grammars for one tokenizer and a model of ``vocabulary`` tokens. May be used by any thread."""

    def __init__(self, codec: TextCodec, *, vocabulary: int, end_token_ids: Collection[int]) -> None:
        self._codec = codec
        self._vocabulary = vocabulary
        self._end_token_ids = sorted(end_token_ids)
        self._threads = ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammar")
        self._waiting: Counter[str] = Counter()  # by owner
        self._kept: OrderedDict[tuple[str, Form, str], Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer: Future[LLTokenizer] | None = None
        self._made_up: tuple[int, ...] = ()

    def prepare(self) -> None:
        """Begins what the first grammar would wait for: seconds, for a large vocabulary."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._threads.submit(self._make_tokenizer)

    def close(self) -> None:
        """What is being compiled is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def compile(self, form: Form, source: str, *, owner: str = "") -> Compiled:
        """The grammar of ``source``; those of one ``owner`` are kept apart from others', as what is kept takes less.

        Raises ``TextRefused`` naming the place that is wrong, ``TextBusy`` where too many are compiled already.
        """
        future = self.begin(form, source, owner=owner)
        try:
            return future.result(WAIT_S)
        except TookTooLong:
            raise self.late(future) from None

    def begin(self, form: Form, source: str, *, owner: str = "") -> Future[Compiled]:
        """``compile``, for a caller that waits in its own way, ``WAIT_S`` at most; ``late`` says what to raise then."""
        if len(source) > SOURCE_CHARACTERS_MAX:
            raise TextRefused(f"{len(source)} characters are more than {SOURCE_CHARACTERS_MAX}")
        key = (owner, form, source)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                there: Future[Compiled] = Future()
                there.set_result(self._kept[key])
                return there
        self.prepare()
        with self._lock:
            if self._waiting.total() >= WAITING_MAX or self._waiting[owner] >= OWN_WAITING_MAX:
                raise TextBusy("too many grammars are being compiled")
            self._waiting[owner] += 1
        future = self._threads.submit(self._compile_and_keep, key)
        future.add_done_callback(lambda _: self._leave(owner))
        return future

    def _leave(self, owner: str) -> None:
        with self._lock:
            self._waiting[owner] -= 1
            self._waiting += Counter()  # whoever has none is forgotten

    @staticmethod
    def late(future: Future[Compiled]) -> TextBusy | TextRefused:
        """Why a grammar is not there after ``WAIT_S``. Nobody waits for it any more."""
        if future.cancel():
            return TextBusy(f"it waited {WAIT_S:g} s for other grammars")
        return TextRefused(f"took longer than {WAIT_S:g} s to compile; make it smaller")

    def _compile_and_keep(self, key: tuple[str, Form, str]) -> Compiled:
        compiled = self._compile(*key[1:])
        with self._lock:
            self._kept[key] = compiled
            while len(self._kept) > KEPT_MAX or sum(len(source) for _, _, source in self._kept) > KEPT_CHARACTERS_MAX:
                self._kept.popitem(last=False)
        return compiled

    def _compile(self, form: Form, source: str) -> Compiled:
        try:
            return self._compiled(form, source)
        except TextRefused:
            raise
        except (ValueError, RecursionError) as error:  # what is JSON to Python, and not to the library
            raise TextRefused(f"cannot be compiled: {_said(str(error))[:SAID_MAX]}") from None

    def _compiled(self, form: Form, source: str) -> Compiled:
        assert self._tokenizer is not None
        tokenizer = self._tokenizer.result(WAIT_S)
        made = _GRAMMARS[form](source)
        state = LLMatcher(tokenizer, made, log_level=0, limits=LIMITS)
        if not state.is_error():  # what the first mask takes long for is kept
            state.unsafe_compute_mask_ptr((row := self._row()).ctypes.data, row.nbytes)
        if state.is_error():
            said = _said(state.get_error())
            raise _PLACED[form](source, said, partial(self._problem, tokenizer))
        return Compiled(state, tokenizer.eos_tokens, self._made_up)

    def _row(self) -> Bits:
        return np.zeros(-(-self._vocabulary // 32), np.int32)

    @staticmethod
    def _problem(tokenizer: LLTokenizer, schema: Any) -> str:
        made = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=WRITING)
        state = LLMatcher(tokenizer, made, log_level=0, limits=LIMITS)
        return _said(state.get_error()) if state.is_error() else ""

    def _make_tokenizer(self) -> LLTokenizer:
        serialized, size, special = self._codec.for_grammars()
        if size > self._vocabulary:
            raise TextRefused(f"the tokenizer has {size} tokens, the model {self._vocabulary}: no grammars here")
        ends = [token for token in self._end_token_ids if token < size]
        if not ends:  # of a model that ends no answer: the grammar's own end, which is never drawn
            ends = sorted(special)[:1]
            self._made_up = tuple(ends)
        if not ends:
            raise TextRefused("the tokenizer has no end token: no grammars here")
        try:
            return LLTokenizer(serialized, n_vocab=self._vocabulary, eos_token=ends)
        except ValueError as error:
            raise TextRefused(f"no grammars with this tokenizer: {_said(str(error))}") from None


def _of_schema(source: str) -> str:
    schema = json_schema.parse(source)
    json_schema.check(schema)
    if schema is False:
        raise TextRefused("at the root: false allows nothing")
    return LLMatcher.grammar_from_json_schema(json.dumps({} if schema is True else schema), overrides=WRITING)


def _of_object(source: str) -> str:
    return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=WRITING)


def _of_regex(source: str) -> str:
    if not source:
        raise TextRefused("is empty")
    return LLMatcher.grammar_from_regex(source)


def _of_lark(source: str) -> str:
    """With the schemas in it checked, and written in our form."""
    made, at = "", 0
    for found in _INLINE.finditer(source):
        if found.start() < at:  # within a schema
            continue
        line = source.count("\n", 0, found.start()) + 1
        try:
            _, length = json.JSONDecoder().raw_decode(source[found.end() :])
            schema = json_schema.parse(source[found.end() : found.end() + length])
            json_schema.check(schema)
            if schema is False:
                raise TextRefused("false allows nothing")
        except (TextRefused, RecursionError, ValueError) as error:
            raise TextRefused(f"line {line}, the schema behind %json: {error}") from None
        written = json.dumps({**({} if schema is True else schema), "x-guidance": WRITING})
        made += source[at : found.end()] + written
        at = found.end() + length
    return LLMatcher.grammar_from_lark(made + source[at:])


_GRAMMARS = {"json_schema": _of_schema, "json_object": _of_object, "regex": _of_regex, "lark": _of_lark}


def _place_in_schema(source: str, said: str, failing: Any) -> TextRefused:
    pointer, problem = json_schema.place_of_failure(json_schema.parse(source or "{}"), said, failing)
    return TextRefused(f"at {pointer or 'the root'}: {_problem_of_regex(problem) or problem or said}")


def _problem_of_regex(said: str) -> str:
    """Of the drawing that the parser of regular expressions makes, the words."""
    return next((line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")), "")


def _place_in_regex(source: str, said: str, failing: Any) -> TextRefused:
    """What the parser of regular expressions draws: the expression, an arrow below, the problem."""
    lines = said.splitlines()
    arrow = next((line for line in lines if line.strip() and not line.strip("^ ")), "")
    problem = _problem_of_regex(said)
    if arrow and problem and "\n" not in source:
        return TextRefused(f"character {arrow.index('^') - 3}: {problem}")
    found = _PLACE.match(said)
    return TextRefused(f"cannot be compiled: {problem or (found[3].split(_DRAWING)[0] if found else said)}")


def _place_in_lark(source: str, said: str, failing: Any) -> TextRefused:
    found = _PLACE.match(said)
    if found is None:
        return TextRefused(said)
    problem = _problem_of_regex(found[3]) or re.split(r"\n +\d+ \|", found[3])[0]
    return TextRefused(f"line {found[1]}, column {found[2]}: {problem}")


_PLACED = {
    "json_schema": _place_in_schema,
    "json_object": _place_in_schema,
    "regex": _place_in_regex,
    "lark": _place_in_lark,
}


def _said(error: str) -> str:
    return error.replace("\n<non-verbose/>", "").strip()
