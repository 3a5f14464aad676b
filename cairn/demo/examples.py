"""The demonstration's material: a system prompt, documents, and questions with the answers they should get."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """A question, the document that holds the fact, and the answer that restates it."""

    document: str
    question: str
    answer: str


@dataclass(frozen=True)
class Examples:
    """The files of an examples directory."""

    system: str
    documents: dict[str, str]
    questions: tuple[Question, ...]

    @classmethod
    def read(cls, directory: Path) -> Examples:
        """Read ``system.txt``, ``documents/*.txt`` and ``questions.json``.

        Raises ``OSError`` if a file is missing and ``ValueError`` if the questions are not what they should be.
        """
        documents = {path.name: path.read_text("utf-8") for path in sorted((directory / "documents").glob("*.txt"))}
        entries = json.loads((directory / "questions.json").read_text("utf-8"))
        try:
            questions = tuple(Question(**entry) for entry in entries)
        except TypeError as error:
            raise ValueError(f"questions.json: {error}") from error
        strangers = {question.document for question in questions} - set(documents)
        if strangers or not questions:
            raise ValueError(f"questions.json: no such documents: {sorted(strangers)}")
        return cls((directory / "system.txt").read_text("utf-8").strip(), documents, questions)


@dataclass(frozen=True)
class Exercise:
    """One question over the documents in one order, under one reuse mode."""

    question: Question
    order: tuple[str, ...]
    reuse: str

    def messages(self, examples: Examples) -> list[dict[str, str]]:
        """The conversation as a chat template takes it."""
        return [
            {"role": "system", "content": examples.system},
            *({"role": "document", "content": examples.documents[name]} for name in self.order),
            {"role": "user", "content": self.question.question},
        ]


def plan_exercises(examples: Examples, orders: int, per_order: int) -> list[Exercise]:
    """So many document orders, so many questions in each, spread over the documents; then one more question in
    INDEPENDENT mode, in an order that was not there before. The same for every run.

    Raises ``ValueError`` if the documents do not have so many orders.
    """
    names = list(examples.documents)
    if orders + 1 > math.factorial(len(names)):
        raise ValueError(f"{len(names)} documents have {math.factorial(len(names))} orders, {orders + 1} are needed")
    shuffled = random.Random("cairn demo")
    seen: list[tuple[str, ...]] = []
    while len(seen) < orders + 1:
        order = tuple(shuffled.sample(names, len(names)))
        if order not in seen:
            seen.append(order)
    questions = sorted(examples.questions, key=lambda question: names.index(question.document))
    count = min(len(questions), orders * per_order + 1)
    *exact, last = (questions[index * len(questions) // count] for index in range(count))
    exercises = [Exercise(question, seen[index // per_order], "exact") for index, question in enumerate(exact)]
    return [*exercises, Exercise(last, seen[-1], "independent")]
