"""Runs a module and samples its threads' Python stacks and processor time: where a service spends its time.

    python -m bench.stack_samples FILE MODULE [ARGUMENT ...]

A line of JSON goes to FILE twice a second; ``between`` adds up those of a time, ``words`` says them. The sampler is a
thread like the others and needs the interpreter for a look: a thread that holds it is seen up to 5 ms late, at
the place where it lets go. Good for what takes milliseconds, not for counting microseconds.
"""

from __future__ import annotations

import json
import runpy
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

SAMPLER = "stack sampler"
PERIOD_S = 0.007
WINDOW_S = 0.5
DEPTH = 40
TICKS_A_SECOND = 100  # of /proc, on every Linux in use


@dataclass
class Sampled:
    """A thread: seconds of processor time, samples, and how many had a function innermost or anywhere on the stack."""

    cpu_s: float = 0.0
    samples: int = 0
    inner: Counter[str] = field(default_factory=Counter)
    anywhere: Counter[str] = field(default_factory=Counter)


def between(path: Path, begin: float, end: float) -> dict[str, Sampled]:
    """What FILE says of the threads from ``begin`` to ``end`` (monotonic clock), by their names."""
    found: dict[str, Sampled] = {}
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # the last line may be half written
            window = json.loads(line)
            if begin <= window["at"] <= end:
                _add(found, window)
    return found


def words(found: dict[str, Sampled], seconds: float, most: int = 14) -> str:
    """A paragraph a thread: the busiest first, with the functions that its time goes to."""
    lines = []
    for name, thread in sorted(found.items(), key=lambda item: -item[1].cpu_s):
        if thread.cpu_s < 0.01 * seconds or name == SAMPLER:
            continue
        lines.append(f"{name}: {thread.cpu_s / seconds:.2f} processors, {thread.samples} samples")
        for title, counted in (("innermost", thread.inner), ("on the stack", thread.anywhere)):
            lines.append(f"  {title}:")
            shares = [(place, count / thread.samples) for place, count in counted.most_common()]
            told = [f"    {share:6.1%}  {place}" for place, share in shares if counted is thread.inner or share < 0.995]
            lines += told[:most]
    return "\n".join(lines)


@contextmanager
def sampling(path: Path) -> Iterator[None]:
    """Samples this process while the block runs."""
    ended = threading.Event()
    thread = threading.Thread(target=_sample, args=(path, ended), name=SAMPLER, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)


def _sample(path: Path, ended: threading.Event) -> None:
    own = threading.get_ident()
    stacks: Counter[tuple[str, ...]] = Counter()
    cpu, wrote = _cpu_seconds(), time.monotonic()
    with path.open("w") as out:
        while not ended.wait(PERIOD_S):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != own:
                    stacks[(names.get(ident, "not Python's"), *_places(frame))] += 1
            if time.monotonic() - wrote >= WINDOW_S:
                now = _cpu_seconds()
                spent = {name: seconds - cpu.get(name, 0.0) for name, seconds in now.items()}
                counted = [[*stack, count] for stack, count in stacks.items()]
                out.write(json.dumps({"at": time.monotonic(), "cpu_s": spent, "stacks": counted}) + "\n")
                out.flush()
                stacks.clear()
                cpu, wrote = now, time.monotonic()


def _places(frame: FrameType | None) -> Iterator[str]:
    """Innermost first; the innermost with its line."""
    for depth in range(DEPTH):
        if frame is None:
            return
        code = frame.f_code
        file = "/".join(code.co_filename.split("/")[-2:])
        yield f"{file} {code.co_qualname}" + (f":{frame.f_lineno}" if depth == 0 else "")
        frame = frame.f_back


def _cpu_seconds() -> dict[str, float]:
    """By threads' names; those that Python did not start are one."""
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    found: dict[str, float] = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            user, system = (task / "stat").read_text().rpartition(")")[2].split()[11:13]
            name = names.get(task.name, "not Python's")
            found[name] = found.get(name, 0.0) + (int(user) + int(system)) / TICKS_A_SECOND
    return found


def _add(found: dict[str, Sampled], window: dict[str, Any]) -> None:
    for name, seconds in window["cpu_s"].items():
        found.setdefault(name, Sampled()).cpu_s += seconds
    for name, *places, count in window["stacks"]:
        thread = found.setdefault(name, Sampled())
        thread.samples += count
        if places:
            thread.inner[places[0]] += count
            thread.anywhere.update(dict.fromkeys({place.partition(":")[0] for place in places}, count))


def main() -> None:
    file, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    with sampling(Path(file)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
