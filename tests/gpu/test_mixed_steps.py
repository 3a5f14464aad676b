"""A row's keys, values and logits have the same bits in any crowd, at any place, however cut, prefilled or decoded."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
import torch

from engine.run.cuda.runner import PackedRunner
from engine.run.pieces import GREEDY, prefill_chunk
from engine.served import ServedModel
from tests.engine.composer import Composer
from tests.gpu.engine_models import FUSED, served, tokens, wide, wide_experts, wide_routers
from tests.gpu.packing import Context, Packing, Slice, Tail

pytestmark = pytest.mark.gpu

WIDE = {"wide": wide, "wide-experts": wide_experts, "wide-routers": wide_routers}
NAMES = (*FUSED, *WIDE)
LENGTHS = (500, 17, 1100)  # of chunks: within a split, a page and a token, more than a split
PLACES = (0, 63, 64, 127, -1)


def model(name: str) -> ServedModel:
    return WIDE[name]() if name in WIDE else served(name)


@functools.cache
def packing(name: str) -> Packing:
    found = model(name)
    assert found.row_bits is not None and found.row_bits.equal, found.row_bits
    return Packing(Composer(found, pages=4096))


@functools.cache
def contexts(name: str) -> list[Context]:
    return packing(name).contexts(LENGTHS)


def released(pack: Packing, tails: list[Tail]) -> None:
    for tail in tails:
        pack.pool.release_pages(tail.pages)


def crowd(pack: Packing, kinds: list[Context], rng: random.Random, rows: int) -> list[Slice]:
    """Slices of ``rows`` rows in all, one to ninety each; most of them of one row, as those that decode."""
    slices: list[Slice] = []
    while rows:
        count = min(rows, rng.choice((1, 1, 1, rng.randint(1, 90))))
        tail = pack.tail(rng.choice(kinds), count, rng.randrange(10**6))
        slices.append(Slice(tail, 0, count, draws=False))
        rows -= count
    return slices


@pytest.mark.parametrize("rows", [1, 2, 9, 64, 65, 128, 200, 256, 512, 1024])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_among_a_crowd_at_any_place(name: str, rows: int) -> None:
    pack, kinds, rng = packing(name), contexts(name), random.Random(rows)
    for context in kinds:
        tail = pack.tail(context, 300, 7)
        pack.begin([Slice(tail, 0, 299, draws=False)])
        alone = pack.begin([Slice(tail, 299, 1)]).logits()
        kept = pack.kv(tail, 299)
        for place in sorted({place % rows for place in PLACES if place < rows}):
            before, behind = crowd(pack, kinds, rng, place), crowd(pack, kinds, rng, rows - 1 - place)
            together = pack.begin([*before, Slice(tail, 299, 1), *behind]).logits()
            assert torch.equal(together, alone), (place, context)
            assert torch.equal(pack.kv(tail, 299), kept), (place, context)
            released(pack, [part.tail for part in (*before, *behind)])
        released(pack, [tail])


@pytest.mark.parametrize("name", NAMES)
def test_any_packing_of_prompts_gives_what_their_rows_give_one_at_a_time(name: str) -> None:
    pack, kinds = packing(name), contexts(name)
    lengths = (1, 2, 17, 64, 65, 130, 257, 300)
    tails = [pack.tail(kinds[i % len(kinds)], length, 100 + i) for i, length in enumerate(lengths)]
    expected = [pack.by_decoding(tail) for tail in tails]
    kept = [pack.kv(tail) for tail in tails]
    for seed in range(8):
        pack.wipe(tails)
        for (index, end), logits in pack.packed(tails, random.Random(seed)).items():
            assert torch.equal(logits, expected[index][end - 1]), (seed, index, end)
        for index, tail in enumerate(tails):
            assert torch.equal(pack.kv(tail), kept[index]), (seed, index)
    released(pack, tails)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_tail_cut_at_any_place(name: str) -> None:
    """Behind 1024 tokens a tail has more than one split; a slice of 512 rows crosses it."""
    pack, kinds = packing(name), contexts(name)
    tail = pack.tail(kinds[1], 1300, 5)
    expected = pack.by_decoding(tail)
    kept = pack.kv(tail)
    for cuts in ([512, 1024], [511, 1023], [1, 513, 1025], [64, 128, 640, 1100], [700, 1023, 1024, 1025]):
        pack.wipe([tail])
        for first, end in zip([0, *cuts], [*cuts, 1300], strict=True):
            for at in range(first, end, 512):
                rows = min(512, end - at)
                logits = pack.begin([Slice(tail, at, rows)]).logits()[0]
                assert torch.equal(logits, expected[at + rows - 1]), (cuts, at)
        assert torch.equal(pack.kv(tail), kept), cuts
    released(pack, [tail])


@pytest.mark.parametrize("name", NAMES)
def test_a_chunk_by_slices_has_the_bits_of_the_same_tokens_decoded(name: str) -> None:
    pack, kinds = packing(name), contexts(name)
    ids = tuple(tokens(9, 1100))
    for context in (kinds[0], kinds[1]):
        run = pack.pool.allocate_run(len(ids))
        assert run is not None
        prefill_chunk(pack.runner, ids, context, run)
        chunk = Tail(context, ids, tuple(range(run.first, run.first + run.pages)))
        kept = pack.kv(chunk)
        decoded = pack.tail(context, len(ids), 9)
        assert decoded.token_ids == ids
        pack.by_decoding(decoded)
        assert torch.equal(pack.kv(decoded), kept)
        pack.wipe([chunk])
        pack.packed([chunk], random.Random(1), most=512)
        assert torch.equal(pack.kv(chunk), kept)
        pack.pool.release_run(run)
        released(pack, [decoded])


@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_step_gives_the_same_bits_every_time(name: str) -> None:
    """What races shows in repetitions: slices of several sizes, a row that decodes, a chunk twice, chunks moved."""
    pack, kinds = packing(name), contexts(name)
    tails = [pack.tail(kinds[4], 65, 104), pack.tail(kinds[1], 257, 106), pack.tail(kinds[2], 300, 107)]
    pack.begin([Slice(tails[0], 0, 6), Slice(tails[1], 0, 180), Slice(tails[2], 0, 115)])
    step = [Slice(tails[2], 115, 1), Slice(tails[0], 6, 54), Slice(tails[1], 180, 49)]
    first = pack.begin(step).logits()
    written = [(replace(part.tail, token_ids=part.tail.token_ids[: part.end]), part.first) for part in step]
    kept = [pack.kv(*place) for place in written]
    for turn in range(300):
        assert torch.equal(pack.begin(step).logits(), first), turn
    assert all(torch.equal(pack.kv(*place), before) for place, before in zip(written, kept, strict=True))
    for part, logits in zip(step, first, strict=True):
        for _ in range(100):
            alone = pack.begin([Slice(part.tail, part.end - 1, 1)]).logits()
            assert torch.equal(alone[0], logits), part.end
    released(pack, tails)


@pytest.mark.parametrize("name", [NAMES[0], "wide", "wide-experts"])
def test_captured_steps_have_the_bits_of_uncaptured_ones(name: str) -> None:
    found: list[list[torch.Tensor]] = []
    for graphs in (True, False):
        pack = Packing(Composer(model(name), pages=1024, graphs=graphs))
        kinds = pack.contexts((300, 17))
        tails = [pack.tail(kinds[i % len(kinds)], length, 100 + i) for i, length in enumerate((1, 30, 129, 200))]
        logits = pack.packed(tails, random.Random(4))
        found.append([*(logits[key] for key in sorted(logits)), *(pack.kv(tail) for tail in tails)])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_long_chunks_run_between_packed_steps_and_change_none() -> None:
    """Which way a chunk takes follows from its own length; nothing waits for it."""
    quiet, busy = (Packing(Composer(served(NAMES[0], piece_tokens=128), pages=1024, long_chunk=256)) for _ in range(2))
    assert quiet.runner.alone(257, chunk=True) and not quiet.runner.alone(256, chunk=True)
    assert not quiet.runner.alone(10**6, chunk=False)
    ids, found = tokens(3, 300), []
    for pack in (quiet, busy):
        tail, run = pack.tail((), 60, 8), pack.pool.allocate_run(300)
        assert run is not None
        chunk = Tail((), tuple(ids), tuple(range(run.first, run.first + run.pages)))
        if pack is quiet:
            prefill_chunk(pack.runner, ids, (), run)
            logits = pack.by_decoding(tail)
        else:
            steps = [pack.begin([Slice(tail, at, 1)]).logits()[0] for at in range(20)]
            for first in range(0, 300, 128):
                rows = Slice(chunk, first, min(128, 300 - first), draws=False).step_rows(0)
                piece = pack.runner.begin([type(rows)(rows.sequence, rows.sources, alone=True)])
                steps.append(pack.begin([Slice(tail, len(steps), 1)]).logits()[0])
                assert piece.wait() == []
            logits = [*steps, *(pack.begin([Slice(tail, at, 1)]).logits()[0] for at in range(len(steps), 60))]
        found.append((torch.stack(logits), pack.kv(tail), pack.kv(chunk)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_steps_that_nothing_was_prepared_for_are_not_met() -> None:
    """After ``prepare`` no step captures, and beginning one synchronises with nothing."""
    pack = Packing(Composer(served(NAMES[0]), pages=1024))
    runner = pack.runner
    assert isinstance(runner, PackedRunner)
    runner.prepare()
    for slot in range(runner.slots):
        runner.open(slot, GREEDY)
    kinds = pack.contexts((300, 17))
    captured = runner.steps.graphs
    tails = [pack.tail(kinds[i % len(kinds)], length, 100 + i) for i, length in enumerate((1, 30, 129, 200, 333))]
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack.packed(tails, random.Random(4))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert runner.steps.graphs == captured
    print("graphs", captured)
