"""The grammar of answers that call tools: calls as the model's template writes them, arguments by their schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from text import json_schema
from text.errors import TextRefused

if TYPE_CHECKING:
    from text.codec import TextCodec


@dataclass(frozen=True)
class CallForm:
    """How one tool is called: the words before its arguments, what these may be, and the words behind them.

    ``schema`` is that of the arguments, a JSON object's; {} for any.
    """

    before: str
    schema: Mapping[str, Any]
    after: str


def calls(
    codec: TextCodec, forms: Sequence[CallForm], *, several: bool = False, between: str = "", opening: str = ""
) -> str:
    """A Lark grammar for ``GrammarCompiler.compile("lark", ...)``: ``opening``, then one call, or one or more.

    Special tokens that are written in the words are special tokens of the answer. Raises ``TextRefused`` naming the
    place in the schema of ``forms[i]`` that cannot be guaranteed.
    """
    if not forms:
        raise TextRefused("there is no tool to call")
    rules = []
    for index, form in enumerate(forms):
        schema = {"type": "object", **form.schema}
        try:
            json_schema.check(schema)
        except TextRefused as error:
            raise TextRefused(f"forms[{index}]: {error}") from None
        words = " ".join(
            part for part in (literal(codec, form.before), f"arguments_{index}", literal(codec, form.after)) if part
        )
        rules += [f"call_{index}: {words}", f"arguments_{index}: %json {json.dumps(schema)}"]
    one = " | ".join(f"call_{index}" for index in range(len(forms)))
    more = f" ({literal(codec, between)} call)*" if several else ""
    return "\n".join([f"start: {literal(codec, opening)} call{more}", f"call: {one}", *rules]) + "\n"


def literal(codec: TextCodec, text: str) -> str:
    """Words as Lark writes them, special tokens among them by their ids; "" for none."""
    parts = []
    for piece, token_id in codec.special_pieces(text):
        parts.append(f"<[{token_id}]>" if token_id is not None else json.dumps(piece, ensure_ascii=False))
    return " ".join(parts)
