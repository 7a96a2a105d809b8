"""Object storage in S3's protocol: a shelf for stores. AWS, MinIO, Google and others, by `endpoint_url`.

Large objects go in parts, several at once. An upload that fails is begun again after a back-off, for as long as it
takes: what waits for it is not settled, so the flow caps bound it.

Invariant: under a key there is a whole object or what was there before, never a part of one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

from inferbus.connectors.aws import TROUBLE, Loop, code_of, complaint, ended
from inferbus.connectors.base import Bell, Unavailable

PART = 8 * 2**20  # bytes of a part; S3 takes 10,000 of them, none but the last under 5 MiB
PARTS_AT_ONCE = 4
UPLOADS_AT_ONCE = 8
BACKOFF = (0.1, 10.0)  # seconds between tries, the first and the longest
MARK = "_inferbus"  # an object written at start, to see that it can be; readers of datasets pass over names with `_`


async def connected(loop: Loop, region: str | None, endpoint_url: str | None, connections: int) -> Any:
    """A client of S3; see `Loop.client`."""
    options = {
        # Trailing checksums are AWS's alone; others refuse them, and TLS guards the way.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "s3": {"addressing_style": "path" if endpoint_url else "auto"},
    }
    return await loop.client("s3", region, endpoint_url, connections, **options)


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
        self._region = region
        self._endpoint_url = endpoint_url
        self._loop = Loop()
        self._done: deque[Callable[[], None]] = deque()
        self._uploads: set[asyncio.Task[None]] = set()  # of the loop's thread
        self._problem: str | None = None
        self._opened = self._closed = False

    def open(self, bell: Bell) -> None:
        """Reach the bucket, and write a mark into it.

        Raises:
            Unavailable: It is away, missing, or may not be written.
            Misconfigured: No region, or no such profile.
        """
        self._bell = bell
        self._loop.open()
        try:
            self._client = self._loop.run(self._reach())
        except BaseException:
            self._loop.close()
            raise
        self._opened = True

    async def _reach(self) -> Any:
        self._slots = asyncio.Semaphore(UPLOADS_AT_ONCE)
        connections = UPLOADS_AT_ONCE * PARTS_AT_ONCE
        try:
            client = await connected(self._loop, self._region, self._endpoint_url, connections)
        except TROUBLE as error:
            raise self._complaint(error) from None
        try:
            await client.put_object(Bucket=self._bucket, Key=self._prefix + MARK, Body=b"")
        except TROUBLE as error:
            await client.close()
            if code_of(error) in ("NoSuchBucket", "404"):
                text = f's3: bucket "{self._bucket}" does not exist; create it, or correct the name'
                raise Unavailable(text) from None
            raise self._complaint(error) from None
        return client

    def _complaint(self, error: Exception) -> Exception:
        return complaint(error, "s3", f'bucket "{self._bucket}"', "s3:PutObject", self._endpoint_url)

    def put(self, name: str, make: Callable[[], bytes], done: Callable[[], None], wanted: Callable[[], bool]) -> None:
        """See `Shelf`."""
        self._loop.call(lambda: self._begin(self._upload(self._prefix + name, make, done, wanted)))

    def _begin(self, upload: Any) -> None:
        task = asyncio.ensure_future(upload)
        self._uploads.add(task)
        task.add_done_callback(self._uploads.discard)

    async def _upload(
        self, key: str, make: Callable[[], bytes], done: Callable[[], None], wanted: Callable[[], bool]
    ) -> None:
        async with self._slots:
            content = make()
            pause, longest = BACKOFF
            while wanted():
                try:
                    await self._store(key, content)
                    break
                except TROUBLE as error:
                    self._problem = str(self._complaint(error))
                await asyncio.sleep(pause)
                pause = min(longest, 2 * pause)
        self._problem = None
        self._done.append(done)
        self._bell.ring()

    async def _store(self, key: str, content: bytes) -> None:
        place = {"Bucket": self._bucket, "Key": key}
        if len(content) <= PART:
            await self._client.put_object(**place, Body=content)
            return
        upload = {**place, "UploadId": (await self._client.create_multipart_upload(**place))["UploadId"]}
        try:
            parts = await self._parts(upload, content)
            await self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except BaseException:
            # Parts of an upload that was given up are kept, and paid for, until somebody says so.
            with contextlib.suppress(*TROUBLE):
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

    def tick(self) -> None:
        """See `Shelf`."""
        while self._done:
            self._done.popleft()()

    def healthy(self) -> str | None:
        """Why the last upload has failed."""
        return self._problem

    def close(self, timeout: float) -> None:
        """See `Shelf`."""
        if not self._opened or self._closed:
            return
        self._closed = True
        self._loop.run(self._end(timeout))
        self._loop.close()
        self.tick()

    async def _end(self, patience: float) -> None:
        if self._uploads:
            await asyncio.wait(self._uploads, timeout=patience)
        await ended(set(self._uploads))
        await self._client.close()
