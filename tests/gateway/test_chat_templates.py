"""Conversations under the templates of published models, over HTTP with OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.decode_service.chat_templates_served import KEPT, likely_words, oracle, services_of_all_templates, under
from tests.decode_service.pair import Pair
from tests.gateway.running import Running, gateway
from tests.text.chat_templates import SPECIAL


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pair, Running]]:
    folder, store = tmp_path_factory.mktemp("templates"), tmp_path_factory.mktemp("store")
    with (
        services_of_all_templates(folder, store) as services,
        gateway(services.prefill_address, services.decode_address) as running,
    ):
        yield services, running


@pytest.mark.parametrize("name", sorted(SPECIAL))
def test_a_conversation_under_a_published_template(served: tuple[Pair, Running], name: str) -> None:
    services, running = served
    bias = {str(token): value for token, value in likely_words().items()}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Where is Crystalton?"}]
    with under(services, name), running.client() as client:
        model = client.models.list().data[0].id
        for turn in range(2):
            reply = client.chat.completions.create(
                model=model, messages=messages, max_tokens=4, logit_bias=bias, temperature=1.0, seed=3
            )
            how = reply.model_extra["cairn"]["chat"]
            assert how["turns_kept"] == (turn if name in KEPT else 0), how
            if not how["turns_kept"]:
                assert reply.usage.prompt_tokens == len(oracle(name, messages))
            messages += [reply.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "Why?"}]
