"""What a person or a script sees."""

from __future__ import annotations

from tests.cairn.on_terminal import on_a_terminal


def test_colours_only_on_a_terminal_and_not_with_no_color(services, cairn):
    argv = ["generate", "q", "--prefill", services.address, "--decode", services.address]
    assert b"\x1b[1m" in on_a_terminal(argv, {})
    coloured = on_a_terminal(["chunks", "list", *argv[2:]], {"NO_COLOR": "1"})
    assert b"\x1b[3" not in coloured
    _, out, err = cairn(*argv)
    assert "\x1b" not in out + err
