"""``python -m gateway``: OpenAI's HTTP API over the services."""

from __future__ import annotations

import sys

from gateway.options import parse
from serving.process.logs import configure_logging

if __name__ == "__main__":
    given = parse()
    configure_logging(given.log_level, given.log_format, "gateway")

from gateway.server import run

if __name__ == "__main__":
    sys.exit(run(given))
