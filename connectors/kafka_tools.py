"""Kafka from outside a worker: publish to a topic, or read a topic, without belonging to a group.

For people at a terminal: these block, they give up, and they say why in one line. Nothing here commits an
offset or joins a group, so a running pipeline never notices.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, Literal, Self

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka import Message as Raw

from inferbus.connectors.base import Headers, Message, Unavailable, resolve_id
from inferbus.connectors.kafka_client import (
    REACH,
    Config,
    Trouble,
    consumer_config,
    headers_of,
    new_client,
    producer_config,
    reach_topic,
    translated,
    write_error,
)

GIVE_UP = 30.0  # seconds a record may take to be acknowledged, or a partition to answer
CHUNK = 1000  # messages taken from the client at once
LEADERLESS = {KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.UNKNOWN_TOPIC_OR_PART}


class _Quiet(Trouble):
    """Remembers what the client complains of, for the one line we say; logs nothing."""

    def callbacks(self) -> dict[str, Any]:
        silent = logging.Logger("kafka")  # noqa: LOG001 - of our own: nobody configures it, nobody hears it
        silent.addHandler(logging.NullHandler())
        return {"error_cb": self.note, "logger": silent}

    def say(self, kind: str, text: str) -> None:
        """Nothing: the caller raises."""


class KafkaPublisher:
    """Publishes to one topic; a context, which opens on entry and drops what is pending on exit.

    Args:
        topic: The topic's name.
        config: librdkafka properties, `bootstrap.servers` among them.

    Raises:
        Misconfigured: On entry: a property cannot work.
        Unavailable: On entry: no broker answers, or the topic does not exist.
    """

    def __init__(self, topic: str, config: Config) -> None:
        self.name = f"kafka:{topic}"
        self.acknowledged = 0
        self._topic = topic
        self._config = {**producer_config(config), "message.timeout.ms": int(GIVE_UP * 1000)}
        self._failure: KafkaError | None = None

    def __enter__(self) -> Self:
        trouble = _Quiet()
        self._client = new_client(Producer, self._config | trouble.callbacks())
        self.partitions = reach_topic(self._client, self._topic, trouble).partitions
        return self

    def __exit__(self, *_: object) -> None:
        self._client.purge()
        self._client.flush(0.1)

    def publish(self, body: bytes, key: bytes | None = None, headers: Headers = ()) -> None:
        """Hand one record to the client; waits while its queue is full.

        Raises:
            TooLarge: The record is larger than the client sends.
            Unavailable: An earlier record was not acknowledged.
        """
        while True:
            try:
                self._client.produce(self._topic, body, key, on_delivery=self._report, headers=list(headers))
                break
            except BufferError:
                self._client.poll(0.1)
            except KafkaException as error:
                raise write_error(error.args[0]) from None
        self._client.poll(0)
        self._raise_failure()

    def finish(self) -> None:
        """Return when every record is acknowledged.

        Raises:
            TooLarge: A record was larger than the topic takes.
            Unavailable: A record was not acknowledged.
        """
        while self._client.flush(0.5):  # in steps, for Ctrl-C; each record ends by its own time limit
            pass
        self._raise_failure()

    def _report(self, error: KafkaError | None, _record: Raw) -> None:
        if error is None:
            self.acknowledged += 1
        else:
            self._failure = self._failure or error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise write_error(self._failure)


class KafkaReader:
    """Reads one topic; a context, which on entry stands at the start or the end of every partition.

    Args:
        topic: The topic's name.
        group: A group whose members may read it. Brokers may ask for it; it is never joined.
        config: librdkafka properties, `bootstrap.servers` among them.
        at: Where to begin.

    Raises:
        Misconfigured: On entry: a property cannot work.
        Unavailable: On entry: no broker answers, or the topic does not exist.
    """

    def __init__(self, topic: str, group: str, config: Config, at: Literal["start", "end"] = "start") -> None:
        self.name = f"kafka:{topic}"
        self._topic = topic
        self._at = at
        self._config = consumer_config(config, group, "earliest", CHUNK, 2**24) | {"enable.partition.eof": True}
        self._config.pop("group.instance.id", None)  # a second member of that name would throw the first out
        self._trouble = _Quiet()

    def __enter__(self) -> Self:
        self._client = new_client(Consumer, self._config | self._trouble.callbacks())
        try:
            self.partitions = reach_topic(self._client, self._topic, self._trouble).partitions
            with translated("read"):
                spans = {p: self._span(p) for p in range(self.partitions)}
                begin = 0 if self._at == "start" else 1
                self._client.assign([TopicPartition(self._topic, p, span[begin]) for p, span in spans.items()])
        except BaseException:
            self._client.close()
            raise
        self._ends = {p: end for p, (start, end) in spans.items() if end > start and self._at == "start"}
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _span(self, partition: int) -> tuple[int, int]:
        """First offset, and one past the last."""
        until = time.monotonic() + REACH
        while True:
            try:
                found = self._client.get_watermark_offsets(TopicPartition(self._topic, partition), REACH)
            except KafkaException as error:
                # Of a topic just made, not every broker knows yet who leads it.
                if error.args[0].code() not in LEADERLESS or time.monotonic() > until:
                    raise
                self._client.poll(0.1)
                continue
            if found is None:
                raise Unavailable(f"{self.name}: partition {partition} did not answer within {REACH:.0f} s")
            start, end = found
            return start, end

    def read(self, timeout: float) -> list[Message]:
        """What has come, waiting at most `timeout` seconds for the first of it."""
        return [self._message(raw) for raw in self._poll(timeout) if raw.error() is None]

    def to_end(self) -> Iterator[Message]:
        """Every message up to the end that each partition had on entry.

        Raises:
            Unavailable: A partition stopped answering before its end.
        """
        left = dict(self._ends)
        patience = GIVE_UP
        while left:
            came = self._poll(0.5)
            patience = GIVE_UP if came else patience - 0.5
            for raw in came:
                partition = raw.partition()
                if partition not in left:
                    continue
                if raw.error() is None:
                    if raw.offset() < left[partition]:
                        yield self._message(raw)
                    if raw.offset() >= left[partition] - 1:
                        del left[partition]
                elif raw.error().code() == KafkaError._PARTITION_EOF:
                    # The last offsets may be transaction markers, which are never delivered.
                    del left[partition]
            if patience <= 0:
                why = f" ({self._trouble.last})" if self._trouble.last else ""
                raise Unavailable(f"{self.name}: nothing came for {GIVE_UP:.0f} s, before its end{why}")

    def whereabouts(self, message: Message) -> str:
        """Topic, partition and offset."""
        return str(message.receipt)

    def _poll(self, timeout: float) -> list[Any]:
        with translated("read"):
            first = self._client.poll(timeout)
            return [] if first is None else [first, *self._client.consume(CHUNK, 0)]

    def _message(self, raw: Any) -> Message:
        ((own,), _) = headers_of([raw])
        headers: Headers = tuple((name, value or b"") for name, value in own)
        place = f"{self._topic}/{raw.partition()}/{raw.offset()}"
        return Message(
            resolve_id(headers) or place.replace("/", "-"),
            raw.key(),
            raw.value() or b"",
            headers,
            raw.timestamp()[1] / 1000,
            1,
            place,
        )
