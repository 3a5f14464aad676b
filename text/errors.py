"""What text can be refused for."""

from __future__ import annotations


class TextRefused(ValueError):
    """This text cannot be used here: no tokenizer, no chat template, a role it refuses, a grammar it cannot be."""


class TextBusy(RuntimeError):
    """What prepares texts has enough to do; later."""
