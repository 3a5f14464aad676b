"""Who holds a claim: the dead are known here, those elsewhere are left alone."""

from __future__ import annotations

import os
import subprocess
import sys

from chunk_store.claimant import is_dead, this_claimant


def test_a_living_process_is_not_dead_and_a_dead_one_is() -> None:
    assert this_claimant() == this_claimant() and not is_dead(this_claimant())
    script = "from chunk_store.claimant import this_claimant; print(this_claimant(), flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    name = other.stdout.readline().strip()
    assert name != this_claimant() and not is_dead(name)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(name), "a zombie runs no more"
    other.communicate(timeout=30)
    assert is_dead(name)


def test_a_process_id_that_was_given_again_is_another_claimant() -> None:
    boot, namespace, pid, start = this_claimant().split("/")
    assert is_dead("/".join((boot, namespace, pid, str(int(start) - 1))))


def test_of_another_machine_or_in_another_form_nothing_is_known() -> None:
    boot, namespace, pid, start = this_claimant().split("/")
    for name in (f"other/{namespace}/{pid}/0", f"{boot}/other/{pid}/0", "", "a/b", f"{boot}/{namespace}/x/{start}"):
        assert not is_dead(name)
