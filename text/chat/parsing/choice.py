"""Which parser reads the answers of a model, by its tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from text.chat.parsing.form_parser import FormParser
from text.chat.parsing.forms import form_of
from text.chat.parsing.parts import ReplyParser
from text.chat.parsing.template_parser import TemplateParser, load_template
from text.chat.parsing.xml_calls import schemas_of

log = logging.getLogger(__name__)


class AnswerReader:
    """How answers of a model are written: by its tokenizer's ``response_template``, else by its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer`` is one of transformers, or None."""
        self._template = _response_template(tokenizer)
        self.form = form_of(_chat_template(tokenizer), _added_tokens(tokenizer))

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
        opened = opening + begun
        begins, ends = max(self.form.reasoning.items(), key=lambda tags: opened.rfind(tags[0]))
        return FormParser(self.form, schemas, ends if opened.rfind(begins) > opened.rfind(ends) else "")

    def words(self) -> str:
        """All that a parser looks for, so that what is in it is not left out of the text that it is given."""
        if self._template is None:
            return "\n".join(self.form.tags)
        edges = [edge for region in self._template.fields.values() for edge in (region.open_re, region.close_re)]
        return "\n".join(re.sub(r"\\(\W)", r"\1", edge.pattern) for edge in edges if edge is not None)


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
