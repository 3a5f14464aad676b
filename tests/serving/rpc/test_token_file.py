"""The lines of a token file."""

from __future__ import annotations

from serving.rpc.token_file import token_lines


def test_lines_are_numbered_and_empty_ones_and_comments_skipped() -> None:
    text = "# tenants\n\n  stone   red admin \n\t\n#slate\nslate blue\n"
    assert list(token_lines(text)) == [(3, ["stone", "red", "admin"]), (6, ["slate", "blue"])]
    assert list(token_lines("")) == []
