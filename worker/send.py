"""`inferbus send`: the lines of a file as requests, and what became of each.

Invariant: a request is called as its body says, where the format has a place for an id, so that its sender finds it
again by the name it knows; else it is given a random one.
"""

from __future__ import annotations

import contextlib
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from inferbus.connectors.base import Bell, Headers, Message, Misconfigured, TooLarge
from inferbus.connectors.settings import KafkaSinkSettings
from inferbus.worker import access
from inferbus.worker.inbox import failure, inbox
from inferbus.worker.settings import PipelineSettings

DONE, AWAY = 0, 3


def send(settings: PipelineSettings, file: Path, wait: bool, *, timeout: float = 60.0) -> int:
    """Publish each line of `file` as one request; with `wait`, print what became of each as a JSON line.

    Args:
        settings: The pipeline; its source is written to. Outcomes are read from the first sink and the first errors
            place where these are topics; else they are awaited as replies, which the pipeline must allow.
        file: Request bodies, one a line; blank lines are skipped.
        wait: Whether to wait for the outcomes.
        timeout: Seconds to wait for them after the last request is published.

    Returns:
        The exit code: 3 when an outcome did not come in time. That an outcome is an error does not count.

    Raises:
        Misconfigured: The file cannot be read, a line is no text, or one is larger than the source takes.
        Unavailable: The source, or a place to read outcomes from, is away.
    """
    if not wait:
        _publish(settings, file)
        return DONE
    with _outcomes(settings) as (headers, read):
        missing = _publish(settings, file, headers)
        until = time.monotonic() + timeout
        while missing and (left := until - time.monotonic()) > 0:
            for message in read(min(0.1, left)):
                outcome = _outcome(message)
                if outcome["id"] in missing:
                    missing[outcome["id"]] -= 1
                    if not missing[outcome["id"]]:
                        del missing[outcome["id"]]
                    sys.stdout.write(orjson.dumps(outcome).decode() + "\n")
            sys.stdout.flush()
    if missing:
        count = missing.total()
        sys.stderr.write(f"inferbus: {count} requests without an outcome after {timeout:g} s; is a worker running?\n")
        return AWAY
    return DONE


Read = Callable[[float], Iterable[Message]]
"""Outcomes that have come, waiting at most so many seconds for the first."""


@contextlib.contextmanager
def _outcomes(settings: PipelineSettings) -> Iterator[tuple[Headers, Read]]:
    """What requests must say for it, and a way to see their outcomes.

    They are read where they go if anybody may read there, as in topics; else they are awaited as replies.
    """
    places = settings.sink[0].place, settings.errors[0].place
    if all(isinstance(place, KafkaSinkSettings) for place in places):
        # Open before anything is published: what came before they stood at the end would never be seen.
        with access.reader(settings, places[0], "end") as sink, access.reader(settings, places[1], "end") as errors:
            yield (), lambda patience: (*sink.read(patience), *errors.read(0))
        return
    try:
        box = inbox(settings)
    except Misconfigured as error:
        raise Misconfigured(f"--wait: outcomes are awaited as replies here, and {error}") from None
    bell = Bell()

    def read(patience: float) -> Iterable[Message]:
        box.rest()
        bell.wait(patience)
        return box.take()

    box.open(bell)
    try:
        yield (("inferbus-reply-to", box.address.encode()),), read
    finally:
        box.close()


def _publish(settings: PipelineSettings, file: Path, headers: Headers = ()) -> Counter[str]:
    """Publish the lines of `file` and, once all are acknowledged, say how many; returns each id and its number."""
    ids: Counter[str] = Counter()
    form = settings.requests.format
    with _opened(file) as lines, access.publisher(settings.source.place) as publisher:
        if lines.seekable():  # a pipe is read once only: what came before a wrong line may then be published
            for _ in _bodies(lines, file, form):
                pass
            lines.seek(0)
        try:
            for body in _bodies(lines, file, form):
                request = (_own_id(body) if form == "v2" else None) or str(uuid.uuid4())
                publisher.publish(body, headers=(("inferbus-id", request.encode()), *headers))
                ids[request] += 1
            publisher.finish()
        except TooLarge as error:
            raise Misconfigured(f"{file}: a request is larger than the source takes ({error})") from None
    sys.stderr.write(f"inferbus: {ids.total()} requests published to {settings.source.place.label()}\n")
    return ids


def _bodies(lines: BinaryIO, file: Path, form: str) -> Iterator[bytes]:
    """The lines that are not blank; `Misconfigured` at one that is no text where requests are text."""
    for number, line in enumerate(lines, 1):
        body = line.rstrip(b"\r\n")
        if not body.strip():
            continue
        try:
            if form != "raw":
                body.decode()
        except UnicodeDecodeError:
            raise Misconfigured(f"{file}:{number}: is not text in UTF-8, as requests.format {form} is") from None
        yield body


def _own_id(body: bytes) -> str | None:
    """The `id` in the body of a V2 request."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    id_ = request.get("id") if isinstance(request, dict) else None
    return id_ if isinstance(id_, str) else None


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        lines = file.open("rb")
    except OSError as error:
        raise Misconfigured(f"{file}: cannot be read: {error.strerror}") from None
    with lines:
        yield lines


def _outcome(message: Message) -> dict[str, Any]:
    """One line of what `--wait` prints."""
    headers = dict(message.headers)
    if "inferbus-error" in headers:
        error = orjson.loads(headers["inferbus-error"])
        return {"id": error.get("id"), "status": "error", "error": error}
    if headers.get("inferbus-status") == b"error":  # a reply
        code, text = failure(message)
        return {"id": message.id, "status": "error", "error": {"id": message.id, "code": code, "message": text}}
    try:
        outcome = orjson.loads(message.body)
    except orjson.JSONDecodeError:  # tensors the request asked for as raw bytes
        outcome = access.readable(message.body)
    return {"id": message.id, "status": "ok", "outcome": outcome}
