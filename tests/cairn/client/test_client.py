"""The client against scripted services: replies, streaming, errors, retries, deadlines, paging, cancellation."""

from __future__ import annotations

import gc
import subprocess
import threading
import time

import grpc
import pytest

import cairn
from cairn import CairnError, Client
from cairn.client.errors import error_from_status
from cairn.local.processes import free_port
from protos import chunks_pb2
from tests.cairn.cairn_fakes import FakeServices, digits

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "draining")


def test_prefill_says_what_happened(client, services):
    chunk = client.prefill("hello", type="code", name="greeting", context=[cairn.ChunkRef("a")])
    assert (chunk.id, chunk.outcome, chunk.tokens, chunk.computed_tokens) == (digits("hello"), "computed", 7, 7)
    assert (chunk.name, chunk.type, chunk.newly_registered) == ("greeting", "code", True)
    assert chunk.timings.prefill_s == 0.0025 and chunk.timings.total_s == 0.003
    assert list(services.script.requests[0].context_chunk_ids) == ["a"]


def test_an_untyped_chunk_is_context(client):
    assert client.prefill([1, 2]).type == "context"


def test_prefill_many_keeps_order_and_goes_on_after_a_failure(client, services):
    results = list(client.prefill_many(["one", "bad", [3, 4]], tags=["t"]))
    assert [result.id for result in (results[0], results[2])] == [digits("one"), digits("3,4")]
    assert isinstance(results[1], cairn.InvalidRequest)
    assert results[1].message == "text: bad"
    assert [list(request.tags) for request in services.script.requests] == [["t"]] * 3


def test_prefill_many_of_nothing(client):
    assert list(client.prefill_many([])) == []


def test_prefill_many_raises_when_the_stream_fails(client, services):
    services.script.fail = [(grpc.StatusCode.RESOURCE_EXHAUSTED, "pool is full")]
    with pytest.raises(cairn.Overloaded, match="pool is full"):
        list(client.prefill_many(["one", "two"]))


def test_generate_streams_deltas_and_then_has_the_result(client, services):
    chunk = client.prefill("hello")
    stream = client.generate([chunk, "query"], logprobs=True, request_id="r1", reuse="independent")
    with pytest.raises(RuntimeError, match="no result yet"):
        _ = stream.result
    deltas = list(stream)
    assert [delta.text for delta in deltas] == ["Cairn ", "is ", "stone."]
    assert [delta.token_ids for delta in deltas] == [(0,), (1,), (2,)]
    assert deltas[0].logprobs == (-0.5,)
    result = stream.result
    assert (result.text, result.token_ids, result.logprobs) == ("Cairn is stone.", (0, 1, 2), (-0.5,) * 3)
    assert (result.request_id, result.finish_reason, result.seed, result.model_name) == ("r1", "stop", 42, "fake")
    assert result.usage.prompt_tokens == result.usage.cached_tokens + result.usage.computed_tokens == 9
    assert result.timings.first_token_s == 0.005
    assert list(stream) == []
    assert services.script.requests[-1].reuse_mode == chunks_pb2.REUSE_MODE_INDEPENDENT


def test_the_reuse_report_names_sources_and_reasons(client):
    report = client.generate(["a", "q"], reuse="anchored").finish().reuse
    assert (report.reuse_mode, report.exactness) == ("anchored", "exact_block_mask")
    document, query = report.segments
    assert (document.source, document.level, document.offset, document.miss_reason) == ("store", 0, -4, "")
    assert (query.source, query.miss_reason, query.chunk_id, query.type) == ("computed", "not_stored", "", "query")


def test_finish_after_some_deltas_returns_the_whole_text(client):
    stream = client.generate(["q"])
    next(stream)
    assert stream.finish().text == "Cairn is stone."


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_an_abandoned_stream_is_cancelled(client, services, how):
    services.script.endless = True
    stream = client.generate(["q"], timeout_s=30)
    assert next(stream).text == "Cairn "
    if how == "close":
        stream.close()
        assert list(stream) == []
    elif how == "with":
        with stream:
            next(stream)
    del stream
    gc.collect()
    assert services.script.cancelled.wait(60)


def test_breaking_out_of_the_loop_cancels(client, services):
    services.script.endless = True
    for delta in client.generate(["q"], timeout_s=30):
        assert delta.text
        break
    gc.collect()
    assert services.script.cancelled.wait(60)


