"""Objects in S3's protocol as the files of a job: listed once, and each fetched whole before it is read.

An object is fetched in ranges, several at once, into a temporary file that has no name, so that nothing is left of it
whatever becomes of this process; while one is read the next is on its way. A range that fails is asked for again after
a back-off, for as long as it takes.

Invariant: every byte is of the object that was listed: each request names the version it wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import tempfile
from typing import Any, BinaryIO, cast

from inferbus.connectors.aws import TROUBLE, Loop, code_of, complaint, ended
from inferbus.connectors.base import Bell, Misconfigured, Unavailable
from inferbus.connectors.job import Found
from inferbus.connectors.request_rows import BUFFER
from inferbus.connectors.s3 import BACKOFF, connected

RANGE = 8 * 2**20  # bytes asked for at once
RANGES_AT_ONCE = 4
NO_ROOM = 1.0  # seconds until another look whether a temporary file can be made

_GONE = {"PreconditionFailed", "412", "NoSuchKey", "404", "InvalidRange", "416"}


class Objects:
    """A `Place` in a bucket.

    Args:
        bucket: Its name.
        prefix: What the keys of the objects begin with, or one key.
        region: AWS region; None for that of the environment.
        endpoint_url: Where S3 is, if not at AWS.
    """

    def __init__(self, bucket: str, prefix: str = "", *, region: str | None, endpoint_url: str | None) -> None:
        self.name = self.whereabouts = f"s3:{bucket}/{prefix}"
        self._bucket = bucket
        self._prefix = prefix
        self._folder = prefix[: prefix.rfind("/") + 1]
        self._region = region
        self._endpoint_url = endpoint_url
        self._loop = Loop()
        self._fetches: dict[str, asyncio.Task[BinaryIO]] = {}  # of the loop's thread
        self._asked: set[str] = set()  # on their way or here
        self._here: dict[str, BinaryIO] = {}
        self._failed: BaseException | None = None
        self._problem: str | None = None
        self._open = False

    def open(self, bell: Bell) -> list[Found]:
        """See `Place`."""
        self._bell = bell
        self._loop.open()
        try:
            self._client = self._loop.run(self._reach())
        except BaseException:
            self._loop.close()
            raise
        self._open = True
        try:
            return self._loop.run(self._listed())
        except BaseException:
            self.close()
            raise

    async def _reach(self) -> Any:
        self._slots = asyncio.Semaphore(RANGES_AT_ONCE)
        try:
            return await connected(self._loop, self._region, self._endpoint_url, RANGES_AT_ONCE)
        except TROUBLE as error:
            raise self._complaint(error, "s3:ListBucket") from None

    async def _listed(self) -> list[Found]:
        found: list[Found] = []
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            async for page in pages:
                found += [self._found(entry) for entry in page.get("Contents", ())]
        except TROUBLE as error:
            if code_of(error) in ("NoSuchBucket", "404"):
                text = f's3: bucket "{self._bucket}" does not exist; correct the name'
                raise Unavailable(text) from None
            raise self._complaint(error, "s3:ListBucket") from None
        return sorted(file for file in found if not self._hidden(file.name))

    def _hidden(self, name: str) -> bool:
        """By what stands behind the prefix, for that is the user's own; it may end in the midst of a name."""
        parts = name.split("/")
        return not parts[-1] or any(part[:1] in ("_", ".") for part in parts[self._prefix != self._folder :] if part)

    def _found(self, entry: dict[str, Any]) -> Found:
        key = entry["Key"]
        return Found(key.removeprefix(self._folder), entry["Size"], entry["ETag"], chosen=key == self._prefix)

    def _complaint(self, error: Exception, action: str) -> Exception:
        return complaint(error, "s3", f'bucket "{self._bucket}"', action, self._endpoint_url)

    # Fetching

    def tail(self, file: Found, size: int) -> bytes:
        """See `Place`."""
        return self._loop.run(self._tail(file, size)) if file.size else b""

    async def _tail(self, file: Found, size: int) -> bytes:
        try:
            return await self._get(file, max(0, file.size - size), file.size)
        except TROUBLE as error:
            raise self._complaint(error, "s3:GetObject") from None

    def ahead(self, file: Found, start: int) -> None:
        """See `Place`."""
        if file.name not in self._asked:
            self._asked.add(file.name)
            self._loop.call(lambda: self._begin(file, start))

    def take(self, file: Found, start: int) -> BinaryIO | None:
        """See `Place`."""
        self.ahead(file, start)
        content = self._here.pop(file.name, None)
        if content is not None:
            self._asked.discard(file.name)
        elif self._failed is not None:
            raise self._failed
        elif self._problem is not None:
            raise Unavailable(self._problem)
        return content

    def _begin(self, file: Found, start: int) -> None:
        task = self._fetches[file.name] = asyncio.ensure_future(self._fetch(file, start))
        task.add_done_callback(lambda _: self._fetched(file, task))

    def _fetched(self, file: Found, task: asyncio.Task[BinaryIO]) -> None:
        del self._fetches[file.name]
        if task.cancelled():
            return
        self._failed = self._failed or task.exception()
        if task.exception() is None:
            self._here[file.name] = task.result()
        self._bell.ring()

    async def _fetch(self, file: Found, start: int) -> BinaryIO:
        while (content := self._temporary()) is None:  # noqa: ASYNC110 - nobody tells when there is room
            await asyncio.sleep(NO_ROOM)
        starts = range(start // RANGE * RANGE, file.size, RANGE)  # what lies before is a hole that takes no room
        tasks = [asyncio.ensure_future(self._range(content, file, begin)) for begin in starts]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            await ended(set(tasks))
            content.close()
            raise
        return content

    def _temporary(self) -> BinaryIO | None:
        try:
            return cast("BinaryIO", tempfile.TemporaryFile(buffering=BUFFER))  # whoever takes it closes it
        except OSError as error:
            self._no_room(error.strerror)
            return None

    def _no_room(self, why: str | None) -> None:
        self._problem = f"{tempfile.gettempdir()}: cannot be written: {why}"

    async def _range(self, content: BinaryIO, file: Found, begin: int) -> None:
        pause, longest = BACKOFF
        async with self._slots:
            while not await self._stored(content, file, begin):
                await asyncio.sleep(pause)
                pause = min(longest, 2 * pause)

    async def _stored(self, content: BinaryIO, file: Found, begin: int) -> bool:
        """Whether a range is here now; the place's trouble says why not."""
        try:
            part = await self._get(file, begin, min(begin + RANGE, file.size))
        except TROUBLE as error:
            if code_of(error) in _GONE:
                where = self.where(file.name)
                raise Misconfigured(f"{where}: has changed, or is gone, since the job began; begin it anew") from None
            self._problem = str(self._complaint(error, "s3:GetObject"))
            return False
        try:
            fits = os.pwrite(content.fileno(), part, begin) == len(part)  # else the rest is not there
        except OSError as error:
            self._no_room(error.strerror)
            return False
        if fits:
            self._problem = None
        else:
            self._no_room(os.strerror(errno.ENOSPC))
        return fits

    async def _get(self, file: Found, begin: int, end: int) -> bytes:
        answer = await self._client.get_object(
            Bucket=self._bucket, Key=self._folder + file.name, Range=f"bytes={begin}-{end - 1}", IfMatch=file.version
        )
        async with answer["Body"] as body:
            part: bytes = await body.read()
        if len(part) != end - begin:
            raise ConnectionError("a range came short")
        return part

    # Asked by others

    def size(self, file: Found) -> int:
        """See `Place`: an object does not grow."""
        return file.size

    def where(self, name: str) -> str:
        """See `Place`: `s3:bucket/key`."""
        return f"s3:{self._bucket}/{self._folder}{name}"

    def healthy(self) -> str | None:
        """See `Place`."""
        return self._problem

    def close(self) -> None:
        """See `Place`."""
        if self._open:
            self._open = False
            self._loop.run(self._end())
            self._loop.close()
            for content in self._here.values():
                content.close()
            self._here.clear()
            self._asked.clear()

    async def _end(self) -> None:
        with contextlib.suppress(*TROUBLE):
            await ended(set(self._fetches.values()))
            await self._client.close()
