"""The processor this process runs on: its name, and the features that decide which dtype it multiplies fast."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

# Names as Linux gives them; "bf16" and "asimdhp" are ARM's.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "asimdhp")
NATIVE = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "amx_fp16"}}


@dataclass(frozen=True)
class Processor:
    """``features`` are those of ``FEATURES`` that it has; empty where the system does not say."""

    name: str
    features: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.features) or 'features unknown'})"

    def multiplies(self, dtype: str) -> bool:
        """Whether it has instructions for products of this dtype."""
        return dtype == "float32" or bool(NATIVE.get(dtype, set()) & set(self.features))


def read_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """This machine's processor, from the Linux kernel where there is one."""
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Processor(name, tuple(feature for feature in FEATURES if feature in flags))


def memory_nbytes(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes of memory that this machine, or the container around this process, has; None if unknown."""
    sizes: list[int] = []
    try:
        sizes += [
            int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if line.startswith("MemTotal")
        ]
        sizes += [int(text) for text in [limit.read_text().strip()] if text.isdigit()]
    except OSError:
        pass
    return min(sizes, default=None)