def test_a_finished_stream_was_not_cancelled(client, services):
    client.generate(["q"]).finish()
    gc.collect()
    assert not services.script.cancelled.wait(0.2)


def test_close_from_another_thread_ends_the_loop(client, services):
    services.script.endless = True
    stream = client.generate(["q"], timeout_s=30)
    next(stream)
    threading.Timer(0.1, stream.close).start()
    assert sum(1 for _ in stream) >= 0
    assert services.script.cancelled.wait(60)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", cairn.InvalidRequest),
        ("OUT_OF_RANGE", cairn.InvalidRequest),
        ("NOT_FOUND", cairn.NotFound),
        ("ALREADY_EXISTS", cairn.Conflict),
        ("FAILED_PRECONDITION", cairn.Unsupported),
        ("UNIMPLEMENTED", cairn.Unsupported),
        ("RESOURCE_EXHAUSTED", cairn.Overloaded),
        ("DEADLINE_EXCEEDED", cairn.DeadlineExceeded),
        ("CANCELLED", cairn.Cancelled),
        ("UNAUTHENTICATED", cairn.Unauthorized),
        ("PERMISSION_DENIED", cairn.Unauthorized),
        ("INTERNAL", cairn.ServerError),
    ],
)
def test_a_status_becomes_its_error(client, services, code, kind):
    services.script.fail = [(grpc.StatusCode[code], "because of this")] * 2
    with pytest.raises(kind) as caught:
        client.stats()
    with pytest.raises(kind):
        client.generate(["q"]).finish()
    assert (caught.value.code, caught.value.message) == (code, "because of this")
    assert services.address in str(caught.value)
    assert len(services.script.requests) == 2, "only UNAVAILABLE is tried again"


def test_every_status_code_has_an_error():
    for code in grpc.StatusCode:
        if code is not grpc.StatusCode.OK:
            assert type(error_from_status(code.name, "m")) is not CairnError


def test_unavailable_is_retried_a_few_times(client, services):
    services.script.fail = [UNAVAILABLE] * 3
    assert client.stats().backend == "file"
    services.script.fail = [UNAVAILABLE] * 9
    with pytest.raises(cairn.Unavailable, match="draining"):
        client.stats()
    assert len(services.script.fail) == 5


def test_unavailable_before_the_first_delta_is_retried(client, services):
    services.script.fail = [UNAVAILABLE] * 2
    assert client.generate(["q"]).finish().text == "Cairn is stone."


def test_after_the_first_delta_nothing_is_retried(client, services):
    services.script.fail_after_words = UNAVAILABLE
    stream = client.generate(["q"])
    with pytest.raises(cairn.Unavailable):
        stream.finish()
    assert len(services.script.requests) == 1
    assert list(stream) == []


def test_delete_is_never_sent_twice(client, services):
    services.script.fail = [UNAVAILABLE]
    with pytest.raises(cairn.Unavailable):
        client.delete("abc")
    assert len(services.script.requests) == 1


def test_a_stream_without_its_final_message_is_an_error(client, services):
    services.script.omit_complete = True
    with pytest.raises(cairn.ServerError, match="before its final message"):
        client.generate(["q"]).finish()


def test_a_service_that_starts_late_is_reached_by_the_retry():
    port = free_port("127.0.0.1")
    started: list[FakeServices] = []
    timer = threading.Timer(0.15, lambda: started.append(FakeServices(port)))
    timer.start()
    with Client(f"127.0.0.1:{port}", f"127.0.0.1:{port}", timeout_s=10) as client:
        assert client.stats().backend == "file"
    timer.join()
    started[0].stop()


def test_another_token_goes_over_the_same_connections(client, services):
    other = client.with_token("stone")
    other.stats()
    client.stats()
    tokens = [seen.get("authorization") for seen in services.script.metadata]
    assert tokens == ["Bearer stone", None]
    found, page_token = other.chunks_page(page_size=2)
    assert ([chunk.name for chunk in found], bool(page_token)) == (["doc-0", "doc-1"], True)


def test_nobody_there_is_unavailable_soon():
    port = free_port("127.0.0.1")
    begin = time.monotonic()
    with Client(f"127.0.0.1:{port}", f"127.0.0.1:{port}") as client, pytest.raises(cairn.Unavailable):
        client.generate(["q"]).finish()
    assert time.monotonic() - begin < 60  # the deadline is 300 s


