"""Accuracy of the small model on held-out entities, under each reuse mode's mask.

An answer counts as right only if greedy decoding gives exactly its text and then `<end>`. Most are
settled by one forward over the expected answer: when each of its tokens is the model's first choice,
greedy decoding gives the same. The rest is decoded, because a name may also come out in other pieces.

Run: python -m models.training.evaluate [--device cuda] [--count 200]
"""

import argparse
import itertools
import random
from pathlib import Path

import torch

from engine.block_mask import MaskedSequence, masked_sequence
from engine.reuse import ReuseMode
from models.training.data import IN_ANSWER, TAIL, Encoded, Shape, Story, encode, make_story
from models.training.names import HELD_OUT

EXACT, INDEPENDENT, ANCHORED = 0, 1, 2
MODES = {"EXACT": EXACT, "INDEPENDENT": INDEPENDENT, "ANCHORED": ANCHORED}
REUSE = {EXACT: ReuseMode.EXACT, INDEPENDENT: ReuseMode.INDEPENDENT, ANCHORED: ReuseMode.ANCHORED}
SHAPES = {
    "16 facts, 4 documents": Shape(documents=4, facts=16, fillers=16),
    "32 facts, 8 documents": Shape(documents=8, facts=32, fillers=32),
    "64 facts, 8 documents": Shape(documents=8, facts=64, fillers=64),
    "48 facts, 8 documents, long": Shape(documents=8, facts=48, fillers=200),
}


def reuse_mask(segments: torch.Tensor, mode: torch.Tensor) -> torch.Tensor:
    """The masks of training: (B, T) segments and (B,) modes -> (B, 1, T, T), true where a row may attend to a column.

    The tail attends to everything before it. A document attends to everything before it (EXACT), to
    itself (INDEPENDENT), or to itself and the system turn, segment 0, wherever that stands (ANCHORED; what is served,
    and evaluated, has the system turn directly before each document: `laid_out`).
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    rows, columns = segments[:, :, None], segments[:, None, :]
    free = (rows == TAIL) | (mode == EXACT)[:, None, None]
    seen = free | (rows == columns) | ((columns == 0) & (mode == ANCHORED)[:, None, None])
    return (causal & seen)[:, None]


def laid_out(segments: list[int], mode: int) -> MaskedSequence:
    """The forward that a reuse mode stands for: one chunk a segment, the tail as the query."""
    return masked_sequence([len(list(run)) for _, run in itertools.groupby(segments)], REUSE[mode])


def pad(rows: list[list[int]], filler: int, length: int) -> torch.Tensor:
    """Rows of different length -> (B, length), filled up on the right."""
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])


def batched(plain: list[MaskedSequence], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) positions and (B, 1, T, T) masks; a row that fills up sees itself alone."""
    length = max(len(one.source) for one in plain)
    positions = torch.zeros(len(plain), length, dtype=torch.int64)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(plain), 1, 1)
    for index, one in enumerate(plain):
        rows = len(one.source)
        positions[index, :rows] = one.positions
        mask[index, :rows, :rows] = one.allowed
    return positions.to(device), mask[:, None].to(device)


