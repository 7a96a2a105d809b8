"""A pipeline's places from outside a worker: for `send`, `errors` and `check --connect`.

Kafka has tools of its own, which join no group. On the other buses a place is written through a sink and read through a
source that settles nothing: what was read goes back when the reader closes.
"""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from typing import Literal, Protocol, Self

from inferbus.connectors.base import Bell, Failure, Headers, Message, Misconfigured, Records, Sink, Source, Unavailable
from inferbus.connectors.settings import (
    JobSourceSettings,
    KafkaSinkSettings,
    KafkaSourceSettings,
    SinkPlace,
    SourcePlace,
    StoreSettings,
)
from inferbus.worker import build
from inferbus.worker.settings import ClaimCheckSettings, PipelineSettings

GIVE_UP = 30.0  # seconds a record may take to be confirmed
QUIET = 3.0  # seconds without a message after which a queue has shown all it has
CHUNK = 500  # records written at once
PAUSE = 0.005  # seconds between looks at a client that works on a thread of its own


class Publisher(Protocol):
    """Writes to one place; a context, which reaches the place on entry."""

    acknowledged: int

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        """Write one record, soon.

        Raises:
            TooLarge: The place never takes it.
            Unavailable: An earlier record was not written.
        """

    def finish(self) -> None:
        """Return when every record is durable.

        Raises:
            TooLarge: The place never takes one of them.
            Unavailable: One was not written.
        """


class Reader(Protocol):
    """Reads one place and takes nothing away; a context, which reaches the place on entry."""

    def read(self, timeout: float) -> list[Message]:
        """What has come, waiting at most `timeout` seconds for the first of it."""

    def to_end(self) -> Iterator[Message]:
        """What lay there on entry."""

    def whereabouts(self, message: Message) -> str:
        """Where a message lies, told alike by every reader of the place."""


class SinkPublisher:
    """A `Publisher` on any sink."""

    def __init__(self, sink: Sink) -> None:
        self.acknowledged = 0
        self._sink = sink
        self._waiting: list[tuple[Message, list[tuple[str, bytes]]]] = []
        self._failures: list[Failure] = []
        self._under_way = 0

    def __enter__(self) -> Self:
        self._sink.open(Bell())
        return self

    def __exit__(self, *_: object) -> None:
        self._sink.close(0.0)

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        """See `Publisher`."""
        given = dict(headers).get("inferbus-id", b"").decode("utf-8", "replace")
        self._waiting.append((Message(given, key, body, headers, None, 1, None), list(headers)))
        if len(self._waiting) >= CHUNK:
            self._write()
            self._sink.tick()
            self._raise_failure()

    def finish(self) -> None:
        """See `Publisher`."""
        self._write()
        until = time.monotonic() + GIVE_UP
        while self._under_way and time.monotonic() < until:
            self._sink.tick()
            time.sleep(PAUSE)
        self._raise_failure()
        if self._under_way:
            raise Unavailable(f"{self._sink.name}: {self._under_way} records were not confirmed in {GIVE_UP:.0f} s")

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            messages = [message for message, _ in waiting]
            headers = [own for _, own in waiting]
            records = Records(messages, [m.key for m in messages], [m.body for m in messages], headers)
            self._under_way += len(records)
            self._sink.write(records, lambda failures: self._written(len(records), failures))

    def _written(self, count: int, failures: Sequence[Failure]) -> None:
        self._under_way -= count
        self._failures += failures
        self.acknowledged += count - len(failures)

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._failures[0][1]


class SourceReader:
    """A `Reader` on any source; what it has read is out of others' sight until it closes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._held: list[Message] = []

    def __enter__(self) -> Self:
        self._source.open(Bell(), lambda _finished, _budget: None)
        return self

    def __exit__(self, *_: object) -> None:
        self._source.release(self._held)
        self._source.close()

    def read(self, timeout: float) -> list[Message]:
        """See `Reader`."""
        until = time.monotonic() + timeout
        while True:
            self._source.tick(time.monotonic())
            messages = self._source.receive(CHUNK)
            self._held += messages
            if messages or time.monotonic() >= until:
                return messages
            time.sleep(PAUSE)

    def to_end(self) -> Iterator[Message]:
        """See `Reader`."""
        while messages := self.read(QUIET):
            yield from messages

    def whereabouts(self, message: Message) -> str:
        """See `Reader`: a digest of what it holds, for a queue has no other places."""
        return blake2b(repr((message.id, message.body, message.headers)).encode(), digest_size=16).hexdigest()


def publisher(place: SourcePlace | SinkPlace) -> AbstractContextManager[Publisher]:
    """Writes to a place of the pipeline.

    Raises:
        Misconfigured: A client library is missing, or a setting cannot work.
    """
    if isinstance(place, JobSourceSettings):
        raise Misconfigured(f"{place.label()}: requests of a job are the rows of its files; add them there")
    if isinstance(place, KafkaSourceSettings | KafkaSinkSettings):
        tools = build.client("kafka_tools")
        return tools.KafkaPublisher(place.topic, {"bootstrap.servers": place.brokers, **place.config})  # type: ignore[no-any-return]
    return SinkPublisher(build.sink(place.writing() if isinstance(place, SourcePlace) else place, {}))


def reader(
    settings: PipelineSettings, place: SourcePlace | SinkPlace, at: Literal["start", "end"] = "start"
) -> AbstractContextManager[Reader]:
    """Reads a place of the pipeline, from its start or, if it is a topic, its end.

    Raises:
        Misconfigured: A client library is missing, a setting cannot work, or the place cannot be read.
    """
    if isinstance(place, KafkaSourceSettings | KafkaSinkSettings):
        tools = build.client("kafka_tools")
        config = {"bootstrap.servers": place.brokers, **place.config}
        source = settings.source.kafka
        return tools.KafkaReader(place.topic, source.group if source else settings.name, config, at)  # type: ignore[no-any-return]
    reading = place.reading() if isinstance(place, SinkPlace) else place
    if reading is None:
        raise Misconfigured(f"{place.label()}: cannot be read from here: name the queue it leads to as `routing_key`")
    return SourceReader(build.source(settings, reading))


@contextlib.contextmanager
def reached(settings: PipelineSettings, place: SourcePlace | SinkPlace) -> Iterator[None]:
    """A place of the pipeline, seen to be there.

    Raises:
        Misconfigured, Unavailable: It cannot be used; says why.
    """
    if isinstance(place, StoreSettings):
        shelf = build.shelf(place)
        shelf.open(Bell())
        try:
            yield
        finally:
            shelf.close(0.0)
        return
    if isinstance(place, SourcePlace) and not isinstance(place, KafkaSourceSettings | JobSourceSettings):
        place = place.writing()  # to read a queue takes from it, and what is given back counts as delivered once more
    with reader(settings, place) if isinstance(place, SourcePlace) else publisher(place):
        yield


@contextlib.contextmanager
def claims_reached(settings: PipelineSettings, chosen: ClaimCheckSettings) -> Iterator[None]:
    """The places of claims, seen to be there.

    Raises:
        Misconfigured, Unavailable: One cannot be used; says why.
    """
    on_a_bus = any(not isinstance(sink.place, StoreSettings) for sink in settings.sink)
    build.Claims(settings, chosen).reach(write=on_a_bus)
    yield


def readable(content: bytes | None) -> str | dict[str, str] | None:
    """Bytes from the bus as JSON can show them: text where they are UTF-8, else `{"base64": ...}`."""
    if content is None:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}
