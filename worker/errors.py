"""`inferbus errors`: what could not be answered, and another chance for it.

An error record is a request as it came, and one header `inferbus-error`. Records are read without a group and
never taken away, so whoever looks changes nothing; a replay publishes a copy.

Invariant: a replayed request is the request byte for byte, published once however many error records it has, and
counts its replays in `inferbus-replays`, so that one that always fails cannot go round for ever.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson

from inferbus.connectors.base import Headers, Message, Misconfigured, resolve_id
from inferbus.worker import access
from inferbus.worker.settings import PipelineSettings

DONE = 0
REPLAYS = "inferbus-replays"
_COLUMNS = {"id": 36, "code": 17, "stage": 7, "time": 20, "source": 32, "message": 0}  # widths in characters


@dataclass(frozen=True, slots=True)
class Choice:
    """Which error records are meant; an empty set means any.

    Attributes:
        ids: Request ids.
        codes: Error codes.
        stages: Stages.
        since: Unix seconds; only records made from then on.
        limit: At most so many.
    """

    ids: frozenset[str] = frozenset()
    codes: frozenset[str] = frozenset()
    stages: frozenset[str] = frozenset()
    since: float | None = None
    limit: int | None = None

    def takes(self, error: dict[str, Any]) -> bool:
        """Whether a record with this error is meant."""
        return (
            (not self.ids or error.get("id") in self.ids)
            and (not self.codes or error.get("code") in self.codes)
            and (not self.stages or error.get("stage") in self.stages)
            and (self.since is None or _time(error) >= self.since)
        )


class ErrorRecord(NamedTuple):
    """A request that could not be answered.

    Attributes:
        message: The request; its body is empty where the record was too large to keep it.
        headers: The request's own headers.
        error: What went wrong: id, code, message, stage, source, attempts, model, time.
        place: Where the record lies, told anew alike by every reader.
    """

    message: Message
    headers: Headers
    error: dict[str, Any]
    place: str


def list_(settings: PipelineSettings, choice: Choice, *, as_json: bool) -> int:
    """Print one line for each error record meant; answers the exit code.

    Raises:
        Unavailable: The errors topic is away.
    """
    if not as_json:
        sys.stdout.write(_row(*_COLUMNS))
    for record in records(settings, choice):
        sys.stdout.write(orjson.dumps(record.error).decode() + "\n" if as_json else _table_row(record.error))
    return DONE


def show(settings: PipelineSettings, request: str) -> int:
    """Print the error records of one request whole, as JSON; answers the exit code.

    Raises:
        Misconfigured: There is none.
        Unavailable: The errors topic is away.
    """
    found = False
    for record in records(settings, Choice(ids=frozenset((request,)))):
        found = True
        whole = {
            "id": request,
            "key": access.readable(record.message.key),
            "headers": [[name, access.readable(value)] for name, value in record.headers],
            "error": record.error,
            "body": None if _is_omitted(record) else access.readable(record.message.body),
        }
        sys.stdout.write(orjson.dumps(whole, option=orjson.OPT_INDENT_2).decode() + "\n")
    if not found:
        raise Misconfigured(f"no error record of a request {request!r} in {settings.errors[0].place.label()}")
    return DONE


def replay(
    settings: PipelineSettings,
    choice: Choice,
    *,
    rate: float | None = None,
    max_replays: int = 3,
    dry_run: bool = False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Publish the requests meant to the source once more, and print how many; answers the exit code.

    Of several records of one request the newest alone counts: whether it is meant, and how often it was replayed.
    Those that fail again make new error records, past the end that this replay reads to.

    Args:
        settings: The pipeline.
        choice: Which error records are meant.
        rate: Requests a second; None for as fast as possible.
        max_replays: A request replayed so often is left alone.
        dry_run: Print what would be published, and publish nothing.
        clock: Monotonic seconds.
        sleep: Waits for so many seconds.

    Raises:
        TooLarge: A request is larger than the source takes.
        Unavailable: The source or the errors topic is away.
    """
    count = omitted = late = spent = 0
    newest = _newest(settings, choice.ids)
    published: set[str] = set()
    due = clock()
    with contextlib.ExitStack() as stack:
        source = None if dry_run else stack.enter_context(access.publisher(settings.source.place))
        for record in records(settings, choice, newest):
            headers = _headers_again(record, max_replays)
            if record.place in published:
                continue  # the same record once more, as a queue may hold it after a crash
            if _is_omitted(record):
                omitted += 1
            elif _is_late(record):
                late += 1
            elif headers is None:
                spent += 1
            else:
                count += 1
                published.add(record.place)
                if source is None:
                    sys.stdout.write(_table_row(record.error))
                    continue
                if rate is not None:
                    sleep(max(0.0, due - clock()))
                    due += 1 / rate
                source.publish(record.message.body, record.message.key, headers)
        if source is not None:
            source.finish()
    said = [f"{count} {'would be replayed' if dry_run else 'replayed'}"]
    said += [f"{omitted} left, for their records were too large to keep the body"] if omitted else []
    said += [f"{late} left, for their deadlines (inferbus-deadline-ms) have passed"] if late else []
    said += [f"{spent} left, for they were replayed enough (--max-replays {max_replays})"] if spent else []
    sys.stdout.write("; ".join(said) + "\n")
    return DONE


