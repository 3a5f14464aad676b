"""Both services started on a card with an 8B-shaped bf16 checkpoint, and asked: times of the start, cold = warm.

    python -m bench.gpu_start [--device cuda:1] [--layers 36] [--folder /tmp/cairn-8b]

The checkpoint is random, of Qwen3-8B's shape with the shipped model's tokenizer, and is written to the folder first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.models import FABLE
from cairn import Client, Result
from cairn.local.processes import free_port

SHAPE = {
    **{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": False},
}
DOCUMENTS = [[1000 + 7 * i + document for i in range(900 + 100 * document)] for document in range(4)]
QUERY = [17, 23, 42, 99]


def save_checkpoint(folder: Path, layers: int) -> float:
    """Writes the checkpoint; seconds."""
    started = time.perf_counter()
    config = AutoConfig.for_model("qwen3", num_hidden_layers=layers, **SHAPE)
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (FABLE / name).exists():
            shutil.copy(FABLE / name, folder / name)
    del model
    torch.cuda.empty_cache()
    return time.perf_counter() - started


def start(module: str, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A service process and its address; its log goes to this one's stderr."""
    port = free_port("127.0.0.1")
    argv = [sys.executable, "-m", module, "--port", str(port), *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True), f"127.0.0.1:{port}"


def ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The ready line of a service. Raises ``RuntimeError`` if it ended instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a service ended with {process.wait(30)}")
    event: dict[str, Any] = json.loads(line)
    return event


def ask(client: Client, order: tuple[int, ...], reuse: str, cache: str = "shared") -> Result:
    parts = [DOCUMENTS[i] for i in order]
    return client.generate([*parts, QUERY], max_tokens=24, reuse=reuse, cache=cache, ignore_eos=True).finish()


def _first_apart(a: Result, b: Result) -> int | None:
    pairs = enumerate(zip(a.token_ids, b.token_ids, strict=True))
    return next((index for index, (x, y) in pairs if x != y), None)


def compare(prefill: str, decode: str) -> None:
    """Prints for each mode whether cold, warm and bypassed answers are the same tokens."""
    with Client(prefill=prefill, decode=decode, timeout_s=180) as client:
        loads = client.loads()
        print("context", loads.context_length_max, loads.context_length_reason or "(whole)")
        print("modes", [(m.mode, m.supported, m.reason) for m in loads.modes])
        for reuse in ("exact", "independent", "anchored"):
            for order in ((0, 1, 2), (2, 0, 3)):
                cold, warm = ask(client, order, reuse), ask(client, order, reuse)
                bypassed = ask(client, order, reuse, cache="bypass")
                again = ask(client, order, reuse, cache="bypass")
                others = {"warm": warm, "bypassed": bypassed, "bypassed again": again}
                apart = {name: _first_apart(cold, other) for name, other in others.items()}
                sources = [segment.source for segment in cold.reuse.segments]
                print(
                    f"{reuse:12s} {order} first token that differs from cold: {apart}  cold from {sources}", flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/cairn-8b"))
    options = parser.parse_args()
    model, store = options.folder / "model", options.folder / "store"
    if not (model / "config.json").exists():
        print(f"checkpoint written in {save_checkpoint(model, options.layers):.1f} s", flush=True)
    shared = ["--model", str(model), "--store", f"file://{store}", "--device", options.device]
    started = time.perf_counter()
    prefill, prefill_at = start("prefill_service", *shared)
    decode, decode_at = start("decode_service", *shared, "--prefill", prefill_at)
    try:
        for process in (prefill, decode):
            print(json.dumps(ready(process)), f"{time.perf_counter() - started:.1f} s", flush=True)
        compare(prefill_at, decode_at)
        used = subprocess.run(["nvidia-smi", "--query-compute-apps=gpu_bus_id,pid,used_memory", "--format=csv"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        print(used.stdout)
    finally:
        for process in (decode, prefill):
            process.terminate()
        for process in (decode, prefill):
            process.wait(60)


if __name__ == "__main__":
    main()
