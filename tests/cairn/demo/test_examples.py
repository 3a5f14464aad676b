"""The demonstration's material: what is read, what is refused, and which questions are asked in which order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cairn.demo.examples import Examples, Question, plan_exercises


def folder(tmp_path: Path, questions: object) -> Path:
    (tmp_path / "documents").mkdir()
    for name in "abc":
        (tmp_path / "documents" / f"{name}.txt").write_text(f"document {name}")
    (tmp_path / "system.txt").write_text(" be brief \n")
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    return tmp_path


def question(name: str, number: int = 0) -> dict[str, str]:
    return {"document": f"{name}.txt", "question": f"{name}{number}?", "answer": "yes"}


def test_files_become_examples(tmp_path: Path) -> None:
    examples = Examples.read(folder(tmp_path, [question("b")]))
    assert examples.system == "be brief" and list(examples.documents) == ["a.txt", "b.txt", "c.txt"]
    assert examples.questions == (Question("b.txt", "b0?", "yes"),)


@pytest.mark.parametrize("questions", [[], [question("z")], [{"document": "a.txt"}], [{**question("a"), "more": 1}]])
def test_questions_that_are_none_are_refused(tmp_path: Path, questions: object) -> None:
    with pytest.raises(ValueError, match=r"questions\.json"):
        Examples.read(folder(tmp_path, questions))


def test_a_plan_spreads_over_documents_and_orders(tmp_path: Path) -> None:
    examples = Examples.read(folder(tmp_path, [question(name, n) for n in range(4) for name in "cab"]))
    plan = plan_exercises(examples, orders=2, per_order=3)
    assert plan == plan_exercises(examples, orders=2, per_order=3), "the same for every run"
    *exact, last = plan
    assert [e.reuse for e in exact] == ["exact"] * 6 and last.reuse == "independent"
    assert len({e.order for e in exact}) == 2 and last.order not in {e.order for e in exact}
    assert [e.order for e in exact[:3]] == [exact[0].order] * 3
    assert {e.question.document for e in plan} == set(examples.documents)
    assert len({e.question.question for e in plan}) == 7


def test_a_plan_needs_enough_orders_and_takes_what_questions_there_are(tmp_path: Path) -> None:
    examples = Examples.read(folder(tmp_path, [question("a"), question("b")]))
    assert len(plan_exercises(examples, orders=5, per_order=5)) == 2
    with pytest.raises(ValueError, match="3 documents have 6 orders, 7 are needed"):
        plan_exercises(examples, orders=6, per_order=1)


def test_an_exercise_is_a_conversation_in_its_order(tmp_path: Path) -> None:
    examples = Examples.read(folder(tmp_path, [question("a"), question("b")]))
    exercise = plan_exercises(examples, 1, 1)[0]
    messages = exercise.messages(examples)
    assert [m["role"] for m in messages] == ["system", "document", "document", "document", "user"]
    assert [m["content"] for m in messages[1:4]] == [examples.documents[name] for name in exercise.order]