@pytest.mark.parametrize("call", ["stats", "generate", "prefill_many"])
def test_every_call_has_a_deadline(client, services, call):
    services.script.delay_s = 60.0
    calls = {
        "stats": lambda: client.stats(timeout_s=0.2),
        "generate": lambda: client.generate(["q"], timeout_s=0.2).finish(),
        "prefill_many": lambda: list(client.prefill_many(["a"], timeout_s=0.2)),
    }
    with pytest.raises(cairn.DeadlineExceeded):  # and not the answer that comes later
        calls[call]()


def test_the_clients_own_deadline_holds_for_an_endless_stream(services):
    services.script.endless = True
    with Client(services.address, services.address, timeout_s=0.3) as client, pytest.raises(cairn.DeadlineExceeded):
        client.generate(["q"]).finish()


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_deadline_must_be_positive(client, timeout_s):
    with pytest.raises(cairn.InvalidRequest, match="timeout_s"):
        client.stats(timeout_s=timeout_s)


def test_chunks_reads_pages_only_as_far_as_needed(client, services):
    listing = client.chunks(page_size=2)
    assert next(listing).name == "doc-0"
    assert services.script.pages_asked == [0]
    assert [chunk.name for chunk in listing] == ["doc-1", "doc-2", "doc-3", "doc-4"]
    assert services.script.pages_asked == [0, 2, 4]


def test_get_pin_unpin_delete_abort(client, services):
    name = digits("chunk 001")
    assert client.get(name).token_ids == ()
    chunk = client.get(name, token_ids=True, text=True)
    assert (chunk.token_ids, chunk.text, chunk.tags, chunk.expires_unix_s) == ((1, 2, 3), "the text", ("demo",), None)
    assert client.pin(chunk).pinned and not client.unpin(chunk).pinned
    assert client.delete(chunk).kv_bytes == 4096
    assert client.abort("running") and not client.abort("gone")
    with pytest.raises(cairn.NotFound, match="not registered"):
        client.get("unknown")


def test_explain_stats_and_loads(client, services):
    plan = client.explain(["a", "q"], reuse="anchored")
    assert (plan.prompt_tokens, plan.bytes_to_load, plan.bytes_read_per_step) == (9, 2048, 4096)
    assert plan.reuse.segments[0].source == "store"
    assert (client.stats().capacity_bytes, client.stats().model_name) == (1000, "f")
    loads = client.loads()
    assert (loads.running, loads.pages_total) == (1, 100)
    assert loads.modes == (cairn.ModeSupport("anchored", False, "dynamic NTK"),)


def test_token_and_salt_go_with_every_request(services):
    with Client(services.address, services.address, token="secret", salt="tenant", timeout_s=60) as client:
        client.prefill("a")
        client.generate(["q"]).finish()
        client.explain(["q"], salt="other")
        list(client.prefill_many(["b"]))
        client.stats()
    assert {metadata.get("authorization") for metadata in services.script.metadata} == {"Bearer secret"}
    assert [request.salt for request in services.script.requests[:4]] == ["tenant", "tenant", "other", "tenant"]


def test_no_token_sends_no_authorization(client, services):
    client.stats()
    assert "authorization" not in services.script.metadata[0]


def test_closing_the_client_ends_its_streams(services):
    services.script.endless = True
    client = Client(services.address, services.address, timeout_s=30)
    stream = client.generate(["q"])
    next(stream)
    client.close()
    with pytest.raises(cairn.Cancelled):
        stream.finish()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1: (key file, certificate file)."""
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=cairn"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return key, certificate


def test_tls(certificate):
    key, pem = certificate
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), pem.read_bytes())])
    services = FakeServices(credentials=credentials)
    with Client(services.address, services.address, tls=pem, token="t", timeout_s=5) as client:
        assert client.stats().backend == "file"
    with Client(services.address, services.address, timeout_s=5) as client, pytest.raises(cairn.Unavailable):
        client.stats()
    services.stop()


def test_a_missing_certificate_file_is_refused():
    with pytest.raises(cairn.InvalidRequest, match="cannot read"):
        Client(tls="/nowhere/ca.pem")
