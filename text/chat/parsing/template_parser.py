"""Tells text, reasoning and tool calls apart by a tokenizer's own ``response_template``, the one of transformers.

Regions, what opens and closes them and how they are read are transformers' own; its parser drops what it cannot read
and raises at JSON that is broken, so the walk over the text is ours. Arguments that are JSON as they stand go out as
they come; of any other notation a call goes out once it is closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing.response_templates import load_response_template

from text.chat.parsing.json_calls import read_arguments, read_call
from text.chat.parsing.region_calls import calls_in
from text.chat.parsing.scan import Broken, Reading
from text.chat.parsing.walk import Walk
from text.chat.parsing.xml_calls import Schemas

REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = "tool_calls"


def load_template(template: Any) -> Any:
    """A tokenizer's ``response_template``, checked and compiled. Raises ``ValueError``."""
    return load_response_template(template)


@dataclass(frozen=True)
class Edge:
    """A pattern at which ``region`` opens, or, without one, the region that is open closes.

    ``fixed``: more text makes none of its matches another.
    """

    pattern: Any
    fixed: bool
    region: Any = None

    @classmethod
    def opening(cls, region: Any) -> Edge:
        return cls(region.open_re, region.open_literals is not None and not region.open_literal_can_extend, region)

    @classmethod
    def closing(cls, region: Any) -> Edge:
        return cls(region.close_re, region.close_literals is not None and not region.close_literal_can_extend)


@dataclass(frozen=True)
class Match:
    """Where an edge was found."""

    edge: Edge
    found: Any

    def start(self) -> int:
        return int(self.found.start())

    def end(self) -> int:
        return int(self.found.end())


class Edges:
    """Edges to be found in text that is still coming."""

    def __init__(self, edges: Sequence[Edge]) -> None:
        self._edges = [edge for edge in edges if edge.pattern is not None]

    def find(self, text: str, start: int, ended: bool) -> tuple[Match | None, int]:
        best: Match | None = None
        settled = len(text)
        for edge in self._edges:
            found = edge.pattern.search(text, start, partial=not ended)
            if found is None or (found.start() == found.end() and not found.partial):
                continue
            match = Match(edge, found)
            if not ended and (found.partial or (match.end() == len(text) and not edge.fixed)):
                settled = min(settled, match.start())
            elif best is None or (match.start(), -match.end()) < (best.start(), -best.end()):
                best = match
        if best is None or best.start() >= settled:
            return None, settled
        return best, best.start()

    def none_begins(self, text: str) -> bool:
        return False  # a pattern may begin with anything


class TemplateParser(Walk[Match]):
    """Parses an answer by ``template`` (of ``load_template``). A ``ReplyParser``.

    ``prompt`` is what the model was given, or its end: it may have opened a region; ``begun`` is what of the answer
    stands behind it. ``schemas`` are those of the tools that may be called, None if none may: calls are text then.
    """

    def __init__(self, template: Any, schemas: Schemas | None, prompt: str = "", begun: str = "") -> None:
        self._schemas = schemas or {}
        known = (*REASONING, CALLS) if schemas is not None else REASONING
        regions = [region for region in template.fields.values() if region.open_re is not None and region.name in known]
        edges = [Edge.opening(region) for region in regions]
        if template.implicit is not None:
            edges.append(Edge.closing(template.fields[template.implicit]))
        self._edges = Edges(edges)
        super().__init__()
        anchors = list(template.start_anchor_re.finditer(prompt))
        given = (prompt[anchors[-1].end() :] if anchors else "") + begun
        self._scan.foreign = len(given)
        self.push(given)

    def _answer(self) -> Reading[None]:
        while (match := (yield from self._up_to(self._edges))) is not None:
            region = match.edge.region
            if region is None:
                yield from self._layout()
            elif region.name == CALLS:
                captures = {key: value for key, value in match.found.groupdict().items() if value is not None}
                yield from self._call(self._read_calls(region, captures))
            else:
                yield from self._reason(Edges([Edge.closing(region)]))

    def _read_calls(self, region: Any, captures: dict[str, str]) -> Reading[None]:
        function = region.transform.get("function") if isinstance(region.transform, dict) else None
        plain = region.content == "json" and not region.content_args and not region.transform_each
        if plain and function == "{content}":
            yield from self._scan.space()
            yield from read_call(self._scan, self._calls)
        elif plain and function == {"name": "{name}", "arguments": "{content}"} and captures.get("name"):
            yield from self._scan.space()
            yield from read_arguments(self._scan, self._calls, captures["name"])
        else:
            yield from self._read_whole(region, captures)
            return
        self._scan.put()
        yield from self._scan.space()
        if (yield from self._scan.peek()):
            yield from self._close(region)

    def _close(self, region: Any) -> Reading[None]:
        """Reads what closes a region, here. Raises ``Broken`` where something else stands."""
        scan, edges = self._scan, Edges([Edge.closing(region)])
        while region.close_re is not None:
            scan.available()
            match, settled = edges.find(scan.text, scan.at, scan.ended)
            if match is not None and match.start() == scan.at:
                scan.at = match.end()
                return
            if settled > scan.at or scan.ended:
                raise Broken
            yield

    def _read_whole(self, region: Any, captures: dict[str, str]) -> Reading[None]:
        """Reads to the end of the region, then the calls that stand in it. Raises ``Broken``."""
        scan, edges = self._scan, Edges([Edge.closing(region)])
        begun = looked = scan.at
        while True:
            scan.available()
            match, settled = edges.find(scan.text, looked, scan.ended)
            if match is not None or scan.ended:
                break
            looked = settled
            yield
        end = match.start() if match is not None else len(scan.text)
        body, scan.at = scan.text[begun:end], match.end() if match is not None else end
        try:
            read = calls_in(region, body, captures, self._schemas)
        except Broken:
            scan.put_as_text()  # the whole region: what begins inside of it is not looked for once more
            raise
        for name, arguments in read:
            self._calls.begin(name, arguments)
            self._calls.end()
