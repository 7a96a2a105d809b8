"""The bare one-message loop: poll one, predict, produce at once, commit. The measure of latency; runs until killed."""

from __future__ import annotations

import argparse

import numpy as np
import onnxruntime as ort
import orjson
from confluent_kafka import Consumer, Producer


def main() -> None:
    """Serve one request after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("brokers", "source", "sink", "group", "model"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()

    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [o.name for o in session.get_outputs()]
    consumer = Consumer({"bootstrap.servers": args.brokers, "group.id": args.group, "auto.offset.reset": "earliest",
                         "enable.auto.commit": False})  # fmt: skip
    consumer.subscribe([args.source])
    producer = Producer({"bootstrap.servers": args.brokers, "acks": "all", "linger.ms": 0})
    while True:
        m = consumer.poll(0.1)
        producer.poll(0)
        if m is None or m.error():
            continue
        row = np.array([orjson.loads(m.value())["inputs"][0]["data"]], "<f4")
        answers = session.run(outputs, {name: row})
        body = {"outputs": [{"name": n, "data": a[0].tolist()} for n, a in zip(outputs, answers, strict=True)]}
        producer.produce(args.sink, orjson.dumps(body), m.key())
        consumer.commit(m, asynchronous=True)


if __name__ == "__main__":
    main()
