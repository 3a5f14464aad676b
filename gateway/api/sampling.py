"""The sampling parameters that chat and completions have in common."""

from __future__ import annotations

from cairn.client.calls import GenerateOptions
from gateway.api.fields import Fields
from gateway.errors import invalid

TEMPERATURE = 1.0  # OpenAI's default; the services' own is 0
UINT32_MAX = 2**32 - 1
ANSWERS_MAX = 128  # as far as a reading goes; the services allow fewer
HARMLESS = ("user", "metadata", "safety_identifier", "prompt_cache_key")


def sampling_options(fields: Fields) -> GenerateOptions:
    """What OpenAI's parameters, and what else is usual beside them, mean to ``generate``. Raises ``HttpError``.

    Ranges are the services' to check; here they are what fits into a message.
    """
    options: GenerateOptions = {}
    options["temperature"] = temperature_of(fields)
    options["top_p"] = fields.number("top_p", 0, 1)
    options["top_k"] = fields.integer("top_k", 0, UINT32_MAX)
    options["min_p"] = fields.number("min_p", 0, 1)
    options["frequency_penalty"] = fields.number("frequency_penalty", -2, 2)
    options["presence_penalty"] = fields.number("presence_penalty", -2, 2)
    options["repetition_penalty"] = fields.number("repetition_penalty", 0, 100)
    options["min_tokens"] = fields.integer("min_tokens", 0, UINT32_MAX)
    options["seed"] = fields.integer("seed", 0, 2**64 - 1)
    options["stop"] = fields.strings("stop", or_one=True) or ()
    options["stop_token_ids"] = fields.integers("stop_token_ids") or ()
    options["ignore_eos"] = bool(fields.boolean("ignore_eos"))
    options["logit_bias"] = _logit_bias(fields)
    options["keep_special_tokens"] = fields.boolean("skip_special_tokens") is False
    options["include_stop"] = bool(fields.boolean("include_stop_str_in_output"))
    options["n"] = fields.integer("n", 1, ANSWERS_MAX) or 1
    fields.harmless(*HARMLESS)
    return options


def temperature_of(fields: Fields) -> float:
    """The temperature that was asked for, or OpenAI's."""
    temperature = fields.number("temperature", 0, 100)
    return TEMPERATURE if temperature is None else temperature


def _logit_bias(fields: Fields) -> dict[int, float]:
    bias: dict[int, float] = {}
    for token, value in (fields.mapping("logit_bias") or {}).items():
        name = f"logit_bias[{token[:20]!r}]"
        if not (token.isascii() and token.isdecimal() and len(token) < 11):
            raise invalid(name, "its name must be a token id")
        if not isinstance(value, int | float) or isinstance(value, bool) or not -100 <= value <= 100:
            raise invalid(name, "must be a number in -100..100")
        bias[int(token)] = float(value)
    return bias
