"""Rows into object storage: JSON lines in, objects of 50,000 rows out, small requests and a model that costs nothing.

    python -m benchmarks.s3_sink [--messages N] [--runs N]

`inferbus run` from start to end, against the bare loop (bare_s3.py) from start to end, in alternating turns. Both read
the same file and store the same objects, but for the rows' ids and times, in a versitygw that keeps them in memory.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from aiobotocore.session import get_session

from benchmarks.common import (
    HERE,
    Figure,
    Neighbours,
    arguments,
    await_quiet,
    cpu_of,
    median,
    own,
    quietest,
    save,
    serving,
    table,
)
from benchmarks.material import json_requests, tiny_model
from deploy.local import servers

ROWS = 256
OBJECT = 50_000  # rows
BUCKET = "bench"

Command = Sequence[str | Path]


def main() -> None:
    """Write the requests, let both serve them, print and keep the rates."""
    args = arguments(__doc__, messages=600_000, runs=5).parse_args()
    began = os.getloadavg()
    os.environ |= {"AWS_ACCESS_KEY_ID": "inferbus", "AWS_SECRET_ACCESS_KEY": "inferbus",
                   "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    turns: dict[str, list[dict[str, Any]]] = {"bare": [], "inferbus": []}
    # In memory where there is memory: disks of shared machines stall for seconds.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a folder of ours with a random name
    with tempfile.TemporaryDirectory(dir=memory) as scratch, serving(servers.SERVERS["s3"]) as server:
        folder = Path(scratch)
        request = json_requests()
        with (folder / "requests.jsonl").open("wb") as file:
            file.writelines(request(i)[0] + b"\n" for i in range(args.messages))
        model = tiny_model(folder)
        asyncio.run(ask(server, "create_bucket"))
        workers = {"bare": bare(folder, model, server.address), "inferbus": inferbus(folder, model, server.address)}
        for i in range(-1, args.runs):  # a first turn of each does not count
            for name in workers if i % 2 else reversed(workers):
                done = quietest(lambda name=name: turn(server, folder, workers[name], args.messages))  # type: ignore[misc]
                print(f"  {name:<12}{done['rate']:>10,.0f} rows/s {done['cpu_us']:>8.1f} us CPU each, and the server "
                      f"{done['server_us']:.1f}; {done['objects']} objects, {done['bytes']:,} B",
                      flush=True)  # fmt: skip
                if i >= 0:
                    turns[name].append(done)
    summary = {
        name: {what: round(median(one[what] for one in each), 2) for what in ("rate", "cpu_us", "server_us")}
        for name, each in turns.items()
    }
    table(("", "rows/s", "CPU us/row", "server's"), [(name, *one.values()) for name, one in summary.items()])
    figures = [Figure("inferbus / bare", summary["inferbus"]["rate"] / summary["bare"]["rate"], 0.8)]
    result = {"messages": args.messages, "runs": args.runs, "rows_of_an_object": OBJECT, "workers": summary}
    save(args.out, began, figures, {**result, "turns": turns, "server": f"versitygw {servers.VERSITYGW}, in memory"})


def bare(folder: Path, model: Path, endpoint_url: str) -> Callable[[str], Command]:
    """The hand-written loop."""
    return lambda prefix: [
        sys.executable, HERE / "bare_s3.py", "--source", folder / "requests.jsonl", "--endpoint-url", endpoint_url,
        "--bucket", BUCKET, "--prefix", prefix, "--model", model, "--rows", str(ROWS), "--object-rows", str(OBJECT),
    ]  # fmt: skip


def inferbus(folder: Path, model: Path, endpoint_url: str) -> Callable[[str], Command]:
    """A job as a user starts it: defaults, but for the batch size and the objects' size."""
    pipeline = {
        "name": "bench",
        "model": str(model),
        "batch": {"max_rows": ROWS},
        "flow": {"max_inflight": 4 * OBJECT},  # an object's requests wait for it
        "source": {"file": {"path": "requests.jsonl"}},
        "sink": {"s3": {"bucket": BUCKET, "prefix": "${BENCH_PREFIX}", "endpoint_url": endpoint_url,
                        "max_rows": OBJECT}},
        "errors": {"file": {"path": "errors"}},
        "http": None,
    }  # fmt: skip
    file = folder / "bench.yaml"
    file.write_text(yaml.safe_dump(pipeline))
    return lambda prefix: ["env", f"BENCH_PREFIX={prefix}", own("inferbus"), "run", file]


def turn(server: servers.Running, folder: Path, worker: Callable[[str], Command], rows: int) -> dict[str, Any]:
    """Serve every line once; rows a second from start to end, and CPU microseconds a row.

    Raises:
        RuntimeError: It failed, or did not store every row.
    """
    prefix = f"{uuid.uuid4().hex[:8]}/"
    (folder / "requests.jsonl.bench.progress").unlink(missing_ok=True)
    await_quiet()
    neighbours = Neighbours(server.pid)
    before, served, start = os.times(), cpu_of(server.pid), time.monotonic()
    done = subprocess.run(worker(prefix), stderr=subprocess.PIPE, check=False, timeout=600)
    seconds, after = time.monotonic() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    taken, server_cpu = neighbours.share(cpu), cpu_of(server.pid) - served
    sizes = [(item.read_bytes().count(b"\n"), item.stat().st_size) for item in objects(server, prefix)]
    if done.returncode or sum(count for count, _ in sizes) != rows:
        raise RuntimeError(f"{sizes} of {rows} rows; it said:\n{done.stderr.decode()}")
    for item in objects(server, prefix):
        item.unlink()
    return {"rate": rows / seconds, "cpu_us": 1e6 * cpu / rows, "server_us": 1e6 * server_cpu / rows,
            "objects": len(sizes), "bytes": sum(size for _, size in sizes), "neighbours": taken}  # fmt: skip


def objects(server: servers.Running, prefix: str) -> list[Path]:
    """The objects under a prefix that have rows: versitygw keeps each in a file."""
    found = (Path(server.folder) / "objects" / BUCKET / prefix).rglob("*")
    return [item for item in found if item.is_file() and item.stat().st_size]


async def ask(server: servers.Running, operation: str) -> None:
    """One call about the bucket."""
    client: Any
    async with get_session().create_client("s3", endpoint_url=server.address) as client:
        await getattr(client, operation)(Bucket=BUCKET)


if __name__ == "__main__":
    main()
