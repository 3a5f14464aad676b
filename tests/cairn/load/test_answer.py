"""What is counted while a job runs."""

from __future__ import annotations

from cairn.load.answer import OK, Answer, Progress, together


def test_progress_counts_what_runs_and_what_became_of_it() -> None:
    progress = Progress()
    good, bad = Answer(0, 0, 1.0), Answer(1, 0, 1.0)
    for answer in (good, bad):
        progress.began()
        answer.times.append(1.5)
        progress.heard(answer, 2)
    good.times.append(2.0)
    progress.heard(good, 1)
    assert (progress.running, progress.tokens, progress.firsts_s) == (2, 5, [0.5, 0.5])
    good.status = OK
    progress.over(good)
    progress.over(bad)
    assert (progress.running, progress.answered, progress.failed) == (0, 1, 1)
    taken = progress.taken()
    assert taken.firsts_s == [0.5, 0.5] and progress.taken().firsts_s == [] and taken.tokens == 5
    assert together([taken, taken]).firsts_s == [0.5] * 4 and together([]).tokens == 0


def test_tokens_are_counted_by_the_server_if_it_does() -> None:
    assert Answer(0, 0, 0.0, counts=[1, 2]).generated == 3 and Answer(0, 0, 0.0, counts=[1], tokens=9).generated == 9
