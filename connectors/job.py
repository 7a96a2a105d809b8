"""A bounded job as a source: the rows of files, one request each, read once.

A `Place` knows where the files are (connectors/file.py, connectors/s3_files.py), a `Format` how rows are read from one
(connectors/request_rows.py). A file is a stream with an order: its rows are numbered from 0, and how far they are
settled is kept in a progress file, which is to a job what the committed offsets are to a consumer group. A job that was
killed begins again there.

Invariant: progress is written only for rows whose outcomes are durable, and never moves back.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import orjson

from inferbus.connectors.base import Bell, ConnectorError, Message, Misconfigured, Unavailable, Unreadable
from inferbus.connectors.gaps import Gaps
from inferbus.connectors.request_rows import SUFFIXES, Chunk, Format, Known, Rows, format_of
from inferbus.connectors.threads import Clerk

SAVE_EVERY = 0.1  # seconds between two writings of the progress file
CLOSING = 10.0  # seconds to wait for the last of them
AGAIN = 1.0  # seconds until a writing that failed is tried again

# A receipt of this source is (Part, row number).
PART: Callable[[Any], Part] = itemgetter(0)
ROW: Callable[[Any], int] = itemgetter(1)


class Found(NamedTuple):
    """One file of a place."""

    name: str
    """From the place's own folder on, with `/` between folders; no two files share it."""

    size: int

    version: str | None
    """Changes when the content does; None where a file grows while it is read."""

    chosen: bool = False
    """The user named this very file, whatever it is called."""

    grows: bool = False
    """Something may be added to it, if its format is such."""


class Place(Protocol):
    """Where the files of a job are."""

    name: str
    """Metric label."""

    whereabouts: str
    """Where that is, in full; the names of files say no more than where in the place they are."""

    def open(self, bell: Bell) -> list[Found]:
        """Everything there, in the order of names, without what begins with `_` or `.`, as readers of data sets do.

        Raises:
            Unavailable: Away, missing or forbidden; `open` may be called again.
            Misconfigured: The settings cannot work.
        """

    def tail(self, file: Found, size: int) -> bytes:
        """The last `size` bytes of a file, or all of it. Blocks; only while the job is opened. Raises `Unavailable`."""

    def ahead(self, file: Found, start: int) -> None:
        """A file will be taken next, and read from byte `start` on."""

    def take(self, file: Found, start: int) -> BinaryIO | None:
        """A file to read, at any place from `start` on, and to close; None while it is on its way: the bell will ring.

        Raises:
            Unavailable: It cannot be had now.
            Misconfigured: It is not there any more as it was listed.
        """

    def size(self, file: Found) -> int:
        """Bytes of a file now."""

    def where(self, name: str) -> str:
        """A file for people and for error records; begins with the place's name."""

    def healthy(self) -> str | None:
        """None when all is well, else what is wrong in a few words."""

    def close(self) -> None:
        """Free everything. Idempotent, also where it was never opened."""


class Part:
    """One file of the job, and how far it is settled."""

    __slots__ = ("file", "gaps", "known", "left", "row", "size")

    def __init__(self, file: Found, row: int, known: Known) -> None:
        self.file = file
        self.row = row  # the next to be read
        self.known = deque([known])  # where chunks ended: from the last before a row it is soon found
        self.size = file.size
        self.left: int | None = None  # rows, where the file itself says so
        self.gaps = Gaps()

    def unread(self) -> int:
        """Bytes from the next row on."""
        return max(0, self.size - self.known[-1].byte)


Progress = dict[str, tuple[int, int, int, str | None]]
"""By file: the first row that is not done, a row at or before it and the byte where that begins, the file's version."""


