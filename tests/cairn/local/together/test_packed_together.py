"""One process with a real model whose rows share steps: chunks of jobs and requests, prompts and streams together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cairn.local.together.one_process import together
from tests.decode_service.models import loaded, model_dir, tokens
from tests.decode_service.packing import PackingRunner, packing
from tests.decode_service.pair import pair
from tests.decode_service.test_packed_model import DOCUMENTS, requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("reuse", ["exact", "anchored", "independent"])
def test_answers_beside_jobs_are_those_of_two_processes(folder: Path, tmp_path: Path, reuse: Any) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "two") as two:
        expected = [two.generate(parts, **options) for parts, options in requests(reuse)]
    with together(packing(loaded(folder, "decode")), tmp_path / "one") as one:
        runner = one.decode.worker.runner
        assert isinstance(runner, PackingRunner)
        with ThreadPoolExecutor(4) as threads:
            jobs = [threads.submit(one.client.prefill, part, reuse=reuse) for part in (*DOCUMENTS, tokens(9, 150))]
            answers = one.together_each(requests(reuse))
            made = [job.result(60) for job in jobs]
        for want, got in zip(expected, answers, strict=True):
            assert got.token_ids == want.token_ids
            assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
            assert got.usage.cached_tokens + got.usage.computed_tokens == want.usage.prompt_tokens
        assert runner.mixed > 3 and sum(chunk.computed_tokens for chunk in made) >= 150
        one.check_idle()


def test_streams_have_a_row_in_every_step_while_chunks_are_computed(folder: Path, tmp_path: Path) -> None:
    with together(packing(loaded(folder, "decode")), tmp_path / "one") as one:
        runner = one.decode.worker.runner
        begin, steps = runner.begin, []

        def noted(batch: Any) -> Any:
            steps.append((sum(rows.sources[0] < 0 for rows in batch), sum(len(rows.sources) > 1 for rows in batch)))
            return begin(batch)

        with one.client.generate([tokens(60, 5)], max_tokens=150, ignore_eos=True) as stream:
            next(stream)
            runner.begin = noted
            one.client.prefill(tokens(61, 1200))
            beside = [decoding for decoding, slices in steps if slices]
            runner.begin = begin
        assert len(beside) >= 10 and min(beside[:10]) == 1
        one.check_idle()
