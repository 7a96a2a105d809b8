"""A bucket as a shelf, on a real S3 server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from inferbus.connectors.base import Bell, Fatal, Unavailable
from inferbus.connectors.s3 import PART, Bucket, Storage
from tests.servers import S3

pytestmark = pytest.mark.broker

PATIENCE = 30.0


def always() -> bool:
    return True


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3.credentials[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3.credentials[1])


def made(s3: S3, bucket: str, prefix: str = "") -> Bucket:
    return Bucket(bucket, prefix, region=s3.region, endpoint_url=s3.url)


def put(shelf: Bucket, contents: dict[str, bytes]) -> None:
    """Put objects, and wait until all are there."""
    done: list[str] = []
    for name, content in contents.items():
        shelf.put(name, lambda content=content: content, lambda name=name: done.append(name), always)  # type: ignore[misc]
    until(lambda: shelf.tick() or len(done) == len(contents))  # type: ignore[func-returns-value, redundant-expr]


def until(happened: Callable[[], bool]) -> None:
    last = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < last, "it did not come to that"
        time.sleep(0.005)


@pytest.fixture
def bucket(s3: S3) -> Iterator[tuple[str, Bucket]]:
    name = s3.bucket()
    shelf = made(s3, name, "out/")
    shelf.open(Bell())
    yield name, shelf
    shelf.close(1.0)


def test_an_object_lies_under_prefix_and_name_and_replaces_what_had_it(s3: S3, bucket: tuple[str, Bucket]) -> None:
    name, shelf = bucket
    put(shelf, {"a/1.jsonl": b"old", "a/2.jsonl": b""})
    put(shelf, {"a/1.jsonl": b"new"})
    assert s3.objects(name) == {"out/a/1.jsonl": b"new", "out/a/2.jsonl": b""}


def test_a_large_object_goes_in_parts_and_arrives_whole(s3: S3, bucket: tuple[str, Bucket]) -> None:
    name, shelf = bucket
    content = os.urandom(5 * PART + 12345)
    put(shelf, {"large": content, "exactly": content[:PART]})
    assert s3.objects(name) == {"out/large": content, "out/exactly": content[:PART]}
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=name)


def test_many_objects_at_once_are_all_stored(s3: S3, bucket: tuple[str, Bucket]) -> None:
    name, shelf = bucket
    contents = {f"{i:03}": b"%d" % i for i in range(100)}
    put(shelf, contents)
    assert s3.objects(name) == {f"out/{key}": content for key, content in contents.items()}


def test_what_cannot_be_stored_now_is_stored_later(s3: S3, bucket: tuple[str, Bucket]) -> None:
    name, shelf = bucket
    s3.client.delete_bucket(Bucket=name)
    done: list[str] = []
    shelf.put("late", lambda: b"content", lambda: done.append("x"), always)
    until(lambda: shelf.healthy() is not None)
    assert shelf.healthy() == f's3: bucket "{name}" does not exist; create it, or correct the name'
    s3.client.create_bucket(Bucket=name)
    until(lambda: shelf.tick() or bool(done))  # type: ignore[func-returns-value, redundant-expr]
    assert s3.objects(name) == {"out/late": b"content"}
    assert shelf.healthy() is None


def test_an_object_that_is_none_is_removed_and_one_that_cannot_be_made_ends_the_run(
    s3: S3, bucket: tuple[str, Bucket]
) -> None:
    name, shelf = bucket
    put(shelf, {"a.jsonl": b"stale"})
    done: list[str] = []
    shelf.put("a.jsonl", lambda: None, lambda: done.append("a"), always)

    def removed() -> bool:
        shelf.tick()
        return bool(done)

    until(removed)
    assert not s3.client.list_objects_v2(Bucket=name).get("KeyCount")
    shelf.put("b.jsonl", lambda: bytes(1 // 0), lambda: None, always)
    with pytest.raises(Fatal, match="an object cannot be written: ZeroDivisionError"):
        until(lambda: removed() and False)


def test_closing_waits_no_longer_than_it_may(s3: S3) -> None:
    name = s3.bucket()
    shelf = made(s3, name)
    shelf.open(Bell())
    s3.client.delete_object(Bucket=name, Key="_inferbus")
    s3.client.delete_bucket(Bucket=name)
    done: list[str] = []
    shelf.put("never", lambda: b"content", lambda: done.append("x"), always)
    began = time.monotonic()
    shelf.close(0.2)
    shelf.close(0.2)
    assert time.monotonic() - began < 5.0
    assert done == []


def test_a_bucket_that_is_not_there_or_not_ours_is_told_in_one_line(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match=r'^s3: bucket "no-such-one" does not exist; create it, or correct the name$'):
        made(s3, "no-such-one").open(Bell())
    with pytest.raises(Unavailable, match=r'^s3: bucket "b-1": no answer from 127.0.0.1:9 \(\w+\)$'):
        Bucket("b-1", region="us-east-1", endpoint_url="http://127.0.0.1:9").open(Bell())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(Unavailable, match="the credentials are not accepted") as caught:
        made(s3, s3.bucket()).open(Bell())
    assert "wrong-secret" not in str(caught.value)


def test_a_server_that_leads_elsewhere_is_not_followed() -> None:
    asked: list[str] = []

    class Leading(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.server.server_address[1]}{self.path}")  # type: ignore[index]
            self.send_response(307)
            self.send_header("Location", f"http://127.0.0.1:{other.server_port}/elsewhere")
            self.send_header("x-amz-bucket-region", "eu-west-1")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 - http.server wants it so

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    first, other = (ThreadingHTTPServer(("127.0.0.1", 0), Leading) for _ in range(2))
    for server in (first, other):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    storage = Storage("us-east-1", f"http://127.0.0.1:{first.server_port}", 1)
    storage.open()
    try:
        for call in (storage.reach("bucket"), storage.get("bucket", "key", anything)):
            with pytest.raises(Unavailable):
                storage.loop.run(call)
    finally:
        storage.close()
        for server in (first, other):
            server.shutdown()
            server.server_close()
    assert asked
    assert {one.partition("/")[0] for one in asked} == {str(first.server_port)}


async def anything(_size: int) -> None:
    """Whatever it is, it may be read."""
