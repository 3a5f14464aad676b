"""What became of one request, and what of a job's requests so far."""

from __future__ import annotations

from dataclasses import dataclass, field

OK = "OK"
CUT = "CUT"  # the status of what ran when the time was over, or when the person had seen enough
NOT_SENT = "NOT_SENT"  # it was due while as many ran as may run at once


@dataclass
class Answer:
    """One request. Times are seconds of the monotonic clock; ``counts`` tokens came at each of ``times``.

    ``asked`` is when it was due, which is when its waiting began: of requests that arrive by themselves the time of
    arrival, however late it was ``sent``. ``status`` is OK, CUT, NOT_SENT, a gRPC status code's name, ``HTTP 503``, or
    what was wrong with the connection; ``reused`` are prompt tokens by where their KV came from.
    """

    session: int
    turn: int
    asked: float
    sent: float = 0.0
    status: str = CUT
    detail: str = ""
    retry_after_s: float | None = None
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    finish_reason: str = ""
    tokens: int | None = None  # generated ones, where the server counts them otherwise
    prompt_tokens: int = 0
    reused: dict[str, int] = field(default_factory=dict)
    stages_ms: dict[str, float] = field(default_factory=dict)

    @property
    def generated(self) -> int:
        """Tokens of the answer."""
        return sum(self.counts) if self.tokens is None else self.tokens


@dataclass
class Progress:
    """How far a job is: requests that run, were answered and failed, tokens so far; times to first token (s) since
    the last report."""

    running: int = 0
    answered: int = 0
    failed: int = 0
    tokens: int = 0
    firsts_s: list[float] = field(default_factory=list)

    def began(self) -> None:
        self.running += 1

    def heard(self, answer: Answer, tokens: int) -> None:
        """Tokens of an answer have come; its ``times`` have them already."""
        self.tokens += tokens
        if len(answer.times) == 1:
            self.firsts_s.append(answer.times[0] - answer.asked)

    def over(self, answer: Answer) -> None:
        self.running -= 1
        if answer.status == OK:
            self.answered += 1
        else:
            self.failed += 1

    def taken(self) -> Progress:
        """The numbers now; the times to first token are given once."""
        now = Progress(self.running, self.answered, self.failed, self.tokens, self.firsts_s)
        self.firsts_s = []
        return now


def together(parts: list[Progress]) -> Progress:
    """What several processes report, as one."""
    return Progress(
        sum(each.running for each in parts),
        sum(each.answered for each in parts),
        sum(each.failed for each in parts),
        sum(each.tokens for each in parts),
        [first_s for each in parts for first_s in each.firsts_s],
    )
