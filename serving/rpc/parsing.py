"""From a message's bytes to the message: size and number of fields are checked before anything is made of them.

A parsed message takes many times its bytes (an empty segment is two of them), so fields are counted on the wire first.
"""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from serving.errors import InvalidRequest, RequestError, TooLarge

M = TypeVar("M", bound=Message)

MESSAGE_NBYTES_MAX = 16 * 1024 * 1024  # whatever the model
MESSAGE_NBYTES_BASE = 512 * 1024  # names, ids, labels
TEXT_NBYTES_PER_TOKEN = 16  # text is about 4; a token id takes at most 5
FIELDS_MAX = 8192  # of a message, those of the messages in it included; packed numbers are one
UNCOUNTED_NBYTES = FIELDS_MAX  # a shorter message cannot have too many

_VARINT, _FIXED64, _BYTES, _GROUP, _END_GROUP, _FIXED32 = range(6)
_FIXED_NBYTES = {_FIXED64: 8, _FIXED32: 4}


def message_nbytes_max(context_length: int) -> int:
    """Bytes of a message at most, for a model that takes ``context_length`` tokens."""
    return min(MESSAGE_NBYTES_MAX, MESSAGE_NBYTES_BASE + TEXT_NBYTES_PER_TOKEN * context_length)


def text_nbytes_max(context_length: int) -> int:
    """Bytes (UTF-8) of a text at most, for a model that takes ``context_length`` tokens."""
    return 4096 + TEXT_NBYTES_PER_TOKEN * context_length


def parse(kind: type[M], raw: bytes, nbytes_max: int = MESSAGE_NBYTES_MAX) -> M:
    """The message that ``raw`` encodes. Raises ``RequestError`` if it is too large or not a ``kind``."""
    if len(raw) > nbytes_max:
        raise TooLarge(
            f"{len(raw)} bytes are more than the {nbytes_max} that this model's context can need",
            field="message",
            remedy="send less",
        )
    if len(raw) > UNCOUNTED_NBYTES:
        _count(raw, 0, len(raw), kind.DESCRIPTOR, 0)
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise InvalidRequest(
            f"these {len(raw)} bytes are not a {kind.DESCRIPTOR.full_name} (wire format, or text that is not UTF-8)",
            field="message",
        ) from None


def _count(raw: bytes, at: int, end: int, kind: Any, seen: int) -> int:
    """``seen`` and the fields in ``raw[at:end]``, a ``kind``; what cannot be read is left to the parser."""
    fields = kind.fields_by_number
    while at < end:
        tag, at = _varint(raw, at, end)
        seen += 1
        if seen > FIELDS_MAX:
            raise _too_many(fields.get(tag >> 3))
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(raw, at, end)
        elif wire == _BYTES:
            length, at = _varint(raw, at, end)
            inner: Any = fields.get(tag >> 3)
            if inner is not None and inner.message_type is not None:
                seen = _count(raw, at, min(end, at + length), inner.message_type, seen)
            at += length
        else:
            at += _FIXED_NBYTES.get(wire, 0)
    return seen


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    """A number and where it ends; at the end of the bytes whatever there is."""
    value = shift = 0
    while at < end:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift >= 63:
            break
        shift += 7
    return value, at


def _too_many(field: Any | None) -> RequestError:
    name = "message" if field is None else field.name
    return InvalidRequest(
        f"the message has more than {FIELDS_MAX} fields", field=name, remedy="send fewer (and numbers packed)"
    )
