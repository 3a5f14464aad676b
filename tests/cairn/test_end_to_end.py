"""The product doing its job: ``cairn up`` on the shipped model, used through the clients and the command line."""

from __future__ import annotations

import asyncio
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

import cairn
from cairn import AsyncClient, Client, Text
from tests.deploy import exported

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = ROOT / "examples" / "documents"
QUERY = Text("Who governs Wendolin?", role="user")
ANSWER = "Wendolin is ruled by Doctor Lisk."


@pytest.fixture(scope="session")
def up(tmp_path_factory) -> Iterator[dict[str, dict[str, str]]]:
    """``cairn up --json`` on free ports; at the end it must drain cleanly."""
    store = tmp_path_factory.mktemp("store")
    argv = [sys.executable, "-m", "cairn.cli", "up", "--json", "--model", str(ROOT / "models" / "fable")]
    argv += ["--store", f"file://{store}", "--dtype", "float32", "--threads", "1", "--drain-s", "100"]
    for port in ("--prefill-port", "--decode-port", "--prefill-metrics-port", "--decode-metrics-port"):
        argv += [port, "0"]
    log = tmp_path_factory.mktemp("log") / "up.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line or json.loads(line)["event"] != "ready":
        pytest.fail(f"cairn up did not start: {line}{log.read_text()[-3000:]}")
    ready: dict[str, Any] = json.loads(line)
    ready["log"] = str(log)
    yield ready
    process.terminate()
    out, _ = process.communicate(timeout=250)
    assert json.loads(out) == {"event": "stopped", "reason": "asked", "clean": True}
    assert process.returncode == 0


@pytest.fixture
def live(up) -> Iterator[Client]:
    with Client(up["prefill"]["address"], up["decode"]["address"], timeout_s=60) as client:
        yield client


def register(client: Client, *names: str) -> list[cairn.Chunk]:
    system = client.prefill(
        "Answer in one full sentence.", type="system_prompt", role="system", name="system", durable=True
    )
    texts = [(DOCUMENTS / f"{name}.txt").read_text() for name in names]
    return [
        system,
        *(
            client.prefill(text, role="document", name=name, durable=True)
            for text, name in zip(texts, names, strict=True)
        ),
    ]


def run(up, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CAIRN_PREFILL": up["prefill"]["address"], "CAIRN_DECODE": up["decode"]["address"]}
    command = [sys.executable, "-m", "cairn.cli", *argv]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)


def conserved(result: cairn.Result) -> bool:
    """hit + computed = prompt tokens, in the usage and in the report."""
    usage, segments = result.usage, result.reuse.segments
    return (
        usage.cached_tokens + usage.computed_tokens
        == usage.prompt_tokens
        == sum(segment.tokens for segment in segments)
        and sum(segment.cached_tokens for segment in segments) == usage.cached_tokens
    )


def test_a_chunk_is_computed_once_and_the_answer_stays(live):
    chunks = register(live, "chronicle", "saltmere")
    first = live.generate([*chunks, QUERY], max_tokens=32).finish()
    warm = live.generate([*chunks, QUERY], max_tokens=32).finish()
    cold = live.generate([*chunks, QUERY], max_tokens=32, cache="bypass").finish()
    assert first.text.strip() == warm.text.strip() == cold.text.strip() == ANSWER
    assert first.token_ids == warm.token_ids == cold.token_ids
    assert all(conserved(result) for result in (first, warm, cold))
    assert [segment.source for segment in warm.reuse.segments] == ["device"] * 3 + ["computed"]
    assert warm.reuse.exactness == "exact_context"
    assert cold.usage.cached_tokens == 0
    assert warm.timings.first_token_s < cold.timings.first_token_s


@pytest.mark.parametrize("reuse", ["anchored", "independent"])
def test_other_orders_compute_only_the_query(live, reuse):
    system, *documents = register(live, "people", "chronicle", "saltmere")
    live.generate([system, *documents, QUERY], reuse=reuse, max_tokens=1).finish()
    result = live.generate([system, *reversed(documents), QUERY], reuse=reuse, max_tokens=32).finish()
    assert result.usage.computed_tokens == result.reuse.segments[-1].tokens
    assert result.reuse.exactness == "exact_block_mask"
    assert any(segment.offset for segment in result.reuse.segments)
    assert result.text.strip() == ANSWER
    assert conserved(result)


def test_explain_foretells_what_generate_reports(live):
    chunks = register(live, "brindlemoor")
    live.generate([*chunks, QUERY], max_tokens=1).finish()
    plan = live.explain([*chunks, QUERY])
    usage = live.generate([*chunks, QUERY], max_tokens=1).finish().usage
    assert (plan.prompt_tokens, plan.cached_tokens, plan.computed_tokens) == (
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.computed_tokens,
    )
    assert plan.bytes_read_per_step > 0


