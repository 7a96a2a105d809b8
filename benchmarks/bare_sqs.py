"""The bare loop for SQS, on aiobotocore: receive, decode, predict, send, delete, ten at a time in `--receivers` tasks.

No headers, no validation, no renewals, no look at failures of single entries. Ends after `--messages`. With `--headers`
each answer has the five that Inferbus gives a prediction.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import numpy as np
import onnxruntime as ort
import orjson
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

HEADERS = {
    "inferbus-id": "01234567-89ab-cdef-0123-456789abcdef",
    "inferbus-status": "ok",
    "inferbus-model": "tiny@0123456789ab",
    "inferbus-timing": '{"batch":"1a2b3-abcdef-123","rows":10,"predict_ms":0.123,"worker":"1a2b3-abcdef"}',
    "content-type": "application/json",
}


async def main() -> None:
    """Serve `--messages` requests and end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brokers", required=True)  # the endpoint
    parser.add_argument("--source", required=True)
    parser.add_argument("--sink", required=True)
    parser.add_argument("--group")  # told to every worker; SQS has none
    parser.add_argument("--model", required=True)
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--rows", type=int)  # told to every worker; a call brings ten
    parser.add_argument("--receivers", type=int, required=True)
    parser.add_argument("--headers", action="store_true")
    args = parser.parse_args()
    attributes = {name: {"DataType": "String", "StringValue": value} for name, value in HEADERS.items()}
    shared: dict[str, Any] = {"MessageAttributes": attributes} if args.headers else {}

    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [o.name for o in session.get_outputs()]
    config = AioConfig(max_pool_connections=args.receivers)
    client: Any
    async with get_session().create_client("sqs", endpoint_url=args.brokers, config=config) as client:
        source = (await client.get_queue_url(QueueName=args.source))["QueueUrl"]
        sink = (await client.get_queue_url(QueueName=args.sink))["QueueUrl"]
        left = args.messages

        async def serve() -> None:
            nonlocal left
            while left > 0:
                answer = await client.receive_message(QueueUrl=source, MaxNumberOfMessages=10, WaitTimeSeconds=1)
                messages = answer.get("Messages", [])
                if not messages:
                    continue
                batch = np.array([orjson.loads(m["Body"])["inputs"][0]["data"] for m in messages], "<f4")
                answers = [a.tolist() for a in session.run(outputs, {name: batch})]
                entries = []
                for i, row in enumerate(zip(*answers, strict=True)):
                    told = [{"name": n, "data": a} for n, a in zip(outputs, row, strict=True)]
                    body = orjson.dumps({"id": str(i), "outputs": told}).decode()
                    entries.append({"Id": str(i), "MessageBody": body, **shared})
                await client.send_message_batch(QueueUrl=sink, Entries=entries)
                done = [{"Id": str(i), "ReceiptHandle": m["ReceiptHandle"]} for i, m in enumerate(messages)]
                await client.delete_message_batch(QueueUrl=source, Entries=done)
                left -= len(messages)

        await asyncio.gather(*(serve() for _ in range(args.receivers)))


if __name__ == "__main__":
    asyncio.run(main())
