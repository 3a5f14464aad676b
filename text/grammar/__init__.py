"""Answers that a grammar allows: a JSON schema, a regular expression or a Lark grammar, compiled by llguidance.

    compiler.compile(form, source) -> Compiled, kept for the next request     a thread of few, bounded in time and size
    Compiled.matcher() -> Matcher, one answer                                 fill(row) -> draw -> accept(token) -> ...

Tokens that a grammar forces come as they would be tokenized; which ones they are follows from the tokens before them
alone. JSON is written in one form, ``{"a": 1, "b": [2, 3]}``, so that only values are drawn.
"""
