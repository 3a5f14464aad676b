"""Models of many families at their published widths through the real entry point, with traffic.

    python -m bench.families gemma2 mistral [--layers 8] [--seconds 10] [--device cuda] [--out FILE]

Of each: a random bf16 checkpoint with so many of its layers, both services in one process, then what their ready lines
say, whether answers are the same cold, warm and bypassed in every mode that is offered, over a document that is longer
than the model's windows, and requests of 512 + 64 tokens and over shared documents, 32 at a time. A line of JSON each;
one that fails does not keep the others back.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import shutil
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.models import FABLE
from bench.serving_services import fresh_store, running, vocabulary_of
from cairn import CairnError, Client, Result
from cairn.load.cairn_target import CairnTarget
from cairn.load.figures import figures
from cairn.load.job import Job
from cairn.load.processes import LoadGenerator
from cairn.load.workload import WORKLOADS, Lengths

AT_ONCE = 32
DOCUMENT, PREFACE, QUERY, ANSWER = 9000, 600, 48, 64  # tokens
LOADS = {
    "unshared": Lengths(system=0, document=0, query=512, output=64),
    "rag": Lengths(system=128, document=1024, query=32, output=64),
}


def _attention(heads: int, kv_heads: int, head_dim: int | None = None) -> dict[str, Any]:
    told = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return told if head_dim is None else {**told, "head_dim": head_dim}


def _widths(hidden: int, mlp: int, vocabulary: int) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": mlp, "vocab_size": vocabulary}


# As published: 9B, 12B, 20B, 7B, mini, 7B, 7B, 7B, 8B, V2-Lite's sizes, 30B-A3B, 8x7B.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {**_widths(3584, 14336, 256000), **_attention(16, 8, 256), "sliding_window": 4096}),
    "gemma3": ("gemma3_text", {**_widths(3840, 15360, 262208), **_attention(16, 8, 256), "sliding_window": 1024}),
    "gpt-oss": (
        "gpt_oss",
        {
            **{**_widths(2880, 2880, 201088), **_attention(64, 8, 64), "sliding_window": 128},
            **{"num_local_experts": 32, "num_experts_per_tok": 4},
        },
    ),
    "mistral": ("mistral", {**_widths(4096, 14336, 32000), **_attention(32, 8), "sliding_window": 4096}),
    "phi3": ("phi3", {**_widths(3072, 8192, 32064), **_attention(32, 32), "sliding_window": 2047}),
    "olmo2": ("olmo2", {**_widths(4096, 11008, 100352), **_attention(32, 32)}),
    "cohere2": ("cohere2", {**_widths(4096, 14336, 256000), **_attention(32, 8), "sliding_window": 4096}),
    "starcoder2": ("starcoder2", {**_widths(4608, 18432, 49152), **_attention(36, 4), "sliding_window": 4096}),
    "granite": ("granite", {**_widths(4096, 12800, 49155), **_attention(32, 8)}),
    "deepseek": (
        "deepseek_v3",
        {
            **{**_widths(2048, 10944, 102400), **_attention(16, 16), "q_lora_rank": None, "kv_lora_rank": 512},
            **{"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 1408},
            **{"n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
            **{"n_shared_experts": 2, "first_k_dense_replace": 1},
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            **{**_widths(2048, 6144, 151936), **_attention(32, 4, 128), "moe_intermediate_size": 768},
            **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
        },
    ),
    "mixtral": ("mixtral", {**_widths(4096, 14336, 32000), **_attention(32, 8), "num_local_experts": 8}),
}


def write(folder: Path, name: str, layers: int, device: str) -> None:
    """A checkpoint with the shipped model's tokenizer, whose ids every vocabulary has. In a process of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = FAMILIES[name]
    told: dict[str, Any] = {"num_hidden_layers": layers, "max_position_embeddings": 32768}
    told["tie_word_embeddings"] = False
    told |= {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**told, **settings})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for each in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (FABLE / each).exists():
            shutil.copy(FABLE / each, folder / each)
    del model
    gc.collect()


