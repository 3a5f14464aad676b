"""What native code writes to descriptor 2 goes to a function of ours, to the last line before the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import os, sys
from serving.process.native_stderr import take_native_stderr
real = take_native_stderr(lambda line: real.write(f"told {line!r}\\n"))
print("by print", file=sys.stderr)
os.write(2, b"native \\xff\\n\\n")
os.system("echo child >&2")
os.write(2, b"x" * 9000 + b"\\n")
os.write(2, b"the last, without an end")
"""


def test_lines_are_told_and_the_last_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    first, second, third, long, rest, last = done.stderr.splitlines()
    assert (first, second, third) == ("told 'by print'", "told 'native \ufffd'", "told 'child'")
    assert len(long) > 8000 and long.count("x") + rest.count("x") == 9000, "cut where it is too long, and all there"
    assert last == "told 'the last, without an end'"
