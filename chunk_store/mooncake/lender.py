"""The process that lends its memory to a Mooncake cluster. Run one for each machine that should hold entries.

    python -m chunk_store.mooncake.lender --master HOST:PORT --memory SIZE [--host ADDRESS]

Its ports listen on all interfaces without authentication: a trusted network only. What it holds dies with it.
"""

from __future__ import annotations

import argparse
import signal
import threading

from chunk_store.mooncake.client import BUFFER_MIB, MooncakeAddress, connect
from chunk_store.quantities import human_bytes, parse_nbytes


def main() -> None:
    """Lends memory until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description="Lend memory to a Mooncake cluster.")
    parser.add_argument("--master", required=True, help="host:port of mooncake_master")
    parser.add_argument(
        "--memory", type=parse_nbytes, metavar="SIZE", required=True, help="memory to lend, for example 64GiB"
    )
    parser.add_argument("--host", default="127.0.0.1", help="this machine's address as the others reach it")
    options = parser.parse_args()
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    address = MooncakeAddress(options.master, options.host, BUFFER_MIB * 2**20 // 4, "")
    client = connect(address, options.memory)
    print(f"lending {human_bytes(options.memory)} to {options.master}", flush=True)
    stop.wait()
    client.close()


if __name__ == "__main__":
    main()
