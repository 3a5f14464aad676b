"""The example texts as stories, and a check that the model answers every example question.

Run: python -m models.training.examples      (some minutes on one CPU core: 4 document orders, 3 masks)
"""

import json
import random
from pathlib import Path

import torch

from models.training.data import Story
from models.training.evaluate import MODES, right_answers

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = Path(__file__).parents[1] / "fable"


def document_order(seed: int) -> list[str]:
    """The example documents' names: in alphabetical order for seed 0, reversed for 1, else shuffled."""
    names = sorted(path.name for path in (EXAMPLES / "documents").glob("*.txt"))
    if seed < 2:
        return names[::-1] if seed else names
    return random.Random(seed).sample(names, len(names))


def example_stories(order: list[str]) -> list[Story]:
    """One story a question, with the documents in this order."""
    system = (EXAMPLES / "system.txt").read_text(encoding="utf-8").strip()
    documents = tuple((EXAMPLES / "documents" / name).read_text(encoding="utf-8") for name in order)
    asked = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
    return [Story(system, documents, ((q["question"], q["answer"]),)) for q in asked]


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL).backend_tokenizer
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for seed in range(4):
        order = document_order(seed)
        stories = example_stories(order)
        for name, mode in MODES.items():
            right = right_answers(model, tokenizer, stories, mode, tokens_max=8000)
            print(f"{name}: {sum(right)} of {len(right)} right, order {' '.join(order)}", flush=True)


if __name__ == "__main__":
    main()
