"""From a chat to the segments of a prompt: rendered, cut into chunks, and what was answered before named as it is.

    system      tools       documents     turn 1          turn 2                user 3 + what opens the answer
    [SYSTEM]    [SYSTEM]    [RAG_RESULT]  [TURN]  bridge  [TURN]  bridge        [QUERY]
    \\_____________ rendered, or remembered ______________________/

A kept turn ends as its answer was generated; what the template puts behind an answer and is not there is the bridge,
which begins what follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from chunk_store.key import ChunkType, unpack_token_ids
from chunk_store.tenant import Tenant
from decode_service.prompt.chat_memory import ChatMemory, KeptChat
from decode_service.prompt.chat_prompt import ChatPrompt, ChatRequest, KeptSegment, chat_names, text_digest
from decode_service.prompt.resolver import SegmentRequest
from text.chat.message import ChunkPart, Message, Part
from text.chat.pieces import pieces
from text.chat.template import CUTS_MAX, Bounds, ChatTemplate, Rendering
from text.errors import TextRefused

KEPT_TRIED_MAX = 4  # remembered beginnings of a chat that are held against its rendering
FAILED_MAX = 8  # cuts that were not to be
ENDS_WITHIN = 256  # characters that an answer may have of what follows it
DOCUMENTS_APART_MAX = 16  # of those that a template is given as its documents; with more they are one piece

_TYPES = {
    "system": ChunkType.SYSTEM_PROMPT,
    "developer": ChunkType.SYSTEM_PROMPT,
    "tool": ChunkType.RAG_RESULT,
    "document": ChunkType.CONTEXT,
}


@dataclass(frozen=True)
class Place:
    """Where something that the template did not write stands in the rendering: instead of ``length`` characters."""

    at: int
    length: int
    part: Part
    field: str


@dataclass(frozen=True)
class Beginning:
    """What of a chat is remembered: its first ``messages`` (of a role), which end at ``at`` of the rendering."""

    name: str = ""
    messages: int = 0
    at: int = 0
    turns: int = 0
    segments: tuple[KeptSegment, ...] = ()
    bridge: str = ""


class ChatCutting:
    """One chat on its way to segments, against what is remembered. For one thread."""

    def __init__(
        self, template: ChatTemplate, memory: ChatMemory, chat: ChatRequest, tenant: Tenant, characters_max: int
    ) -> None:
        self._template = template
        self._memory = memory
        self._chat = chat
        self._tenant = tenant
        # Of a message of a role: where it stands among all.
        self._places = [index for index, message in enumerate(chat.messages) if message.role]
        self._spoken: list[Message] = [chat.messages[index] for index in self._places]
        self._rendering: Rendering = template.open(
            *(self._spoken, chat.tools, chat.arguments),
            go_on=chat.go_on,
            names=[f"messages[{index}]" for index in self._places],
            bounds=Bounds(characters_max),
        )
        self._reason = ""

    def made(self) -> tuple[list[SegmentRequest], ChatPrompt]:
        whole = self._rendering.whole
        begins = self._remembered()
        kept = [_kept_segment(segment) for segment in begins.segments]
        cut = list(self._cut(begins))
        if not cut or cut[-1].chunk_id is not None:
            last = len(self._chat.messages) - 1
            raise TextRefused(f"messages[{last}]: nothing follows its last chunk, so there is no query")
        cut[-1] = replace(cut[-1], type=ChunkType.QUERY)
        prompt = ChatPrompt(
            tenant=self._tenant,
            request=self._chat,
            pieces=len(cut),
            turns_kept=begins.turns,
            kept_segments=len(kept),
            kept=begins.name,
            rendered_again=self._rendered_again(begins),
            opening=self._rendering.opening,
            text_length=len(whole),
            text_digest=text_digest(whole),
        )
        return [*kept, *cut], prompt

    # -- what is remembered -------------------------------------------------------------------------
    def _remembered(self) -> Beginning:
        """The longest beginning that is remembered, and rendered as it was when it was answered."""
        names = chat_names(self._tenant, self._chat, self._chat.messages)
        tried = 0
        for count in range(len(self._spoken) - 1, 0, -1):
            if self._spoken[count - 1].role != "assistant" or tried == KEPT_TRIED_MAX:
                continue
            name = names[self._places[count - 1] + 1]
            found = self._memory.find(self._tenant, name)
            if found is None:
                continue
            tried += 1
            why, bridge = self._stands(count, found[0], found[1][-1])
            if not why:
                at = len(self._rendering.beginning(count) or "")
                return Beginning(name, count, at, found[0].turns, found[1], bridge)
            self._reason = self._reason or why
        return Beginning()

    def _stands(self, count: int, chat: KeptChat, turn: KeptSegment) -> tuple[str, str]:
        """Why what is remembered of the first messages cannot stand for their rendering, or "" and the bridge."""
        whole, field = self._rendering.whole, f"messages[{self._places[count - 1]}]"
        if text_digest(whole[: chat.text_length]) != chat.text_digest:
            return f"{field}: the template renders what stands before it otherwise than when it was answered", ""
        said = self._rendering.beginning(count)
        if said is None or not whole.startswith(said):
            return f"{field}: the template renders it otherwise once more messages follow", ""
        answer, closing = unpack_token_ids(turn.packed)[-chat.answer_tokens :], self._template.closing
        if closing is None or not said.endswith(closing):
            closing = ""
            if answer[-1] not in self._template.codec.special_tokens:
                return f"{field}: it was cut off, and what the template ends it with is not known", ""
        follows = closing + whole[len(said) :]
        if not self._template.special_at(follows, 0):
            return f"{field}: no special token stands behind it", ""
        generated = self._template.codec.decode(answer, keep_special=True)
        if not _reads_as(generated, whole[chat.text_length : len(said) - len(closing)], follows):
            return f"{field}: the template renders it otherwise than it was generated", ""
        return "", closing

    def _rendered_again(self, begins: Beginning) -> str:
        """Why answers that stand in the chat are rendered; "" if none is."""
        last = len(self._spoken) - (1 if self._chat.go_on else 0)
        again = [index for index in range(begins.messages, last) if self._spoken[index].role == "assistant"]
        if not again:
            return ""
        return self._reason or f"messages[{self._places[again[-1]]}]: not known here as an answer that was kept"

    # -- what is rendered ---------------------------------------------------------------------------
    def _cut(self, begins: Beginning) -> Iterator[SegmentRequest]:
        """The segments behind what is remembered."""
        whole, at, bridge = self._rendering.whole, begins.at, begins.bridge
        starts = self._starts(begins)
        cuts = sorted({*starts, *(at for region in self._regions for at in region[:2])})
        while cuts and not self._template.says(whole[: cuts[0]]):  # the token that begins a text is no piece
            del cuts[0]
        answer = unpack_token_ids(begins.segments[-1].packed) if begins.segments else ()
        for place in [*self._standing(begins), None]:
            end = len(whole) if place is None else place.at
            text, moved = bridge + whole[at:end], at - len(bridge)
            inside = [cut - moved for cut in cuts if max(at, begins.at) < cut < end]
            for piece in pieces(self._template.codec, text, inside) if text else ():
                # What follows an answer may begin with the token that ended it.
                token_ids = piece.token_ids[_overlap(answer, piece.token_ids, self._ids(bridge) + 1) :]
                answer = ()
                if token_ids:
                    kind = self._type(starts, begins, piece.start + moved, piece.end + moved)
                    yield SegmentRequest(None, token_ids, None, kind, field="chat.messages", fixed=True)
            if place is not None:
                yield self._placed(place)
                at, bridge = place.at + place.length, ""

    def _ids(self, bridge: str) -> int:
        """Tokens of it."""
        return len(self._template.codec.encode(bridge)) if bridge else 0

    def _starts(self, begins: Beginning) -> dict[int, int]:
        """Where the rendering may be cut, and before which message: an answer stays with its question.

        Of a long chat not everywhere, but at the same messages while it goes on.
        """
        questions = [
            index
            for index in range(max(1, begins.messages), len(self._spoken))
            if self._spoken[index].role != "assistant"
        ]
        step = 1
        while step * CUTS_MAX < len(self._spoken):
            step *= 2
        coarse = [index for index in questions if index % step == 0 or index == questions[-1]]
        found: dict[int, int] = {}
        failed = 0  # in a row: the template writes all that was said before as it likes
        for index in coarse:
            at = self._rendering.cut_before(index) if failed < FAILED_MAX else None
            failed = 0 if at is not None else failed + 1
            if at is not None:
                found[at] = index
        return found

    @cached_property
    def _regions(self) -> list[tuple[int, int, ChunkType]]:
        """Where tools and documents stand that the template is given beside the messages."""
        found: list[tuple[int, int, ChunkType]] = []
        if self._rendering.head:
            found.append((0, self._rendering.head, ChunkType.SYSTEM_PROMPT))
        if self._chat.tools and (region := self._rendering.region_of("tools", None)):
            found.append((*region, ChunkType.SYSTEM_PROMPT))
        documents = self._chat.arguments.get("documents")
        if isinstance(documents, list) and documents:
            counts = range(len(documents)) if len(documents) <= DOCUMENTS_APART_MAX else (0,)
            regions = [self._rendering.region_of("documents", documents[:count] or None) for count in counts]
            found += [(*region, ChunkType.RAG_RESULT) for region in regions if region is not None]
        return found

    def _standing(self, begins: Beginning) -> list[Place]:
        """What stands in the rendering behind what is remembered, and was not written by the template."""
        found: list[Place] = []
        spoken = 0
        for index, message in enumerate(self._chat.messages):
            if message.role:
                if spoken >= begins.messages:
                    found += self._chunks_in(index, message)
                spoken += 1
            elif spoken >= begins.messages:
                at = self._between(index, spoken, begins)
                parts = enumerate(message.parts)
                found += [Place(at, 0, part, f"chat.messages[{index}].content[{number}]") for number, part in parts]
        return sorted(found, key=lambda place: place.at)

    def _chunks_in(self, index: int, message: Message) -> Iterator[Place]:
        whole = self._rendering.whole
        for number, part in enumerate(message.parts):
            if isinstance(part, ChunkPart):
                if whole.count(part.mark) != 1:
                    raise TextRefused(
                        f"messages[{index}].content[{number}]: the template does not write what stands there once, so "
                        "no chunk can stand there"
                    )
                yield Place(whole.index(part.mark), len(part.mark), part, f"chat.messages[{index}].content[{number}]")

    def _between(self, index: int, spoken: int, begins: Beginning) -> int:
        """Where something stands that is put between two messages."""
        if spoken and spoken == begins.messages:
            return begins.at
        if spoken == 0:
            first = self._template.codec.named_special_tokens.get("bos_token", "")
            return self._rendering.head or (len(first) if self._rendering.whole.startswith(first) else 0)
        at = self._rendering.cut_before(spoken) if spoken < len(self._spoken) else None
        if at is None:
            raise TextRefused(
                f"messages[{index}]: without a role it stands between two messages, and the template allows nothing "
                "there; put its content into a message"
            )
        return at

    def _placed(self, place: Place) -> SegmentRequest:
        if isinstance(place.part, ChunkPart):
            return SegmentRequest(None, None, place.part.chunk_id, ChunkType.CONTEXT, field=f"{place.field}.chunk_id")
        return SegmentRequest(place.part, None, None, ChunkType.CONTEXT, field=f"{place.field}.text")

    def _type(self, starts: dict[int, int], begins: Beginning, start: int, end: int) -> ChunkType:
        """Of what stands there: that of a region, else of the messages in it."""
        for first, last, kind in self._regions:
            if end <= last and (first <= start or not self._template.says(self._rendering.whole[start:first])):
                return kind
        before = [index for at, index in starts.items() if at <= start]
        behind = [index for at, index in starts.items() if at >= end]
        first, last = max(before, default=begins.messages), min(behind, default=len(self._spoken))
        roles = {message.role for message in self._spoken[first:last]}
        if "assistant" in roles:
            return ChunkType.TURN
        kinds = {_TYPES.get(role, ChunkType.CONTEXT) for role in roles}
        return kinds.pop() if len(kinds) == 1 else ChunkType.CONTEXT


def _reads_as(generated: str, rendered: str, follows: str) -> bool:
    """Whether an answer was generated as it is rendered; it may have begun what follows it.

    Spaces are no difference: a template may strip an answer, or write a tool call's JSON with other ones.
    """
    words, wanted, behind = ("".join(text.split()) for text in (generated, rendered, follows[:ENDS_WITHIN]))
    return words.startswith(wanted) and behind.startswith(words[len(wanted) :])


def _kept_segment(segment: KeptSegment) -> SegmentRequest:
    if segment.chunk_id:
        return SegmentRequest(None, None, segment.chunk_id, segment.type, field="chat.messages")
    ids = unpack_token_ids(segment.packed)
    return SegmentRequest(None, ids, None, segment.type, field="chat.messages", fixed=True)


def _overlap(answer: Sequence[int], following: Sequence[int], most: int) -> int:
    """With how many of the ``following`` tokens the answer ends already, ``most`` at most."""
    most = min(most, len(answer), len(following))
    return next((n for n in range(most, 0, -1) if tuple(answer[-n:]) == tuple(following[:n])), 0)
