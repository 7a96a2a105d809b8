"""arroyo: batches of requests through one task, answers produced one by one, offsets committed once a second.

`use_simple_futures` is its own advice for speed.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

import orjson
from arroyo.backends.kafka import KafkaConsumer, KafkaPayload, KafkaProducer
from arroyo.backends.kafka.configuration import build_kafka_configuration, build_kafka_consumer_configuration
from arroyo.commit import ONCE_PER_SECOND
from arroyo.processing.processor import StreamProcessor
from arroyo.processing.strategies import CommitOffsets, Produce, RunTask
from arroyo.processing.strategies.abstract import ProcessingStrategy, ProcessingStrategyFactory
from arroyo.processing.strategies.batching import BatchStep, UnbatchStep
from arroyo.types import Commit, Message, Partition, Topic
from model import Model, arguments

args = arguments()
model = Model(args.model)
producer = KafkaProducer(build_kafka_configuration({}, [args.brokers]), use_simple_futures=True)


def predict(message: Message[Any]) -> list[Any]:
    """The batch with answers in place of requests."""
    requests = message.payload
    answers = model.answer([orjson.loads(r.payload.value) for r in requests])
    return [r.replace(KafkaPayload(r.payload.key, a, [])) for r, a in zip(requests, answers, strict=True)]


class Steps(ProcessingStrategyFactory[KafkaPayload]):
    """Batch, predict, unbatch, produce, commit."""

    def create_with_partitions(
        self,
        commit: Commit,
        partitions: Mapping[Partition, int],  # noqa: ARG002 - arroyo's
    ) -> ProcessingStrategy[KafkaPayload]:
        """The chain; arroyo builds it anew at every assignment."""
        write = Produce(producer, Topic(args.sink), CommitOffsets(commit))
        return BatchStep(args.rows, 0.1, RunTask(predict, UnbatchStep(write)))


config = build_kafka_consumer_configuration({}, args.group, "earliest", bootstrap_servers=[args.brokers])
stream = StreamProcessor(KafkaConsumer(config), Topic(args.source), Steps(), ONCE_PER_SECOND)
signal.signal(signal.SIGTERM, lambda *_: stream.signal_shutdown())
stream.run()
