"""Compiles grammars, each once, in a thread of few: bounded in number, size and time."""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from text.errors import TextBusy, TextRefused
from text.grammar.forms import GRAMMARS, WRITING, Form
from text.grammar.matcher import Bits, Matcher, words_of
from text.grammar.places import PLACES

if TYPE_CHECKING:
    from text.codec import TextCodec

SOURCE_CHARACTERS_MAX = 128 * 1024
COMPILERS = 2
WAITING_MAX = 32  # grammars that wait to be compiled, or are
OWN_WAITING_MAX = 16  # of them one owner's
WAIT_S = 10.0
KEPT_MAX = 64  # compiled grammars
KEPT_CHARACTERS_MAX = 1 << 20  # of their sources
SAID_MAX = 200  # characters of the library's own words
# A mask or a token of an ambiguous grammar takes 2 s with the library's 50000 items, and every step would wait for it;
# with these about 20 ms at most, over 150 thousand tokens.
LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=5000, max_lexer_states=60_000, verbose_errors=False)


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
            raise TextRefused(f"cannot be compiled: {words_of(str(error))[:SAID_MAX]}") from None

    def _compiled(self, form: Form, source: str) -> Compiled:
        assert self._tokenizer is not None
        tokenizer = self._tokenizer.result(WAIT_S)
        made = GRAMMARS[form](source)
        state = LLMatcher(tokenizer, made, log_level=0, limits=LIMITS)
        if not state.is_error():  # what the first mask takes long for is kept
            state.unsafe_compute_mask_ptr((row := self._row()).ctypes.data, row.nbytes)
        if state.is_error():
            said = words_of(state.get_error())
            raise PLACES[form](source, said, partial(self._problem, tokenizer))
        return Compiled(state, tokenizer.eos_tokens, self._made_up)

    def _row(self) -> Bits:
        return np.zeros(-(-self._vocabulary // 32), np.int32)

    @staticmethod
    def _problem(tokenizer: LLTokenizer, schema: Any) -> str:
        made = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=WRITING)
        state = LLMatcher(tokenizer, made, log_level=0, limits=LIMITS)
        return words_of(state.get_error()) if state.is_error() else ""

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
            raise TextRefused(f"no grammars with this tokenizer: {words_of(str(error))}") from None
