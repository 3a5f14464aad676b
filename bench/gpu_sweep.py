"""How a decode step's cost grows with shared length and batch: a table, and a plot beside what no sharing costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.gpu_model import KV_TOKEN_NBYTES, WEIGHT_NBYTES_READ, Engine
from bench.gpu_workloads import Tree, decode_floor_ms, decode_ms

SHARED_TOKENS = (1024, 4096, 16384, 65536)
BATCHES = (1, 4, 16, 64)
OWN_TOKENS = (128, 512)


@dataclass(frozen=True)
class Point:
    """A decode step: milliseconds of ours, of the fewest bytes, and of the bytes if every row read its own copy."""

    shared: int
    batch: int
    own: int
    ms: float
    floor_ms: float
    unshared_ms: float


def sweep(engine: Engine, bandwidth: float) -> list[Point]:
    points = []
    for own in OWN_TOKENS:
        for shared in SHARED_TOKENS:
            for batch in BATCHES:
                tree = Tree(batch, ((batch, shared),), own)
                ms, _ = decode_ms(engine, tree, steps=24)
                unshared = (WEIGHT_NBYTES_READ + batch * (shared + own) * KV_TOKEN_NBYTES) / bandwidth * 1e3
                points.append(Point(shared, batch, own, ms, decode_floor_ms(tree, bandwidth), unshared))
    return points


def print_table(points: list[Point]) -> None:
    print("decode step, ms (floor), by shared tokens (rows) and batch (columns)")
    for own in OWN_TOKENS:
        print(f"own {own:6}", *(f"{batch:>16}" for batch in BATCHES))
        for shared in SHARED_TOKENS:
            row = [p for p in points if (p.own, p.shared) == (own, shared)]
            print(f"{shared:10}", *(f"{p.ms:9.2f} ({p.floor_ms:4.1f})" for p in row))


def plot(points: list[Point], path: Path) -> None:
    """Step time over batch, a line a shared length: measured, and the bytes alone if nothing were shared."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(OWN_TOKENS), figsize=(11, 4.5), sharey=True)
    for axis, own in zip(axes, OWN_TOKENS, strict=True):
        for index, shared in enumerate(SHARED_TOKENS):
            row = [p for p in points if (p.own, p.shared) == (own, shared)]
            batches, color = [p.batch for p in row], f"C{index}"
            axis.plot(batches, [p.ms for p in row], color=color, marker="o", label=f"{shared // 1024}k shared")
            axis.plot(batches, [p.unshared_ms for p in row], color=color, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="batch", title=f"{own} own tokens")
        axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
        axis.grid(True, alpha=0.3)
    axes[0].set_ylabel("decode step, ms")
    axes[0].legend(title="measured; dotted: the bytes\nalone, nothing shared")
    figure.suptitle("Decode step of the Qwen3-8B shape on one H200")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
