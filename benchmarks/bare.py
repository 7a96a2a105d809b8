"""The bare loop: the shortest hand-written program that does a worker's job with the same libraries.

Consume, decode, predict, produce, commit: no headers, no validation, no delivery check. The measure of every figure.
Run by the benchmarks; ends after `--messages`.
"""

from __future__ import annotations

import argparse

import numpy as np
import onnxruntime as ort
import orjson
from confluent_kafka import Consumer, Message, Producer


def main() -> None:
    """Serve `--messages` requests and end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brokers", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--sink", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--binary", action="store_true")
    args = parser.parse_args()

    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    dtype = {"tensor(float)": "<f4", "tensor(int32)": "<i4"}[session.get_inputs()[0].type]
    outputs = [o.name for o in session.get_outputs()]
    consumer = Consumer(
        {
            "bootstrap.servers": args.brokers,
            "group.id": args.group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([args.source])
    producer = Producer({"bootstrap.servers": args.brokers, "acks": "all"})
    left = args.messages
    while left > 0:
        # Never asks for more than is left: `consume` waits for all it was asked for.
        messages = [m for m in consumer.consume(min(args.rows, left), 0.1) if m.error() is None]
        if not messages:
            continue
        if args.binary:
            batch = np.stack([decode_binary(m, dtype) for m in messages])
        else:
            documents = [orjson.loads(m.value()) for m in messages]
            batch = np.array([d["inputs"][0]["data"] for d in documents], dtype)
        answers = [a.tolist() for a in session.run(outputs, {name: batch})]
        for i, m in enumerate(messages):
            body = {"id": str(i), "outputs": [{"name": n, "data": a[i]} for n, a in zip(outputs, answers, strict=True)]}
            produce(producer, args.sink, orjson.dumps(body), m.key())
        producer.poll(0)
        consumer.commit(asynchronous=True)
        left -= len(messages)
    producer.flush()
    consumer.close()


def decode_binary(m: Message, dtype: str) -> np.ndarray:
    """The tensor behind the JSON of a V2 request with the binary extension."""
    body, length = m.value(), int(dict(m.headers())["inference-header-content-length"])
    shape = orjson.loads(body[:length])["inputs"][0]["shape"][1:]
    return np.frombuffer(body, dtype, offset=length).reshape(shape)


def produce(producer: Producer, topic: str, body: bytes, key: bytes | None) -> None:
    """Produce, waiting while the queue is full."""
    while True:
        try:
            producer.produce(topic, body, key)
            break
        except BufferError:
            producer.poll(0.01)


if __name__ == "__main__":
    main()
