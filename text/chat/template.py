"""A chat rendered by its model's template, and where the rendering may be cut.

    messages   system          user                answer                 user
    rendering  <s>system ...   <s>user ...         <s>assistant ...       <s>user ...   <s>assistant
                               ^ cut               (an answer stays       ^ cut
                                                   with its question)

It is cut before a message where the rendering of the messages before it is how the whole begins, so that the piece
stays what it is as the chat goes on, and a special token starts there, so that what is tokenized apart has the tokens
of the whole. Whether it has is checked as well (``pieces``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from text.chat.message import Message, template_messages, template_tools
from text.chat.sandbox import Sandbox
from text.codec import TextCodec
from text.errors import TextRefused

WORDS_MAX = 200  # of what a template says when it refuses
RENDER_S = 2.0  # for all renderings of one chat
PROBE_S = 1.0  # for a rendering that finds out how a template is
CUTS_MAX = 32  # renderings of one chat to find cuts; with more messages they are coarser
PLACES_MAX = 16  # messages that may be the one which is refused
RESERVED = ("messages", "tools", "add_generation_prompt", "chat_template", "continue_final_message", "tokenize")
GOES_ON = "CONTINUED "  # behind the last words of a message that goes on; the space shows whether a template strips

_ASKED_TWICE = (("user", "Cairn"), ("assistant", "Stone"), ("user", "Brook"))


@dataclass(frozen=True)
class Bounds:
    """Of a chat's rendering; ``seconds`` of the thread's own time, for all of a chat."""

    characters: int
    seconds: float = RENDER_S


class ChatTemplate:
    """A model's template, or its templates: some have one for chats with tools. Thread-safe."""

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self._sandbox = lru_cache(4)(self._compile)

    def _compile(self, source: str) -> Sandbox:
        try:
            return Sandbox(source)
        except Exception as error:
            raise TextRefused(f"the chat template of model {self.codec.name!r} is none: {error}") from None

    def open(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
        *,
        go_on: bool = False,
        names: Sequence[str] = (),
        bounds: Bounds,
    ) -> Rendering:
        """The rendering of a chat. ``go_on``: from the end of its last message, not with a new answer.

        ``names``: what its messages are called in errors, if not by their place.

        Raises ``TextRefused`` as ``Rendering.whole``.
        """
        source = self.codec.chat_template(with_tools=bool(tools))
        variables = {**self.codec.named_special_tokens, **(arguments or {}), "tools": template_tools(tools)}
        named = names or [f"messages[{index}]" for index in range(len(messages))]
        return Rendering(self, self._sandbox(source), tuple(messages), variables, go_on, named, bounds)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The longest first: one may begin as another."""
        return tuple(sorted(self.codec.special_tokens.values(), key=len, reverse=True))

    def says(self, text: str) -> bool:
        """Whether there is more in it than special tokens."""
        for token in self.special_tokens:
            text = text.replace(token, "")
        return bool(text.strip())

    def special_at(self, text: str, at: int) -> bool:
        """Whether a special token starts there."""
        return text.startswith(self.special_tokens, at)

    @cached_property
    def closing(self) -> str | None:
        """What follows the words of an answer, which may be nothing; None where it is not known."""
        text = self._probe(Message("user", ("Cairn",)), Message("assistant", ("Stone",)))
        return text.rpartition("Stone")[2] if "Stone" in text else None

    @cached_property
    def asking(self) -> str:
        """What stands before the words of a user's message; "" where it is not known."""
        text = self._probe(*(Message(role, (text,)) for role, text in _ASKED_TWICE))
        between = text.partition("Stone")[2].partition("Brook")[0]
        closing = self.closing
        return "" if closing is None or not between.startswith(closing) else between[len(closing) :]

    def _probe(self, *messages: Message) -> str:
        """The rendering of some messages, without what opens an answer; "" if it is refused."""
        try:
            return self.open(messages, bounds=Bounds(1 << 20, PROBE_S)).beginning(len(messages)) or ""
        except TextRefused:
            return ""

    @cached_property
    def in_parts(self) -> bool:
        """Whether the template wants a message's content as a list of parts: it does not render a string."""
        probe = [Message("user", ("Cairn",))]
        source = self.codec.chat_template(with_tools=False)
        variables = {**self.codec.named_special_tokens, "tools": None, "documents": None}
        for in_parts in (False, True):
            given = {**variables, "messages": template_messages(probe, in_parts=in_parts)}
            try:
                if "Cairn" in self._sandbox(source).render(given, characters_max=1 << 20, seconds=PROBE_S):
                    return in_parts
            except Exception:  # templates raise what they like
                continue
        return False


