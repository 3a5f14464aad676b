"""What hand-over counts on either side. Every label value is there from the start."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from serving.handover.door import TurnedAway
from serving.handover.leases import LeaseEnd
from serving.handover.lent import NoSession, Refusal

BORROWED, OPENED = "borrowed", "opened"


class LenderMetrics:
    """Leases and connections of one lender."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model = model_name
        label = ["model_name"]
        self._leases = Counter(
            "cairn_hand_over_leases", "Leases of chunks that ended", [*label, "end"], registry=registry
        )
        self._turned_away = Counter(
            "cairn_hand_over_turned_away", "Connections that were closed on", [*label, "reason"], registry=registry
        )
        for end in LeaseEnd:
            self._leases.labels(model_name, end.value)
        for reason in TurnedAway:
            self._turned_away.labels(model_name, reason.value)

    def lease_ended(self, how: LeaseEnd) -> None:
        self._leases.labels(self._model, how.value).inc()

    def turned_away(self, why: TurnedAway) -> None:
        self._turned_away.labels(self._model, why.value).inc()

    def watch(self, leases: Callable[[], int], sessions: Callable[[], int]) -> None:
        """Reads how many there are when somebody asks for the metrics."""
        for name, text, read in (
            ("leased_chunks", "Leases that hold now", leases),
            ("borrowers", "Processes that have this pool open", sessions),
        ):
            gauge = Gauge(f"cairn_hand_over_{name}", text, ["model_name"], registry=self._registry)
            gauge.labels(self._model).set_function(read)


class BorrowerMetrics:
    """Chunks and sessions of one borrower."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model = model_name
        self._chunks = Counter(
            "cairn_hand_over_chunks",
            "Computed chunks by how they came from their lender, or why they did not",
            ["model_name", "outcome"],
            registry=registry,
        )
        self._sessions = Counter(
            "cairn_hand_over_sessions",
            "Sessions with lenders that were opened, or why they were not",
            ["model_name", "outcome"],
            registry=registry,
        )
        for outcome in (BORROWED, *Refusal):
            self._chunks.labels(model_name, str(outcome))
        for opened in (OPENED, *NoSession):
            self._sessions.labels(model_name, str(opened))

    def chunk(self, refusal: Refusal | None) -> None:
        """A chunk was copied from its lender, or not."""
        self._chunks.labels(self._model, BORROWED if refusal is None else refusal.value).inc()

    def session(self, why_not: NoSession | None) -> None:
        """A session was opened, or not."""
        self._sessions.labels(self._model, OPENED if why_not is None else why_not.value).inc()
