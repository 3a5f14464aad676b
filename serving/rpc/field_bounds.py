"""Bounds on a message's fields, checked by count and length before anything is made of them.

Every function raises ``InvalidRequest`` naming the field, and echoes nothing longer than an id.
"""

from __future__ import annotations

from collections.abc import Sized

from serving.errors import InvalidRequest
from serving.rpc.parsing import text_nbytes_max

ID_CHARACTERS_MAX = 128  # of a chunk's id, which has 64
LABEL_CHARACTERS_MAX = 256  # of a name, a tag, a role, a salt or a request id


def check_count(field: str, items: Sized, most: int, remedy: str = "send fewer") -> None:
    """At most ``most`` items."""
    if len(items) > most:
        raise InvalidRequest(f"{len(items)} are more than {most}", field=field, remedy=remedy)


def check_label(field: str, text: str, most: int = LABEL_CHARACTERS_MAX) -> None:
    """At most ``most`` characters."""
    if len(text) > most:
        raise InvalidRequest(f"{len(text)} characters are more than {most}", field=field, remedy="shorten it")


def check_id(field: str, text: str) -> None:
    """Not longer than any id is; whether there is such a chunk is another question."""
    check_label(field, text, ID_CHARACTERS_MAX)


def check_request_id(text: str) -> None:
    """A name that can stand in a log line as it is."""
    check_label("request_id", text)
    if text and not text.isprintable():
        raise InvalidRequest(
            "has characters that cannot be printed", field="request_id", remedy="use letters, digits and signs"
        )


class ContentBudget:
    """What texts and token ids of one request may come to, for a model that takes ``context_length`` tokens.

    ``whole`` is what they make together, in the words of an error; ``limit`` names the limit with its reason.
    """

    def __init__(self, context_length: int, whole: str = "prompt", *, limit: str = "") -> None:
        self._context_length = context_length
        self._limit = limit or f"{context_length} tokens"
        self._whole = whole
        self._tokens = 0
        self.characters = 0  # of all texts so far

    def take_tokens(self, field: str, token_ids: Sized) -> None:
        self._tokens += len(token_ids)
        if self._tokens > self._context_length:
            raise InvalidRequest(
                f"a {self._whole} of {self._tokens} tokens is longer than the model's limit of {self._limit}",
                field=field,
                remedy="send fewer",
            )

    def take_text(self, field: str, text: str) -> None:
        self.characters += len(text)
        most = text_nbytes_max(self._context_length)
        if self.characters > most:
            raise InvalidRequest(
                f"a {self._whole} of {self.characters} characters is longer than the {most} that can fit the "
                f"model's limit of {self._limit}",
                field=field,
                remedy="shorten it",
            )
