"""What grammars cost a step: ``python -m bench.grammar_cost [--device cuda]``

64 requests decode together over one shared chunk, through admission, scheduler, forwards and sampling, without RPC; all
of them, half, or nobody follows a grammar. ``text`` (free strings) forces next to nothing: nearly every token needs a
mask. ``json`` has names and punctuation that are forced: where rows of one answer share a step, several come at once.

On a card the model has Qwen3-8B's shape with random weights, a vocabulary of 151936 tokens, and a byte-level BPE of
random merges as a tokenizer; on the CPU it is the shipped one.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from llguidance import LLExecutor
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.models import FABLE
from chunk_store.key import ChunkId, ChunkType, ModelIdentity
from decode_service.device.worker import DecodeWorker
from decode_service.metrics import DecodeMetrics
from decode_service.prompt.composition import compose
from decode_service.prompt.request_chunk import Segment
from decode_service.scheduling.sequence import Deliveries, Failed, FinishReason, Sequence, Tokens
from engine.kv.pages import TAIL
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.reuse import ReuseMode
from engine.run.protocol import Runner
from engine.sampling.params import SamplingParams, SamplingRequest
from text.codec import TextCodec
from text.grammar.compiler import Compiled, GrammarCompiler
from text.grammar.matcher import fill_rows

VOCABULARY, END = 151936, 151643  # on a card
ROWS = 64
QUERY_TOKENS = 16
ANSWER_TOKENS = 4000  # at most; where much is forced a step brings many
STEPS = {"cpu": 24, "cuda": 200}  # of a measurement
WARM = 12  # steps before
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["granite", "limestone", "sandstone"]},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
        "score": {"type": "number"},
    },
    "required": ["name", "age", "kind", "notes", "score"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, tuple[Any, str]] = {
    "text": ("json_schema", '{"type": "array", "items": {"type": "string"}, "minItems": 100000}'),
    "json": ("json_schema", json.dumps({"type": "array", "items": ITEM, "minItems": 4000})),
}


@dataclass(frozen=True)
class Engine:
    """What a worker stands on."""

    runner: Runner
    pool: PagedKVPool
    shared: int  # tokens of the chunk that all read
    served: Any  # what compositions ask of a served model
    end: int
    steps: int


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``END`` + 1 tokens, merged at random; seeded."""
    source = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [character for character in alphabet if character.isascii() and character.isalpha()]
    # As in real vocabularies nearly all tokens are words: few have quotes, fewer are parts of characters.
    words = [*letters, *"0123456789", *".,:;-()'", *["\u0120"] * 8]
    tokens, ids, merges = list(alphabet), dict[str, int](), list[tuple[str, str]]()
    ids |= {character: index for index, character in enumerate(alphabet)}
    while len(tokens) < END:
        pair = source.choice(words), source.choice(letters)
        merged = "".join(pair)
        if len(merged) <= 12 and merged not in ids:
            ids[merged] = len(tokens)
            tokens.append(merged)
            words.append(merged)
            merges.append(pair)
    made = Tokenizer(models.BPE(ids, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def on_card(shared: int) -> Engine:
    from bench.gpu_model import make_engine

    tails = ROWS * (QUERY_TOKENS + ANSWER_TOKENS)  # all of them: nobody gives way
    made = make_engine(pool_tokens=shared + tails + 8192, chunk_share=(shared + 4096) / (shared + tails + 8192))
    served = SimpleNamespace(identity=ModelIdentity("ab" * 32), vocabulary=VOCABULARY)
    return Engine(made.runner, made.pool, shared, served, END, STEPS["cuda"])


def on_cpu(shared: int) -> Engine:
    """The shipped model, with one thread for what torch computes."""
    from engine.model.borrowed import BorrowedModel
    from engine.served import serve

    torch.set_num_threads(1)
    served = serve(BorrowedModel.load(str(FABLE), dtype="float32"), piece_tokens=512)
    pages = (shared + ROWS * (QUERY_TOKENS + ANSWER_TOKENS)) // 16 + 2 * ROWS
    pool = PagedKVPool(served.layout, pages=pages, chunk_pages=shared // 16 + 1, page_size=16)
    return Engine(
        served.make_runner(pool, slots=ROWS), pool, shared, served, next(iter(served.eos_token_ids)), STEPS["cpu"]
    )


def document(engine: Engine, residents: ResidentChunks) -> tuple[int, ...]:
    """The shared chunk's tokens; its KV is random and resident."""
    ids = tuple(np.random.default_rng(1).integers(300, engine.served.vocabulary - 400, engine.shared).tolist())
    composition = compose(engine.served, [*_segments(engine, ids, 0)], ReuseMode.EXACT, "")
    key = composition.chunks[0].key
    if residents.find(key) is None:
        chunk = residents.reserve(key, len(ids))
        for tensor in residents.pool.run_planes(chunk.run, chunk.tokens):
            tensor.normal_()
        chunk.ready = True
    return ids


def _segments(engine: Engine, ids: tuple[int, ...], index: int) -> Iterator[Segment]:
    yield Segment(ChunkId("document"), ChunkType.CONTEXT, ids)
    query = np.random.default_rng(100 + index).integers(300, engine.served.vocabulary - 400, QUERY_TOKENS).tolist()
    yield Segment(ChunkId(""), ChunkType.QUERY, tuple(query))


def measure(engine: Engine, residents: ResidentChunks, follow: Callable[[int], Compiled | None], **fields: Any) -> Any:
    """Milliseconds between deliveries, of which this process computed, and tokens a second, while all decode."""
    worker = DecodeWorker(
        engine.runner,
        residents,
        SimpleNamespace(model=engine.served.identity, load_threads=None),  # type: ignore[arg-type]
        DecodeMetrics(CollectorRegistry(), model_name="bench", token_nbytes=1),
        eos_token_ids=frozenset({engine.end}),
        batch_max=ROWS,
    )
    ids, seen, over = document(engine, residents), list[tuple[float, float, int, int]](), threading.Event()
    failed = list[Failed]()

    def deliver(deliveries: Deliveries) -> None:
        every = [event for events in deliveries.values() for event in events]
        failed.extend(event for event in every if isinstance(event, Failed))
        tokens = [len(event.choices) for event in every if isinstance(event, Tokens)]
        seen.append((time.perf_counter(), time.process_time(), len(deliveries), sum(tokens)))
        if failed or sum(1 for _, _, members, _ in seen if members == ROWS) >= WARM + engine.steps:
            over.set()

    for index in range(ROWS):
        compiled = follow(index)
        params = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True, seed=index, **fields)
        composition = compose(engine.served, [*_segments(engine, ids, index)], ReuseMode.EXACT, "")
        request = SamplingRequest(params, (), frozenset({engine.end}), masked=compiled is not None)
        sequence = Sequence(str(index), composition, request, "", False, lambda _: None)
        sequence.grammar = compiled.matcher(ignore_ends=True) if compiled is not None else None
        worker.take_place()
        worker.submit(sequence)
    worker.start(deliver)
    if not over.wait(200):
        raise TimeoutError("the requests did not decode together for long enough within 200 s")
    if failed:
        raise failed[0].error
    end_all(worker, engine.pool)
    full = [(at, cpu, tokens) for at, cpu, members, tokens in seen if members == ROWS][WARM : WARM + engine.steps]
    gaps = [(after - before) * 1e3 for (before, *_), (after, *_) in pairwise(full)]
    rate = sum(tokens for *_, tokens in full[1:]) / (full[-1][0] - full[0][0])
    cpu = [(after - before) * 1e3 for (_, before, _), (_, after, _) in pairwise(full)]
    return {
        "cpu_ms": statistics.median(cpu),
        "ms": statistics.median(gaps),
        "ms_p90": statistics.quantiles(gaps, n=10)[8],
        "tokens_s": rate,
    }


def end_all(worker: DecodeWorker, pool: PagedKVPool) -> None:
    """Stops a worker whose requests still run; their pages are there for the next one."""
    for index in range(ROWS):
        worker.end(str(index), FinishReason.ABORT)
    until = time.monotonic() + 30
    while pool.count()[TAIL]:
        if time.monotonic() > until:
            raise TimeoutError("pages of requests that were ended did not come back within 30 s")
        time.sleep(0.01)
    worker.stop()


def host_alone(compiled: Compiled, vocabulary: int) -> dict[str, float]:
    """Milliseconds that 64 masks take together, and 64 tokens accepted, with nothing else running."""
    matchers = [compiled.matcher(ignore_ends=True) for _ in range(ROWS)]
    rows = np.zeros((ROWS, vocabulary // 32), np.int32)
    executor, source = LLExecutor(), random.Random(0)
    fills, accepts = list[float](), list[float]()
    for _ in range(60):
        began = time.perf_counter()
        fill_rows(matchers, rows, executor)
        fills.append(time.perf_counter() - began)
        may = [np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")) for row in rows]
        drawn = [int(source.choice(tokens)) for tokens in may]
        began = time.perf_counter()
        for matcher, token in zip(matchers, drawn, strict=True):
            matcher.accept(token)
        accepts.append(time.perf_counter() - began)
    return {"masks_ms": statistics.median(fills) * 1e3, "accept_ms": statistics.median(accepts) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shared", type=int, help="tokens of the shared chunk (default: 32768 on a card, else 512)")
    parser.add_argument("--json", help="where the figures go")
    arguments = parser.parse_args()
    logging.getLogger("decode_service").setLevel(logging.ERROR)  # requests that are cut off at the end
    shared = arguments.shared or (32768 if arguments.device == "cuda" else 512)
    engine = on_card(shared) if arguments.device == "cuda" else on_cpu(shared)
    codec = TextCodec(tokenizer(), "random merges") if arguments.device == "cuda" else TextCodec.load(str(FABLE))
    vocabulary = engine.served.vocabulary
    compiler = GrammarCompiler(codec, vocabulary=vocabulary, end_token_ids=[engine.end])
    compiled = {name: compiler.compile(*grammar) for name, grammar in GRAMMARS.items()}
    found: dict[str, Any] = {
        f"host alone, {name}": host_alone(grammar, vocabulary) for name, grammar in compiled.items()
    }
    residents = ResidentChunks(engine.pool)
    cases: dict[str, tuple[Callable[[int], Compiled | None], dict[str, Any]]] = {
        "nobody, greedy": (lambda _: None, {}),
        "nobody, sampled": (lambda _: None, SAMPLED),
        "nobody, sampled, biased": (lambda _: None, {**SAMPLED, "logit_bias": ((5, 1.0),)}),
        "all text, greedy": (lambda _: compiled["text"], {}),
        "all text, sampled": (lambda _: compiled["text"], SAMPLED),
        "half text, sampled": (lambda index: compiled["text"] if index % 2 else None, SAMPLED),
        "all json, sampled": (lambda _: compiled["json"], SAMPLED),
        "nobody, sampled, again": (lambda _: None, SAMPLED),
    }
    for name, figures in found.items():
        print(name, {key: round(value, 3) for key, value in figures.items()}, flush=True)
    for name, (follow, fields) in cases.items():
        found[name] = measure(engine, residents, follow, **fields)
        print(f"{name:26s}", {key: round(value, 2) for key, value in found[name].items()}, flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": arguments.device, "shared": shared, "figures": found}, file, indent=1)


if __name__ == "__main__":
    main()
