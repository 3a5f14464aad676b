"""What an operator sees, of real services through a real fault: alerts, the dashboard's numbers, log lines."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cairn import InvalidRequest
from tests.decode_service.models import tokens
from tests.deploy.exported import scraped
from tests.deploy.observing import Observed, counted, observed, wait_until
from tests.deploy.test_deploy_files import dashboard_queries

REQUEST_ID = "known-7f3a"
STARTING = (
    *(
        "importing torch",
        "listening on",
        "loading the tokenizer",
        "loading the weights",
        "checking",
        "opening the store",
    ),
    *("preparing the KV pool", "ready:"),
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    with observed(tmp_path_factory.mktemp("observed")) as services:
        yield services


def test_a_starting_service_says_what_it_does(seen: Observed) -> None:
    for service in (seen.prefill, seen.decode):
        said = [line["message"] for line in service.lines()]
        places = [next(at for at, words in enumerate(said) if stage in words) for stage in STARTING]
        assert places[0] == 0 and len(set(places)) == len(places), said
        assert all(" s: " in said[at] for at in places[1:]), said


def test_one_request_id_in_every_line_of_both_services(seen: Observed) -> None:
    parts = [tokens(1, 60), tokens(2, 50), tokens(3, 5)]
    seen.client.generate(parts, max_tokens=4, ignore_eos=True, request_id=REQUEST_ID).finish()
    decode_stages = ("accepted", "admitted", "not stored", "asking for chunks", "first token", "finished")
    seen.decode.wait_for_lines(REQUEST_ID, *decode_stages)
    seen.prefill.wait_for_lines(REQUEST_ID, "computing 60 tokens", "computing 50 tokens", "computed: chunk")
    for service in (seen.decode, seen.prefill):
        threads = {line["thread"] for line in service.lines() if line["request_id"] == REQUEST_ID}
        assert len(threads) >= 2, "the event loop's, and those of loaders and devices"
        assert all(line["service"] == service.name for line in service.lines())


def test_a_request_without_an_id_gets_one_and_errors_tell_it(seen: Observed) -> None:
    with pytest.raises(InvalidRequest) as caught:
        seen.client.generate([[10**6], [20]]).finish()
    made = caught.value.request_id
    assert len(made) == 32 and made in str(caught.value)
    seen.decode.wait_for_lines(made, "INVALID_ARGUMENT")
    with pytest.raises(InvalidRequest) as caught:
        seen.client.prefill([10**6], request_id="mine\nforged")
    seen.prefill.wait_for_lines("mine_forged", "INVALID_ARGUMENT")


def test_wrong_stored_bytes_raise_the_alert_and_are_logged_once(seen: Observed) -> None:
    """Nothing has failed before: what fires must have seen the very first event."""
    corrupt = 'cairn_store_reads_total{outcome="verify_failed"}'
    misses = 'cairn_cache_misses_total{reason="verify_failed"}'
    seen.prometheus.wait_for(f"sum({corrupt})", 0)
    assert seen.prometheus.query(misses) and "CairnStoredBytesWrong" not in seen.prometheus.firing()
    before = set(seen.store.glob("data/**/*"))
    chunks = [
        seen.client.prefill(tokens(11, 70), durable=True),
        seen.client.prefill(tokens(12, 70), reuse="independent", durable=True),
    ]
    files = [path for path in set(seen.store.glob("data/**/*")) - before if path.is_file()]
    assert len(files) == 2
    for path in files:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    result = seen.client.generate([*chunks, tokens(13, 5)], reuse="independent", max_tokens=2, ignore_eos=True).finish()
    reasons = [part.miss_reason for part in result.reuse.segments]
    assert reasons[:2] == ["verify_failed"] * 2
    wait_until(lambda: "CairnStoredBytesWrong" in seen.prometheus.firing(), "the alert fires")
    assert seen.prometheus.firing()["CairnStoredBytesWrong"]["severity"] == "page"
    assert seen.prometheus.value(f"sum({corrupt})") == 2
    seen.prometheus.wait_for(f"sum({misses})", 2)
    for path in files:
        key = path.name.partition(".")[0]
        lines = [
            line["message"]
            for service in (seen.prefill, seen.decode)
            for line in service.lines()
            if "verify_failed" in line["message"] and key in line["message"] and "quarantine" in line["message"]
        ]
        assert len(lines) == 1 and str(seen.store / "quarantine" / path.name) in lines[0]


def test_the_dashboard_counts_a_shared_store_once(seen: Observed) -> None:
    seen.client.generate([tokens(21, 40), tokens(22, 5)], max_tokens=2, ignore_eos=True).finish()
    stats = seen.client.stats()
    shown = {query.replace("$__rate_interval", "20s").replace("$model", ".*"): query for query in dashboard_queries()}
    for query in shown:
        seen.prometheus.query(query)  # raises for one that Prometheus refuses
    told = {"bytes": stats.kv_bytes, "entries": stats.kv_entries, "capacity_bytes": stats.capacity_bytes}
    for name, expected in told.items():
        (query,) = [each for each in shown if f"cairn_store_{name}{{" in each]
        seen.prometheus.wait_for(query, expected)
        seen.prometheus.wait_for(f"sum(cairn_store_{name})", 2 * expected)  # both services tell it


def test_quantiles_are_those_that_clients_see(seen: Observed) -> None:
    def first_token_s(number: int) -> float:
        began = time.perf_counter()
        stream = seen.client.generate([tokens(1000 + number, 200), tokens(31, 5)], max_tokens=8, ignore_eos=True)
        next(stream)
        took = time.perf_counter() - began
        stream.finish()
        return took

    first_token_s(-1)
    name = "cairn_time_to_first_token_seconds"
    exported = scraped(f"http://127.0.0.1:{seen.decode.metrics_port}/metrics")
    before = float(next(line for line in exported.splitlines() if line.startswith(f"{name}_count")).split()[-1])
    with ThreadPoolExecutor(8) as threads:
        clients = list(threads.map(first_token_s, range(64)))
    seen.prometheus.wait_for(f"{name}_count", before + len(clients))
    server = seen.prometheus.value(f"histogram_quantile(0.5, {name}_bucket)")
    assert math.isclose(server, statistics.median(clients), rel_tol=0.2)


def test_no_series_is_born_by_an_event(seen: Observed) -> None:
    """Comes last: whatever the tests above have counted, it was counted in a series that began at 0."""
    now = counted((seen.prefill, seen.decode))
    assert now == seen.counted_at_start
    assert any("code=INVALID_ARGUMENT" in labels for _, _, *labels in now)
