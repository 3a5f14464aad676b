"""Chats as segments: the type of each piece, where chunks stand, and what is taken from memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from chunk_store.key import ChunkType, pack_token_ids
from chunk_store.tenant import tenant_of
from decode_service.prompt.chat_cutting import ChatCutting
from decode_service.prompt.chat_memory import ChatMemory, KeptChat
from decode_service.prompt.chat_prompt import ChatPrompt, ChatRequest, KeptSegment, Said
from decode_service.prompt.resolver import SegmentRequest
from tests.text.chat.test_template import ASKED, DOCUMENTS, TOLD, WEATHER, own, said
from tests.text.chat_templates import template
from text.chat.message import ChunkPart, Message
from text.chat.template import ChatTemplate
from text.errors import TextRefused

TENANT = tenant_of("")
S, Q, T, C, R = (ChunkType.SYSTEM_PROMPT, ChunkType.QUERY, ChunkType.TURN, ChunkType.CONTEXT, ChunkType.RAG_RESULT)


def cut(
    chat: ChatRequest, under: str | ChatTemplate = "qwen2_5", memory: ChatMemory | None = None
) -> tuple[list[SegmentRequest], ChatPrompt]:
    made = template(under) if isinstance(under, str) else under
    return ChatCutting(made, memory or ChatMemory(), chat, TENANT, 1 << 20).made()


def shown(segments: Sequence[SegmentRequest], under: str | ChatTemplate = "qwen2_5") -> list[tuple[ChunkType, str]]:
    made = template(under) if isinstance(under, str) else under

    def text(segment: SegmentRequest) -> str:
        if segment.token_ids is not None:
            return made.codec.decode(segment.token_ids, keep_special=True)
        return f"chunk {segment.chunk_id}" if segment.text is None else f"text {segment.text}"

    return [(segment.type, text(segment)) for segment in segments]


def chat(messages: Sequence[Message], **options: Any) -> ChatRequest:
    return ChatRequest(tuple(messages), **options)


def test_each_piece_has_the_type_of_what_is_in_it() -> None:
    messages = [*said("a", "b", "c", system="s"), ASKED, TOLD, Message("assistant", ("d",)), *said("e"), *said("f")]
    segments, prompt = cut(chat(messages, tools=(WEATHER,)))
    assert [kind for kind, _ in shown(segments)] == [S, T, T, T, C, Q]
    assert shown(segments)[1][1] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert shown(segments)[-1][1] == "<|im_start|>user\nf<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.pieces == 6 and prompt.opening == "<|im_start|>assistant\n"
    # What the template says by itself is a chunk for all that begin so; several results of tools are one each.
    assert [kind for kind, _ in shown(cut(chat(said("a")))[0])] == [S, Q]
    results = [*said("a", system="s"), ASKED, Message("tool", ("x",)), Message("tool", ("y",))]
    assert [kind for kind, _ in shown(cut(chat(results), "llama3")[0])] == [S, T, R, Q]


def test_tools_and_documents_are_chunks_where_special_tokens_hold_them() -> None:
    made = own(DOCUMENTS)
    documents = {"documents": [{"text": "One."}, {"text": "Two."}]}
    segments, _ = cut(chat(said("a", system="s"), tools=(WEATHER,), arguments=documents), made)
    found = shown(segments, made)
    assert [kind for kind, _ in found] == [R, R, S, S, Q]
    assert [text for _, text in found[:2]] == ["<pad><|document|>One.<end>", "<|document|>Two.<end>"]
    assert shown(cut(chat(said("b", system="s"), arguments=documents), made)[0], made)[:2] == found[:2]


def test_chunks_stand_in_messages_and_between_them() -> None:
    part = ChunkPart("f" * 64, mark="cairnffffat0and0end")
    messages = [Message("system", ("s",)), Message("", (ChunkPart("e" * 64, mark="m"), "as it is")), *said("a")]
    messages[-1] = Message("user", ("Of this: ", part, " what?"))
    segments, _ = cut(chat(messages))
    assert [text for _, text in shown(segments)] == [
        "<|im_start|>system\ns<|im_end|>\n",
        f"chunk {'e' * 64}",
        "text as it is",
        "<|im_start|>user\nOf this: ",
        f"chunk {'f' * 64}",
        " what?<|im_end|>\n<|im_start|>assistant\n",
    ]
    first = shown(cut(chat([Message("", ("doc",)), *said("a")]), "llama3")[0], "llama3")
    assert [text for _, text in first][:2] == ["<s>", "text doc"]
    last = [*said("a", "b"), Message("user", ("x",)), Message("", ("doc",))]
    for messages in (last, [Message("system", ("s",)), Message("", ("doc",)), *said("a")]):
        with pytest.raises(TextRefused, match=r"^messages\[[13]\]: without a role"):
            cut(chat(messages), "idefics3" if messages is not last else "qwen2_5")
    twice = own("{{ messages[0].content }}{{ messages[0].content }}")
    with pytest.raises(TextRefused, match=r"^messages\[0\]\.content\[0\]: the template does not write"):
        cut(chat([Message("user", (part,))]), twice)
    with pytest.raises(TextRefused, match="no query"):
        cut(chat([Message("user", ("a",)), Message("assistant", (part,))], go_on=True))


def answered(memory: ChatMemory, asked: ChatRequest, text: str, under: str = "qwen2_5", tokens: str = "") -> None:
    """Remembers a chat whose answer was generated as ``tokens``, else as its text."""
    segments, prompt = cut(asked, under, memory)
    answer = template(under).codec.encode(tokens or text)
    new = [KeptSegment(s.type, s.chunk_id or "", pack_token_ids(s.token_ids or ())) for s in segments]
    query = segments[-1].token_ids or ()
    turn = KeptSegment(T, "", pack_token_ids((*query, *answer)))
    kept = (*new[prompt.kept_segments : -1], turn)
    memory.remember(
        TENANT,
        prompt.name_with(Said(text)),
        KeptChat(prompt.kept, kept, prompt.turns_kept + 1, len(answer), prompt.text_length, prompt.text_digest),
    )


def test_an_answer_is_taken_from_memory_and_ended_as_the_template_does() -> None:
    memory = ChatMemory()
    for tokens, bridge in (
        ("b", "<|im_end|>\n"),
        ("b<|im_end|>", "\n"),
        ("b<|im_end|>\n", ""),
        ("  b\n", "<|im_end|>\n"),
    ):
        answered(memory, chat(said("a", system="s")), "b", tokens=tokens)
        segments, prompt = cut(chat(said("a", "b", "c", system="s")), memory=memory)
        assert (prompt.turns_kept, prompt.pieces, prompt.rendered_again) == (1, 1, "")
        assert shown(segments)[-1][1] == f"{bridge}<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        assert shown(segments)[1][1].endswith(f"assistant\n{tokens}")


def test_why_an_answer_is_rendered() -> None:
    def reason(under: str, then: list[Message], *, text: str = "b", tokens: str = "", **options: Any) -> str:
        memory = ChatMemory()
        answered(memory, chat(said("a", system="s"), **options), text, under, tokens)
        return cut(chat(then, **options), under, memory)[1].rendered_again

    grown = said("a", "b", "c", system="s")
    assert reason("qwen2_5", grown) == ""
    assert reason("qwen2_5", said("a", "B", "c", system="s")).endswith("not known here as an answer that was kept")
    assert reason("qwen2_5", grown, tokens="other").endswith("renders it otherwise than it was generated")
    assert reason("qwen3", grown).endswith("renders it otherwise once more messages follow")
    assert reason("deepseekv3", grown).endswith("renders what stands before it otherwise than when it was answered")
    assert reason("idefics3", said("a", "b", system="s")).endswith("not known here as an answer that was kept")


def test_an_answer_that_goes_on_is_one_answer() -> None:
    memory = ChatMemory()
    answered(memory, chat(said("a", "b"), go_on=True), " and c")
    segments, prompt = cut(chat(said("a", "b and c", "d")), memory=memory)
    assert prompt.turns_kept == 1 and prompt.rendered_again == ""
    text = "".join(text for _, text in shown(segments))
    assert "assistant\nb and c<|im_end|>\n<|im_start|>user\nd" in text


def test_a_long_chat_is_cut_at_the_same_places_while_it_goes_on() -> None:
    texts = [f"{number}" for number in range(301)]
    found = [[s.token_ids for s in cut(chat(said(*texts[:count])))[0]] for count in (281, 291, 301)]
    assert all(len(each) < 45 for each in found)
    assert found[0][:-2] == found[1][: len(found[0]) - 2] == found[2][: len(found[0]) - 2]
