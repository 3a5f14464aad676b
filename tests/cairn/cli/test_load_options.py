"""Flags of `cairn bench serve` that cannot be meant name themselves."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("chat", "invalid choice: 'chat'"),
        ("--rate 0", "--rate: 0 is not above 0"),
        ("--rate inf", "--rate: 'inf' is not a number"),
        ("--concurrency 0", "--concurrency: 0 is not at least 1"),
        ("--requests 1.5", "--requests: '1.5' is not a whole number"),
        ("--warm-up -1", "--warm-up"),
        ("--vocabulary 100", "--vocabulary: 100 tokens are too few"),
        ("--zipf -1", "--zipf"),
        ("--goodput ttft", "--goodput"),
        ("--goodput speed:3", "--goodput: 'speed:3' is no bound"),
        ("--url h:1", "--url: 'h:1' is no address"),
        ("--url http://h:x/v1", "--url"),
        ("--url http://h/v1?a=b", "--url"),
        ("--body [1]", "--body: '[1]' is no JSON object"),
        ("--duration nan", "--duration"),
    ],
)
def test_a_wrong_flag_is_named(cairn, services, flags: str, words: str) -> None:
    code, out, err = cairn("bench", "serve", *flags.split())
    assert (code, out) == (2, "") and words in err
    assert services.script.requests == []
