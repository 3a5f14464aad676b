"""The process that lends its memory to a Mooncake cluster. Run one for each machine that should hold entries.

    python -m chunk_store.mooncake.lender --master HOST:PORT --memory-gib N [--host ADDRESS]

Its ports listen on all interfaces without authentication: a trusted network only. What it holds dies with it.
"""

from __future__ import annotations

import argparse
import signal
import threading

from chunk_store.mooncake.client import BUFFER_MIB, MooncakeAddress, connect


def main() -> None:
    """Lends memory until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description="Lend memory to a Mooncake cluster.")
    parser.add_argument("--master", required=True, help="host:port of mooncake_master")
    parser.add_argument("--memory-gib", type=float, required=True, help="memory to lend, in GiB")
    parser.add_argument("--host", default="127.0.0.1", help="this machine's address as the others reach it")
    options = parser.parse_args()
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    address = MooncakeAddress(options.master, options.host, BUFFER_MIB * 2**20 // 4, "")
    client = connect(address, int(options.memory_gib * 2**30))
    print(f"lending {options.memory_gib} GiB to {options.master}", flush=True)
    stop.wait()
    client.close()


if __name__ == "__main__":
    main()
