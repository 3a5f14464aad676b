"""The calls of one answer, as they are put out: numbered, each with an id of its own."""

from __future__ import annotations

import json
import secrets
import string
import uuid
from collections.abc import Callable

from text.chat.parsing.parts import CallPart
from text.chat.parsing.scan import Scan

MISTRAL_ID_LENGTH = 9  # its templates refuse others


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def mistral_id() -> str:
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(MISTRAL_ID_LENGTH))


def as_json(value: object) -> str:
    """Raises ``ValueError`` for what JSON does not have."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value, allow_nan=False)
    return text


class Calls:
    """Puts calls out into ``scan``: all that was read until then stands for them."""

    def __init__(self, scan: Scan, make_id: Callable[[], str] = call_id) -> None:
        self._scan = scan
        self._make_id = make_id
        self._begun = 0
        self.whole = 0

    def begin(self, name: str, arguments: str = "") -> None:
        self._scan.put(call=CallPart(self._begun, self._make_id(), name, arguments))
        self._begun += 1

    def more(self, arguments: str) -> None:
        self._scan.put(call=CallPart(self._begun - 1, arguments=arguments))

    def end(self) -> None:
        """The arguments of the call are all there."""
        self.whole += 1
