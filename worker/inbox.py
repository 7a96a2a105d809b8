"""Inboxes: where replies to one asker come in, on each bus; for `inferbus send --wait` and for clients.

Kafka has a topic for all askers of a pipeline, of which each reads all, from the end, without a group. On RabbitMQ and
SQS each has a queue of its own, which goes with it.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import orjson

from inferbus.connectors.base import Bell, ConnectorError, Message, Misconfigured, Source
from inferbus.connectors.settings import (
    KafkaSourceSettings,
    RabbitmqSourceSettings,
    SourcePlace,
    SqsSourceSettings,
)
from inferbus.worker import build
from inferbus.worker.settings import PipelineSettings

CHUNK = 500  # replies taken at once
LOOK = 0.2  # seconds of one read on Kafka: how long closing may wait for it
AGAIN = 1.0  # seconds until the next try where reading failed


class Inbox(Protocol):
    """Where replies come in; for one thread."""

    address: str
    """What requests name as `inferbus-reply-to`."""

    def open(self, bell: Bell) -> None:
        """Make it ready for replies to requests that are published from now on.

        Raises:
            Unavailable: Away, or missing.
        """

    def take(self) -> Sequence[Message]:
        """What has come; never blocks."""

    def rest(self) -> None:
        """Ring the bell when something comes."""

    def close(self) -> None:
        """Remove what was made. Idempotent."""


def failure(reply: Message) -> tuple[str, str]:
    """Code and sentence of a reply that says that its request failed."""
    code, _, text = str(orjson.loads(reply.body).get("error", "")).partition(": ")
    return code, text


def inbox(settings: PipelineSettings, reply_to: str | None = None) -> Inbox:
    """An inbox on the bus of a pipeline's source, at an address that its `replies` allow.

    Args:
        settings: The pipeline.
        reply_to: On Kafka a topic, by default `<name>.replies`, which must exist; on RabbitMQ and SQS what the name of
            the queue begins with.

    Raises:
        Misconfigured: Nobody can ask there, or the address is not allowed.
    """
    made = _made(settings.source.place, settings.name, reply_to)
    allowed = settings.replies.allow if settings.replies else ()
    if not any(fnmatchcase(made.address, pattern) for pattern in allowed):
        raise Misconfigured(f"replies.allow does not allow {made.address!r}; add a pattern that does")
    return made


def _made(place: SourcePlace, pipeline: str, reply_to: str | None) -> Inbox:
    own = uuid.uuid4().hex[:12]
    match place:
        case KafkaSourceSettings():
            return TopicInbox(place, reply_to or f"{pipeline}.replies")
        case RabbitmqSourceSettings():
            rabbitmq = build.client("rabbitmq")
            address = f"{reply_to or pipeline + '.replies'}.{own}"
            return QueueInbox(address, rabbitmq.RabbitmqSource(place.url, address, temporary=True, tls=place.tls))
        case SqsSourceSettings():
            sqs = build.client("sqs")
            address = f"{reply_to or pipeline + '-replies'}-{own}"
            return QueueInbox(
                address, sqs.TemporaryQueue(address, region=place.region, endpoint_url=place.endpoint_url)
            )
        case _:
            raise Misconfigured(f"{place.label()}: nobody can ask there; expected a source on Kafka, RabbitMQ or SQS")


class QueueInbox:
    """A source whose messages are settled as they are taken."""

    def __init__(self, address: str, source: Source) -> None:
        self.address = address
        self._source = source

    def open(self, bell: Bell) -> None:
        """See `Inbox`."""
        self._source.open(bell, lambda _finished, _budget: None)

    def take(self) -> Sequence[Message]:
        """See `Inbox`."""
        self._source.tick(time.monotonic())
        messages = self._source.receive(CHUNK)
        if messages:
            self._source.settle(messages)
        return messages

    def rest(self) -> None:
        """See `Inbox`."""
        self._source.rest()

    def close(self) -> None:
        """See `Inbox`."""
        self._source.close()


class TopicInbox:
    """A topic read from its end by a thread, for reading Kafka blocks."""

    def __init__(self, place: KafkaSourceSettings, topic: str) -> None:
        self.address = topic
        tools = build.client("kafka_tools")
        config = {"bootstrap.servers": place.brokers, **place.config}
        self._reader: Any = tools.KafkaReader(topic, f"inferbus-client-{uuid.uuid4().hex}", config, "end")
        self._came: deque[Message] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None

    def open(self, bell: Bell) -> None:
        """See `Inbox`."""
        self._reader.__enter__()
        self._bell = bell
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            try:
                messages = self._reader.read(LOOK)
            except ConnectorError:
                time.sleep(AGAIN)  # the client goes on by itself; whoever waits meanwhile times out
                continue
            if messages:
                self._came.extend(messages)
                self._bell.ring()

    def take(self) -> Sequence[Message]:
        """See `Inbox`."""
        came: list[Message] = []
        with contextlib.suppress(IndexError):
            while True:
                came.append(self._came.popleft())
        return came

    def rest(self) -> None:
        """See `Inbox`: it rings for each reading anyway."""

    def close(self) -> None:
        """See `Inbox`."""
        if self._thread is not None:
            self._closing = True
            self._thread.join()
            self._thread = None
            self._reader.__exit__(None, None, None)
