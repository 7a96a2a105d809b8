"""One SQS queue as its source and its sink use it: reached by name or URL, asked in calls of up to ten entries.

Serves `sqs.py`; knows nothing of deliveries. Everything but `open`, `close` and `Tens.put` is for the loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from inferbus.connectors.aws import TROUBLE, Loop, code_of, complaint, ended
from inferbus.connectors.base import Misconfigured, Refused, TooLarge, Unavailable

TEN = 10  # entries of one call
CALLS = 16  # of one kind at once: each takes a millisecond of CPU, so more would only wait for each other
MOMENT = 0.004  # seconds a call waits to be filled, while others are under way
QUIET = 30.0  # seconds between two log lines of the same kind

REFUSALS = {
    "BatchRequestTooLong",
    "InvalidAttributeValue",
    "InvalidMessageContents",
    "InvalidParameterValue",
    "MessageTooLong",
    "ReceiptHandleIsInvalid",
}
"""A call that SQS will never take as it is, though it may take parts of it."""

log = logging.getLogger("inferbus.sqs")


class Queue:
    """A queue and the client to it.

    Args:
        queue: Its name or URL. A URL tells region and endpoint as well, where these are not given.
        region: AWS region.
        endpoint_url: Where SQS is, if not at AWS.
        connections: Calls at once.
        loop: Where the client lives.
    """

    def __init__(
        self, queue: str, region: str | None, endpoint_url: str | None, connections: int, loop: Loop | None
    ) -> None:
        self.name = queue.rpartition("/")[2]
        self.fifo = self.name.endswith(".fifo")
        self.loop = loop or Loop()
        self._given = queue
        self._region, self._endpoint_url = _whereabouts(queue, region, endpoint_url)
        self._connections = connections
        self._client: Any = None
        self._failing: dict[str, str] = {}  # what is wrong, by operation
        self._said: dict[str, float] = {}

    def open(self) -> dict[str, str]:
        """Reach the queue; answers its attributes.

        Raises:
            Unavailable: Away, missing or forbidden.
            Misconfigured: No region.
        """
        self._failing = {}
        self.loop.open()
        try:
            return self.loop.run(self._reach())
        except BaseException:
            self.close()
            raise

    async def _reach(self) -> dict[str, str]:
        try:
            self._client = await self.loop.client("sqs", self._region, self._endpoint_url, self._connections)
        except TROUBLE as error:
            raise self._complaint(error, "GetQueueUrl") from None
        except ValueError:
            raise Misconfigured("sqs: endpoint_url: expected http:// or https://, a host and perhaps a port") from None
        self._url = self._given
        if "/" not in self._given:
            self._url = (await self._ask("get_queue_url", QueueName=self.name))["QueueUrl"]
        return await self.attributes()

    async def attributes(self) -> dict[str, str]:
        """All that SQS says of the queue."""
        answer = await self.call("get_queue_attributes", AttributeNames=["All"])
        found: dict[str, str] = answer.get("Attributes", {})
        return found

    async def call(self, operation: str, **arguments: Any) -> Any:
        """Ask SQS about the queue.

        Raises:
            Refused: SQS will never take this as it is.
            Unavailable: Away, missing or forbidden; `trouble` says so until the next call of this kind succeeds.
        """
        return await self._ask(operation, QueueUrl=self._url, **arguments)

    async def _ask(self, operation: str, **arguments: Any) -> Any:
        try:
            answer = await getattr(self._client, operation)(**arguments)
        except TROUBLE as error:
            code = code_of(error)
            if code in REFUSALS:
                raise refusal(f"sqs:{self.name}", code, str(error)) from None
            found = self._complaint(error, operation.title().replace("_", ""))
            self._failing[operation] = str(found)
            self.say(operation, str(found))
            raise found from None
        self._failing.pop(operation, None)
        return answer

    @property
    def label(self) -> str:
        """The queue for people."""
        return f'queue "{self.name}"'

    def _complaint(self, error: Exception, operation: str) -> Exception:
        if code_of(error) in {"NonExistentQueue", "QueueDoesNotExist"}:
            return Unavailable(f"sqs: {self.label} does not exist; create it, or correct the name")
        endpoint_url = self._client.meta.endpoint_url if self._client is not None else self._endpoint_url
        return complaint(error, "sqs", self.label, f"sqs:{operation.removesuffix('Batch')}", endpoint_url)

    def trouble(self, *operations: str) -> str | None:
        """What is wrong with these kinds of calls, or with any; None when all is well."""
        for operation, text in list(self._failing.items()):
            if not operations or operation in operations:
                return text
        return None

    def say(self, kind: str, text: str) -> None:
        """Log, at most once in half a minute for each kind."""
        now = time.monotonic()
        if now - self._said.get(kind, -1e9) > QUIET:
            self._said[kind] = now
            log.warning("%s", text)

    def close(self) -> None:
        """Close the client; what is under way must have ended."""
        client, self._client = self._client, None
        if client is not None:
            self.loop.run(client.close())
        self.loop.close()


def refusal(name: str, code: str, text: str) -> Refused:
    """What SQS will never take, as it says itself."""
    code = code.rpartition(".")[2]
    too_large = any(sign in f"{code} {text}" for sign in ("TooLong", "shorter than"))
    return (TooLarge if too_large else Refused)(f"{name}: the queue refuses it ({code})")


def _whereabouts(queue: str, region: str | None, endpoint_url: str | None) -> tuple[str | None, str | None]:
    """Region and endpoint: what is given, else what the queue's URL says."""
    if "/" not in queue:
        return region, endpoint_url
    url = urlsplit(queue)
    amazon = re.search(r"(?:^|\.)([a-z0-9-]+)\.amazonaws\.com(\.cn)?$", url.hostname or "")
    if amazon is None:
        return region, endpoint_url or f"{url.scheme}://{url.netloc}"
    return region or amazon[1], endpoint_url


