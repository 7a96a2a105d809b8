"""A Kafka broker inside this process: librdkafka's own, for the demo and for tests.

It speaks the real protocol on a port of 127.0.0.1, to clients in any process. It keeps the last 5 MiB or 100,000
records of a partition in memory, lets a new group wait three seconds for more members, knows no transactions and
survives nothing: it shows the way of a message, not its durability.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from confluent_kafka import Producer

from inferbus.connectors.kafka_client import REACH, new_client


@contextlib.contextmanager
def embedded_broker(*topics: str) -> Iterator[str]:
    """A broker with these topics, of four partitions each, while the context lasts; gives its address, `host:port`."""
    silent = logging.Logger("embedded")  # noqa: LOG001 - of our own: it would warn that this is no real cluster
    silent.addHandler(logging.NullHandler())
    owner = new_client(Producer, {"test.mock.num.brokers": 1, "logger": silent})
    (broker,) = owner.list_topics(timeout=REACH).brokers.values()
    for topic in topics:
        owner.list_topics(topic, timeout=REACH)  # makes it: a topic begins when a producer asks for it
    yield f"{broker.host}:{broker.port}"
    # The broker ends with its owner, here.
