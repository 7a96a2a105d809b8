"""`inferbus send`: the lines of a file as requests, and what became of each."""

from __future__ import annotations

import contextlib
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from inferbus.connectors.base import Message, Misconfigured, TooLarge
from inferbus.worker import access
from inferbus.worker.settings import PipelineSettings

DONE, AWAY = 0, 3


def send(settings: PipelineSettings, file: Path, wait: bool, *, timeout: float = 60.0) -> int:
    """Publish each line of `file` as one request; with `wait`, print what became of each as a JSON line.

    Args:
        settings: The pipeline; its source is written to, its first sink and first errors place are read.
        file: Request bodies, one a line; blank lines are skipped.
        wait: Whether to wait for the outcomes.
        timeout: Seconds to wait for them after the last request is published.

    Returns:
        The exit code: 3 when an outcome did not come in time.

    Raises:
        Misconfigured: The file cannot be read, or a line is larger than the source takes.
        Unavailable: The source, or a place to read outcomes from, is away.
    """
    if not wait:
        count = sum(1 for _ in published(settings, file))
        sys.stderr.write(f"inferbus: {count} requests published to {settings.source.kafka.topic}\n")
        return DONE
    with contextlib.ExitStack() as stack:
        # Readers first: an outcome that came before they stood at the end would never be seen.
        sink = stack.enter_context(access.reader(settings, settings.sink[0].kafka, "end"))
        errors = stack.enter_context(access.reader(settings, settings.errors[0].kafka, "end"))
        missing = set(published(settings, file))
        until = time.monotonic() + timeout
        while missing and (left := until - time.monotonic()) > 0:
            for message in (*sink.read(min(0.1, left)), *errors.read(0)):
                outcome = _outcome(message)
                if outcome["id"] in missing:
                    missing.remove(outcome["id"])
                    sys.stdout.write(orjson.dumps(outcome).decode() + "\n")
            sys.stdout.flush()
    if missing:
        sys.stderr.write(f"inferbus: {len(missing)} requests without an outcome after {timeout:g} s\n")
        return AWAY
    return DONE


def published(settings: PipelineSettings, file: Path) -> Iterator[str]:
    """Publish the lines of `file`; yields the id given to each, and ends when all are acknowledged."""
    with _opened(file) as lines, access.publisher(settings.source.kafka) as publisher:
        try:
            for line in lines:
                body = line.rstrip(b"\r\n")
                if body.strip():
                    request = str(uuid.uuid4())
                    publisher.publish(body, headers=(("inferbus-id", request.encode()),))
                    yield request
            publisher.finish()
        except TooLarge as error:
            raise Misconfigured(f"{file}: a request is larger than the source takes ({error})") from None


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Iterator[bytes]]:
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
    try:
        outcome = orjson.loads(message.body)
    except orjson.JSONDecodeError:  # tensors the request asked for as raw bytes
        outcome = access.readable(message.body)
    return {"id": message.id, "status": "ok", "outcome": outcome}
