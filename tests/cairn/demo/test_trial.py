"""The demonstration's plan and its judgement: it must be able to say that an answer differs or is wrong."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cairn import AsyncClient
from cairn.demo.examples import Examples, Exercise, Question, plan_exercises
from cairn.demo.trial import Verdict, register, try_exercise

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = Examples(
    "Be brief.",
    {"a.txt": "A.", "b.txt": "B.", "c.txt": "C."},
    tuple(Question(f"{letter}.txt", f"{letter}{n}?", "Cairn is stone.") for letter in "abc" for n in range(4)),
)


class Plain:
    """Stands in for plain generation: the prompt has as many tokens as the fake service counts."""

    def __init__(self, token_ids: tuple[int, ...] = (0, 1, 2), prompt_tokens: int = 9) -> None:
        self.token_ids = token_ids
        self.prompt_tokens = prompt_tokens

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        assert [message["role"] for message in messages] == ["system", "document", "document", "document", "user"]
        return [0] * self.prompt_tokens

    def answer(self, prompt: list[int], tokens_max: int) -> list[int]:
        return list(self.token_ids)

    def without_end(self, token_ids: list[int]) -> list[int]:
        return token_ids


def judged(services, oracle: Plain, reuse: str = "exact", expected: str = "Cairn is stone.") -> tuple[Verdict, str]:
    shown: list[str] = []
    exercise = Exercise(Question("a.txt", "why?", expected), ("b.txt", "a.txt", "c.txt"), reuse)

    async def main() -> Verdict:
        async with AsyncClient(services.address, services.address, timeout_s=10) as client:
            registered = await register(client, EXAMPLES)
            return await try_exercise(client, registered, EXAMPLES, exercise, oracle, shown.append)  # type: ignore[arg-type]

    return asyncio.run(main()), "".join(shown)


def test_a_right_answer(services):
    verdict, shown = judged(services, Plain())
    assert (verdict.compared, verdict.problems, shown) == ("identical", (), "Cairn is stone.")
    assert min(verdict.first_s, verdict.warm_s, verdict.cold_s) > 0
    registered = [request.name for request in services.script.requests[:4]]
    assert registered == ["system", "a", "b", "c"]
    requests = services.script.requests[4:]
    assert [request.cache_use for request in requests] == [1, 1, 2], "as asked, warm, past every cache"
    for request in requests:
        assert [segment.WhichOneof("content") for segment in request.segments] == ["chunk_id"] * 4 + ["text"]
        assert (request.segments[-1].text, request.segments[-1].role) == ("why?", "user")


def test_other_tokens_than_plain_generation_differ(services):
    verdict, _ = judged(services, Plain(token_ids=(0, 1, 3)))
    assert verdict.compared == "DIFFERS"
    assert verdict.problems == ("the tokens differ from plain generation",)


def test_an_unexpected_answer_is_wrong_even_if_identical(services):
    verdict, _ = judged(services, Plain(), expected="Cairn is wood.")
    assert verdict.compared == "identical"
    assert verdict.problems == ("expected 'Cairn is wood.'",)


def test_a_prompt_of_another_length_is_a_problem(services):
    verdict, _ = judged(services, Plain(prompt_tokens=10))
    assert any("the prompt has 10 tokens, the service counted 9" in problem for problem in verdict.problems)


def test_independent_is_not_compared_with_plain_generation(services):
    verdict, _ = judged(services, Plain(token_ids=(7,)), reuse="independent")
    assert (verdict.compared, verdict.problems) == ("", ())


def test_the_plan_is_the_same_for_every_run_and_covers_what_it_says():
    plan = plan_exercises(EXAMPLES, orders=3, per_order=2)
    assert plan == plan_exercises(EXAMPLES, orders=3, per_order=2)
    assert [exercise.reuse for exercise in plan] == ["exact"] * 6 + ["independent"]
    assert len({exercise.order for exercise in plan}) == 4, "the last order was not there before"
    assert {exercise.question.document for exercise in plan} == set(EXAMPLES.documents)
    assert len({exercise.question for exercise in plan}) == 7


def test_a_plan_for_more_than_there_is_uses_what_there_is():
    few = Examples("s", {"a.txt": "A.", "b.txt": "B."}, EXAMPLES.questions[:2])
    assert len(plan_exercises(few, orders=1, per_order=5)) == 2
    with pytest.raises(ValueError, match="2 documents have 2 orders"):
        plan_exercises(few, orders=2, per_order=1)


def test_the_shipped_examples_can_be_read():
    examples = Examples.read(ROOT / "examples")
    assert len(examples.documents) >= 4
    assert len(plan_exercises(examples, 3, 2)) == 7


def test_broken_examples_are_refused(tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "system.txt").write_text("s")
    (tmp_path / "questions.json").write_text(json.dumps([{"document": "x.txt", "question": "q", "answer": "a"}]))
    with pytest.raises(ValueError, match=r"no such documents: \['x.txt'\]"):
        Examples.read(tmp_path)
    (tmp_path / "questions.json").write_text(json.dumps([{"question": "q"}]))
    with pytest.raises(ValueError, match=r"questions\.json"):
        Examples.read(tmp_path)
