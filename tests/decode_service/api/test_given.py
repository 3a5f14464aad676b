"""What a caller was given of an answer, as the message he sends back."""

from __future__ import annotations

from decode_service.api.given import Given
from decode_service.prompt.chat_prompt import Said
from protos import decode_pb2
from text.chat.message import ToolCall


def test_deltas_make_a_message() -> None:
    call, given = decode_pb2.ToolCallDelta, Given()
    given.add(decode_pb2.Delta(reasoning="We", token_ids=[1, 2]))
    given.add(decode_pb2.Delta(reasoning="ll.", text="So", token_ids=[3]))
    given.add(decode_pb2.Delta(tool_calls=[call(index=1, id="b", name="g"), call(index=0, id="a", name="f")]))
    given.add(decode_pb2.Delta(tool_calls=[call(index=0, arguments='{"x"')], text=".", token_ids=[4]))
    given.add(decode_pb2.Delta(tool_calls=[call(index=0, arguments=": 1}")]))
    assert given.token_ids == [1, 2, 3, 4]
    assert given.said() == Said("So.", "Well.", (ToolCall("a", "f", '{"x": 1}'), ToolCall("b", "g", "{}")))
    assert Given().said() == Said("")