Entry = TypeVar("Entry")


def _first_ten(waiting: deque[Entry]) -> list[Entry]:
    return [waiting.popleft() for _ in range(min(TEN, len(waiting)))]


class Tens(Generic[Entry]):
    """Entries from the pipeline's thread on their way to SQS, several calls at once.

    A full call goes at once; a smaller one too if nothing is under way, else it waits a moment to be filled.

    Args:
        loop: Whose thread the calls are made on.
        call: Makes one call and sees to its failures; it must not raise.
        take: Takes the entries of the next call off the front; none if that cannot go yet.
    """

    def __init__(
        self,
        loop: Loop,
        call: Callable[[list[Entry]], Coroutine[Any, Any, None]],
        take: Callable[[deque[Entry]], list[Entry]] = _first_ten,
    ) -> None:
        self._loop = loop
        self._call = call
        self._take = take
        self._waiting: deque[Entry] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._soon = False
        self._hurried = False

    def put(self, entries: Iterable[Entry]) -> None:
        """Take charge of these; returns at once."""
        self._waiting.extend(entries)
        self._loop.call(self._start)

    def _start(self) -> None:
        while self._waiting and len(self._calls) < CALLS:
            if len(self._waiting) < TEN and self._calls and not self._hurried:
                if not self._soon:
                    self._soon = True
                    asyncio.get_running_loop().call_later(MOMENT, self._wait_no_longer)
                return
            if not (entries := self._take(self._waiting)):
                return
            task = asyncio.create_task(self._call(entries))
            self._calls.add(task)
            task.add_done_callback(self._done)
        self._hurried = False

    def _wait_no_longer(self) -> None:
        self._soon = False
        self._hurried = True
        self._start()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._start()

    async def finish(self, patience: float) -> None:
        """Send what is left and wait for the answers, at most `patience` seconds; drop the rest."""
        clock = asyncio.get_running_loop().time
        until = clock() + patience
        self._start()
        while self._calls and (left := until - clock()) > 0:
            await asyncio.wait(self._calls, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)  # so that the next ones start
        self._waiting.clear()
        await ended(self._calls.copy())