class Rendering:
    """One chat under its template, and the renderings of its beginnings. For one thread."""

    def __init__(
        self,
        template: ChatTemplate,
        sandbox: Sandbox,
        messages: tuple[Message, ...],
        variables: Mapping[str, Any],
        go_on: bool,
        names: Sequence[str],
        bounds: Bounds,
    ) -> None:
        self._template = template
        self._sandbox = sandbox
        self._variables = {"documents": None, **variables}
        self._go_on = go_on
        self._names = names
        self._characters = bounds.characters
        self._ends = time.thread_time() + bounds.seconds
        self._now = datetime.now()  # for all of its renderings: they are held against each other
        self._beginnings: dict[int, str | None] = {}
        self.messages = messages

    @cached_property
    def whole(self) -> str:
        """All of it, with the words that open an answer.

        Raises ``TextRefused`` where the template refuses it, and naming the message from which on it does.
        """
        try:
            return self._render(len(self.messages), self._variables, whole=True)
        except Exception as error:  # templates raise what they like, jinja2's errors among it
            raise TextRefused(f"{self._place()}: the chat template refuses it: {self._said(error)}") from None

    @property
    def opening(self) -> str:
        """What opens the answer, behind the last message: "" if the template puts it elsewhere, or the last goes on."""
        said = self.beginning(len(self.messages))
        if self._go_on or said is None or not self.whole.startswith(said):
            return ""
        return self.whole[len(said) :]

    def beginning(self, count: int) -> str | None:
        """The rendering of the first ``count`` messages; None if the template refuses them alone."""
        if count not in self._beginnings:
            try:
                self._beginnings[count] = self._render(count, self._variables)
            except Exception:
                self._beginnings[count] = None
        return self._beginnings[count]

    def cut_before(self, index: int) -> int | None:
        """Where in the whole it may be cut before a message; None if it may not."""
        said = self.beginning(index) if index else ""
        if said is None or not self.whole.startswith(said) or len(said) >= len(self.whole):
            return None
        return len(said) if self._template.special_at(self.whole, len(said)) else None

    def region_of(self, variable: str, value: Any) -> tuple[int, int] | None:
        """Where in the whole that stands which is left out when a variable of the template has another value.

        From special token to special token; None if there is nothing such, or it is part of something else.
        """
        try:
            other = self._render(len(self.messages), {**self._variables, variable: value}, whole=True)
        except Exception:
            return None
        whole, special = self.whole, self._template.special_at
        start = _common(whole, other)
        first = next((at for at in range(start, -1, -1) if special(whole, at)), None)
        if first is None or whole == other:
            return None
        end = first + len(whole) - len(other)
        if end <= first or whole[end:] != other[first:] or not special(whole, end):
            return None
        return first, end

    @cached_property
    def head(self) -> int:
        """How much of the whole the template writes before a user's first message, of its own and of tools.

        Up to a special token; 0 if there is nothing such but the tokens that begin a text.
        """
        first, opens = self.messages[0], self._template.asking
        if first.role != "user" or not opens:
            return 0
        other = replace(first, parts=("b" if first.text.strip().startswith("a") else "a",))
        try:
            changed = self._render(len(self.messages), self._variables, whole=True, first=other)
        except Exception:
            return 0
        start = _common(self.whole, changed)
        at = start - len(opens)
        if at <= 0 or self.whole[at:start] != opens or not self._template.special_at(self.whole, at):
            return 0
        return at if self._template.says(self.whole[:at]) else 0

    def _render(
        self, count: int, variables: Mapping[str, Any], *, whole: bool = False, first: Message | None = None
    ) -> str:
        """Of the first messages; with what opens an answer, if they are the ``whole``, and another ``first`` one."""
        goes_on = whole and self._go_on
        messages = self.messages[:count] if first is None else (first, *self.messages[1:count])
        given = template_messages(messages, in_parts=self._template.in_parts)
        if goes_on:
            last = given[-1]["content"]
            if isinstance(last, str):
                given[-1]["content"] = last + GOES_ON
            else:
                last[-1]["text"] += GOES_ON
        text = self._sandbox.render(
            {**variables, "messages": given, "add_generation_prompt": whole and not goes_on},
            characters_max=self._characters,
            seconds=self._ends - time.thread_time(),
            now=self._now,
        )
        return _up_to_the_end(text) if goes_on else text

    def _place(self) -> str:
        """The message behind the longest beginning that is rendered."""
        for count in range(len(self.messages) - 1, max(0, len(self.messages) - PLACES_MAX), -1):
            if self.beginning(count) is not None:
                return self._names[count]
        return self._names[0] if len(self.messages) == 1 else "messages"

    def _said(self, error: Exception) -> str:
        """Its words, unless they quote what was said in the chat: that is for no log and no error of ours."""
        said = str(error)[:WORDS_MAX]
        runs = {said[at : at + 8] for at in range(max(1, len(said) - 7))}
        quotes = any(run in message.text for message in self.messages for run in runs)
        return type(error).__name__ if quotes else said


def _up_to_the_end(text: str) -> str:
    """The rendering up to the last words of a message that goes on."""
    at = text.rfind(GOES_ON.strip())
    if at < 0:
        raise ValueError("it leaves out the end of the last message, so the answer cannot go on from there")
    return text[:at] if text.startswith(GOES_ON, at) else text[:at].rstrip()


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
