"""Chats as segments of a prompt, and those that were answered with kept turns remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chunk_store.key import ChunkType, pack_token_ids
from chunk_store.record import RecordQuery
from chunk_store.store import ChunkStore
from chunk_store.tenant import Tenant, tenant_of, visible_to
from decode_service.prompt.chat_cutting import ChatCutting
from decode_service.prompt.chat_memory import ChatMemory, KeptChat
from decode_service.prompt.chat_prompt import ChatPrompt, ChatRequest, KeptSegment, Said
from decode_service.prompt.composition import Composition
from decode_service.prompt.resolver import SegmentRequest
from serving.errors import InvalidRequest, NotFound
from text.chat.message import ChunkPart, Part
from text.chat.template import ChatTemplate
from text.codec import TextCodec
from text.errors import TextRefused


class ChatComposer:
    """Makes segments of chats, and remembers those that were answered with kept turns."""

    def __init__(self, codec: TextCodec, store: ChunkStore, memory: ChatMemory | None = None) -> None:
        self._store = store
        self._template = ChatTemplate(codec)
        self._memory = memory or ChatMemory()

    def segments(self, chat: ChatRequest, salt: str, characters_max: int) -> tuple[list[SegmentRequest], ChatPrompt]:
        """The segments of a chat, the query last, and how it became them.

        Raises ``RequestError`` naming the message.
        """
        tenant = tenant_of(salt)
        chat = self._with_chunks(chat, tenant)
        try:
            return ChatCutting(self._template, self._memory, chat, tenant, characters_max).made()
        except TextRefused as error:
            raise InvalidRequest(f"chat.{error}" if str(error).startswith("messages") else f"chat: {error}") from None

    def answered(self, composition: Composition, said: Said, answer: Sequence[int]) -> None:
        """Remembers a chat whose turn was kept: ``answer`` are the tokens that its caller was given."""
        chat = composition.chat
        if chat is None or not answer:
            return
        new = composition.segments[chat.kept_segments : -1]
        query = composition.segments[-1].token_ids
        segments = [
            KeptSegment(each.type, each.chunk_id, b"")
            if each.named_by_id
            else KeptSegment(each.type, "", pack_token_ids(each.token_ids))
            for each in new
        ]
        segments.append(KeptSegment(ChunkType.TURN, "", pack_token_ids((*query, *answer))))
        kept = KeptChat(
            chat.kept, tuple(segments), chat.turns_kept + 1, len(answer), chat.text_length, chat.text_digest
        )
        self._memory.remember(chat.tenant, chat.name_with(said), kept)

    def _with_chunks(self, chat: ChatRequest, tenant: Tenant) -> ChatRequest:
        """The chat with chunks named by their ids, and a mark for each."""

        def marked(index: int, number: int, part: Part) -> Part:
            if isinstance(part, str):
                return part
            name = part.chunk_id or self._named(part.name, f"chat.messages[{index}].content[{number}]", tenant)
            return ChunkPart(name, mark=f"cairn{name[:32]}at{index}and{number}end")

        messages = [
            replace(message, parts=tuple(marked(index, number, part) for number, part in enumerate(message.parts)))
            for index, message in enumerate(chat.messages)
        ]
        return replace(chat, messages=tuple(messages))

    def _named(self, name: str, field: str, tenant: Tenant) -> str:
        """The id of the one chunk that bears a name: the tenant's own, else a shared one."""
        for whose in visible_to(tenant):
            records = self._store.list_records(RecordQuery(name=name, tenants=(whose,), limit=2)).records
            if len(records) > 1:
                raise InvalidRequest(
                    f"several chunks are named {name!r}", field=f"{field}.chunk_name", remedy="name it by its id"
                )
            if records:
                return str(records[0].chunk_id)
        raise NotFound(f"no chunk is named {name!r} here", field=f"{field}.chunk_name", remedy="register it first")
