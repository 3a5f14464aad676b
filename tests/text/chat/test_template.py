"""Renderings are those of ``transformers``, and cuts leave the tokens of the whole: on published models' templates."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.chat_templates import SPECIAL, STABLE, template, tokenizer
from tests.tokenizer_for_tests import byte_level_tokenizer
from text.chat.message import Message, ToolCall, template_messages
from text.chat.pieces import pieces
from text.chat.template import Bounds, ChatTemplate, Rendering
from text.codec import TextCodec
from text.errors import TextRefused

BOUNDS = Bounds(1 << 20)
NAMES = sorted(SPECIAL)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "Which."}}},
    },
}
ASKED = Message("assistant", ("",), tool_calls=(ToolCall("call00001", "weather", '{"town": "Tarn", "days": 2}'),))
TOLD = Message("tool", ("Rain.",), tool_call_id="call00001", name="weather")


def said(*texts: str, system: str = "") -> list[Message]:
    """Turns of a user and an assistant, one after the other."""
    opening = [Message("system", (system,))] if system else []
    return opening + [Message(("user", "assistant")[index % 2], (text,)) for index, text in enumerate(texts)]


CHATS: dict[str, tuple[list[Message], dict[str, Any]]] = {
    "one": (said("Hello"), {}),
    "system": (said("Where?", "There. ", "Why?", system="Be brief."), {}),
    "long": (said("a", "b", "c", "d", "e", "f", " g\n"), {}),
    "empty": (said("a", "", "c"), {}),
    "thoughts": ([*said("a"), Message("assistant", ("b",), reasoning="Well, a."), *said("c")], {}),
    "tools": (said("Weather?", system="Be brief."), {"tools": [WEATHER]}),
    "called": ([*said("Weather?"), ASKED, TOLD], {"tools": [WEATHER]}),
    "told": ([*said("Weather?"), ASKED, TOLD, Message("assistant", ("Rain.",)), *said("Sure?")], {"tools": [WEATHER]}),
    "off": (said("a"), {"enable_thinking": False}),
    "twice": (said("a", system="b") + said("c"), {}),
    "answer last": (said("a", "b"), {}),
}


def oracle(name: str, messages: list[Message], **options: Any) -> Any:
    given = template_messages(messages, in_parts=template(name).in_parts)
    return tokenizer(name).apply_chat_template(given, **{"add_generation_prompt": True, **options})


def opened(name: str, messages: list[Message], **options: Any) -> Rendering:
    tools = options.pop("tools", ())
    return template(name).open(messages, tools, options, bounds=BOUNDS)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", NAMES)
def test_it_renders_what_transformers_renders(name: str, chat: str) -> None:
    messages, options = CHATS[chat]
    try:
        wanted = oracle(name, messages, tokenize=False, **options)
    except Exception:
        with pytest.raises(TextRefused, match=r"^messages"):
            _ = opened(name, messages, **options).whole
        return
    rendering = opened(name, messages, **options)
    assert rendering.whole == wanted
    cuts = sorted({at for index in range(1, len(messages)) if (at := rendering.cut_before(index))})
    cut = pieces(template(name).codec, rendering.whole, cuts)
    assert len(cut) == len(cuts) + 1
    whole = oracle(name, messages, tokenize=True, **options)["input_ids"]
    assert [token for piece in cut for token in piece.token_ids] == whole


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_goes_on_as_in_transformers(name: str) -> None:
    for text in ("It is", "It is ", "\nIt"):
        messages = said("Where?", text)
        wanted = oracle(name, messages, tokenize=False, add_generation_prompt=False, continue_final_message=True)
        assert template(name).open(messages, go_on=True, bounds=BOUNDS).whole == wanted


@pytest.mark.parametrize("name", NAMES)
def test_which_templates_let_a_chat_grow(name: str) -> None:
    """Before each question of those that do, there is a cut; and what was cut stays as it is while the chat goes on."""
    texts = ("Where?", "There.", "Why?", "So.", "When?")
    rendering = opened(name, said(*texts))
    found = [rendering.cut_before(index) for index in (2, 4)]
    assert (None not in found) == (name in STABLE), found
    if name in STABLE:
        shorter = opened(name, said(*texts[:3]))
        assert rendering.whole.startswith(shorter.whole.removesuffix(shorter.opening))
        assert shorter.cut_before(2) == found[0]


def test_where_it_is_cut() -> None:
    rendering = opened("qwen2_5", said("Where?", "There.", "Why?", system="Be brief."))
    turns = [rendering.whole[: rendering.cut_before(index)] for index in (1, 3)]
    assert turns[0] == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert turns[1] == turns[0] + "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nThere.<|im_end|>\n"
    assert rendering.opening == "<|im_start|>assistant\n"
    assert opened("qwen3_5_think", said("Where?")).opening == "<|im_start|>assistant\n<think>\n"
    # A template that ends what it rendered with a token of its own, and one without special tokens between turns.
    for name in ("phi3", "idefics3"):
        assert [opened(name, said("a", "b", "c")).cut_before(index) for index in (1, 2)] == [None, None]


def test_a_template_that_rewrites_an_answer_is_not_cut_behind_it() -> None:
    thought = Message("assistant", ("b",), reasoning="Well.")
    for name in ("qwen3", "glm4moe", "gptoss"):
        rendering = opened(name, [*said("a"), thought, *said("c")])
        assert rendering.cut_before(2) is None and "Well." not in rendering.whole
    ends = "('<pad>' if loop.last else '<end>')"
    last = own("{%- for m in messages -%}{{- '<|user|>' + m.content + " + ends + " -}}{%- endfor -%}")
    assert [last.open(said("a", "b", "c"), bounds=BOUNDS).cut_before(index) for index in (1, 2)] == [None, None]
    assert template("llama3").closing == "<|eot_id|>" and template("qwen3").closing == "<|im_end|>\n"


words = st.one_of(
    st.text(max_size=12),
    st.lists(
        st.sampled_from(
            ["Crystalton", " ", "\n\n", "<|im_start|>", "<end", "|>", "</think>", "é", "{{ x }}", "\u2028"]
        ),
        max_size=4,
    ).map("".join),
)


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    texts=st.lists(words, min_size=1, max_size=6),
    system=words,
    tools=st.booleans(),
)
def test_random_chats_have_the_tokens_of_the_whole(name: str, texts: list[str], system: str, tools: bool) -> None:
    messages = said(*texts, system=system)
    options = {"tools": [WEATHER]} if tools else {}
    try:
        whole = oracle(name, messages, tokenize=True, **options)["input_ids"]
    except Exception:
        with pytest.raises(TextRefused):
            _ = opened(name, messages, **options).whole
        return
    rendering = opened(name, messages, **options)
    cuts = sorted({at for index in range(1, len(messages)) if (at := rendering.cut_before(index))})
    codec = template(name).codec
    cut = pieces(codec, rendering.whole, cuts)
    assert [token for piece in cut for token in piece.token_ids] == whole
    assert "".join(rendering.whole[piece.start : piece.end] for piece in cut) == rendering.whole
    for piece, at in zip(cut[1:], cuts, strict=True):
        assert piece.start == at
        assert piece.token_ids[0] in codec.special_tokens


DOCUMENTS = (
    "{{- bos_token -}}{%- for d in documents or [] -%}{{- '<|document|>' + d.text + '<end>' -}}{%- endfor -%}"
    "{%- if tools -%}{{- '<|system|>' + (tools | tojson) + '<end>' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content + '<end>' -}}{%- endfor -%}"
)


def own(source: str) -> ChatTemplate:
    made = byte_level_tokenizer()
    made.bos_token = "<pad>"
    made.chat_template = source
    return ChatTemplate(TextCodec(made, "own"))


def test_where_tools_and_documents_stand() -> None:
    documents = [{"text": "One."}, {"text": "Two."}]
    made = own(DOCUMENTS).open(said("a", system="s"), [WEATHER], {"documents": documents}, bounds=BOUNDS)
    region = made.region_of("tools", None)
    assert region and made.whole[slice(*region)] == f"<|system|>{json.dumps([WEATHER])}<end>"
    both, second = made.region_of("documents", None), made.region_of("documents", documents[:1])
    assert both and made.whole[slice(*both)] == "<|document|>One.<end><|document|>Two.<end>"
    assert second and made.whole[slice(*second)] == "<|document|>Two.<end>"
    assert own(DOCUMENTS).open(said("a"), bounds=BOUNDS).region_of("tools", None) is None


def test_what_a_template_may_not_do_is_refused_naming_the_message() -> None:
    quoting = own("{%- for m in messages -%}{%- if m.role == 'user' -%}{{- raise_exception('no ' + m.content) -}}"
                  "{%- endif -%}{{- m.content -}}{%- endfor -%}")  # fmt: skip
    with pytest.raises(TextRefused) as refused:
        _ = quoting.open([Message("system", ("s",)), *said("my secret plan")], bounds=BOUNDS).whole
    assert "messages[1]" in str(refused.value) and "secret" not in str(refused.value)
    with pytest.raises(TextRefused, match=r"^messages\[0\].*more than 100 characters"):
        _ = own("{{ messages[0].content * 60 }}").open(said("ab"), bounds=Bounds(100)).whole
    loop = "{%- for a in range(99999) -%}{%- for b in range(99999) -%}{{- a.x -}}{%- endfor -%}{%- endfor -%}"
    endless = own("{{- messages[0].content -}}{%- if messages[0].content == 'ab' -%}" + loop + "{%- endif -%}")
    with pytest.raises(TextRefused, match="takes too long"):
        _ = endless.open(said("ab"), bounds=Bounds(100, seconds=0.2)).whole
    with pytest.raises(TextRefused, match="is none"):
        own("{% for %}").open(said("a"), bounds=BOUNDS)
    with pytest.raises(TextRefused, match="has no chat template"):
        ChatTemplate(TextCodec(None, "bare")).open(said("a"), bounds=BOUNDS)
    loses = own("{{- messages[-1].role -}}")
    with pytest.raises(TextRefused, match="cannot go on"):
        _ = loses.open(said("a", "b"), go_on=True, bounds=BOUNDS).whole


def test_the_time_is_one_for_a_chat() -> None:
    clock = own("{{- '<|system|>' + strftime_now('%S.%f') + '<end>' -}}" + DOCUMENTS)
    rendering = clock.open(said("a", "b", "c"), bounds=BOUNDS)
    assert rendering.whole and rendering.cut_before(2) is not None


def test_tools_may_have_a_template_of_their_own() -> None:
    made = byte_level_tokenizer()
    made.chat_template = {"default": "plain", "tool_use": "tools"}
    both = ChatTemplate(TextCodec(made, "two"))
    assert both.open(said("a"), bounds=BOUNDS).whole == "plain"
    assert both.open(said("a"), [WEATHER], bounds=BOUNDS).whole == "tools"
