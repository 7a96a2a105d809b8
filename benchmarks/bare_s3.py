"""The bare loop for objects: read, parse, batch, predict, put, on aiobotocore. No progress, no check.

The rows have the fields that Inferbus writes, so the objects are of one size. Each is put when it is full, in one call.
"""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import numpy as np
import onnxruntime as ort
import orjson
from aiobotocore.session import get_session


async def main() -> None:
    """Serve every line of a file and end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--endpoint-url", required=True)
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--object-rows", type=int, required=True)
    args = parser.parse_args()

    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [o.name for o in session.get_outputs()]
    number = 0
    rows: list[bytes] = []
    client: Any
    async with get_session().create_client("s3", endpoint_url=args.endpoint_url) as client:
        with open(args.source, "rb") as source:  # noqa: ASYNC230, PTH123 - as one would write it
            while lines := list(islice(source, min(args.rows, args.object_rows - len(rows)))):
                batch = np.array([orjson.loads(line)["inputs"][0]["data"] for line in lines], "<f4")
                answers = [a if a.ndim > 1 else a.tolist() for a in session.run(outputs, {name: batch})]
                shared = fields(number)
                for row in zip(*answers, strict=True):
                    answer = {"id": f"requests.jsonl-{number}", **shared, **dict(zip(outputs, row, strict=True))}
                    rows.append(orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
                    number += 1
                if len(rows) == args.object_rows:
                    await client.put_object(Bucket=args.bucket, Key=f"{args.prefix}{number}.jsonl", Body=b"".join(rows))
                    rows = []
        if rows:
            await client.put_object(Bucket=args.bucket, Key=f"{args.prefix}{number}.jsonl", Body=b"".join(rows))


def fields(number: int) -> dict[str, Any]:
    """What the rows of a batch have in common."""
    timing = f'{{"batch":"705f-da8ec4-{number}","rows":256,"predict_ms":0.085,"worker":"705f-da8ec4"}}'
    return {
        "row": 0,
        "key": None,
        "status": "ok",
        "model": "tiny",
        "version": "0123456789ab",
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "headers": [{"name": "inferbus-timing", "value": timing}],
    }


if __name__ == "__main__":
    asyncio.run(main())