def test_texts_and_token_ids_are_parts_too(live):
    system, document = register(live, "crystalton")
    ids = live.get(document, token_ids=True).token_ids
    assert len(ids) == document.tokens
    question = Text("Where is Crystalton located?", role="user")
    by_chunk = live.generate([system, document, question], max_tokens=24).finish()
    by_ids = live.generate([system, list(ids), question], max_tokens=24).finish()
    assert by_chunk.token_ids == by_ids.token_ids
    assert by_chunk.text.strip() == "Crystalton is located in Nebulonia."


def test_deltas_add_up_to_the_result(live):
    chunks = register(live, "chronicle")
    stream = live.generate([*chunks, QUERY], max_tokens=32, logprobs=True)
    deltas = list(stream)
    result = stream.result
    assert "".join(delta.text for delta in deltas) == result.text
    assert len(result.token_ids) == len(result.logprobs) == result.usage.completion_tokens
    assert all(logprob <= 0 for logprob in result.logprobs)
    assert result.finish_reason == "stop"


def test_max_tokens_and_ignore_eos(live):
    result = live.generate(["Some text."], max_tokens=40, ignore_eos=True).finish()
    assert (len(result.token_ids), result.finish_reason) == (40, "length")


def test_a_seed_repeats_a_sampled_answer(live):
    sampled = [live.generate(["Some text."], temperature=1.0, max_tokens=16, seed=7).finish() for _ in range(2)]
    assert sampled[0].token_ids == sampled[1].token_ids
    assert sampled[0].seed == 7


def test_what_cannot_work_says_why(live):
    with pytest.raises(cairn.NotFound):
        live.generate([cairn.ChunkRef("0" * 64), "q"]).finish()
    with pytest.raises(cairn.InvalidRequest):
        live.generate(["a", ""]).finish()
    with pytest.raises(cairn.InvalidRequest):
        live.generate([[10] * 9000, "q"]).finish()
    with pytest.raises(cairn.InvalidRequest):
        live.generate([[10**6]]).finish()
    with pytest.raises(cairn.InvalidRequest):
        live.prefill("t", role="pirate")


def idle(client: Client) -> bool:
    loads = client.loads()
    return loads.running == loads.waiting == loads.pages_tails == 0


def test_an_abandoned_stream_frees_its_pages(live):
    stream = live.generate(["Some text."], max_tokens=5000, ignore_eos=True)
    next(stream)
    assert live.loads().running == 1
    stream.close()
    ends_at = time.monotonic() + 5
    while not idle(live) and time.monotonic() < ends_at:
        time.sleep(0.05)
    assert idle(live)


def test_abort_ends_a_stream_from_outside(live):
    stream = live.generate(["Some text."], max_tokens=5000, ignore_eos=True, request_id="to-be-aborted")
    next(stream)
    assert live.abort("to-be-aborted")
    assert stream.finish().finish_reason == "abort"
    assert not live.abort("to-be-aborted")


def test_many_at_once_give_the_answers_of_one_alone(up, live):
    chunks = register(live, "chronicle", "people")
    questions = ["Who governs Wendolin?", "What does Port Aurel export?", "Which animal does Tavia Quillon keep?"]
    segments: list[list[Any]] = [[*chunks, Text(question, role="user")] for question in questions]
    alone = [live.generate(segment, max_tokens=24).finish().token_ids for segment in segments]

    async def together() -> list[cairn.Result]:
        async with AsyncClient(up["prefill"]["address"], up["decode"]["address"], timeout_s=60) as client:
            return await asyncio.gather(*(client.generate(segments[n % 3], max_tokens=24).finish() for n in range(12)))

    results = asyncio.run(together())
    assert [result.token_ids for result in results] == [alone[n % 3] for n in range(12)]
    assert all(conserved(result) for result in results)


def test_chunks_are_listed_pinned_and_deleted(live):
    made = [live.prefill(f"Note {number}.", name=f"note-{number}", tags=["notes"], durable=True) for number in range(5)]
    assert {chunk.id for chunk in live.chunks(tag="notes", page_size=2)} == {chunk.id for chunk in made}
    assert [chunk.name for chunk in live.chunks(name="note-3")] == ["note-3"]
    assert live.pin(made[0]).pinned and not live.unpin(made[0]).pinned
    assert live.get(made[1], text=True).text == "Note 1."
    live.delete(made[2])
    with pytest.raises(cairn.NotFound):
        live.get(made[2])
    with pytest.raises(cairn.NotFound):
        live.generate([made[2], "q"]).finish()
    stats = live.stats()
    assert stats.chunks >= 4 and stats.kv_bytes > 0


def test_eviction_order_is_listed_and_a_tag_removes(up, live):
    made = [
        live.prefill(f"Entry {number} of the log.", name=f"entry-{number}", tags=["log"], durable=True)
        for number in range(3)
    ]
    live.generate([made[0], QUERY], max_tokens=1).finish()

    def listed(by: str) -> list[str]:
        done = run(up, "chunks", "list", "--tag", "log", "--by", by, "--json")
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["name"] for line in done.stdout.splitlines()]

    assert listed("created") == listed("name") == ["entry-0", "entry-1", "entry-2"]
    assert listed("last-used") == ["entry-1", "entry-2", "entry-0"], "the next to be evicted comes first"
    done = run(up, "chunks", "rm", "--tag", "log", "--json")
    assert {json.loads(line)["id"] for line in done.stdout.splitlines()} == {chunk.id for chunk in made}
    assert listed("created") == []


