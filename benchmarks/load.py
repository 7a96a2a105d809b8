"""An open loop, in two programs of their own: one writes requests by the clock, one notes when each answer came.

    python -m benchmarks.load write BROKERS TOPIC RATE COUNT
    python -m benchmarks.load read BROKERS TOPIC COUNT FILE.npy

Request i is due at begin + i / RATE on the machine's monotonic clock, whatever became of those before it; its key is i
in eight bytes. Latency counts from when it was due: a worker that stalls is charged for everyone who had to wait.
The writer prints `begin`, and at the end by how many milliseconds it was late (p99); the reader that it is ready.
"""

from __future__ import annotations

import sys
import time
from collections import deque

import numpy as np
from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks.common import PARTITIONS, percentiles
from benchmarks.material import json_requests

SILENCE = 10.0  # seconds without an answer after which no more are expected


def write(brokers: str, topic: str, rate: float, count: int) -> None:
    """Publish `count` requests, each when it is due or as soon as possible after."""
    producer = Producer({"bootstrap.servers": brokers, "linger.ms": 0, "queue.buffering.max.messages": 1_000_000})
    producer.list_topics(topic, 10.0)
    request = json_requests()
    begin = time.monotonic() + 0.1
    print(begin, flush=True)
    sent, late = 0, []
    while sent < count:
        now = time.monotonic()
        late.append(now - begin - sent / rate)
        due = min(count, int((now - begin) * rate) + 1)
        for i in range(sent, due):
            producer.produce(topic, request(i)[0], i.to_bytes(8, "big"), i % PARTITIONS)
        sent = max(sent, due)
        producer.poll(0)
        time.sleep(max(0.0005, begin + sent / rate - time.monotonic()))
    producer.flush(60.0)
    print(percentiles(late)["p99"], flush=True)


def read(brokers: str, topic: str, count: int, file: str) -> None:
    """Save when each answer came (monotonic seconds, NaN for none), once `count` are there or no more come."""
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": "reader"})
    consumer.assign([TopicPartition(topic, p, 0) for p in range(PARTITIONS)])
    chunks: deque[tuple[float, list[bytes]]] = deque()
    left, heard = count, time.monotonic() + 20.0  # the writer has yet to start
    while left > 0 and time.monotonic() - heard < SILENCE:
        first = consumer.poll(0.1)
        if not chunks and first is not None:
            print("ready", flush=True)  # it has the answer that was there before
        if first is None:
            continue
        heard = time.monotonic()
        chunk = [first, *consumer.consume(10_000, 0)]
        chunks.append((heard, [m.key() for m in chunk if m.error() is None]))
        left -= len(chunk)
    consumer.close()
    came = np.full(count, np.nan)
    for at, keys in chunks:
        for key in keys:
            if len(key) == 8:
                came[int.from_bytes(key, "big")] = at
    np.save(file, came)


if __name__ == "__main__":
    act, brokers, topic, *rest = sys.argv[1:]
    if act == "write":
        write(brokers, topic, float(rest[0]), int(rest[1]))
    else:
        read(brokers, topic, int(rest[0]), rest[1])
