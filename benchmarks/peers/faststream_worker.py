"""FastStream on confluent-kafka: a batch subscriber, its answers published together."""

from __future__ import annotations

import asyncio

import orjson
from faststream import FastStream
from faststream.confluent import KafkaBroker, KafkaMessage
from model import Model, arguments

args = arguments()
model = Model(args.model)
broker = KafkaBroker(args.brokers, logger=None)


async def parse(body: KafkaMessage) -> object:
    return body


@broker.subscriber(args.source, batch=True, max_records=args.rows, polling_interval=0.1, group_id=args.group,
                   auto_offset_reset="earliest", auto_commit=True)
async def predict(documents: list[dict]) -> None:
    await broker.publish_batch(*model.answer(documents), topic=args.sink)


asyncio.run(FastStream(broker, logger=None).run())
