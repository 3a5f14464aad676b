"""``python -m cairn.local.together OPTIONS -- OPTIONS``: the prefill service's options, then the decode service's.

``cairn up`` starts it. It prints a ready line for each service, and ends as a service does.
"""

from __future__ import annotations

import sys

from decode_service import options as decode_options
from prefill_service import options as prefill_options
from serving.process.logs import adopt_library_loggers, begin_logging

if __name__ == "__main__":
    words = sys.argv[1:]
    between = words.index("--") if "--" in words else len(words)
    told = prefill_options.parse(words[:between]), decode_options.parse(words[between + 1 :])
    begin_logging("cairn", told[1].log_level, told[1].log_format)

import os
import signal

from cairn.local.together.assembly import build
from decode_service.__main__ import FULL_NAME as DECODE
from prefill_service.api.service import FULL_NAME as PREFILL
from serving.process.life import Listed, run_main


def main(prefill: prefill_options.PrefillOptions, decode: decode_options.DecodeOptions) -> int:
    adopt_library_loggers()
    failed: list[bool] = []

    def on_failure() -> None:
        """A process that can compute no more ends, so that what supervises it starts another one."""
        failed.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    listed = [Listed("decode", DECODE, decode), Listed("prefill", PREFILL, prefill)]
    code = run_main(listed, lambda loaded: build(prefill, decode, loaded, on_failure))
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(*told))
