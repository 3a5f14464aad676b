"""What text can be refused for."""

from __future__ import annotations


class TextRefused(ValueError):
    """This text cannot become token ids here (no tokenizer, no chat template, a role it refuses)."""
