"""``python -m bench.flashinfer_build [NAME ...] [--save DIR] [--use DIR]``: FlashInfer's kernels, built all at once.

A module of its kernels takes a minute or two of all processors when it is first used. This builds several side by
side, keeps what came of it (``--save``, files of some MB each), and puts kept ones where FlashInfer finds them
(``--use``), for machines that start bare. NAMEs are of ``MODULES``; all of them unless given. Needs FlashInfer and
nvcc, and no card if FLASHINFER_CUDA_ARCH_LIST says for which one.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch

# name -> backend, dtype, widths of K and V, soft cap
MODULES: dict[str, tuple[str, torch.dtype, int, int, bool]] = {
    "128": ("fa2", torch.bfloat16, 128, 128, False),
    "128cap": ("fa2", torch.bfloat16, 128, 128, True),
    "64": ("fa2", torch.bfloat16, 64, 64, False),
    "64cap": ("fa2", torch.bfloat16, 64, 64, True),
    "fa3": ("fa3", torch.bfloat16, 128, 128, False),
    "256": ("fa2", torch.bfloat16, 256, 256, False),
    "mla": ("fa2", torch.bfloat16, 192, 128, False),
    "fp16": ("fa2", torch.float16, 128, 128, False),
}


def spec(name: str) -> Any:
    """FlashInfer's own description of a module: no rotation, no window, int32 indices."""
    from flashinfer.jit.attention import gen_batch_prefill_module

    backend, dtype, k_dim, v_dim, cap = MODULES[name]
    return gen_batch_prefill_module(backend, dtype, dtype, dtype, torch.int32, k_dim, v_dim, 0, False, cap, False)


def use(folder: Path) -> list[str]:
    """Puts kept modules where FlashInfer looks before it builds; their names."""
    from flashinfer.jit import env

    names = []
    for kept in sorted(folder.glob("*.so")):
        place = Path(env.FLASHINFER_AOT_DIR) / kept.stem / kept.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept, place)
        names.append(kept.stem)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*MODULES, []], default=[])
    parser.add_argument("--save", type=Path)
    parser.add_argument("--use", type=Path)
    given = parser.parse_args()
    from flashinfer.jit.core import build_jit_specs

    if given.use is not None:
        print("in place:", *use(given.use))
    began = time.perf_counter()
    specs = [spec(name) for name in given.names or MODULES]
    build_jit_specs(specs)
    print(f"{len(specs)} modules in {time.perf_counter() - began:.0f} s")
    for each in specs:
        built = Path(each.get_library_path())
        print(f"{each.name}: {built.stat().st_size / 1e6:.1f} MB", flush=True)
        if given.save is not None:
            given.save.mkdir(parents=True, exist_ok=True)
            shutil.copy(built, given.save / built.name)


if __name__ == "__main__":
    main()