class JobSource:
    """The rows of all files in a place, one request each; once.

    Args:
        place: Where the files are.
        form: How their rows are read.
        progress: The progress file; made where it is not, its folder must exist.
        clock: Monotonic seconds.
    """

    def __init__(
        self, place: Place, form: Format, progress: Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = place.name
        self._place = place
        self._form = form
        self._progress = progress
        self._clock = clock
        self._parts: list[Part] = []
        self._unread: deque[Part] = deque()
        self._active: dict[Part, None] = {}  # those in flight, of perhaps thousands
        self._rows: Rows | None = None  # of the first that is unread
        self._saved: Progress = {}
        self._bell = Bell()
        self._lock: int | None = None
        self._save_at = 0.0
        self._problem: str | None = None
        self._closed = False
        self._read = [0, 0]  # rows and bytes of this run, for the size of a row
        self._held = 0  # bytes

    def open(self, bell: Bell, drain: Callable[[Callable[[], bool], float], None]) -> None:  # noqa: ARG002 - never revoked
        """Find the files, and where the last run of this job has come to.

        Raises:
            Unavailable: The place is away, or the progress file cannot be read and written, or is another worker's.
            Misconfigured: There is no file, not a row of the first can be read, or the progress file is not ours.
        """
        self._bell = bell
        try:
            self._take_lock()
            self._saved = self._load()
            files = self._fitting(self._place.open(bell))
            parts = [self._begun(file) for file in files]
            self._form.check(self._place.where(files[0].name), partial(self._place.tail, files[0]))
            if isinstance(why := self._save(self._saved), str):
                raise Unavailable(why)  # better now than when rows have gone out
        except ConnectorError:
            self._give_lock()
            self._place.close()
            raise
        self._parts = parts
        self._unread = deque(part for part in parts if part.unread())
        self._clerk = Clerk(bell)

    def _fitting(self, listed: Sequence[Found]) -> list[Found]:
        """The files of our format; one that the user named may be called as it likes, but not as of another."""
        own = self._form.name
        formats = [format_of(file.name) for file in listed]
        fitting = [
            file for file, other in zip(listed, formats, strict=True) if other == own or (file.chosen and other is None)
        ]
        if not fitting:
            why = f"no file there ends in {', '.join(SUFFIXES[own])}"
            for other in {*SUFFIXES} - {own}:
                if count := formats.count(other):
                    why += f"; {count} are for `format: {other}`: set that"
            raise Misconfigured(f"{self.name}: {why}")
        for file in fitting:
            self._check_name(file.name)
        # What must be read from its beginning was written at once.
        return [
            file._replace(version=None) if file.grows and self._form.seekable(file.name) else file for file in fitting
        ]

    def _check_name(self, name: str) -> None:
        """Objects are named for the file, and its errors say it: another's name, or none at all, will not do."""
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise Misconfigured(f'{self.name}: "{name}" has an empty part; expected a name without')
        try:
            name.encode()
        except UnicodeEncodeError:
            raise Misconfigured(f"{self.name}: {name!a} is not UTF-8; expected names that are") from None

    def _begun(self, file: Found) -> Part:
        """A file, from where the last run has come to."""
        row, *known, version = self._saved.get(file.name, (0, 0, 0, file.version))
        where = self._place.where(file.name)
        if version != file.version:
            raise Misconfigured(f"{where}: has changed since {self._progress} was written; delete that to begin anew")
        if known[1] > file.size:
            raise Misconfigured(
                f"{where}: is shorter than {self._progress} says was read of it; delete that to begin anew"
            )
        return Part(file, row, Known(*known))

    def _take_lock(self) -> None:
        """Have the progress to ourselves: of two that write it one would move it back."""
        path = self._progress.with_name(f".{self._progress.name}.lock")
        try:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"{self._progress}: another worker is at this job; let it end") from None
        except OSError as error:
            raise Unavailable(f"{self._progress}: cannot be written: {error.strerror}") from None

    def _give_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _load(self) -> Progress:
        try:
            saved = orjson.loads(self._progress.read_bytes())
            place = str(saved["place"])
            progress: Progress = {
                str(name): (int(row), int(before), int(byte), None if version is None else str(version))
                for name, (row, before, byte, version) in saved["rows"].items()
            }
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise Unavailable(f"{self._progress}: cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise Misconfigured(
                f"{self._progress}: cannot be read as the progress of a job; delete it to begin anew"
            ) from None
        if progress and place != self._place.whereabouts:
            own = self._place.whereabouts
            raise Misconfigured(f"{self._progress}: is the progress of {place}, not of {own}; name another `progress`")
        return progress

    # Receiving

    def receive(self, limit: int) -> list[Message]:
        """The next rows, without lines that are blank; those that were added to a file meanwhile, too."""
        self._unread = self._unread or self._grown()
        while self._unread:
            part = self._unread[0]
            chunk = self._next(part, limit)
            if chunk is None:
                return []
            if not chunk.count:
                self._end(part)
            elif messages := self._messages(part, chunk):
                return messages
        return []

    def _next(self, part: Part, limit: int) -> Chunk | None:
        """The next rows of a file, none at its end; None while they are on their way."""
        try:
            if self._rows is None:
                self._rows = self._taken(part)
            if self._rows is None:
                return None
            chunk = self._rows.read(limit)
        except OSError as error:
            self._close_rows()
            raise Unavailable(f"{self._place.where(part.file.name)}: cannot be read: {error.strerror}") from None
        part.left = self._rows.left
        return chunk

    def _taken(self, part: Part) -> Rows | None:
        """A file's rows, while the next file is sent for."""
        file = self._place.take(part.file, self._start(part))
        if file is None:
            return None
        if len(self._unread) > 1:
            self._place.ahead(self._unread[1].file, self._start(self._unread[1]))
        try:
            return self._form.rows(self._place.where(part.file.name), file, part.size, part.row, part.known[-1])
        except BaseException:
            file.close()  # nobody has it yet
            raise

    def _start(self, part: Part) -> int:
        """The first byte that is needed of a file."""
        return part.known[-1].byte if self._form.seekable(part.file.name) else 0

    def _end(self, part: Part) -> None:
        """Nothing more is in a file, unless it grows."""
        self._close_rows()
        self._unread.popleft()
        if part.file.version is not None:
            part.known.append(Known(part.row, part.size))

    def _grown(self) -> deque[Part]:
        """Files with more in them than was read."""
        growing = [part for part in self._parts if part.file.version is None]
        for part in growing:
            part.size = self._place.size(part.file)
        return deque(part for part in growing if part.unread())

    def _messages(self, part: Part, chunk: Chunk) -> list[Message]:
        self._read = [self._read[0] + chunk.count, self._read[1] + chunk.end.byte - part.known[-1].byte]
        part.row += chunk.count
        part.known.append(chunk.end)
        part.gaps.receive(chunk.rows, 0)
        self._active[part] = None
        self._held += sum(map(len, chunk.bodies))
        name = part.file.name
        ids: Sequence[str] = [f"{name}-{row}" for row in chunk.rows]
        receipts = zip(repeat(part), chunk.rows)
        plain = (repeat(None), chunk.bodies, repeat(()), repeat(None), repeat(1), receipts)
        if chunk.extra is None:
            return list(map(Message, ids, *plain))
        return [
            Message(given or own, key, body, headers, None, 1, (part, row))
            if wrong is None
            else Unreadable(given or own, None, (part, row), *wrong, key, body, headers)
            for own, row, body, (given, key, headers, wrong) in zip(
                ids, chunk.rows, chunk.bodies, chunk.extra, strict=True
            )
        ]

    def _close_rows(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    # Settling

    def settle(self, messages: Sequence[Message]) -> None:
        """Mark as done; saved within a moment."""
        for part, run in groupby([m.receipt for m in messages], PART):
            part.gaps.settle(map(ROW, run))
        self._held -= _bytes(messages)

    def release(self, messages: Sequence[Message]) -> None:
        """Nothing to tell: a row that is not saved comes again to the next run."""

    def inflight(self) -> tuple[int, int]:
        """Rows read and not saved as done, and the bytes of those that are not settled."""
        return sum(part.gaps.inflight_messages for part in self._active), self._held

    def holds(self, message: Message) -> bool:
        """Not saved as done."""
        confirmed = PART(message.receipt).gaps.confirmed
        return confirmed is None or ROW(message.receipt) >= confirmed

    def tick(self, now: float) -> float:
        """Save progress that was made."""
        self._clerk.tick()
        if now >= self._save_at and not self._clerk.busy and (moved := self._moved()):
            self._save_at = now + SAVE_EVERY
            self._clerk.ask(partial(self._save, self._places(moved)), partial(self._saved_at, moved))
        return self._save_at if self._save_at > now else now + 1.0

    def _moved(self) -> list[tuple[Part, int]]:
        return [(part, position) for part in self._active if (position := part.gaps.unconfirmed()) is not None]

    def _places(self, moved: Sequence[tuple[Part, int]]) -> Progress:
        """What the progress file will say."""
        places = dict(self._saved)
        for part, position in moved:
            while len(part.known) > 1 and part.known[1].row <= position:
                part.known.popleft()
            places[part.file.name] = (position, *part.known[0], part.file.version)
        return places

    def _save(self, places: Progress) -> Progress | str:
        """On the clerk's thread: what is saved now, or why it is not."""
        try:
            written_whole(self._progress, orjson.dumps({"place": self._place.whereabouts, "rows": places}))
        except OSError as error:
            return f"{self._progress}: cannot be written: {error.strerror}"
        return places

    def _saved_at(self, moved: Sequence[tuple[Part, int]], answer: Progress | str) -> None:
        if isinstance(answer, str):
            self._problem = answer
            self._save_at = self._clock() + AGAIN
            return
        self._problem, self._saved = None, answer
        for part, position in moved:
            part.gaps.confirm(position)
            if not part.gaps.inflight_messages:
                self._active.pop(part, None)

    # For stores

    def forget_bodies(self, messages: Sequence[Message]) -> None:
        """Keep only the receipts."""
        self._held -= _bytes(messages)
        for m in messages:
            m.body = b""

    def stream(self, message: Message) -> Part:
        """Its file."""
        return PART(message.receipt)

    def run(self, messages: list[Message]) -> tuple[str, list[Message]] | None:
        """`file-jsonl/row`, where the job would begin again now, and the run from there."""
        part = PART(messages[0].receipt)
        if part.gaps.unconfirmed() is not None:
            return None
        # Its suffix too, for `a.jsonl` and `a.ndjson` are two; but a folder is not to be taken for a file of that kind.
        stem, _, suffix = part.file.name.rpartition(".")
        folder = f"{stem}-{suffix}" if stem else suffix
        name = f"{folder}/{part.gaps.position or 0:012}"
        return name, part.gaps.run([ROW(m.receipt) for m in messages], messages)

    # Asked by others

    def rest(self) -> None:
        """A file that is on its way rings the bell; of one that is here, whatever is to be passed over takes steps."""
        if self._rows is not None:
            self._bell.ring()

    def ended(self) -> bool:
        """Every row has been received."""
        return not any(part.unread() for part in self._unread) and not self._grown()

    def lag(self) -> int | None:
        """Rows left: told by the files that know, by the size of those read of the others; None before the first."""
        rows, size = self._read
        told = sum(part.left for part in self._parts if part.left is not None)
        left = sum(part.unread() for part in self._parts if part.left is None)
        return told + round(left * rows / size) if size else None if left else told

    def exhausted(self) -> bool:
        """Every row has been received."""
        return self.ended()

    def void(self, message: Message) -> bool:  # noqa: ARG002 - nobody takes rows away
        """Never, until it is closed."""
        return self._closed

    def locate(self, message: Message) -> str:
        """`file:name/row`, counted from 1 as editors do."""
        return f"{self._place.where(PART(message.receipt).file.name)}/{ROW(message.receipt) + 1}"

    def healthy(self) -> str | None:
        """Why progress cannot be saved, or files not be had."""
        return self._problem or self._place.healthy()

    def close(self) -> None:
        """Save what is settled."""
        if self._parts and not self._closed:
            self._closed = True
            self._close_rows()
            until = self._clock() + CLOSING
            while self._clerk.busy and self._clock() < until:
                self._clerk.tick()
                time.sleep(0.001)
            if moved := self._moved():
                self._saved_at(moved, self._save(self._places(moved)))
            self._clerk.close()
            self._place.close()
            self._give_lock()


def _bytes(messages: Sequence[Message]) -> int:
    return sum([len(m.body) for m in messages])


def written_whole(path: Path, content: bytes) -> None:
    """Write a file so that whoever looks, even after a crash, sees the old content or the new, and nothing else."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    synced(path.parent)


def synced(path: Path) -> None:
    """What a folder holds now is what it holds after a crash."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
