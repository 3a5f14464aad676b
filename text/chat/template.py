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
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from text.chat.message import Message, template_messages, template_tools
from text.chat.sandbox import Sandbox
from text.codec import TextCodec
from text.errors import TextRefused

WORDS_MAX = 200  # of what a template says when it refuses
RENDER_S = 5.0  # for all renderings of one chat
CUTS_MAX = 64  # renderings of one chat to find cuts; with more messages they are coarser
RESERVED = ("messages", "tools", "add_generation_prompt", "chat_template", "continue_final_message", "tokenize")
GOES_ON = "CONTINUED "  # behind the last words of a message that goes on; the space shows whether a template strips


@dataclass(frozen=True)
class Bounds:
    """Of a chat's rendering."""

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
        bounds: Bounds,
    ) -> Rendering:
        """The rendering of a chat. ``go_on``: from the end of its last message, not with a new answer.

        Raises ``TextRefused`` as ``Rendering.whole``.
        """
        source = self.codec.chat_template(with_tools=bool(tools))
        variables = {**self.codec.named_special_tokens, **(arguments or {}), "tools": template_tools(tools)}
        return Rendering(self, self._sandbox(source), tuple(messages), variables, go_on, bounds)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The longest first: one may begin as another."""
        return tuple(sorted(self.codec.special_tokens.values(), key=len, reverse=True))

    def special_at(self, text: str, at: int) -> bool:
        """Whether a special token starts there."""
        return text.startswith(self.special_tokens, at)

    @cached_property
    def closing(self) -> str:
        """What follows the words of an answer; "" where it is not known."""
        said = [Message("user", ("Cairn",)), Message("assistant", ("Stone",))]
        try:
            text = self.open(said, bounds=Bounds(1 << 20)).beginning(2) or ""
        except TextRefused:
            return ""
        return text.rpartition("Stone")[2] if "Stone" in text else ""

    @cached_property
    def in_parts(self) -> bool:
        """Whether the template wants a message's content as a list of parts: it does not render a string."""
        probe = [Message("user", ("Cairn",))]
        source = self.codec.chat_template(with_tools=False)
        variables = {**self.codec.named_special_tokens, "tools": None, "documents": None}
        for in_parts in (False, True):
            given = {**variables, "messages": template_messages(probe, in_parts=in_parts)}
            try:
                if "Cairn" in self._sandbox(source).render(given, characters_max=1 << 20, seconds=RENDER_S):
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
        bounds: Bounds,
    ) -> None:
        self._template = template
        self._sandbox = sandbox
        self._variables = {"documents": None, **variables}
        self._go_on = go_on
        self._characters = bounds.characters
        self._ends = time.monotonic() + bounds.seconds
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
        """Where in the whole that stands which is not there when a variable of the template has another value.

        From special token to special token; None if there is nothing such.
        """
        try:
            other = self._render(len(self.messages), {**self._variables, variable: value}, whole=True)
        except Exception:
            return None
        start = _common(self.whole, other)
        end = len(self.whole) - _common(self.whole[start:][::-1], other[start:][::-1])
        special = self._template.special_at
        first = next((at for at in range(start, -1, -1) if special(self.whole, at)), None)
        last = next((at for at in range(end, len(self.whole)) if special(self.whole, at)), None)
        if first is None or last is None or start == len(self.whole) == len(other):
            return None
        return first, last

    def _render(self, count: int, variables: Mapping[str, Any], *, whole: bool = False) -> str:
        goes_on = whole and self._go_on
        given = template_messages(self.messages[:count], in_parts=self._template.in_parts)
        if goes_on:
            last = given[-1]["content"]
            if isinstance(last, str):
                given[-1]["content"] = last + GOES_ON
            else:
                last[-1]["text"] += GOES_ON
        text = self._sandbox.render(
            {**variables, "messages": given, "add_generation_prompt": whole and not goes_on},
            characters_max=self._characters,
            seconds=self._ends - time.monotonic(),
        )
        return _up_to_the_end(text) if goes_on else text

    def _place(self) -> str:
        """The message behind the longest beginning that is rendered."""
        for count in range(len(self.messages) - 1, max(0, len(self.messages) - CUTS_MAX), -1):
            if self.beginning(count) is not None:
                return f"messages[{count}]"
        return "messages[0]" if len(self.messages) == 1 else "messages"

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
