"""A look at offsets from outside the group, with a client of its own: it may block, and disturbs no one's reading."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from confluent_kafka import Consumer, KafkaError, TopicPartition

from inferbus.connectors.base import Unavailable
from inferbus.connectors.kafka_client import REACH, UNREADABLE, Config, log, new_client, reads_from_start, translated

POLL = 0.05  # seconds of one poll


class Probe:
    """A client outside the group that looks at offsets. Blocks; its methods raise `Unavailable` when nobody answers."""

    def __init__(self, client: Consumer, *, earliest: bool) -> None:
        self._client = client
        self._earliest = earliest

    def look(self, topic: str, partition: int, offset: int) -> tuple[str, int]:
        """What a fetch at `offset` gives: `message`, `bad` or `end`, and at which offset."""
        self._client.assign([TopicPartition(topic, partition, offset)])
        until = time.monotonic() + 2 * REACH
        while time.monotonic() < until:
            m = self._client.poll(POLL)
            if m is None:
                continue
            code = m.error() and m.error().code()
            if code is None:
                return "message", m.offset()
            if code in UNREADABLE:
                return "bad", m.offset()
            if code == KafkaError._PARTITION_EOF:
                return "end", m.offset()
        raise Unavailable(f"kafka: {topic}/{partition} could not be read at offset {offset}")

    def end_of_unreadable(self, topic: str, partition: int, first: int) -> int:
        """One past the last offset of the unreadable batch that holds `first`.

        Every fetch from inside the batch fails alike, so double the step until one does not, then halve.
        """
        bad, good, step = first, None, 1
        while good is None:
            found, at = self.look(topic, partition, bad + step)
            if found == "bad":
                bad, step = bad + step, step * 2
            else:
                good = min(at, bad + step)
        while good - bad > 1:
            middle = (bad + good) // 2
            if self.look(topic, partition, middle)[0] == "bad":
                bad = middle
            else:
                good = middle
        return good

    def readable_from(self, topic: str, partition: int, offset: int) -> int | None:
        """The first offset at or after `offset` that holds a record; None when the partition ends before."""
        if offset >= self.end(topic, partition):
            return None
        found, at = self.look(topic, partition, offset)
        return None if found == "end" else at

    def partitions(self, topic: str) -> int:
        """How many the topic has now."""
        with translated("look"):
            return len(self._client.list_topics(topic, REACH).topics[topic].partitions)

    def end(self, topic: str, partition: int) -> int:
        """One past the last offset."""
        with translated("look"):
            return int(self._client.get_watermark_offsets(TopicPartition(topic, partition), REACH)[1])

    def begin(self, topic: str, partition: int) -> int:
        """Where the group would begin to read."""
        place = TopicPartition(topic, partition)
        with translated("look"):
            committed: int = self._client.committed([place], REACH)[0].offset
            low, end = self._client.get_watermark_offsets(place, REACH)
        if committed >= 0:
            return committed
        return int(low if self._earliest else end)


@contextlib.contextmanager
def probing(config: Config) -> Iterator[Probe]:
    """A `Probe` with the settings of a source."""
    own = {k: v for k, v in config.items() if k != "group.instance.id"}
    client = new_client(Consumer, own | {"enable.partition.eof": True, "queued.min.messages": 1, "logger": log})
    try:
        yield Probe(client, earliest=reads_from_start(config))
    finally:
        client.close()
