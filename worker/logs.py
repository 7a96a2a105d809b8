"""How a worker speaks to people: events with fields, on stderr, for eyes at a terminal and as JSON elsewhere.

Beside the path of a message. Everything that is said passes here, also what libraries log or warn: it gets
a UTC time, loses secrets, is cut to a bounded length, and goes out above the progress line.

Invariant: a log line is one `write`; a stderr that is gone costs the lines, never the work.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger, Processor

LONGEST = 8192
"""Characters of one value in a log line."""

Redact = Callable[[str], str]


class UnknownLogFormat(Exception):
    """`INFERBUS_LOG` is neither `json` nor `console`: say so and exit 1."""


class Screen:
    """A stream shared by log lines and one progress line, which always stays below them.

    Attributes:
        live: True at a terminal; only then is a progress line ever shown.
    """

    def __init__(self, stream: TextIO) -> None:
        self.live = stream.isatty()
        self._stream = stream
        self._line = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Write whole lines above the progress line."""
        with self._lock:
            self._put(f"{_ERASE}{text}{self._line}" if self._line else text)
        return len(text)

    def flush(self) -> None:
        """Nothing to do: `write` has flushed."""

    def show(self, line: str) -> None:
        """Replace the progress line; an empty one takes it away."""
        with self._lock:
            if self.live and line != self._line:
                # A line wider than the terminal would wrap, and erasing takes back only its last row.
                self._line = line[: self._columns() - 1]
                self._put(_ERASE + self._line)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80

    def _put(self, text: str) -> None:
        # The reader of a pipe may be gone, the terminal closed: serving goes on without being heard.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


_ERASE = "\r\x1b[2K"


def configure(screen: Screen, redact: Redact = str, environ: Mapping[str, str] = os.environ) -> None:
    """Send structlog, the standard library's logging and warnings to `screen`. May be called again.

    Args:
        screen: Where lines go.
        redact: Takes the secrets out of a text; applied to every string of every event, tracebacks included.
        environ: `INFERBUS_LOG=json|console` overrides the choice by terminal.

    Raises:
        UnknownLogFormat: `INFERBUS_LOG` says something else.
    """
    form = environ.get("INFERBUS_LOG") or ("console" if screen.live else "json")
    ends: list[Processor]
    if form == "json":
        # The standard encoder takes what orjson refuses: lone surrogates of file names, huge integers.
        ends = [structlog.processors.JSONRenderer()]
    elif form == "console":
        colors = screen.live and not environ.get("NO_COLOR")
        plain = structlog.dev.plain_traceback
        ends = [_escape, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    else:
        raise UnknownLogFormat(f"INFERBUS_LOG is {form!r}; expected json or console")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _Scrub(redact),
            *ends,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # It needs no more of a file than `write` and `flush`.
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", screen)),
        cache_logger_on_first_use=False,  # secrets are known only after the first lines may have been logged
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_ToStructlog()], force=True)
    logging.captureWarnings(True)


class Seldom:
    """Says the same thing at most once in `every` seconds, then how often it was `suppressed`."""

    def __init__(self, logger: FilteringBoundLogger, every: float = 10.0) -> None:
        self._logger = logger
        self._every = every
        self._said: dict[tuple[str, str], tuple[float, int]] = {}  # when last, and kept back since

    def warning(self, now: float, event: str, key: str = "", **fields: object) -> None:
        """Log `event` at level warning, unless event and key were said less than `every` seconds ago."""
        last, suppressed = self._said.pop((event, key), (-math.inf, 0))
        if now - last < self._every:
            self._said[event, key] = last, suppressed + 1
            return
        self._said[event, key] = now, 0
        if len(self._said) > 1024:
            del self._said[next(iter(self._said))]  # the one not heard of for longest
        if suppressed:
            fields["suppressed"] = suppressed
        self._logger.warning(event, **fields)


class _ToStructlog(logging.Handler):
    """What libraries log, as events of ours with the field `logger`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = record.getMessage()
        except (TypeError, ValueError):
            event = str(record.msg)  # a library's wrong format string must not stop the worker
        logger: FilteringBoundLogger = structlog.get_logger()
        say = logger.error if record.levelno >= logging.ERROR else logger.warning
        say(event, logger=record.name, exc_info=record.exc_info)


class _Scrub:
    """Makes an event plain (strings, numbers, booleans, None, lists, dicts), free of secrets and bounded."""

    def __init__(self, redact: Redact) -> None:
        self._redact = redact

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        first = {name: event.pop(name) for name in ("timestamp", "level", "event") if name in event}
        return {name: self._plain(value) for name, value in {**first, **event}.items()}

    def _plain(self, value: object) -> object:
        if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, Mapping):
            return {self._text(str(key)): self._plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._plain(item) for item in value]
        return self._text(str(value))

    def _text(self, text: str) -> str:
        text = self._redact(text)  # before the cut, which could leave half a secret that nobody recognises
        if len(text) <= LONGEST:
            return text
        half = LONGEST // 2
        return f"{text[:half]} ... {len(text) - 2 * half} characters left out ... {text[-half:]}"


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_CONTROLS_BUT_NEWLINE = {code: text for code, text in _CONTROLS.items() if code != ord("\n")}


def _escape(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """No text from outside forges a line or steers the terminal. Tracebacks keep their lines."""
    return {
        name: _visible(value, _CONTROLS_BUT_NEWLINE if name == "exception" else _CONTROLS)
        for name, value in event.items()
    }


def _visible(value: object, table: Mapping[int, str]) -> object:
    # Inside lists and dicts the renderer shows repr(), which escapes by itself.
    return value.translate(table) if isinstance(value, str) else value
