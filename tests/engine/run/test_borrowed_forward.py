"""Packed steps over a model's own code: the oracle's logits, in mixed steps, pieces and steps that decode."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.probe import examine
from engine.plan import CascadePlan, PlacedChunk, StepSequence, behind_each_other
from engine.run.cuda.borrowed import BorrowedForward, CapturedModel, own_values
from engine.run.cuda.cascade.tuning import Tuning
from engine.run.cuda.replaced import product_forwards, replaced
from engine.run.cuda.runner import PackedRunner
from engine.run.pieces import GREEDY
from engine.run.protocol import StepRows
from engine.sampling.params import Draw, Scored
from engine.sampling.scoring import PendingScores
from engine.served import look_into
from tests import oracle
from tests.architectures import ARCHITECTURES, build, build_named
from tests.engine.composer import Composer
from tests.engine.run.test_packed_steps import Graphs, graphs, rows_of
from tests.engine.run.torch_works import packed_runner
from tests.gpu.packing import Packing

__all__ = ["graphs"]  # a fixture

# Norms of every form, products with biases and without, experts, two ropes, no rope, tables that would change.
NAMES = (
    "qwen3-ratio2", "gemma2-softcap", "gemma3-two-ropes", "phi3-partial", "olmo2", "granite", "starcoder2",
    "cohere2-some-nope", "gpt-oss-sinks", "deepseek-v3-mla", "mixtral-moe", "llama-dynamic", "phi3-longrope",
    "gpt-neox",
)  # fmt: skip


def words(seed: int, count: int) -> list[int]:
    return torch.randint(3, 211, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def composer_of(name: str, monkeypatch: pytest.MonkeyPatch, **options: bool | int) -> Composer:
    served = look_into(BorrowedModel(build_named(name), name=name))
    composer = Composer(served, pages=256)
    model = CapturedModel.of(served.borrowed, served.findings)
    composer.runner = packed_runner(monkeypatch, model, composer.pool, slots=4, rows_max=64, **options)
    return composer


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_models_own_code_in_packed_steps_gives_the_oracles_logits(
    name: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    composer = composer_of(name, monkeypatch, together=together, piece_tokens=24)
    limit = composer.served.context_length_max
    sizes = (9, 31, 5) if limit > 100 else (3, 9, 2)
    chunks = [words(i, size) for i, size in enumerate(sizes)]
    moved = "exact" if composer.served.findings.rotation_refusal else "independent"
    requests = [(chunks, words(7, 6), "exact"), (chunks[::-1], words(8, 3), moved), (chunks[:1], words(9, 1), "exact")]
    for (parts, query, mode), (tokens, logits) in zip(requests, composer.generate(requests, 4), strict=True):
        expected, expected_logits = oracle.greedy(build_named(name), parts, query, mode, 4)
        assert tokens == expected
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)


def sequence_of(composer: Composer, count: int) -> tuple[StepSequence, list[int]]:
    pages = composer.pool.allocate_pages(composer.pool.pages_for(count))
    assert pages is not None
    return StepSequence((), tuple(pages), 0, count, 0), words(11, count)


@pytest.mark.parametrize("name", ["gemma3-two-ropes", "deepseek-v3-mla"])
def test_slices_of_prompts_beside_rows_that_decode_give_what_they_give_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Packing(composer_of(name, monkeypatch))
    kinds = pack.contexts((30, 9))
    tails = [pack.tail(kinds[i % len(kinds)], length, 100 + i) for i, length in enumerate((1, 17, 40))]
    expected, kept = [pack.by_decoding(tail) for tail in tails], [pack.kv(tail) for tail in tails]
    for (index, end), logits in pack.packed(tails, random.Random(2)).items():
        torch.testing.assert_close(logits, expected[index][end - 1], atol=1e-4, rtol=1e-4)
    for tail, before in zip(tails, kept, strict=True):
        torch.testing.assert_close(pack.kv(tail), before, atol=1e-4, rtol=1e-4)


def test_more_rows_of_a_piece_are_scored_than_there_are_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of its own is one step, again for each few rows that are scored; several answers begin behind it."""
    composer = composer_of("olmo2", monkeypatch, together=False, piece_tokens=24)
    runner, module = composer.runner, build_named("olmo2")
    assert isinstance(runner, PackedRunner) and runner.alone(1, chunk=False) and runner.alone(1, chunk=True)
    sequence, ids = sequence_of(composer, 20)
    wanted = tuple((row, ids[row + 1]) for row in range(19))
    for slot in range(2):
        runner.open(slot, GREEDY)
    step = runner.begin(
        [StepRows(sequence, ids, Draw(0, 0, 20), alone=True, also=(Draw(1, 0, 20),), scored=Scored(wanted, top=1))]
    )
    logits = oracle.logits(module, [], ids, "exact")
    expected = logits.log_softmax(-1)
    assert [score.logprob for score in step.scores()] == pytest.approx(
        [float(expected[row, token]) for row, token in wanted], abs=1e-4
    )
    assert [choice.token_id for choice in step.wait()] == [int(logits[-1].argmax())] * 2
    torch.testing.assert_close(step.logits(), logits[-1:].expand(2, -1), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="a piece of 25 rows, 24 are the most"):
        runner.begin([StepRows(*sequence_of(composer, 25), alone=True)])