def answers(client: Client, vocabulary: int, document: int) -> dict[str, Any]:
    """By mode: whether an answer has the tokens of the cold one when warm and when bypassed; or why it is refused."""

    def ids(first: int, count: int) -> list[int]:
        return [300 + (first + 31 * number * number) % (vocabulary - 400) for number in range(count)]

    def ask(mode: str, cache: str) -> Result:
        parts = [ids(5, PREFACE), ids(11, document), ids(17, PREFACE), ids(23, QUERY)]
        return client.generate(
            parts, max_tokens=ANSWER, reuse=mode, cache=cache, ignore_eos=True,
            temperature=1.0, seed=7,  # greedy answers of random weights may say one token over and over
        ).finish()  # fmt: skip

    found: dict[str, Any] = {}
    for mode in ("exact", "anchored", "independent"):
        try:
            cold, warm, bypass = ask(mode, "shared"), ask(mode, "shared"), ask(mode, "bypass")
        except CairnError as error:
            found[mode] = f"refused: {error}"
            continue
        same = [each.token_ids == cold.token_ids for each in (warm, bypass)]
        distinct = len(set(cold.token_ids))
        found[mode] = {"warm": same[0], "bypass": same[1], "cached": warm.usage.cached_tokens, "distinct": distinct}
    return found


async def measured(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What was seen of one family."""
    vocabulary, began = vocabulary_of(folder), time.perf_counter()
    with fresh_store() as (store, capacity), LoadGenerator(1) as generator:
        shared = ["--model", str(folder), "--store", f"file://{store}/store", "--dtype", "auto", "--log-level", "info"]
        shared += ["--device", args.device]
        pages = ["--kv-pages", str(args.pages)] if args.pages else []
        prefill, decode = [*pages, "--store-capacity", str(capacity)], [*pages, "--batch-max", str(AT_ONCE)]
        async with running(shared, prefill, decode, together=True) as services:
            found: dict[str, Any] = {"start_s": round(time.perf_counter() - began, 1)}
            ready = services.ready["decode"]
            found["ready"] = {key: ready[key] for key in ready if key not in ("prefill", "host", "port")}
            with Client(prefill=services.prefill, decode=services.decode, timeout_s=300) as client:
                found["answers"] = await asyncio.to_thread(answers, client, vocabulary, args.document)
            target = CairnTarget(services.decode)
            for load, lengths in LOADS.items():
                workload = replace(WORKLOADS[load], lengths=lengths, vocabulary=vocabulary)
                warm = Job(target, workload, 0, AT_ONCE, AT_ONCE, limit_s=200)
                await asyncio.to_thread(generator.run, warm)
                job = replace(warm, first=AT_ONCE, end=1 << 40, duration_s=args.seconds, limit_s=args.seconds + 60)
                seen = figures(await asyncio.to_thread(generator.run, job), args.seconds)
                found[load] = {key: seen[key] for key in ("ok", "errors", "tokens_per_s", "ttft_ms", "gap_ms")}
            if services.died.done():
                raise RuntimeError(services.died.result())
            found["log"] = [line for log in services.logs.values() for line in log if "WARNING" in line.upper()][-5:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", choices=sorted(FAMILIES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--document", type=int, default=DOCUMENT, help="tokens of the long document")
    parser.add_argument("--pages", type=int, help="of KV for each service (default: theirs)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="where the lines go too")
    args = parser.parse_args()
    for name in args.families:
        with tempfile.TemporaryDirectory(prefix="cairn-families-") as folder:
            try:
                writer = multiprocessing.get_context("spawn").Process(
                    target=write, args=(Path(folder), name, args.layers, args.device)
                )
                writer.start()
                writer.join()
                found = asyncio.run(measured(name, Path(folder), args))
            except Exception as error:  # the next family is still to be looked at
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {error}"}
        line = json.dumps({"family": name, **found})
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
