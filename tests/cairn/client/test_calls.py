"""RPCs as values: under which salt they go, and which are sent twice."""

from __future__ import annotations

from cairn.client import calls


def test_a_call_goes_under_the_clients_salt_unless_it_names_one() -> None:
    assert calls.salted(calls.stats(), "red").request.salt == "red"
    own = calls.prefill(calls.prefill_request("a", {"salt": "blue"}))
    assert calls.salted(own, "red").request.salt == "blue"
    assert not hasattr(calls.salted(calls.loads(), "red").request, "salt"), "nothing of a tenant is asked for"


def test_only_what_does_no_harm_is_sent_twice() -> None:
    assert calls.get("a", False, False).retry and calls.pin("a").retry and not calls.delete("a").retry
