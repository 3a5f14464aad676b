"""Log lines that bear the request they belong to, as text or as JSON. Configured by a service's ``__main__`` only.

One event is one line, whatever is in it: control characters of a message are escaped, the lines of a traceback are
marked, and everything is bounded. So nothing that a caller sends can look like a line of ours.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

from serving.process.native_stderr import take_native_stderr
from serving.trace.printable import printable
from serving.trace.request_id import NO_REQUEST, current_request_id

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
TRACE_CHARACTERS_MAX = 32768


class TextLines(logging.Formatter):
    """time, level, logger, [request id], message; the lines of a traceback begin with ``  |``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        trace = super().formatException(ei)  # type: ignore[arg-type]  # as the base class is called
        return "\n".join("  | " + printable(line) for line in trace[:TRACE_CHARACTERS_MAX].split("\n"))


class JsonLines(logging.Formatter):
    """One JSON object an event: time (UTC), level, service, logger, thread, request_id, message, exception."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "thread": record.threadName,
            "request_id": getattr(record, "request_id", NO_REQUEST),
            "message": printable(record.getMessage()),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[:TRACE_CHARACTERS_MAX]
        return json.dumps(line)


def configure_logging(level: str, log_format: str = "text", service: str = "") -> None:
    """One event a line on stderr. ``level`` is one of ``LEVELS``, ``log_format`` one of ``FORMATS``.

    What libraries log or warn comes along; in JSON also what native code writes to stderr.
    """
    target: TextIO = sys.stderr
    formatter: logging.Formatter = TextLines()
    if log_format == "json":
        target = take_native_stderr(logging.getLogger("native").warning)
        formatter = JsonLines(service)
        logging.raiseExceptions = False  # a line that cannot be written must not become another one
    formatter.converter = time.localtime
    handler = logging.StreamHandler(target)
    handler.addFilter(_add_request_id)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _logged(sys.excepthook)
    threading.excepthook = _log_thread_failure


def begin_logging(service: str, level: str, log_format: str) -> None:
    """``configure_logging`` and a first line, before a service imports what takes seconds."""
    configure_logging(level, log_format, service)
    logging.getLogger(__name__).info("%s service: importing torch and transformers", service)


def adopt_library_loggers() -> None:
    """Loggers that print for themselves (torch's, transformers') hand their lines to ours instead.

    For once they are imported: they add their handlers then.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and any(type(h) is logging.StreamHandler for h in logger.handlers):
            logger.handlers = [h for h in logger.handlers if type(h) is not logging.StreamHandler]
            logger.propagate = True


def _logged(usual: Callable[..., object]) -> Callable[..., None]:
    """An unexpected end of the process as a log line; Ctrl-C ends as usual."""

    def hook(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if issubclass(kind, KeyboardInterrupt):
            usual(kind, error, trace)
        else:
            logging.getLogger(__name__).critical("the process ends", exc_info=error)

    return hook


def _log_thread_failure(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else "unknown"
    logging.getLogger(__name__).critical("thread %s ended", name, exc_info=args.exc_value)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = current_request_id()
    return True
