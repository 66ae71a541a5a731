"""The log: one line for each record, as text or as JSON, on standard error or in the system's log."""

from __future__ import annotations

import json
import logging
import logging.handlers
import threading
from datetime import UTC, datetime
from pathlib import Path

_SYSTEM_LOG = Path("/dev/log")
_QUIET = {"qemu.qmp": logging.CRITICAL, "asyncio": logging.WARNING}
"""Libraries that log what their callers deal with, or what nobody wants to know."""


class ClientLog(logging.LoggerAdapter[logging.Logger]):
    """The log of what one client does."""

    def __init__(self, client: str) -> None:
        super().__init__(logging.getLogger("nbdserve"), {"client": client})


class TextFormatter(logging.Formatter):
    """``nbdserve: 192.0.2.1:40000: the message``."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line; line breaks in a message become spaces."""
        client = getattr(record, "client", None)
        parts = [self._program, *([client] if client else []), " ".join(record.message.splitlines())]
        return ": ".join(parts)


class JsonFormatter(logging.Formatter):
    """An object with the members time (UTC), level, client (or null) and message, and maybe traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object on one line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "client": getattr(record, "client", None),
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


def start(program: str, handler: logging.Handler, *, as_json: bool, verbose: bool) -> None:
    """Log to this handler, and to no other, from now on; also what a thread dies of."""
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter(program))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
    threading.excepthook = _log_death
    # A log that cannot be written, as its disk is full, is no reason for a traceback in it.
    logging.raiseExceptions = False


def system_log() -> logging.Handler:
    """Tell where a daemon's log goes: to syslog, if this system has one."""
    if _SYSTEM_LOG.exists():
        return logging.handlers.SysLogHandler(str(_SYSTEM_LOG), logging.handlers.SysLogHandler.LOG_DAEMON)
    return logging.NullHandler()


def _log_death(what: threading.ExceptHookArgs) -> None:
    """A thread ends with an exception that nobody expected: a defect of this program."""
    if what.exc_value is not None:
        exc_info = (what.exc_type, what.exc_value, what.exc_traceback)
        logging.getLogger("nbdserve").error("a thread has died", exc_info=exc_info)
