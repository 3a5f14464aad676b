"""Which parser reads the answers of a model, by its tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from text.chat.parsing.form_parser import FormParser
from text.chat.parsing.forms import HERMES, QWEN_CODER, form_of
from text.chat.parsing.parts import ReplyParser
from text.chat.parsing.template_parser import TemplateParser, load_template
from text.chat.parsing.writing import Writing, calls_grammar, parameters_of
from text.chat.parsing.xml_calls import schemas_of
from text.errors import TextRefused

log = logging.getLogger(__name__)


class AnswerReader:
    """How answers of a model are written: by its tokenizer's ``response_template``, else by its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer`` is one of transformers, or None."""
        self._template = _response_template(tokenizer)
        source, added = _chat_template(tokenizer), _added_tokens(tokenizer)
        self.form = form_of(source, added)
        self._special = _special_tokens(tokenizer)
        self._thinks = [tags for tags in self.form.reasoning.items() if tags[0] in source or tags[0] in added]

    @property
    def name(self) -> str:
        return "response_template" if self._template is not None else self.form.name

    def parser(self, tools: Sequence[Mapping[str, Any]] = (), *, opening: str = "", begun: str = "") -> ReplyParser:
        """A parser of one answer.

        ``tools`` are the definitions of those that may be called; without any, calls are text. ``opening`` is how the
        prompt opened the answer, which may have begun reasoning, and ``begun`` what it goes on from.
        """
        schemas = schemas_of(tools) if tools else None
        if self._template is not None:
            return TemplateParser(self._template, schemas, opening, begun)
        return FormParser(self.form, schemas, self._begun_reasoning(opening + begun))

    def calls_grammar(
        self, tools: Sequence[Mapping[str, Any]], *, many: bool, opening: str = "", begun: str = ""
    ) -> str:
        """Lark of an answer that calls one of ``tools``, or several with ``many``; reasoning may come before.

        Raises ``TextRefused`` where it is not known how calls are written.
        """
        writing = self.form.writing if self._template is None else self._template_writing()
        if writing is None:
            raise TextRefused("how this model writes tool calls cannot be said by a grammar")
        opened = opening + begun
        reasoning = None
        if ends := self._begun_reasoning(opened):
            reasoning = "", ends
        elif self._thinks and self._thinks[0][1] not in opened:
            reasoning = self._thinks[0]
        named = [(str(tool.get("function", tool)["name"]), parameters_of(tool)) for tool in tools]
        return calls_grammar(writing, named, self._special, many=many, reasoning=reasoning)

    def _begun_reasoning(self, opened: str) -> str:
        """What ends the reasoning that the prompt has begun; "" if it has not."""
        begins, ends = max(self.form.reasoning.items(), key=lambda tags: opened.rfind(tags[0]))
        return ends if opened.rfind(begins) > opened.rfind(ends) else ""

    def _template_writing(self) -> Writing | None:
        """A way to write calls that the tokenizer's own template reads."""
        for form, written in _WRITTEN:
            parser = TemplateParser(self._template, {})
            parser.push(written)
            parser.flush()
            if parser.calls == 1:
                return form.writing
        return None

    def words(self) -> str:
        """All that a parser looks for, so that what is in it is not left out of the text that it is given."""
        if self._template is None:
            return "\n".join(self.form.tags)
        edges = [edge for region in self._template.fields.values() for edge in (region.open_re, region.close_re)]
        return "\n".join(re.sub(r"\\(\W)", r"\1", edge.pattern) for edge in edges if edge is not None)


_WRITTEN = (
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'),
    (QWEN_CODER, "<tool_call>\n<function=f>\n</function>\n</tool_call>"),
)


def _response_template(tokenizer: Any) -> Any:
    template = getattr(tokenizer, "response_template", None)
    try:
        return None if template is None else load_template(template)
    except (ValueError, TypeError, LookupError) as error:
        log.warning("the tokenizer's response_template is left alone: %s", error)
        return None


def _chat_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else "\n".join(map(str, template.values()))


def _added_tokens(tokenizer: Any) -> dict[str, Any]:
    return {} if tokenizer is None else dict(tokenizer.get_added_vocab())


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    if tokenizer is None:
        return {}
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: index for index, token in added.items() if token.special}
