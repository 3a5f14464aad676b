"""How fast the chunk stores are, each beside what it stands on: memcpy, files, the raw Redis and Mooncake clients.

    python -m bench.store [--backends file,redis,mooncake] [--dir DIR] [--seconds N] [--json FILE]

The two sides of a ratio take turns in the same run; each number is a median. File reads go round a working set larger
than the processor's caches, entries and destination buffers both, as a pool would; ours and the bare read stand half a
round apart. Ours verifies every byte, the other side verifies nothing. Nothing here decides what is good enough.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.store_entries import Row
from bench.store_files import bench_file, bench_memcpy, bench_scale
from bench.store_servers import bench_mooncake, bench_redis, started
from engine.model.processor import read_processor
from tests.chunk_store.servers import mooncake, redis_server


def show(rows: Sequence[Row]) -> None:
    print(f"{'':14}{'MB':>8}{'ours GB/s':>12}{'beside GB/s':>13}  {'beside':12}{'ratio':>6}")
    for row in rows:
        print(f"{row.what:14}{row.mb:8.1f}{row.ours:12.2f}{row.theirs:13.2f}  {row.beside:12}{row.ratio:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="file,redis,mooncake", help="comma-separated")
    parser.add_argument("--dir", type=Path, help="where the files go (a temporary directory)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    chosen = options.backends.split(",")
    found: dict[str, Any] = {"load_average": os.getloadavg()[0], "processors": os.cpu_count()}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        root = Path(name)
        if "file" in chosen:
            rows += bench_memcpy(options.seconds) + bench_file(root, options.seconds)
            found["scale"] = bench_scale(root)
        if {"redis", "mooncake"} & set(chosen):
            server = redis_server(make(root / "redis"))
            with started(server):
                if "redis" in chosen:
                    rows += bench_redis(server, options.seconds)
                if "mooncake" in chosen:
                    cluster = mooncake(make(root / "mooncake"), server, memory_gib=0.5)
                    with started(cluster):
                        rows += bench_mooncake(cluster, options.seconds)
    found["rows"] = [{**asdict(row), "ratio": row.ratio} for row in rows]
    print(f"{read_processor()}, {found['processors']} of them, load average {found['load_average']:.1f}")
    show(rows)
    for scale in found.get("scale", []):
        print(
            "  ".join(
                f"{label} {value:,.0f}" if value > 99 else f"{label} {value:.2f}" for label, value in scale.items()
            )
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def make(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    main()
