"""The grammar of a request: what was asked for, and the matcher that its answer follows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future

from decode_service.scheduling.sequence import Sequence as Answer
from protos import decode_pb2
from serving.errors import InvalidRequest, Overloaded
from text.errors import TextBusy, TextRefused
from text.grammar.compiler import WAIT_S, Compiled, GrammarCompiler
from text.grammar.forms import Form

RETRY_AFTER_S = 2.0


async def compiled(compiler: GrammarCompiler, request: decode_pb2.GenerateRequest, owner: str) -> Compiled | None:
    """The grammar that a request's answer must follow; None if it names none.

    Raises ``InvalidRequest`` naming the place that is wrong, ``Overloaded`` where too many are compiled already.
    """
    form = request.grammar.WhichOneof("form") if request.HasField("grammar") else None
    if form is None:
        if request.HasField("grammar"):
            raise InvalidRequest("give one of json_schema, regex, lark and json_object", field="grammar")
        return None
    if form == "json_object" and not request.grammar.json_object:
        raise InvalidRequest("is false", field="grammar.json_object", remedy="leave the grammar out")
    source = "" if form == "json_object" else str(getattr(request.grammar, form))
    return await _compiled(compiler, form, source, owner, f"grammar.{form}")


async def compiled_calls(compiler: GrammarCompiler, source: str, owner: str) -> Compiled:
    """The grammar of an answer that calls tools, from its Lark. Raises as ``compiled`` does."""
    return await _compiled(compiler, "lark", source, owner, "chat.tools")


async def follow(grammar: Compiled, sequences: Sequence[Answer]) -> None:
    """Has each of the answers follow the grammar. In a thread: what it forces at its beginning can be long."""

    def matched() -> None:
        for sequence in sequences:
            sequence.grammar = grammar.matcher(ignore_ends=sequence.params.ignore_eos)

    await asyncio.to_thread(matched)


async def _compiled(compiler: GrammarCompiler, form: Form, source: str, owner: str, field: str) -> Compiled:
    future: Future[Compiled] | None = None
    try:
        future = compiler.begin(form, source, owner=owner)
        return await asyncio.wait_for(asyncio.wrap_future(future), WAIT_S)
    except TimeoutError:
        assert future is not None
        late = compiler.late(future)
        raise _refusal(field, late) from None
    except (TextRefused, TextBusy) as error:
        raise _refusal(field, error) from None


def _refusal(field: str, error: TextRefused | TextBusy) -> InvalidRequest | Overloaded:
    if isinstance(error, TextBusy):
        return Overloaded(str(error), field=field, remedy="try later", retry_after_s=RETRY_AFTER_S)
    return InvalidRequest(str(error), field=field)