def test_a_piece_by_library_attention_is_drawn_from_by_a_step_of_its_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    composer = composer_of("olmo2", monkeypatch, together=False, piece_tokens=24)
    runner = composer.runner
    assert isinstance(runner, PackedRunner)
    begun, steps = list[CascadePlan](), runner.steps

    class Pieces:
        def launch(self, plan: CascadePlan, sources: Sequence[int], scored: Scored | None) -> list[PendingScores]:
            begun.append(plan)
            steps.launch(plan, sources, [], [])
            return []

    runner._pieces = Pieces()  # type: ignore[assignment]
    runner.open(0, GREEDY)
    sequence, ids = sequence_of(composer, 20)
    step = runner.begin([StepRows(sequence, ids, Draw(0, 0, 20), alone=True)])
    assert len(begun) == 1 and step.plan is begun[0] and len(step.plan.slots) == 20
    expected = oracle.logits(build_named("olmo2"), [], ids, "exact")[-1]
    torch.testing.assert_close(step.logits()[0], expected, atol=1e-4, rtol=1e-4)
    assert step.wait()[0].token_id == int(expected.argmax())


def test_once_prepared_layers_with_windows_capture_nothing(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long chunk is read by tall tiles where all of it is seen, and by others where a window cuts it."""
    settings = {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 300}
    borrowed = BorrowedModel(build("gemma2", {**settings, "num_hidden_layers": 2}).bfloat16(), name="gemma2")
    findings = replace(examine(borrowed), deferred=False)
    pool = PagedKVPool(findings.layout, pages=5000, chunk_pages=2000, page_size=16)
    forward = BorrowedForward(CapturedModel.of(borrowed, findings), pool, positions=1000)
    runner = PackedRunner(forward, slots=16, rows_max=64, tuning=Tuning())
    runner.prepare()
    captured, rng = runner.steps.graphs, random.Random(3)
    seen = set()
    chunks = [PlacedChunk(16 * first, tokens, 0, 0) for first, tokens in ((0, 100), (10, 3000), (300, 20_000))]
    for _ in range(80):
        room, batch = runner.room(decoding=True), []
        for slot in range(rng.randint(1, 16)):
            runner.open(slot, GREEDY)
            context = behind_each_other(
                (each.first_slot, each.tokens, 0) for each in rng.sample(chunks, rng.randint(0, 3))
            )
            room.grant([each.tokens for each in context], 900)
            batch.append(rows_of(runner, slot, 1, chunks=context, before=rng.randint(0, 900), slot=slot))
        runner.begin(batch)
        seen.add(runner.steps._work.classes)
    assert len(forward.windows) == 2 and len(set(forward.windows)) == 2 and len(seen) > 1, seen
    assert runner.steps.graphs == captured


def test_products_with_one_input_are_one_and_rows_elsewhere_their_own() -> None:
    module = build_named("olmo2")
    with torch.inference_mode():
        check_joined(module)


def check_joined(module: Any) -> None:
    borrowed = BorrowedModel(module, name="olmo2")
    attention = module.model.layers[0].self_attn
    forwards = product_forwards(borrowed, {})
    x, other = torch.randn(1, 5, 64), torch.randn(1, 2, 64)
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    expected = [part(x) for part in parts]
    assert all(part in forwards for part in parts) and module.model.layers[0].mlp in forwards
    with replaced(forwards):
        found = [attention.q_proj(x), attention.k_proj(other), attention.k_proj(x), attention.v_proj(x)]
        gated = module.model.layers[0].mlp(x)
    torch.testing.assert_close(found[1], attention.k_proj(other))
    for ours, theirs in zip((found[0], *found[2:]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gated, module.model.layers[0].mlp(x), atol=1e-5, rtol=1e-5)
    first = attention.q_proj.weight.untyped_storage().data_ptr()
    assert attention.v_proj.weight.untyped_storage().data_ptr() == first, "nothing is kept twice"


def test_an_odd_head_is_lengthened_and_nobody_sees_it() -> None:
    module = build_named("gpt-neox")
    head = module.embed_out if hasattr(module, "embed_out") else module.lm_head
    x = torch.randn(3, 64)
    expected = head(x)
    with replaced(product_forwards(BorrowedModel(module, name="neox"), {})):
        torch.testing.assert_close(head(x), expected)
    assert head.weight.shape == (211, 64) and head.weight.untyped_storage().nbytes() >= 224 * 64 * 4


@pytest.mark.parametrize("name", ["gemma2-softcap", "starcoder2", "gpt-neox"])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("looked", [False, True])
def test_matrices_are_moved_in_and_out_of_inference_mode(name: str, built: bool, looked: bool) -> None:
    with torch.inference_mode(built):
        borrowed = BorrowedModel(build(*ARCHITECTURES[name]), name=name)
        findings = examine(borrowed)
    ids = torch.arange(3, 8)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        return own_values(q, v)

    expected = borrowed.forward(ids, ids, attend, ids - 3)
    with torch.inference_mode(looked):
        for _ in range(3):
            model = CapturedModel.of(borrowed, findings)
    for _ in range(2):
        with torch.inference_mode():
            logits, _ = model.run(ids, ids, attend, ids - 3)
        torch.testing.assert_close(logits.float(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(borrowed.forward(ids, ids, attend, ids - 3), expected)