def test_prefill_many(live):
    results = list(live.prefill_many(["First note.", [10**6], "Third note."], tags=["many"]))
    assert [isinstance(result, cairn.Chunk) for result in results] == [True, False, True]
    assert isinstance(results[1], cairn.InvalidRequest)
    again = next(iter(live.prefill_many(["First note."])))
    assert isinstance(again, cairn.Chunk) and again.outcome == "already_stored"


def test_the_readme_example_runs(up):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 3, "the others go on inside the block of the first"
    script = "".join([blocks[0], *(textwrap.indent(block, "    ") for block in blocks[1:])])
    script = script.replace("127.0.0.1:50071", up["prefill"]["address"])
    script = script.replace("127.0.0.1:50072", up["decode"]["address"])
    again = script.replace('name="chronicle", context=[system]', 'name="chronicle", context=[system], durable=True')
    assert again != script
    for words in (script, again):  # KV is stored behind: at once where that is waited for
        done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(ANSWER)
    line = next(line for line in done.stdout.splitlines() if line.startswith("chronicle "))
    _, tokens, cached, source = line.split()  # no miss reason: a hit
    assert cached == tokens and source in ("store", "device")


def test_the_readme_commands_run(up):
    block = re.search(r"```\n(cairn prefill .*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    commands = [line.split("cairn ", 1)[1] for line in block[1].splitlines()]
    assert len(commands) == 4
    for command in commands:
        done = run(up, *shlex.split(command))
        assert done.returncode == 0, done.stderr
    done = run(up, *shlex.split(commands[1]), "--json")
    assert json.loads(done.stdout)["text"].strip() == ANSWER


def test_the_services_describe_themselves(up):
    for service, full_name in (("prefill", "cairn.v1.PrefillService"), ("decode", "cairn.v1.DecodeService")):
        with grpc.insecure_channel(up[service]["address"]) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            reply = next(stub.ServerReflectionInfo(iter([request]), timeout=10))
            assert full_name in {found.name for found in reply.list_services_response.service}


def scrape(up, service: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = urllib.request.urlopen(up[service]["metrics"], timeout=10).read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_start_says_what_it_is_doing(up):
    lines = Path(up["log"]).read_text().splitlines()
    for service in ("prefill", "decode"):
        own = "\n".join(line for line in lines if line.startswith(f"{service:>7} | "))
        for stage in (
            "importing torch",
            "loading the tokenizer",
            "loading the weights, 1",
            "checking float32",
            "ready:",
        ):
            assert stage in own, (service, stage, own)


def test_metrics_are_those_that_the_documentation_lists(up):
    """To write the table anew: ``python -m tests.deploy.exported PREFILL_METRICS_URL DECODE_METRICS_URL``."""
    found = exported.rows_of(*(exported.scraped(up[service]["metrics"]) for service in ("prefill", "decode")))
    assert exported.table(found) == exported.table(exported.documented())


def test_metrics_add_up(up, live):
    def totals() -> tuple[float, float]:
        values = scrape(up, "decode")
        by_source = sum(v for (name, _), v in values.items() if name == "cairn_prompt_tokens_by_source_total")
        return by_source, sum(v for (name, _), v in values.items() if name == "cairn_prompt_tokens_total")

    before = totals()
    chunks = register(live, "people")
    used = sum(live.generate([*chunks, QUERY], max_tokens=4).finish().usage.prompt_tokens for _ in range(3))
    after = totals()
    assert after[0] == after[1]
    assert after[1] - before[1] == used


def test_demo():
    argv = [sys.executable, "-m", "cairn.cli", "demo", "--json", "--orders", "1", "--questions", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    *answers, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert end["answers"] == end["good"] == len(answers) == 2
    assert [answer["compared"] for answer in answers] == ["identical", ""]


def test_demo_of_a_model_that_is_not_there(tmp_path):
    argv = [sys.executable, "-m", "cairn.cli", "demo", "--model", str(tmp_path / "nowhere")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "nowhere does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_example_of_a_conversation(live, capsys) -> None:
    """Right answers, each of which computes its own question alone."""
    talk = runpy.run_path(str(ROOT / "examples" / "conversation.py"))["run"](live)
    assert talk.turns[0].answer.strip() == ANSWER
    for turn in talk.turns[1:]:
        assert turn.result.usage.computed_tokens == len(turn.kept.query_token_ids)
    said = capsys.readouterr().out
    assert ANSWER in said and "Crystalton is located in Nebulonia." in said and "famous for its glass bridges" in said
