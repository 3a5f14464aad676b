"""``python -m tests.gpu.interpreted_cascade FIRST LAST``, with TRITON_INTERPRET=1: the portable kernel on the CPU.

A process of its own, since what Triton's kernels become is settled when Triton is imported. Numbers choose a form of
attention and a plan. In float16: the interpreter cuts off what does not fit bfloat16 instead of rounding it.
"""

from __future__ import annotations

import random
import sys
import warnings
from dataclasses import replace

import torch

from engine.plan import StepSequence, Window, behind_each_other
from engine.run.cuda.cascade.records import Limits, SplitRule
from engine.run.cuda.cascade.tuning import CHUNKS, LONG_TAILS, ROW_TAILS, TileClass, Tuning
from tests.gpu.cascade_cases import PAGE, Form, Sequences, Setting, random_sequences, relative_error

LIMITS = Limits(rows=64, pairs=256, items=512, pages=256, partials=512)
SPLITS = SplitRule(((0, 64), (129, 128)), 64)
LOW = TileClass(16, 32, 4, 1, 1, split_loop=False)
CLASSES = (LOW, TileClass(32, 32, 4, 1, 1))
BOTH = Tuning(narrow=CLASSES, wide=CLASSES, splits=SPLITS, overlap=False)
# One height of tiles: what the interpreter sums of a row may follow from the height.
SPLIT_LOOP = TileClass(16, 32, 4, 1, 1, (CHUNKS, ROW_TAILS, LONG_TAILS))
ONE = Tuning(narrow=(SPLIT_LOOP,), wide=(SPLIT_LOOP,), splits=SPLITS, overlap=False)

FORMS = (
    Form(ratio=2, k_dim=32, v_dim=32, kv_heads=1, window=Window(50)),
    Form(ratio=3, k_dim=24, v_dim=16, kv_heads=1, window=Window(64, chunked=True), softcap=2.0, interleaved=True),
    Form(ratio=1, k_dim=40, v_dim=24, kv_heads=2, first_dim=24, sinks=True),
    Form(ratio=2, k_dim=72, v_dim=72, kv_heads=1, pairs=8, window=Window(7), sinks=True, softcap=1.0),
    Form(ratio=7, k_dim=16, v_dim=16, kv_heads=1, window=Window(100_000)),
    Form(ratio=4, k_dim=16, v_dim=8, kv_heads=1, softcap=3.0),
    Form(ratio=1, k_dim=192, v_dim=128, kv_heads=1, first_dim=128, window=Window(300)),
)


def small(number: int) -> Sequences:
    """Tails over chunks that are shared, some of them long enough for several splits."""
    sequences = random_sequences(number, 5, rows=(1, 1, 4), chunk_tokens=(1, 40, 150))
    return replace(sequences, sequences=sequences.sequences[:4])


def run(number: int) -> None:
    """A random plan against float64."""
    form = replace(FORMS[number % len(FORMS)], dtype=torch.float16)
    setting = Setting(small(number), form, "cpu", LIMITS)
    plan = setting.sequences.plan()
    turn = random.Random(number).choice(("raw", "back", "none"))
    q = setting.standing(plan) if turn == "back" else setting.q
    out = setting.attend(setting.work(BOTH), plan, q, turn=turn)
    error = relative_error(out, setting.expected(plan, setting.q, turn=turn != "none"))
    assert error < 2e-3, (number, form, turn, error)


def cut(number: int) -> None:
    """Rows behind a window alone, in slices and together, with NaN in what none of them sees any more."""
    form = replace(FORMS[(0, 1, 3)[number % 3]], dtype=torch.float16)
    pages = tuple(range(20, 40))[:: -1 if number % 2 else 1]
    chunks = behind_each_other(((16, 30, 0), (64, 100, 30), (16, 30, 9)))
    sequence = StepSequence(chunks, pages, 11 + 40 * (number % 4), 60, 171 + 40 * (number % 4))
    other = StepSequence(chunks[:2], tuple(range(40, 44)), 3, 2, 133)
    setting = Setting(Sequences((sequence, other), 50 * PAGE), form, "cpu", LIMITS)
    work, plan = setting.work(ONE), setting.sequences.plan()
    assert form.window is not None
    gone = max(0, form.window.first(sequence.position) - 160) // PAGE  # pages
    setting.forget([page * PAGE + at for page in pages[:gone] for at in range(PAGE)])
    together = setting.attend(work, plan, setting.q)
    assert bool(torch.isfinite(together).all())
    slices = [(own, 1) for own in (0, 1, 15, 33, 59)] + [(0, 25), (25, 35)]
    for own, rows in slices:
        one = replace(sequence, tail_tokens=sequence.tail_tokens + own, rows=rows, position=sequence.position + own)
        alone = setting.attend(work, Sequences((one,), setting.sequences.slots).plan(), setting.q[own : own + rows])
        assert torch.equal(alone, together[own : own + rows]), (number, own, rows)


def main(first: int, last: int) -> None:
    warnings.simplefilter("ignore")  # numpy computes what kernels compute, NaN too
    torch.set_num_threads(1)
    for number in range(first, last):
        run(number)
    for number in range(first // 3, -(-last // 3)):
        cut(number)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
