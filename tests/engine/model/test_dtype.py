"""``--dtype auto``: the faster dtype on the processor that is there, and the same one in two services on one host."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from engine.model.dtype import ROWS, Measure, choose_dtype, product_rates
from engine.model.processor import Processor, memory_nbytes, read_processor

AVX2 = Processor("an older one", ("avx2",))
AVX512 = Processor("one with AVX-512", ("avx2", "avx512f"))
BF16 = Processor("one with bf16", ("avx2", "avx512f", "avx512_bf16"))
AMX = Processor("one with AMX", ("avx2", "avx512f", "avx512_bf16", "amx_bf16"))
ARM = Processor("an ARM one", ("bf16", "asimdhp"))
LARGE, PLENTY = 600_000_000, 1 << 40


def rates(**gflops: tuple[float, float]) -> Measure:
    return lambda dtype: gflops[dtype]


def chosen(processor: Processor, **gflops: tuple[float, float]) -> str:
    return choose_dtype("bfloat16", LARGE, "cpu", processor=processor, memory=PLENTY, measure=rates(**gflops)).dtype


def test_the_faster_dtype_is_taken_and_the_reason_names_figures_and_processor() -> None:
    measure = rates(bfloat16=(10.0, 11.0), float32=(56.0, 85.0))
    choice = choose_dtype("bfloat16", LARGE, "cpu", processor=AVX2, memory=PLENTY, measure=measure)
    assert choice.dtype == "float32"
    assert "10 and 11 GFLOP/s in bfloat16, 56 and 85 in float32" in choice.reason
    assert choice.reason.endswith("on an older one (avx2)")
    assert chosen(AMX, bfloat16=(500.0, 900.0), float32=(60.0, 80.0)) == "bfloat16"


def test_a_product_that_contradicts_the_features_clearly_is_believed() -> None:
    assert chosen(AVX2, bfloat16=(200.0, 200.0), float32=(60.0, 80.0)) == "bfloat16"
    assert chosen(AMX, bfloat16=(20.0, 20.0), float32=(60.0, 80.0)) == "float32"


@pytest.mark.parametrize("processor", [AVX2, AVX512, BF16, AMX, ARM], ids=str)
def test_noise_around_equal_speeds_does_not_flip_it(processor: Processor) -> None:
    draw = random.Random(7)
    found = {
        chosen(processor, bfloat16=(60 * draw.uniform(0.85, 1.2),) * 2, float32=(60 * draw.uniform(0.85, 1.2),) * 2)
        for _ in range(200)
    }
    assert found == {"bfloat16" if processor.multiplies("bfloat16") else "float32"}


@pytest.mark.parametrize(
    ("stored", "parameters", "device", "dtype", "words"),
    [
        ("bfloat16", LARGE, "cuda:1", "bfloat16", "checkpoint's own"),
        ("float16", LARGE, "cuda", "float16", "checkpoint's own"),
        ("float32", LARGE, "cpu", "float32", "checkpoint's own"),
        ("bfloat16", 5_250_000, "cpu", "float32", "5.25 M parameters, fewer than 100 M"),
        ("bfloat16", 8_000_000_000, "cpu", "bfloat16", "29.8 GiB a service, too much for 32.0 GiB"),
    ],
)
def test_what_needs_no_product(stored: str, parameters: int, device: str, dtype: str, words: str) -> None:
    def never(dtype: str) -> tuple[float, ...]:
        raise AssertionError("nothing is to be measured")

    choice = choose_dtype(stored, parameters, device, processor=AVX2, memory=32 << 30, measure=never)
    assert choice.dtype == dtype and words in choice.reason


def test_the_product_itself() -> None:
    assert len(product_rates("float32")) == len(ROWS) and min(product_rates("float32")) > 0


@pytest.mark.skipif("avx2" not in read_processor().features, reason="an x86 processor is made to do without AVX-512")
def test_a_processor_that_is_held_to_avx2_takes_float32() -> None:
    program = f"""
import torch
from engine.model.dtype import choose_dtype
torch.set_num_threads(1)
print(choose_dtype("bfloat16", {LARGE}, "cpu", memory={PLENTY}).dtype)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "float32"


def test_reading_the_processor(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nflags\t\t: fpu avx2 amx_bf16 avx512f\n\nprocessor\t: 1\n"
    )
    assert str(read_processor(info)) == "Some CPU @ 2.00GHz (avx2, avx512f, amx_bf16)"
    info.write_text("processor : 0\nFeatures : fp asimd asimdhp bf16\n")
    assert read_processor(info).multiplies("bfloat16")
    unknown = read_processor(tmp_path / "none")
    assert unknown.features == () and "features unknown" in str(unknown)
    assert unknown.multiplies("float32") and not unknown.multiplies("bfloat16")


def test_reading_the_memory(tmp_path: Path) -> None:
    info, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    info.write_text("MemTotal:       16384 kB\nMemFree:  1 kB\n")
    assert memory_nbytes(info, tmp_path / "none") == 16 << 20
    limit.write_text("max\n")
    assert memory_nbytes(info, limit) == 16 << 20
    limit.write_text("1048576\n")
    assert memory_nbytes(info, limit) == 1 << 20
    assert memory_nbytes(tmp_path / "none", tmp_path / "none") is None
