"""Replies: a requester that gave an address gets its outcome there as well, if the pipeline file allows that address.

Beside delivery: a reply is sent once, when the outcome is given to the sinks, and nobody waits for it. So it is fast,
may be lost or come twice, and never keeps a request from being settled; what counts is the outcome in its sink.

Invariant: nothing is sent to an address that no pattern of the pipeline file allows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from fnmatch import translate

import orjson
import structlog

from inferbus.connectors.base import Message, Records, Replies
from inferbus.worker.delivery import Outcomes
from inferbus.worker.metrics import Metrics
from inferbus.worker.outcomes import CARRIED

log = structlog.get_logger("inferbus.replies")

ADDRESS = "inferbus-reply-to"
QUIET = 30.0  # seconds between two log lines


class Answering:
    """Sends outcomes to whoever asked for them.

    Args:
        replies: The way there.
        allow: Patterns of addresses, as of file names: `*` and `?`.
        metrics: What is counted.
    """

    def __init__(self, replies: Replies, allow: Sequence[str], metrics: Metrics) -> None:
        self._replies = replies
        self._allowed = re.compile("|".join(translate(pattern) for pattern in allow))
        self._metrics = metrics
        self._refused = 0
        self._said_at = -1e9

    def answer(self, outcomes: Outcomes) -> None:
        """Send those of the outcomes that somebody asked for."""
        wanted: dict[str, list[int]] = {}
        for position, m in enumerate(outcomes.records.messages):
            if m.headers and (address := self._address(m)) is not None:
                wanted.setdefault(address, []).append(position)
        for address, positions in wanted.items():
            records = outcomes.records.take(positions)
            self._replies.send(address, records if outcomes.kind == "prediction" else errors(records))

    def _address(self, m: Message) -> str | None:
        """Where an outcome is wanted, and may go."""
        given = dict(m.headers).get(ADDRESS)
        if not given:
            return None
        address = given.decode("utf-8", "replace")
        if self._allowed.fullmatch(address):
            return address
        self._refused += 1
        if (now := time.monotonic()) - self._said_at > QUIET:
            self._said_at = now
            log.warning("reply_refused", address=address[:200], id=m.id[:200], cure="add a pattern to replies.allow")
        return None

    def tick(self) -> None:
        """Make progress, and tell how many went."""
        self._replies.tick()
        self._metrics.set_replies(self._replies.sent, self._replies.failed, self._refused)


def errors(records: Records) -> Records:
    """Error records as their requesters read them: what went wrong, without the request."""
    bodies: list[bytes] = []
    headers: list[list[tuple[str, bytes]]] = []
    for m, own in zip(records.messages, records.headers, strict=True):
        error = orjson.loads(dict(own)["inferbus-error"])
        bodies.append(orjson.dumps({"id": m.id, "error": f"{error['code']}: {error['message']}"}))
        told = [("inferbus-id", m.id.encode()), ("inferbus-status", b"error"), ("content-type", b"application/json")]
        headers.append([*told, *(header for header in m.headers if header[0] in CARRIED)])
    return Records(records.messages, records.keys, bodies, headers)
