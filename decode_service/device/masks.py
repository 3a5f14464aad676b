"""What the draws of a step are told: which tokens may come in answers that follow a grammar.

runner that waits     tokens are all read:   fill, in a thread | forward            | draw
runner that runs ahead                       forward | read the step before | fill  | draw
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLExecutor

from decode_service.scheduling.sequence import Sequence
from engine.run.protocol import Runner
from engine.sampling.shaping import Bits
from text.grammar.matcher import GrammarFailed, fill_rows

FILL_S_MAX = 60.0  # milliseconds, on a machine that does nothing else


class Masks:
    """Fills masks for the steps of one runner. Its methods belong to the device thread."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._executor: LLExecutor | None = None  # from the first grammar on
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def stop(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def of(self, sequences: Items[Sequence]) -> StepMasks:
        """The masks of the next step's draws that need one, in order."""
        if self._executor is None:
            self._executor = LLExecutor()
        masks = StepMasks(sequences, self._runner.bitmasks(len(sequences)), self._executor)
        if not self._runner.runs_ahead:
            masks.begin(self._thread)
        return masks


class StepMasks:
    """The masks of one step: a row of ``bits`` for each of ``sequences``."""

    def __init__(self, sequences: Items[Sequence], bits: Bits, executor: LLExecutor) -> None:
        self.sequences = sequences
        self.bits = bits
        self._executor = executor
        self._filling: Future[list[GrammarFailed | None]] | None = None

    def begin(self, thread: ThreadPoolExecutor) -> None:
        """Begins to fill them; nothing may change where the answers stand until ``fill``."""
        self._filling = thread.submit(self._fill)

    def fill(self) -> list[tuple[Sequence, GrammarFailed]]:
        """Fills them, or waits until they are filled: who cannot go on, and why."""
        failed = self._fill() if self._filling is None else self._filling.result(FILL_S_MAX)
        return [(each, error) for each, error in zip(self.sequences, failed, strict=True) if error is not None]

    def _fill(self) -> list[GrammarFailed | None]:
        # Whoever has ended meanwhile has no grammar any more, and what is drawn for it is dropped.
        return fill_rows([sequence.grammar for sequence in self.sequences], self.bits, self._executor)
