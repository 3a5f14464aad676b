"""Every outcome is there from the start, with 0."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from serving.handover.door import TurnedAway
from serving.handover.leases import LeaseEnd
from serving.handover.lent import NoSession, Refusal
from serving.handover.metrics import BORROWED, OPENED, BorrowerMetrics, LenderMetrics
from tests.serving.handover.lending import value


def test_what_a_borrower_counts() -> None:
    registry = CollectorRegistry()
    metrics = BorrowerMetrics(registry, "model")
    name = "cairn_hand_over_chunks_total"
    assert all(value(registry, name, outcome=each) == 0 for each in (BORROWED, *Refusal))
    metrics.chunk(None)
    metrics.chunk(Refusal.LEASE_LOST)
    assert (value(registry, name, outcome=BORROWED), value(registry, name, outcome="lease_lost")) == (1, 1)
    name = "cairn_hand_over_sessions_total"
    metrics.session(NoSession.OFF)
    metrics.session(None)
    assert (value(registry, name, outcome=OPENED), value(registry, name, outcome="off"), value(registry, name)) == (
        1,
        1,
        2,
    )


def test_what_a_lender_counts() -> None:
    registry = CollectorRegistry()
    metrics = LenderMetrics(registry, "model")
    metrics.watch(lambda: 3, lambda: 2)
    metrics.lease_ended(LeaseEnd.EXPIRED)
    metrics.turned_away(TurnedAway.OTHER_USER)
    assert value(registry, "cairn_hand_over_leases_total", end="expired") == value(
        registry, "cairn_hand_over_leases_total"
    )
    assert value(registry, "cairn_hand_over_turned_away_total", reason="other_user") == 1
    assert (value(registry, "cairn_hand_over_leased_chunks"), value(registry, "cairn_hand_over_borrowers")) == (3, 2)
