"""What a person is shown of figures."""

from __future__ import annotations

from pathlib import Path

from cairn.load.answer import OK, Answer, Progress, together
from cairn.load.figures import figures
from cairn.load.processes import Load
from cairn.load.report import line, plot, rows, time_rows, warnings

SOURCES = {"device": 15, "computed": 5}
ANSWERS = [
    Answer(0, 0, 10.0, 10.0, OK, times=[10.5, 10.6], counts=[1, 1], prompt_tokens=20, reused=SOURCES),
    Answer(1, 0, 10.0, 10.1, "RESOURCE_EXHAUSTED", "full", 2.0),
]
LOAD = Load(ANSWERS, 10.0, 2.0, (0.4, 0.9))


def test_rows_say_what_was_measured() -> None:
    found = figures(LOAD, goodput={"ttft": 600.0})
    said = dict(rows(found))
    assert said["requests"] == "1 answered of 2, in 2.0 s" and said["output"] == "1.0 tokens/s, 0.50 requests/s"
    assert said["prompt tokens"] == "device 15 (75.0%), computed 5 (25.0%)"
    assert said["errors"] == "RESOURCE_EXHAUSTED 1: full" and said["goodput"].startswith("0.50 requests/s, 50.0% of")
    assert said["come again"].startswith("1 were told to, in 2.00 s")
    assert said["load generator"].startswith("90% of a processor in the busiest of 2, 1.30")
    assert time_rows(found)[0] == ("time to first token, ms", "500", "500", "500", "500", "500")
    assert dict(rows(figures(Load([]))))["errors"] == "0"


def test_a_load_generator_that_may_be_what_is_measured_says_so() -> None:
    found = figures(LOAD)
    busy, late = warnings(found, arriving=True)
    assert "90% busy" in busy and "--processes" in busy and "99 ms" in late
    assert len(warnings(found, arriving=False)) == 1
    assert warnings(figures(Load(ANSWERS[:1], 0.0, 1.0, (0.1,))), arriving=True) == []


def test_a_line_says_how_far_it_is() -> None:
    progress = together([Progress(1, 2, 0, 9, [0.1]), Progress(3, 0, 1, 1, [0.3])])
    assert line(progress, 12.34, 99.6, [0.1, 0.3]) == (
        "  12.3 s  4 running, 2 answered, 1 failed  100 tokens/s  first token 200 ms"
    )
    assert "no first token" in line(progress, 1.0, 0.0, [])


def test_a_plot_is_drawn_even_of_nothing(tmp_path: Path) -> None:
    for name, answers in (("some.png", ANSWERS), ("none.png", [])):
        plot(answers, 10.0, tmp_path / name, "rag")
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
