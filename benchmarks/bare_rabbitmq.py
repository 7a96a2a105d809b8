"""The bare loop for RabbitMQ, on pika's SelectConnection: consume, decode, predict, publish, acknowledge.

No headers, no validation, no reconnection. Answers are published with confirms, a batch after the other without
waiting; the requests of a batch are acknowledged together once all its answers are confirmed. Ends after `--messages`.
"""

from __future__ import annotations

import argparse
from collections import deque
from typing import Any

import numpy as np
import onnxruntime as ort
import orjson
import pika
from pika.channel import Channel


def main() -> None:
    """Serve `--messages` requests and end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brokers", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--sink", required=True)
    parser.add_argument("--group")  # told to every worker; RabbitMQ has none
    parser.add_argument("--model", required=True)
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prefetch", type=int, required=True)
    loop = Loop(parser.parse_args())
    connection = pika.SelectConnection(
        pika.URLParameters(loop.args.brokers), on_open_callback=lambda c: c.channel(on_open_callback=loop.start)
    )
    connection.ioloop.start()


class Loop:
    """What the callbacks of the connection share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        options = ort.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.properties = pika.BasicProperties(delivery_mode=2)
        self.waiting: list[bytes] = []
        self.received = self.published = 0
        self.unconfirmed: dict[int, None] = {}  # in the order they were published in
        self.batches: deque[int] = deque()  # the last of each: of requests and answers alike, one is the other's number

    def start(self, channel: Channel) -> None:
        """Ask for confirms and for requests."""
        self.channel = channel
        channel.confirm_delivery(self.confirmed)
        channel.basic_qos(prefetch_count=self.args.prefetch)
        channel.basic_consume(self.args.source, self.deliver)

    def deliver(self, _channel: Channel, _method: Any, _properties: Any, body: bytes) -> None:
        """Serve a batch once it is full, or the last is there."""
        self.waiting.append(body)
        self.received += 1
        if len(self.waiting) == self.args.rows or self.received == self.args.messages:
            self.serve()

    def serve(self) -> None:
        """Predict and publish."""
        batch = np.array([orjson.loads(body)["inputs"][0]["data"] for body in self.waiting], "<f4")
        self.waiting = []
        answers = [a.tolist() for a in self.session.run(self.outputs, {self.name: batch})]
        for i, row in enumerate(zip(*answers, strict=True)):
            body = {"id": str(i), "outputs": [{"name": n, "data": a} for n, a in zip(self.outputs, row, strict=True)]}
            self.channel.basic_publish("", self.args.sink, orjson.dumps(body), self.properties)
            self.published += 1
            self.unconfirmed[self.published] = None
        self.batches.append(self.published)

    def confirmed(self, frame: Any) -> None:
        """Acknowledge the batches of which every answer is confirmed."""
        tag = frame.method.delivery_tag
        if frame.method.multiple:
            while self.unconfirmed and (first := next(iter(self.unconfirmed))) <= tag:
                del self.unconfirmed[first]
        else:
            self.unconfirmed.pop(tag, None)
        before = next(iter(self.unconfirmed), self.published + 1)
        while self.batches and self.batches[0] < before:
            done = self.batches.popleft()
            self.channel.basic_ack(done, multiple=True)
            if done == self.args.messages:
                self.channel.connection.add_on_close_callback(lambda c, _: c.ioloop.stop())
                self.channel.connection.close()


if __name__ == "__main__":
    main()
