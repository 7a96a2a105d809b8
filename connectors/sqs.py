"""SQS as a Source and a Sink, on aiobotocore.

The client needs an event loop, so it has one on a thread of its own. Receive calls, as many at once as the flow asks
for, put what they bring into a deque; the pipeline takes from it without waiting and makes the messages there. What is
settled, released or sent goes the other way in calls of ten.

A message is ours until its visibility timeout passes, so from receive to delete it is renewed at half of that. One that
SQS says is no longer ours is void: someone else will serve it. Nobody cancels a receive call under way, for the
messages of its answer would be invisible to everyone; so calls are short, and closing waits for them.

Invariant: what is held here is invisible to others, or void; after `close` nothing is held.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count, takewhile
from operator import itemgetter
from typing import Any, NamedTuple

from inferbus.connectors.aws import REACH, TROUBLE, Loop, complaint, ended
from inferbus.connectors.base import (
    Bell,
    ConnectorError,
    Done,
    Failure,
    Message,
    Records,
    Refused,
    TooLarge,
    Unavailable,
    Unreadable,
    resolve_id,
)
from inferbus.connectors.sqs_mapping import ID, Malformed, decoded, encoded, group_of, size_of
from inferbus.connectors.sqs_queue import CALLS, TEN, Queue, Tens, refusal

WAIT = 1  # seconds a receive call waits for a message: an idle queue costs one call a second, closing waits as long
RECEIVERS = 16  # receive calls at once, at most, where nothing is said
AHEAD = 1000  # messages received before the pipeline asks for them: more would be kept from other workers
LOOK_EVERY = 5.0  # seconds between questions for how much is left
LOOKS_APART = 0.5  # seconds between two looks for the end of a queue, whose numbers are approximate
LONGEST = 43_200 - 60  # seconds SQS lets a message be held at all, with a margin
FIRST_BACKOFF = 0.1
MAX_BACKOFF = 10.0
CLOSING = 8.0  # seconds closing takes if SQS is away; what is not given back then comes again after its timeout
LARGEST = 2**20  # bytes of a message, and of all those of one call
MARGIN = 4096  # bytes of a call left free, should SQS count differently
REMEMBERED = 300.0  # seconds a FIFO queue knows what it has been sent

LEFT = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible", "ApproximateNumberOfMessagesDelayed")


class _Entry:
    """A message that is ours: the receipt of this source."""

    __slots__ = ("deadline", "deleted", "id", "raw", "receipt", "settled", "since", "size", "taken", "text", "void")

    def __init__(self, raw: Mapping[str, Any], now: float) -> None:
        self.id: str = raw["MessageId"]
        self.raw = raw
        self.receipt: str = raw["ReceiptHandle"]  # the newest: SQS may not honour an older one
        self.size = size_of(raw)  # bytes that it takes here
        self.text = len(raw["Body"])  # of which its body
        self.since = now
        self.deadline = now  # monotonic seconds at which others may see it
        self.taken: int | None = None  # bytes that the pipeline has of it; set and read by its thread alone
        self.settled = False
        self.deleted = False
        self.void = False


class SqsSource:
    """At-least-once deliveries from one queue, standard or FIFO.

    Args:
        queue: The queue's name or URL.
        region: AWS region; None for that of the environment.
        endpoint_url: Where SQS is, if not at AWS.
        visibility_timeout: Seconds until a message comes again after a crash.
        receivers: Receive calls at once, at most; None for as many as the flow asks for, up to 16.
        max_inflight: The pipeline's cap in messages; what is held here stays under it.
        max_inflight_bytes: The pipeline's cap in bytes; likewise.
        loop: The loop of other connectors to AWS, to be shared; None for one of its own.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        queue: str,
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        visibility_timeout: float = 60.0,
        receivers: int | None = None,
        max_inflight: int = 8192,
        max_inflight_bytes: int = 256 * 2**20,
        loop: Loop | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._receivers = receivers or RECEIVERS
        self._queue = Queue(queue, region, endpoint_url, self._receivers + 3 * CALLS, loop)
        self.name = f"sqs:{self._queue.name}"
        self._timeout = math.ceil(visibility_timeout)
        self._max_inflight = max_inflight
        self._max_bytes = max_inflight_bytes
        self._clock = clock
        self._open = False
        # The pipeline's thread alone:
        self._inflight = 0
        self._inflight_bytes = 0
        # Between the two threads:
        self._waiting: deque[_Entry] = deque()  # received, for the pipeline to take
        self._gone: deque[_Entry] = deque()  # deleted, released or void, for the pipeline to forget
        self._short = False  # receiving stopped for lack of room

    # Opening and closing

    def open(self, bell: Bell, drain: Callable[[Callable[[], bool], float], None]) -> None:  # noqa: ARG002 - ours until a timeout
        """Reach the queue and begin to receive."""
        self._bell = bell
        attributes = self._queue.open()
        self._lag: int | None = int(attributes.get(LEFT[0], 0))
        self._held: dict[str, _Entry] = {}  # by MessageId, in the order of their deadlines
        self._held_bytes = 0
        self._largest = 0  # bytes of the largest message of late; 0 before the first
        self._polls: set[asyncio.Task[None]] = set()
        self._asked = 0  # messages asked for by them
        self._wanted = 1  # as many receive calls at once as the flow asks for
        self._backing_off = False
        self._backoff = FIRST_BACKOFF
        self._deletes = Tens(self._queue.loop, self._delete)
        self._releases = Tens(self._queue.loop, self._give_back)
        self._watch: set[asyncio.Task[None]] = set()
        self._round = asyncio.Lock()  # held while renewals are under way
        self._renewals = asyncio.Semaphore(CALLS)
        self._closing = False
        self._open = True
        self._queue.loop.run(self._begin())

    async def _begin(self) -> None:
        self._watch = {asyncio.create_task(self._keep()), asyncio.create_task(self._look())}
        self._ask()

    def close(self) -> None:
        """Delete what is settled, make everything else visible again, and end."""
        self._disconnect(orderly=True)

    def _disconnect(self, *, orderly: bool) -> None:
        if not self._open:
            return
        self._open = False
        self._queue.loop.run(self._end(orderly=orderly))
        self._queue.close()
        self._forget_gone()

    async def _end(self, *, orderly: bool) -> None:
        self._closing = True
        until = self._clock() + CLOSING
        if orderly and self._polls:
            await asyncio.wait(self._polls, timeout=WAIT + REACH)
        if orderly:
            await self._deletes.finish(until - self._clock())
            self._releases.put([entry for entry in self._held.values() if not entry.settled])
            await self._releases.finish(until - self._clock())
        for tens in (self._deletes, self._releases):
            await tens.finish(0.0)
        await ended(self._watch | self._polls)
        self._drop(list(self._held.values()), void=True)
        self._waiting.clear()

    # Receiving, on the loop's thread

    def _ask(self) -> None:
        """Start receive calls: as many as the flow asks for, and for no more than there is room."""
        while not self._closing and len(self._polls) < self._wanted and not self._backing_off:
            room = self._room()
            if not room:
                self._short = True
                return
            self._asked += room
            poll = asyncio.create_task(self._poll(room))
            self._polls.add(poll)
            poll.add_done_callback(self._polled)

    def _room(self) -> int:
        """Messages to ask for in one call."""
        room = min(
            TEN,
            self._max_inflight - len(self._held) - self._asked,
            AHEAD - len(self._waiting) - self._asked,
            (self._max_bytes - self._held_bytes) // (self._largest or LARGEST) - self._asked,
        )
        if room > 0:
            return room
        return 0 if self._held or self._asked else 1  # one larger than all the room must be served too

    async def _poll(self, room: int) -> None:
        """One receive call, which is never cancelled but by a crash."""
        try:
            answer = await self._queue.call(
                "receive_message",
                MaxNumberOfMessages=room,
                WaitTimeSeconds=WAIT,
                VisibilityTimeout=self._timeout,
                AttributeNames=["ApproximateReceiveCount", "SentTimestamp", "MessageGroupId"],
                MessageAttributeNames=["All"],
                # The client tries again when an answer was lost: by this name it gets the same messages then.
                **({"ReceiveRequestAttemptId": secrets.token_hex(16)} if self._queue.fifo else {}),
            )
        except ConnectorError:
            self._back_off()
            return
        finally:
            self._asked -= room
        self._backoff = FIRST_BACKOFF
        brought = answer.get("Messages", [])
        if 2 * len(brought) >= room:
            self._wanted = min(self._receivers, self._wanted + 1)
        elif not brought:
            self._wanted = max(1, self._wanted // 2)
        if brought:
            self._accept(brought)

    def _back_off(self) -> None:
        if not self._backing_off:  # others failed with the first
            self._backing_off = True
            self._wanted = 1
            asyncio.get_running_loop().call_later(self._backoff, self._ask_again)
            self._backoff = min(MAX_BACKOFF, 2 * self._backoff)
            self._bell.ring()

    def _ask_again(self) -> None:
        self._backing_off = False
        self._ask()

    def _polled(self, poll: asyncio.Task[None]) -> None:
        self._polls.discard(poll)
        if not poll.cancelled() and (fault := poll.exception()) is not None:  # a fault of ours: it must not spin
            self._queue.say("poll", f"{self.name}: {fault!r}")
            self._back_off()
        self._ask()

    def _accept(self, brought: list[Mapping[str, Any]]) -> None:
        """Hold what came; of a message held already only the newest receipt counts."""
        now = self._clock()
        fresh: list[_Entry] = []
        for raw in brought:
            entry = self._held.pop(raw["MessageId"], None)
            if entry is None:
                entry = _Entry(raw, now)
                self._held_bytes += entry.size
                fresh.append(entry)
            else:
                entry.receipt = raw["ReceiptHandle"]
                if entry.raw:  # not with the pipeline yet: it shall know the newest count of attempts
                    entry.raw = raw
            entry.deadline = now + self._timeout
            self._held[entry.id] = entry
        if fresh:
            self._largest = max(self._largest // 2, *(entry.size for entry in fresh))
            if self._closing:
                self._releases.put(fresh)
                return
            empty = not self._waiting
            self._waiting.extend(fresh)
            if empty:
                self._bell.ring()

    def _drop(self, entries: Iterable[_Entry], *, void: bool) -> None:
        """These are no longer ours."""
        empty = not self._gone
        for entry in entries:
            if self._held.get(entry.id) is entry:
                del self._held[entry.id]
                self._held_bytes -= entry.size
                entry.void |= void
                entry.deleted |= not void
                self._gone.append(entry)
        if empty and self._gone:
            self._bell.ring()
        if not self._closing:
            self._ask()

    # Keeping, on the loop's thread

    async def _keep(self) -> None:
        """Renew, again and again, what has less than half of its timeout left."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 8))
            async with self._round:
                now = self._clock()
                due = self._due(now)
                await asyncio.gather(*(self._renew(due[i : i + TEN], now) for i in range(0, len(due), TEN)))

    def _due(self, now: float) -> list[_Entry]:
        """What is to be renewed; what SQS lets nobody hold any longer is dropped."""
        near = list(takewhile(lambda entry: entry.deadline < now + self._timeout / 2, self._held.values()))
        due = [entry for entry in near if self._reach(entry, now) > entry.deadline + 1]
        if len(due) < len(near):
            self._queue.say("old", f"{self.name}: SQS lets no message be held for over 12 h; it comes again")
            self._drop([entry for entry in near if entry.deadline < now and entry not in due], void=True)
        return due

    def _reach(self, entry: _Entry, now: float) -> float:
        """Until when it may be made ours."""
        return min(now + self._timeout, entry.since + LONGEST)

    async def _renew(self, entries: list[_Entry], now: float) -> None:
        """Make these ours for another timeout; what SQS no longer lets us have is void."""
        receipts = [entry.receipt for entry in entries]
        reaches = [self._reach(entry, now) for entry in entries]
        async with self._renewals:
            try:
                failed = await self._change(receipts, [round(reach - now) for reach in reaches])
            except ConnectorError:
                return  # and try again at the next round
        gone: list[_Entry] = []
        for i, entry in enumerate(entries):
            if self._held.get(entry.id) is not entry or entry.receipt is not receipts[i]:
                continue  # deleted, or come anew, meanwhile
            if i not in failed:
                del self._held[entry.id]
                entry.deadline = reaches[i]
                self._held[entry.id] = entry
            elif failed[i] and not entry.settled:  # a delete finds out for itself
                gone.append(entry)
        if gone:
            self._queue.say("void", f"{self.name}: {len(gone)} messages were not renewed in time; others serve them")
            self._drop(gone, void=True)

    async def _change(self, receipts: Sequence[str], timeouts: Sequence[int]) -> dict[int, bool]:
        """Set visibility timeouts; answers which failed, and whether for good."""
        entries = [
            {"Id": str(i), "ReceiptHandle": receipt, "VisibilityTimeout": timeout}
            for i, (receipt, timeout) in enumerate(zip(receipts, timeouts, strict=True))
        ]
        return await self._in_batch("change_message_visibility_batch", entries)

    async def _in_batch(self, operation: str, entries: list[dict[str, Any]]) -> dict[int, bool]:
        """Positions that failed, and whether for good. An answer of 200 may hide failures of single entries."""
        try:
            answer = await self._queue.call(operation, Entries=entries)
        except Refused:
            if len(entries) == 1:
                return {0: True}
            failed: dict[int, bool] = {}
            for i, entry in enumerate(entries):
                if await self._in_batch(operation, [entry]):
                    failed[i] = True
            return failed
        return {int(fault["Id"]): fault["SenderFault"] for fault in answer.get("Failed", [])}

    async def _look(self) -> None:
        """Ask how much is left, every few seconds."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                self._lag = int((await self._queue.attributes())[LEFT[0]])
            except (ConnectorError, KeyError):
                self._lag = None

    async def _delete(self, entries: list[_Entry]) -> None:
        """Delete these, however often it takes: until then they are ours."""
        backoff = FIRST_BACKOFF
        while entries := await self._delete_once(entries):
            await asyncio.sleep(backoff)
            backoff = min(MAX_BACKOFF, 2 * backoff)

    async def _delete_once(self, entries: list[_Entry]) -> list[_Entry]:
        """Those that are still to be deleted."""
        entries = [entry for entry in entries if self._held.get(entry.id) is entry]
        receipts = [entry.receipt for entry in entries]
        if not entries:
            return []
        try:
            failed = await self._in_batch(
                "delete_message_batch", [{"Id": str(i), "ReceiptHandle": receipt} for i, receipt in enumerate(receipts)]
            )
        except ConnectorError:
            return entries
        # One that came anew meanwhile is deleted by its newest receipt: the old one may not have counted.
        fresh = [entry.receipt is receipts[i] for i, entry in enumerate(entries)]
        self._drop([e for i, e in enumerate(entries) if fresh[i] and i not in failed], void=False)
        self._drop([e for i, e in enumerate(entries) if fresh[i] and failed.get(i)], void=True)
        return [e for i, e in enumerate(entries) if not fresh[i] or failed.get(i) is False]

    async def _give_back(self, entries: list[_Entry]) -> None:
        """Let others see these at once, and ask for no more: who gives back is about to end."""
        self._closing = True
        receipts = [entry.receipt for entry in entries if not entry.void]
        self._drop(entries, void=True)  # first, so that nothing of what follows takes them for ours
        async with self._round:
            pass  # a renewal under way would hide them again
        try:
            if receipts:
                await self._change(receipts, [0] * len(receipts))
        except ConnectorError:
            self._queue.say("release", f"{self.name}: messages not given back come again after {self._timeout} s")

    # Asked by the pipeline

    def receive(self, limit: int) -> list[Message]:
        """What receive calls have brought, at most `limit`."""
        waiting = self._waiting
        messages: list[Message] = []
        while waiting and len(messages) < limit:
            entry = waiting.popleft()
            if not entry.void:
                entry.taken = entry.size
                self._inflight += 1
                self._inflight_bytes += entry.size
                messages.append(self._message(entry))
        if self._short and messages:
            self._short = False
            self._queue.loop.call(self._ask)
        if not messages and (trouble := self._queue.trouble("receive_message")):
            raise Unavailable(trouble)
        return messages

    def _message(self, entry: _Entry) -> Message:
        raw, entry.raw = entry.raw, {}  # the body lives on in the message alone
        attributes = raw.get("Attributes", {})
        created_at = int(attributes["SentTimestamp"]) / 1000 if "SentTimestamp" in attributes else None
        try:
            key, body, headers = decoded(raw)
        except Malformed as error:
            given = raw["MessageAttributes"].get(ID, {}).get("StringValue")
            body = raw["Body"].encode()
            return Unreadable(given or entry.id, created_at, entry, "invalid_request", str(error), None, body)
        attempts = int(attributes.get("ApproximateReceiveCount", 1))
        own = (headers and resolve_id(headers)) or entry.id
        return Message(own, key, body, headers, created_at, attempts, entry)

    def settle(self, messages: Sequence[Message]) -> None:
        """Delete these, in tens."""
        entries = self._ours(messages)
        for entry in entries:
            entry.settled = True
        if entries:
            self._deletes.put(entries)

    def release(self, messages: Sequence[Message]) -> None:
        """Make these visible to others at once."""
        if entries := self._ours(messages):
            self._releases.put(entries)

    def forget_bodies(self, messages: Sequence[Message]) -> None:
        """Keep only the receipts."""
        entries = self._ours([m for m in messages if m.body])
        for entry in entries:
            entry.taken = (entry.taken or 0) - entry.text
            self._inflight_bytes -= entry.text
        for m in messages:
            m.body = b""
        if entries:
            self._queue.loop.call(partial(self._lighten, entries))

    def _lighten(self, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            if self._held.get(entry.id) is entry:
                entry.size -= entry.text
                self._held_bytes -= entry.text
        if not self._closing:
            self._ask()

    def stream(self, message: Message) -> None:
        """None: what comes again may go to several workers."""

    def run(self, messages: Sequence[Message]) -> tuple[str, list[Message]]:
        """All of them, under a name that was never used."""
        return f"{self._queue.name}/{time.time_ns()}-{secrets.token_hex(6)}", list(messages)

    def _ours(self, messages: Sequence[Message]) -> list[_Entry]:
        receipts: list[Any] = [m.receipt for m in messages]
        return [entry for entry in receipts if not entry.void]

    def inflight(self) -> tuple[int, int]:
        """Given to the pipeline and not yet deleted; what waits here for it is not counted."""
        return self._inflight, self._inflight_bytes

    def holds(self, message: Message) -> bool:
        """Not deleted."""
        receipt: Any = message.receipt
        return not receipt.deleted

    def tick(self, now: float) -> float:
        """Free the credit of what is deleted. The loop's thread does the rest, and rings."""
        self._forget_gone()
        return now + 1.0

    def _forget_gone(self) -> None:
        gone = self._gone
        while gone:
            entry = gone.popleft()
            if entry.taken is not None:
                self._inflight -= 1
                self._inflight_bytes -= entry.taken

    def rest(self) -> None:
        """Nothing to do: the loop's thread rings whenever a deque here is no longer empty."""

    def lag(self) -> int | None:
        """Messages on the queue that are visible, as last told."""
        return self._lag

    def ended(self) -> bool:
        """Never."""
        return False

    def exhausted(self) -> bool:
        """Nothing visible, invisible or delayed, in two looks."""
        for pause in (0.0, LOOKS_APART):
            time.sleep(pause)
            if self._held or self._waiting:
                return False
            found = self._queue.loop.run(self._queue.attributes())
            if any(int(found.get(name, 0)) for name in LEFT):
                return False
        return True

    def void(self, message: Message) -> bool:
        """It was not renewed in time, or this source is closed."""
        receipt: Any = message.receipt
        return bool(receipt.void)

    def locate(self, message: Message) -> str:
        """`sqs:queue/MessageId`."""
        receipt: Any = message.receipt
        return f"{self.name}/{receipt.id}"

    def healthy(self) -> str | None:
        """SQS away or refusing."""
        if self._open and any(task.done() for task in self._watch):
            return f"{self.name}: messages are not kept any more"
        return self._queue.trouble()


# The sink


class TemporaryQueue(SqsSource):
    """A queue of our own, made on opening and removed on closing.

    Args:
        queue: Its name, which nobody else has.
        region: AWS region; None for that of the environment.
        endpoint_url: Where SQS is, if not at AWS.
    """

    def __init__(self, queue: str, *, region: str | None = None, endpoint_url: str | None = None) -> None:
        super().__init__(queue, region=region, endpoint_url=endpoint_url, receivers=2)
        self._where = region, endpoint_url
        self._url: str | None = None

    def open(self, bell: Bell, drain: Callable[[Callable[[], bool], float], None]) -> None:
        """Make the queue and begin to receive."""
        self._url = self._administer("create_queue", QueueName=self._queue.name)["QueueUrl"]
        super().open(bell, drain)

    def close(self) -> None:
        """End, and remove the queue; one that cannot be removed now stays, and says so in the log."""
        super().close()
        if self._url is not None:
            url, self._url = self._url, None
            try:
                self._administer("delete_queue", QueueUrl=url)
            except ConnectorError as error:
                self._queue.say("delete_queue", f"queue {self._queue.name} is left behind: {error}")

    def _administer(self, operation: str, **arguments: Any) -> Any:
        loop = self._queue.loop
        loop.open()
        try:
            return loop.run(self._call_once(operation, arguments))
        finally:
            loop.close()

    async def _call_once(self, operation: str, arguments: dict[str, Any]) -> Any:
        region, endpoint_url = self._where
        try:
            client = await self._queue.loop.client("sqs", region, endpoint_url, 1)
            try:
                return await getattr(client, operation)(**arguments)
            finally:
                await client.close()
        except TROUBLE as error:
            action = f"sqs:{operation.title().replace('_', '')}"
            raise complaint(error, "sqs", self._queue.label, action, endpoint_url) from None


class _Write:
    """The records of one `write` and what became of them; `left` counts answers to come."""

    __slots__ = ("done", "failures", "left", "messages", "since", "tokens")

    def __init__(self, messages: Sequence[Message], done: Done, since: float) -> None:
        self.messages = messages
        self.tokens: dict[int, str] = {}  # deduplication ids by position; of a FIFO queue alone
        self.done = done
        self.failures: list[Failure] = []
        self.left = len(messages)
        self.since = since


class _Outgoing:
    """One record on its way."""

    __slots__ = ("group", "position", "request", "size", "write")

    def __init__(self, write: _Write, position: int, request: dict[str, Any], size: int, group: str | None) -> None:
        self.write = write
        self.position = position
        self.request = request
        self.size = size
        self.group = group


class SqsSink:
    """Records to one queue, standard or FIFO; durable when SQS has said so for each of them.

    A FIFO queue gets the records of one key one call after the other, in order. Each record has a deduplication id of
    its own and keeps it when it is written again, so a call whose answer was lost doubles nothing.

    Args:
        queue: The queue's name or URL.
        region: AWS region; None for that of the environment.
        endpoint_url: Where SQS is, if not at AWS.
        loop: The loop of other connectors to AWS, to be shared; None for one of its own.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        queue: str,
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        loop: Loop | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = Queue(queue, region, endpoint_url, 2 * CALLS, loop)
        self.name = f"sqs:{self._queue.name}"
        self._clock = clock
        self._open = False
        self._writes: deque[_Write] = deque()
        self._run = secrets.token_hex(8)
        self._numbers = count()
        self._again: dict[int, tuple[Message, str, float]] = {}  # deduplication ids of what must be written again

    def open(self, bell: Bell) -> None:
        """Reach the queue and learn how large a message it takes."""
        self._bell = bell
        attributes = self._queue.open()
        self._largest = min(LARGEST, int(attributes.get("MaximumMessageSize", LARGEST)))
        self._sends = Tens(self._queue.loop, self._send, self._take)
        self._busy: set[str | None] = set()  # groups with a call under way
        self._failing: ConnectorError | None = None
        self._open = True

    def write(self, records: Records, done: Done) -> None:
        """Start sending; `done` comes from `tick`, for writes in the order they were started."""
        write = _Write(records.messages, done, self._clock())
        self._writes.append(write)
        outgoing: list[_Outgoing] = []
        columns = zip(records.messages, records.keys, records.bodies, records.headers, strict=True)
        for position, (message, key, body, headers) in enumerate(columns):
            text, attributes, size = encoded(key, body, headers)
            if size > self._largest:
                self._report(write, position, TooLarge(f"{self.name}: {size} bytes, at most {self._largest} are taken"))
                continue
            request: dict[str, Any] = {"MessageBody": text, "MessageAttributes": attributes}
            group = None
            if self._queue.fifo:
                group = group_of(key, message.id)
                request["MessageGroupId"] = group
                write.tokens[position] = request["MessageDeduplicationId"] = self._token(message)
            outgoing.append(_Outgoing(write, position, request, size, group))
        if outgoing:
            self._sends.put(outgoing)

    def _token(self, message: Message) -> str:
        """A deduplication id: that of an earlier try of this record, whose answer may have been lost, else a new one.

        Not made of the request's id: two deliveries of one request have two outcomes, and neither is to be swallowed.
        """
        earlier = self._again.pop(id(message), None)
        return earlier[1] if earlier and earlier[0] is message else f"{self._run}-{next(self._numbers)}"

    def _remember(self, write: _Write) -> None:
        """Keep the deduplication ids of what will be written again, for as long as SQS knows them."""
        now = self._clock()
        for position, error in write.failures:
            if position in write.tokens and isinstance(error, Unavailable):
                message = write.messages[position]
                self._again[id(message)] = (message, write.tokens[position], now)
        while self._again and now - next(iter(self._again.values()))[2] > REMEMBERED:
            del self._again[next(iter(self._again))]

    # On the loop's thread

    def _take(self, waiting: deque[_Outgoing]) -> list[_Outgoing]:
        """The records of the next call: up to ten and 1 MiB, and none of a group that has a call under way."""
        batch: list[_Outgoing] = []
        size = 0
        while waiting and len(batch) < TEN:
            outgoing = waiting[0]
            size += outgoing.size
            if outgoing.group in self._busy or (batch and size > LARGEST - MARGIN):
                break
            batch.append(waiting.popleft())
        self._busy.update(outgoing.group for outgoing in batch if outgoing.group is not None)
        return batch

    async def _send(self, batch: list[_Outgoing]) -> None:
        try:
            await self._send_once(batch)
        finally:
            self._busy.difference_update(outgoing.group for outgoing in batch)

    async def _send_once(self, batch: list[_Outgoing]) -> None:
        """One call; one that is refused whole is made again in halves, to find for the sake of which record."""
        if self._failing is not None:  # what came before is to be written again, and this must not overtake it
            self._failed(batch, self._failing)
            return
        entries = [{"Id": str(i), **outgoing.request} for i, outgoing in enumerate(batch)]
        try:
            answer = await self._queue.call("send_message_batch", Entries=entries)
        except ConnectorError as error:
            if len(batch) == 1 or not isinstance(error, Refused):
                self._failed(batch, error)
                return
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                await self._send_once(half)
        else:
            faults = {int(fault["Id"]): fault for fault in answer.get("Failed", [])}
            for i, outgoing in enumerate(batch):
                if i in faults:
                    self._failed([outgoing], self._verdict(faults[i]))
                else:
                    self._report(outgoing.write, outgoing.position, None)

    def _verdict(self, fault: Mapping[str, Any]) -> ConnectorError:
        code, text = fault["Code"], fault.get("Message", "")
        if fault["SenderFault"]:
            return refusal(self.name, code, text)
        return Unavailable(f"{self.name}: a record was not taken ({code})")

    def _failed(self, batch: Sequence[_Outgoing], error: ConnectorError) -> None:
        if self._queue.fifo and isinstance(error, Unavailable):
            self._failing = error
        for outgoing in batch:
            self._report(outgoing.write, outgoing.position, error)

    def _report(self, write: _Write, position: int, error: ConnectorError | None) -> None:
        if error is not None:
            write.failures.append((position, error))
        write.left -= 1
        if not write.left:
            self._bell.ring()

    # Asked by the pipeline

    def tick(self) -> None:
        """Tell whoever wrote."""
        while self._writes and not self._writes[0].left:
            write = self._writes.popleft()
            self._remember(write)
            write.done(sorted(write.failures, key=itemgetter(0)))
        if not self._writes:
            self._failing = None  # the pipeline knows of it all, and writes again in order

    def rest(self) -> None:
        """Nothing to do: the loop's thread rings when a write has its last answer."""

    def healthy(self) -> str | None:
        """SQS away or refusing, or a write unconfirmed for ten seconds."""
        for write in list(self._writes)[:1]:  # a copy: the listener's thread asks too
            if self._clock() - write.since > 2 * REACH:
                return f"{self.name}: a write has not been confirmed for {self._clock() - write.since:.0f} s"
        return self._queue.trouble()

    def close(self, timeout: float) -> None:
        """Wait for pending writes, then drop them."""
        if not self._open:
            return
        self._open = False
        self._queue.loop.run(self._sends.finish(timeout))
        self._queue.close()
        self.tick()
        self._writes.clear()


MOST_NAMES = 1000  # of queues whose URLs are remembered


class _Reply(NamedTuple):
    address: str
    request: dict[str, Any]
    size: int


class SqsReplies:
    """Replies to queues, by name or URL.

    Args:
        region: AWS region; None for that of the environment.
        endpoint_url: Where SQS is, if not at AWS.
        loop: The loop of other connectors to AWS, to be shared; None for one of its own.
    """

    def __init__(self, *, region: str | None = None, endpoint_url: str | None = None, loop: Loop | None = None) -> None:
        self.name = "sqs:replies"
        self.sent = 0
        self.failed = 0
        self._region = region
        self._endpoint_url = endpoint_url
        self._loop = loop or Loop()
        self._sends: Tens[_Reply] = Tens(self._loop, self._send, self._take)
        self._urls: dict[str, str] = {}  # by name
        self._opened = False

    def open(self, bell: Bell) -> None:  # noqa: ARG002 - nobody waits for replies
        """Make the client."""
        self._loop.open()
        try:
            self._client = self._loop.run(self._loop.client("sqs", self._region, self._endpoint_url, CALLS))
        except TROUBLE as error:
            self._loop.close()
            raise complaint(error, "sqs", "replies", "sqs:SendMessage", self._endpoint_url) from None
        self._opened = True

    def send(self, address: str, records: Records) -> None:
        """Hand all records over at once."""
        waiting: list[_Reply] = []
        columns = zip(records.messages, records.keys, records.bodies, records.headers, strict=True)
        for m, key, body, headers in columns:
            text, attributes, size = encoded(key, body, headers)
            if size > LARGEST:
                self.failed += 1
                continue
            request: dict[str, Any] = {"MessageBody": text, "MessageAttributes": attributes}
            if address.endswith(".fifo"):
                request |= {"MessageGroupId": group_of(key, m.id), "MessageDeduplicationId": secrets.token_hex(16)}
            waiting.append(_Reply(address, request, size))
        self._sends.put(waiting)

    def tick(self) -> None:
        """Nothing to do here."""

    def close(self, timeout: float) -> None:
        """Wait for the last calls."""
        if self._opened:
            self._opened = False
            self._loop.run(self._sends.finish(timeout))
            self._loop.run(self._client.close())
            self._loop.close()

    # On the loop's thread

    def _take(self, waiting: deque[_Reply]) -> list[_Reply]:
        """Up to ten and 1 MiB for one queue."""
        batch = [waiting.popleft()]
        size = batch[0].size
        while waiting and len(batch) < TEN and waiting[0].address == batch[0].address:
            size += waiting[0].size
            if size > LARGEST - MARGIN:
                break
            batch.append(waiting.popleft())
        return batch

    async def _send(self, batch: list[_Reply]) -> None:
        address = batch[0].address
        entries = [{"Id": str(i), **reply.request} for i, reply in enumerate(batch)]
        try:
            if "/" not in address and address not in self._urls:
                if len(self._urls) >= MOST_NAMES:
                    self._urls.clear()
                self._urls[address] = (await self._client.get_queue_url(QueueName=address))["QueueUrl"]
            url = self._urls.get(address, address)
            answer = await self._client.send_message_batch(QueueUrl=url, Entries=entries)
        except TROUBLE:
            self.failed += len(batch)
            return
        failed = len(answer.get("Failed", []))
        self.failed += failed
        self.sent += len(batch) - failed
