"""Where the password of a store's server is taken from."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunk_store.password import password_in


def test_the_first_line_is_the_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("qu@rtz 7 \r\nand nothing of this\n")
    assert password_in(file, "THE_SETTING") == "qu@rtz 7"


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), (b"\nquartz", "empty line"), (b"quartz\xff", "not a text")]
)
def test_a_file_without_one_is_named_and_not_shown(content: bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"THE_SETTING: .*{file.name}.*{words}") as caught:
        password_in(file, "THE_SETTING")
    assert "quartz" not in str(caught.value) and (caught.value.__suppress_context__ or not caught.value.__context__)