def records(settings: PipelineSettings, choice: Choice, places: Container[str] | None = None) -> Iterator[ErrorRecord]:
    """The error records meant, up to the end the topic has now; in order only within a partition.

    Args:
        settings: The pipeline.
        choice: Which are meant.
        places: If given, only those that lie there.
    """
    left = choice.limit
    with access.reader(settings, settings.errors[0].place) as reader:
        for message in reader.to_end():
            if left == 0:
                return
            place = reader.whereabouts(message)
            if places is not None and place not in places:
                continue
            record = _record(message, place)
            if record is not None and choice.takes(record.error):
                left = None if left is None else left - 1
                yield record


def _newest(settings: PipelineSettings, ids: frozenset[str]) -> set[str]:
    """Where the newest error record of each request lies; no ids mean all. Bodies are not kept: they may be many."""
    newest: dict[str, tuple[int, float, str]] = {}
    for record in records(settings, Choice(ids)):
        id_ = str(record.error.get("id"))
        # Times are the clocks of different workers; the count of replays is the request's own.
        rank = (_replays(record), _time(record.error), record.place)
        newest[id_] = max(rank, newest.get(id_, rank))
    return {place for _, _, place in newest.values()}


def _record(message: Message, place: str) -> ErrorRecord | None:
    """The message as an error record; None for anything else that was written to the topic."""
    own = tuple(header for header in message.headers if header[0] != "inferbus-error")
    try:
        error = orjson.loads(dict(message.headers)["inferbus-error"])
    except (KeyError, orjson.JSONDecodeError):
        return None
    return ErrorRecord(message, own, error, place) if isinstance(error, dict) else None


def _headers_again(record: ErrorRecord, max_replays: int) -> Headers | None:
    """The request's headers with its replays counted and its id kept; None when it was replayed enough."""
    replays = _replays(record)
    if replays >= max_replays:
        return None
    headers = tuple(header for header in record.headers if header[0] != REPLAYS)
    if resolve_id(headers) is None:
        # Its id was its place on the bus; published anew it would get another, unknown to whoever asked.
        headers += (("inferbus-id", str(record.error.get("id")).encode()),)
    return (*headers, (REPLAYS, str(replays + 1).encode()))


def _replays(record: ErrorRecord) -> int:
    before = dict(record.headers).get(REPLAYS, b"0")
    return int(before) if before.isdigit() and len(before) < 10 else 0


def _is_late(record: ErrorRecord) -> bool:
    """Whether it could only expire; `inferbus-timeout-ms` does not count, for it starts anew with each publishing."""
    deadline = dict(record.headers).get("inferbus-deadline-ms", b"")
    return deadline.isdigit() and len(deadline) < 16 and int(deadline) / 1000 <= time.time()


def _is_omitted(record: ErrorRecord) -> bool:
    return record.error.get("body") == "omitted"


def _time(error: dict[str, Any]) -> float:
    """Unix seconds; 0 where the record does not say."""
    at = error.get("time")
    return at if isinstance(at, int | float) and 0 <= at < 1e11 else 0.0


def _table_row(error: dict[str, Any]) -> str:
    moment = datetime.fromtimestamp(_time(error), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return _row(*(moment if name == "time" else str(error.get(name)) for name in _COLUMNS))


def _row(*columns: str) -> str:
    cells = (_printable(text).ljust(w) for text, w in zip(columns, _COLUMNS.values(), strict=True))
    return "  ".join(cells) + "\n"


def _printable(text: str) -> str:
    # Some of it comes from whoever sent the request, and must not steer the terminal.
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
