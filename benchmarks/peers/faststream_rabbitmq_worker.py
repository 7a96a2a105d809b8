"""FastStream on RabbitMQ (aio-pika): a subscriber a message at a time, whose calls gather in batches.

Its RabbitMQ broker has no batch subscriber, so the handlers of all messages in flight wait for one task that predicts
for all of them, as its users write it. Answers are published with confirms, each before its request is acknowledged.
"""

from __future__ import annotations

import asyncio
from typing import Any

from faststream import FastStream
from faststream.rabbit import Channel, RabbitBroker, RabbitQueue
from model import Model, arguments

args = arguments()
model = Model(args.model)
broker = RabbitBroker(args.brokers, logger=None, default_channel=Channel(prefetch_count=args.prefetch))
waiting: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[bytes]]] = asyncio.Queue()


async def serve() -> None:
    """Predict for whoever waits, at most a batch at once."""
    while True:
        batch = [await waiting.get()]
        await asyncio.sleep(0.01)  # others join it; there are many more in flight
        while len(batch) < args.rows and not waiting.empty():
            batch.append(waiting.get_nowait())
        for (_, future), answer in zip(batch, model.answer([request for request, _ in batch]), strict=True):
            future.set_result(answer)


@broker.subscriber(RabbitQueue(args.source, durable=True, declare=False))
@broker.publisher(args.sink, persist=True)
async def predict(request: dict[str, Any]) -> bytes:
    """One answer, when its batch is served."""
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    waiting.put_nowait((request, future))
    return await future


async def main() -> None:
    """Run both."""
    server = asyncio.create_task(serve())
    await FastStream(broker, logger=None).run()
    server.cancel()


asyncio.run(main())
