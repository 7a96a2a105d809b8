"""The bare start: import the libraries, load the model, reach the broker, say so. The measure of start-up."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort
import orjson  # noqa: F401 - a worker imports it, so it counts
from confluent_kafka import Consumer

model, brokers, topic = sys.argv[1:]
options = ort.SessionOptions()
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: np.zeros((1, 64), "<f4")})
consumer = Consumer({"bootstrap.servers": brokers, "group.id": "bare"})
if consumer.list_topics(topic, 10.0).topics[topic].error is not None:
    sys.exit("the topic is not there")
print("ready", flush=True)
