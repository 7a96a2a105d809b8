"""arroyo: batches of messages through one task, the answers produced one by one, then their offsets committed."""

from __future__ import annotations

import signal

import orjson
from arroyo.backends.kafka import KafkaConsumer, KafkaPayload, KafkaProducer
from arroyo.backends.kafka.configuration import build_kafka_configuration, build_kafka_consumer_configuration
from arroyo.processing.processor import StreamProcessor
from arroyo.processing.strategies import CommitOffsets, Produce, RunTask
from arroyo.processing.strategies.abstract import ProcessingStrategyFactory
from arroyo.processing.strategies.batching import BatchStep, UnbatchStep
from arroyo.commit import ONCE_PER_SECOND
from arroyo.types import Message, Topic, Value
from model import Model, arguments

args = arguments()
model = Model(args.model)
producer = KafkaProducer(build_kafka_configuration({}, [args.brokers]), use_simple_futures=True)


def predict(message: Message) -> list:
    requests = message.payload
    answers = model.answer([orjson.loads(r.payload.value) for r in requests])
    return [r.replace(KafkaPayload(r.payload.key, a, [])) for r, a in zip(requests, answers, strict=True)]


class Steps(ProcessingStrategyFactory):
    def create_with_partitions(self, commit, partitions):
        write = Produce(producer, Topic(args.sink), CommitOffsets(commit))
        return BatchStep(args.rows, 0.1, RunTask(predict, UnbatchStep(write)))


config = build_kafka_consumer_configuration({}, args.group, "earliest", bootstrap_servers=[args.brokers])
processor = StreamProcessor(KafkaConsumer(config), Topic(args.source), Steps(), ONCE_PER_SECOND)
signal.signal(signal.SIGTERM, lambda *_: processor.signal_shutdown())
processor.run()