@torch.no_grad()
def first_choices(model, encoded: list[Encoded], mode: int, tokens_max: int) -> list[bool]:
    """Whether each token of each story's answers is the first choice, under the mask of this mode."""
    device = model.device
    right: list[bool] = []
    longest = max(len(e.ids) for e in encoded)
    rows_max = max(1, tokens_max // longest)
    for start in range(0, len(encoded), rows_max):
        batch = encoded[start : start + rows_max]
        plain = [laid_out(e.segments, mode) for e in batch]
        length = max(len(one.source) for one in plain)
        pairs = list(zip(batch, plain, strict=True))
        ids = pad([torch.tensor(e.ids)[one.source].tolist() for e, one in pairs], 0, length).to(device)
        parts = pad([torch.tensor(e.parts)[one.source].tolist() for e, one in pairs], 0, length).to(device)
        positions, mask = batched(plain, device)
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        # Answers stand in the tail alone, whose rows are neighbours in every layout.
        wrong = (logits[:, :-1].argmax(-1) != ids[:, 1:]) & (parts[:, 1:] == IN_ANSWER)
        right += (~wrong.any(1)).tolist()
    return right


@torch.no_grad()
def greedy_answer(model, tokenizer, story: Story, mode: int, tokens_max: int = 64) -> str:
    """The text that greedy decoding gives to the story's last question, without `<end>`."""
    question, _ = story.exchanges[-1]
    asked = Story(story.system, story.documents, (*story.exchanges[:-1], (question, "")))
    prompt = encode(tokenizer, asked)  # ends with <|assistant|><end>; the last id is not fed
    end = prompt.ids[-1]
    plain = laid_out(prompt.segments[:-1], mode)
    positions, mask = batched([plain], model.device)
    ids = torch.tensor(prompt.ids[:-1])[plain.source][None].to(model.device)
    out = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True)
    seen = mask[:, :, -1:]  # an answer sees what the question sees, and itself
    answer: list[int] = []
    while len(answer) < tokens_max:
        token = int(out.logits[0, -1].argmax())
        if token == end:
            return tokenizer.decode(answer, skip_special_tokens=False)
        seen = torch.cat((seen, torch.ones_like(seen[..., :1])), dim=-1)
        place = torch.tensor([[len(prompt.ids) - 1 + len(answer)]], device=model.device)
        answer.append(token)
        out = model(
            input_ids=torch.tensor([[token]], device=model.device),
            position_ids=place,
            attention_mask=seen,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    return tokenizer.decode(answer, skip_special_tokens=False) + " ..."


def right_answers(model, tokenizer, stories: list[Story], mode: int, tokens_max: int = 60_000) -> list[bool]:
    """Whether each story's last question gets exactly its answer. `tokenizer` is a `tokenizers.Tokenizer`."""
    right = first_choices(model, [encode(tokenizer, s) for s in stories], mode, tokens_max)
    return [
        sure or greedy_answer(model, tokenizer, story, mode) == story.exchanges[-1][1]
        for sure, story in zip(right, stories, strict=True)
    ]


def held_out(shape: Shape, count: int, seed: int = 1) -> list[Story]:
    """Stories whose every name the training never used."""
    rng = random.Random(f"held out {seed} {shape}")
    return [make_story(rng, shape, HELD_OUT) for _ in range(count)]


def shuffled(stories: list[Story], seed: int = 2) -> list[Story]:
    """The same stories with their documents in another order."""
    rng = random.Random(f"shuffled {seed}")
    return [Story(s.system, tuple(rng.sample(s.documents, len(s.documents))), s.exchanges) for s in stories]


def accuracy(model, tokenizer, stories: list[Story], mode: int) -> float:
    """Share of the stories answered exactly."""
    right = right_answers(model, tokenizer, stories, mode)
    return sum(right) / len(right)


def table(model, tokenizer, count: int, modes: tuple[str, ...] = tuple(MODES)) -> str:
    """The README's table: one row a shape and order, one column a mode."""
    lines = ["| stories | tokens (mean) | " + " | ".join(modes) + " |", "| --- | --- |" + " --- |" * len(modes)]
    for name, shape in SHAPES.items():
        stories = held_out(shape, count)
        tokens = sum(len(encode(tokenizer, s).ids) for s in stories) / count
        for order, drawn in ((name, stories), (name + ", other order", shuffled(stories))):
            cells = [f"{100 * accuracy(model, tokenizer, drawn, MODES[mode]):.1f} %" for mode in modes]
            lines.append(f"| {order} | {tokens:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "fable")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=200, help="stories a row")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=tuple(MODES), help="columns")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model).backend_tokenizer
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    print(table(model, tokenizer, args.count, tuple(args.mode)))


if __name__ == "__main__":
    main()
