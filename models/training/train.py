"""Train the model that ships, `models/fable`: recall of invented facts from documents in the context.

A Qwen3 architecture of about 5 M parameters. Steps use one of a few fixed shapes, short ones first.
In each batch a part of the rows runs under the causal mask and the rest under the block masks of the
INDEPENDENT and ANCHORED modes, so the model is right when chunks are computed apart. RoPE only sees
differences of positions; so half of the rows have gaps of random size between turns, and distances
of thousands of tokens are learned without sequences of that length.

Run: python -m models.training.train --device cuda                       (minutes on one GPU)
     python -m models.training.train --steps 20 --tokens 4096 --workers 1 --out /tmp/fable   (a smoke run)
"""

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from models.training.data import END, IN_ANSWER, IN_DOCUMENT, TAIL, Encoded, Shape, encode, make_story
from models.training.evaluate import ANCHORED, EXACT, INDEPENDENT, SHAPES, accuracy, held_out, pad, reuse_mask, table
from models.training.tokenizer import PAD, POSITIONS_MAX, VOCABULARY, train_tokenizer, wrap_tokenizer

LENGTHS = (192, 384, 768, 1792)  # tokens a row, by the kind of step
SHARES = (0.15, 0.35, 0.25, 0.25)  # how often each, after the short first part of the training
FIRST_PART = 0.15  # of the steps: only the shortest rows
ROWS_MAX = 384
GAP_MAX = 6000  # positions, the gaps of one row together
DOCUMENT_WEIGHT = 0.05


@dataclass(frozen=True)
class Batch:
    """One step's rows: ids, positions, segments and loss parts are (B, T), mode is (B,)."""

    ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    parts: torch.Tensor
    mode: torch.Tensor

    def to(self, device: str) -> "Batch":
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        return Batch(**moved)


def draw_row(rng: random.Random, tokenizer, length: int) -> Encoded:
    """A story of at most `length` tokens; its size is drawn, and drawn smaller when it does not fit."""
    questions = rng.randint(1, {192: 2, 384: 3, 768: 4}.get(length, 6))
    room = (length - 20 - 40 * questions) // 13
    while True:
        sentences = rng.randint(max(2, room // 3), max(3, room))
        facts = max(1, round(sentences * rng.uniform(0.3, 1.0)))
        documents = rng.randint(1, min(8, max(1, sentences // 2)))
        row = encode(tokenizer, make_story(rng, Shape(documents, facts, sentences - facts, questions)))
        if len(row.ids) <= length:
            return row
        room = room * 4 // 5


def draw_positions(rng: random.Random, row: Encoded) -> list[int]:
    """Consecutive positions, or in half of the rows with gaps where one document or turn ends."""
    if rng.random() < 0.5:
        return list(range(len(row.ids)))
    borders = [i for i in range(1, len(row.ids)) if row.segments[i] != row.segments[i - 1]]
    budget = rng.randrange(min(GAP_MAX, POSITIONS_MAX - len(row.ids)))
    cuts = sorted(rng.randint(0, budget) for _ in borders)
    gaps = {border: cut - before for border, cut, before in zip(borders, cuts, [0, *cuts], strict=False)}
    positions, now = [], -1
    for i in range(len(row.ids)):
        now += 1 + gaps.get(i, 0)
        positions.append(now)
    return positions


class Batches(Dataset):
    """Batch number i is a function of (seed, i) alone, so the number of workers changes nothing."""

    def __init__(self, tokenizer, steps: int, tokens: int, seed: int) -> None:
        self.tokenizer, self.steps, self.tokens, self.seed = tokenizer, steps, tokens, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"batch {self.seed} {step}")
        early = step < FIRST_PART * self.steps
        length = LENGTHS[0] if early else rng.choices(LENGTHS, SHARES)[0]
        count = max(1, min(ROWS_MAX, self.tokens // length))
        rows = [draw_row(rng, self.tokenizer, length) for _ in range(count)]
        modes = rng.choices((EXACT, INDEPENDENT, ANCHORED), (0.4, 0.4, 0.2), k=count)
        return Batch(
            ids=pad([r.ids for r in rows], 0, length),
            positions=pad([draw_positions(rng, r) for r in rows], 0, length),
            segments=pad([r.segments for r in rows], TAIL, length),
            parts=pad([r.parts for r in rows], 0, length),
            mode=torch.tensor(modes),
        )


def new_model(tokenizer) -> Qwen3ForCausalLM:
    """The architecture with random weights."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=768,
        tie_word_embeddings=True,
        max_position_embeddings=POSITIONS_MAX,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    config._attn_implementation = "sdpa"
    return Qwen3ForCausalLM(config)


def loss_of(model, batch: Batch) -> torch.Tensor:
    """Mean loss on the answers plus a small share of the mean loss on the documents."""
    mask = reuse_mask(batch.segments, batch.mode)
    out = model(input_ids=batch.ids, attention_mask=mask, position_ids=batch.positions, use_cache=False)
    logits = out.logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none"
    )
    parts = batch.parts[:, 1:].flatten()

    def mean(part: int) -> torch.Tensor:
        chosen = (parts == part).float()
        return (losses * chosen).sum() / chosen.sum().clamp(min=1)

    return mean(IN_ANSWER) + DOCUMENT_WEIGHT * mean(IN_DOCUMENT)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 300 steps (a tenth of a short run), then a cosine down to zero."""
    warm = min(300, max(1, steps // 10))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def report(model, tokenizer, step: int, loss: torch.Tensor, started: float, stories: int) -> None:
    """One line: loss, accuracy on held-out stories of 16 facts in 4 documents, seconds."""
    model.eval()
    drawn = held_out(SHAPES["16 facts, 4 documents"], stories)
    exact, apart = (accuracy(model, tokenizer, drawn, mode) for mode in (EXACT, INDEPENDENT))
    model.train()
    seconds = time.monotonic() - started
    print(f"step {step} loss {loss.item():.4f} exact {exact:.3f} independent {apart:.3f} {seconds:.0f} s", flush=True)


def train(args: argparse.Namespace, tokenizer) -> Qwen3ForCausalLM:
    """The whole training; weights stay fp32, the forward runs in bf16 on a GPU."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = new_model(tokenizer).to(args.device).train()
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    on_gpu = args.device.startswith("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    batches = Batches(tokenizer, args.steps, args.tokens, args.seed)
    loader = DataLoader(batches, batch_size=None, num_workers=args.workers, prefetch_factor=8)
    started = time.monotonic()
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, args.steps, args.rate)
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=on_gpu):
            loss = loss_of(model, batch.to(args.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % args.report == 0:
            report(model, tokenizer, step + 1, loss, started, args.stories // 4)
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "fable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--tokens", type=int, default=114_688, help="tokens a step")
    parser.add_argument("--workers", type=int, default=12, help="processes that make batches")
    parser.add_argument("--report", type=int, default=250, help="steps between accuracy lines")
    parser.add_argument("--stories", type=int, default=300, help="held-out stories a row of the last table")
    args = parser.parse_args()

    tokenizer = train_tokenizer(args.seed)
    model = train(args, tokenizer)
    model.to(torch.bfloat16).save_pretrained(args.out)
    wrap_tokenizer(tokenizer).save_pretrained(args.out)
    model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    print("rounded to bf16, run in fp32:\n" + table(model.float(), tokenizer, args.stories), flush=True)


if __name__ == "__main__":
    main()
