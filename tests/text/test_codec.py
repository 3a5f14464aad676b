"""The text codec: turns of a chat template, refusals, and streams whose text equals decoding at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models_for_tests import tiny_model_dir
from tests.tokenizer_for_tests import CHAT_TEMPLATE, byte_level_tokenizer, sentencepiece_like
from text.codec import TextCodec
from text.errors import TextRefused

BYTE_LEVEL = TextCodec(byte_level_tokenizer(), "byte level")
PIECES = TextCodec(sentencepiece_like(), "pieces")


def test_turns_are_rendered_one_at_a_time() -> None:
    turn = BYTE_LEVEL.encode("Hello", role="user")
    assert BYTE_LEVEL.decode(turn, keep_special=True) == "<|user|>Hello<end>"
    assert BYTE_LEVEL.decode(turn) == "Hello"
    opened = BYTE_LEVEL.encode("Hello", role="user", generation_prompt=True)
    assert BYTE_LEVEL.decode(opened[len(turn) :], keep_special=True) == "<|assistant|>"
    assert opened[: len(turn)] == turn


def test_special_tokens_are_parsed_and_none_added() -> None:
    assert BYTE_LEVEL.encode("<end>") == (1,)
    assert BYTE_LEVEL.encode("") == ()
    assert 1 not in PIECES.encode("a")


def test_refused_roles_and_templates() -> None:
    with pytest.raises(TextRefused, match="refuses 'wizard'"):
        BYTE_LEVEL.encode("x", role="wizard")
    with pytest.raises(TextRefused, match="no chat template"):
        PIECES.encode("a", role="user")
    with pytest.raises(TextRefused, match="needs a role"):
        BYTE_LEVEL.encode("x", generation_prompt=True)


@pytest.mark.parametrize("opening", ["<end>{}", "{{- 'default system<end>' if messages[0]['role'] != 'system' -}}{}"])
def test_templates_that_do_not_separate_are_refused(opening: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = opening.format("") + CHAT_TEMPLATE
    with pytest.raises(TextRefused, match="otherwise next to"):
        TextCodec(tokenizer, "opens").encode("x", role="user")


def test_a_template_that_demands_alternation_is_accepted() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{%- for m in messages -%}{%- if loop.index0 and m['role'] == messages[loop.index0 - 1]['role'] -%}"
        "{{- raise_exception('roles must alternate') -}}{%- endif -%}"
        "{{- m['role'] + ':' + m['content'] -}}{%- endfor -%}"
    )
    codec = TextCodec(tokenizer, "alternates")
    assert codec.decode(codec.encode("x", role="user")) == "user:x"


def test_a_model_without_tokenizer_works_with_ids_only(tmp_path: Path) -> None:
    codec = TextCodec.load(str(tiny_model_dir(tmp_path / "m", tokenizer=False)))
    assert not codec.has_text
    for use in (lambda: codec.encode("x"), lambda: codec.decode([1])):
        with pytest.raises(TextRefused, match="no tokenizer; give token_ids"):
            use()
    stream = codec.stream()
    assert stream.push(3) == "" and stream.flush() == ""


def test_identity_is_the_tokenizers(tmp_path: Path) -> None:
    saved = TextCodec.load(str(tiny_model_dir(tmp_path / "m")))
    again = TextCodec.load(str(tiny_model_dir(tmp_path / "elsewhere", hidden_size=64)))
    assert saved.identity == again.identity
    assert len({saved.identity, PIECES.identity, TextCodec(None, "").identity}) == 3


def test_a_broken_tokenizer_is_an_error_not_an_absence(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded"):
        TextCodec.load(str(folder))


def test_what_an_answer_lacks_of_its_turn() -> None:
    codec = TextCodec(byte_level_tokenizer(), "tiny")
    whole = codec.encode("", role="assistant")[1:]
    assert codec.closing(codec.encode("It is.")) == whole == codec.encode("<end>")
    assert codec.closing((*codec.encode("It is."), *whole)) == codec.closing(whole) == ()
    lines = byte_level_tokenizer()
    lines.chat_template = CHAT_TEMPLATE.replace("<end>", "<end>\n")
    codec = TextCodec(lines, "lines")
    assert codec.closing(()) == codec.closing(codec.encode("It")) == codec.encode("<end>\n")
    assert codec.closing(codec.encode("It<end>")) == codec.encode("\n"), "an answer ends with the token that ended it"
    assert codec.closing(codec.encode("It<end>\n")) == ()


def test_without_a_template_for_answers_nothing_is_lacking() -> None:
    bare, silent = byte_level_tokenizer(), byte_level_tokenizer()
    bare.chat_template = None
    silent.chat_template = CHAT_TEMPLATE.replace(", 'assistant']", "]")
    for codec in (TextCodec(bare, "bare"), TextCodec(silent, "silent"), TextCodec(None, "none")):
        assert codec.closing((5, 6)) == ()


def test_special_tokens_that_tell_an_answers_parts_apart_are_kept_for_who_looks_for_them() -> None:
    tokenizer = byte_level_tokenizer()
    tags = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<other>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    codec = TextCodec(tokenizer, "tags")
    ids = codec.encode('<think>Hm</think><other><tool_call>{"name": "f"}</tool_call><end>')

    def text(**shown: bool) -> str:
        stream = codec.stream(**shown)
        return "".join(map(stream.push, ids)) + stream.flush()

    assert text() == 'Hm{"name": "f"}'
    assert text(keep_tags=True) == '<think>Hm</think><tool_call>{"name": "f"}</tool_call>'
    assert text(keep_tags=True, keep_special=True).endswith("</tool_call><end>")


def test_the_bytes_of_tokens_make_the_text() -> None:
    text = "a heap of €, 茶 and stones 🍵 that marks <end> a place"
    assert b"".join(map(BYTE_LEVEL.token_bytes, BYTE_LEVEL.encode(text))) == text.encode()
    text = "a stone é € b"
    assert b"".join(map(PIECES.token_bytes, PIECES.encode(text))) == b" " + text.encode()
    assert TextCodec(None, "none").token_bytes(3) == b"" == BYTE_LEVEL.token_bytes(10**6) == PIECES.token_bytes(10**6)


def test_a_configuration_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "quantization_config": "fp8"}')
    with pytest.raises(ValueError, match="cannot be loaded: 'str' object"):
        TextCodec.load(str(tmp_path))
