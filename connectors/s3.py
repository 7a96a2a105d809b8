"""Object storage in S3's protocol: AWS, MinIO, Google and others, by `endpoint_url`; a bucket as a shelf for stores.

Large objects go in parts, several at once. An upload that fails is begun again after a back-off, for as long as it
takes: what waits for it is not settled, so the flow caps bound it.

Invariant: under a key there is a whole object or what was there before, never a part of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from inferbus.connectors.aws import TROUBLE, Loop, code_of, complaint, ended
from inferbus.connectors.base import Bell, ConnectorError, Fatal, Refused, Unavailable
from inferbus.connectors.objects import Make

PART = 8 * 2**20  # bytes of a part; S3 takes 10,000 of them, none but the last under 5 MiB
PARTS_AT_ONCE = 4
UPLOADS_AT_ONCE = 8
BACKOFF = (0.1, 10.0)  # seconds between tries, the first and the longest
MARK = "_inferbus"  # an object written at start, to see that it can be; readers of datasets pass over names with `_`

_NO_BUCKET = {"NoSuchBucket", "404"}
_NO_OBJECT = {"404", "InvalidArgument", "InvalidObjectState", "InvalidRequest", "InvalidURI", "KeyTooLongError",
              "NoSuchKey", "NotFound", "XMinioInvalidObjectName"}  # fmt: skip
"""What S3 says of an object that it will not give however often it is asked: missing, archived, no possible key."""

log = logging.getLogger("inferbus.s3")


async def connected(loop: Loop, region: str | None, endpoint_url: str | None, connections: int) -> Any:
    """A client of S3; see `Loop.client`."""
    options = {
        # Trailing checksums are AWS's alone; others refuse them, and TLS guards the way.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "s3": {"addressing_style": "path" if endpoint_url else "auto"},
    }
    return await loop.client("s3", region, endpoint_url, connections, **options)


class Storage:
    """S3 as one client, for one connector or for several. All but `open` and `close` is for its loop's thread.

    Args:
        region: AWS region; None for that of the environment.
        endpoint_url: Where S3 is, if not at AWS.
        connections: Calls at once.
    """

    def __init__(self, region: str | None, endpoint_url: str | None, connections: int) -> None:
        self.loop = Loop()
        self._region = region
        self._endpoint_url = endpoint_url
        self._connections = connections
        self._users = 0
        self._unannounced: set[type[Exception]] = set()  # of the loop's thread: what the client raised and was logged

    def open(self) -> None:
        """Take another connector into the count of those that `close`; the first makes the client.

        Raises:
            Unavailable: No credentials.
            Misconfigured: No region, or no such profile.
        """
        if not self._users:
            self.loop.open()
            try:
                self._client = self.loop.run(self._connect())
            except BaseException:
                self.loop.close()
                raise
        self._users += 1

    async def _connect(self) -> Any:
        try:
            return await connected(self.loop, self._region, self._endpoint_url, self._connections)
        except TROUBLE as error:
            raise complaint(error, "s3", "client", "s3:GetObject", self._endpoint_url) from None

    def close(self) -> None:
        """Close the client, if nobody else is in the count; what is under way must have ended."""
        self._users -= 1
        if not self._users:
            self.loop.run(self._client.close())
            self.loop.close()

    @contextlib.contextmanager
    def _asked(self, bucket: str, action: str) -> Iterator[None]:
        """Around every call: whatever comes of it leaves as our own error, also what the client does not announce."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - clients raise RuntimeError and KeyError too; callers wait for ours
            raise self._complaint(error, bucket, action) from None

    def _complaint(self, error: Exception, bucket: str, action: str) -> ConnectorError:
        code = code_of(error)
        if action == "GetObject" and code in _NO_OBJECT:
            return Refused(code)
        if code in _NO_BUCKET:
            return Unavailable(f's3: bucket "{bucket}" does not exist; create it, or correct the name')
        if isinstance(error, TROUBLE):
            return complaint(error, "s3", f'bucket "{bucket}"', f"s3:{action}", self._endpoint_url)
        if type(error) not in self._unannounced:
            self._unannounced.add(type(error))
            log.error("s3: %s failed in the client", action, exc_info=error)
        return Unavailable(f's3: bucket "{bucket}": {action} failed in the client ({type(error).__name__})')

    async def reach(self, bucket: str) -> None:
        """See that a bucket is there.

        Raises:
            Unavailable: It is away, missing, or forbidden.
        """
        with self._asked(bucket, "ListBucket"):
            await self._client.head_bucket(Bucket=bucket)

    async def try_to_write(self, bucket: str, prefix: str) -> None:
        """Write a mark under a prefix.

        Raises:
            Unavailable: The bucket is away, missing, or may not be written.
        """
        with self._asked(bucket, "PutObject"):
            await self._client.put_object(Bucket=bucket, Key=prefix + MARK, Body=b"")

    async def get(self, bucket: str, key: str, admit: Callable[[int], Awaitable[None]]) -> bytes:
        """The content of an object; `admit` is told its size before any of it is read, and may wait or raise.

        Raises:
            Refused: It is not there, and never will be by itself.
            Unavailable: The bucket is away, missing, or may not be read.
        """
        with self._asked(bucket, "GetObject"):
            answer = await self._client.get_object(Bucket=bucket, Key=key)
            body, size = answer["Body"], answer["ContentLength"]
        try:
            await admit(size)
            with self._asked(bucket, "GetObject"):
                content: bytes = await body.read()
            return content
        finally:
            body.close()

    async def delete(self, bucket: str, key: str) -> None:
        """Remove an object, if it is there.

        Raises:
            Unavailable: The bucket is away, or may not be written.
        """
        with self._asked(bucket, "DeleteObject"):
            await self._client.delete_object(Bucket=bucket, Key=key)

    async def put(self, bucket: str, key: str, content: bytes) -> None:
        """Store an object, in place of what had the key.

        Raises:
            Unavailable: The bucket is away, missing, or may not be written.
        """
        with self._asked(bucket, "PutObject"):
            await self._put(bucket, key, content)

    async def _put(self, bucket: str, key: str, content: bytes) -> None:
        place = {"Bucket": bucket, "Key": key}
        if len(content) <= PART:
            await self._client.put_object(**place, Body=content)
            return
        upload = {**place, "UploadId": (await self._client.create_multipart_upload(**place))["UploadId"]}
        try:
            parts = await self._parts(upload, content)
            await self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except BaseException:
            # Parts of an upload that was given up are kept, and paid for, until somebody says so.
            with contextlib.suppress(Exception):
                await self._client.abort_multipart_upload(**upload)
            raise

    async def _parts(self, upload: dict[str, str], content: bytes) -> list[dict[str, Any]]:
        slots = asyncio.Semaphore(PARTS_AT_ONCE)
        view = memoryview(content)

        async def part(number: int, start: int) -> dict[str, Any]:
            async with slots:
                body = bytes(view[start : start + PART])
                answer = await self._client.upload_part(**upload, PartNumber=number, Body=body)
                return {"PartNumber": number, "ETag": answer["ETag"]}

        starts = range(0, len(content), PART)
        tasks = [asyncio.ensure_future(part(number, start)) for number, start in enumerate(starts, 1)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await ended(set(tasks))


class Bucket:
    """A `Shelf` in a bucket.

    Args:
        bucket: Its name.
        prefix: What the key of every object begins with.
        region: AWS region; None for that of the environment.
        endpoint_url: Where S3 is, if not at AWS.
    """

    def __init__(self, bucket: str, prefix: str = "", *, region: str | None, endpoint_url: str | None) -> None:
        self.name = f"s3:{bucket}/{prefix}"
        self._bucket = bucket
        self._prefix = prefix
        self._storage = Storage(region, endpoint_url, UPLOADS_AT_ONCE * PARTS_AT_ONCE)
        self._done: deque[Callable[[], None]] = deque()
        self._uploads: set[asyncio.Task[None]] = set()  # of the loop's thread
        self._problem: str | None = None
        self._broken: BaseException | None = None
        self._opened = self._closed = False

    def open(self, bell: Bell) -> None:
        """Reach the bucket, write a mark into it, and remove that.

        Raises:
            Unavailable: It is away, missing, or may not be written.
            Misconfigured: No region, or no such profile.
        """
        self._bell = bell
        self._slots = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self._storage.open()
        try:
            self._storage.loop.run(self._storage.try_to_write(self._bucket, self._prefix))
            self._storage.loop.run(self._storage.delete(self._bucket, self._prefix + MARK))
        except BaseException:
            self._storage.close()
            raise
        self._opened = True

    def put(self, name: str, make: Make, done: Callable[[], None], wanted: Callable[[], bool]) -> None:
        """See `Shelf`."""
        self._storage.loop.call(lambda: self._begin(self._upload(self._prefix + name, make, done, wanted)))

    def _begin(self, upload: Any) -> None:
        task = asyncio.ensure_future(upload)
        self._uploads.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._uploads.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._broken = task.exception()
            self._bell.ring()

    async def _upload(self, key: str, make: Make, done: Callable[[], None], wanted: Callable[[], bool]) -> None:
        async with self._slots:
            content = make()
            pause, longest = BACKOFF
            while wanted():
                try:
                    if content is None:
                        await self._storage.delete(self._bucket, key)
                    else:
                        await self._storage.put(self._bucket, key, content)
                    break
                except ConnectorError as error:
                    self._problem = str(error)
                await asyncio.sleep(pause)
                pause = min(longest, 2 * pause)
        self._problem = None
        self._done.append(done)
        self._bell.ring()

    def tick(self) -> None:
        """See `Shelf`."""
        while self._done:
            self._done.popleft()()
        broken, self._broken = self._broken, None
        if broken is not None:
            raise Fatal(f"{self.name}: an object cannot be written: {broken!r}")

    def healthy(self) -> str | None:
        """Why the last upload has failed."""
        return self._problem

    def close(self, timeout: float) -> None:
        """See `Shelf`."""
        if not self._opened or self._closed:
            return
        self._closed = True
        self._storage.loop.run(self._end(timeout))
        self._storage.close()
        while self._done:
            self._done.popleft()()

    async def _end(self, patience: float) -> None:
        if self._uploads:
            await asyncio.wait(self._uploads, timeout=patience)
        await ended(set(self._uploads))
