"""Files: requests from JSON lines, for bounded jobs, and objects into a folder.

A file is a stream with an order: its lines are numbered from 0, and how far they are settled is kept in a progress
file, which is to a job what the committed offsets are to a consumer group. A job that was killed begins again there.

Invariant: progress is written only for lines whose outcomes are durable, and never moves back.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, islice, repeat
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import orjson

from inferbus.connectors.base import Bell, Message, Misconfigured, Unavailable
from inferbus.connectors.gaps import Gaps
from inferbus.connectors.threads import Clerk

SAVE_EVERY = 0.1  # seconds between two writings of the progress file
PATTERNS = ("*.jsonl", "*.ndjson")
BACKOFF = (0.1, 10.0)  # seconds between tries, the first and the longest

# A receipt of this source is (Part, line number).
PART: Callable[[Any], Part] = itemgetter(0)
LINE: Callable[[Any], int] = itemgetter(1)


class Part:
    """One file of the job, and how far it is settled."""

    __slots__ = ("ends", "gaps", "line", "name", "path", "size", "start")

    def __init__(self, path: Path, name: str, line: int, start: int) -> None:
        self.path = path
        self.name = name
        self.line = line  # the next to be read
        self.start = start  # its place in the file, in bytes
        self.size = path.stat().st_size
        self.gaps = Gaps()
        self.ends = deque([(line, start)])  # (line, byte) where a chunk ended: from there a line is soon found


class FileSource:
    """The lines of a file, or of all the files in a folder, one request each; once.

    Args:
        path: A file, or a folder of `.jsonl` files, which are read in the order of their names.
        progress: The progress file; made where it is not, its folder must exist.
        max_inflight: The pipeline's cap in messages.
        max_inflight_bytes: The pipeline's cap in bytes.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        path: Path,
        progress: Path,
        *,
        max_inflight: int = 8192,  # noqa: ARG002 - nothing is read ahead: a file waits
        max_inflight_bytes: int = 2**28,  # noqa: ARG002
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"file:{path.name}"  # not where it lies: it is in every error record
        self._path = path
        self._progress = progress
        self._clock = clock
        self._parts: list[Part] = []
        self._unread: deque[Part] = deque()
        self._file: BinaryIO | None = None
        self._saved: dict[str, list[int]] = {}
        self._save_at = 0.0
        self._problem: str | None = None
        self._closed = False
        self._read = [0, 0]  # lines and bytes of this run, for the size of a line
        self._held = 0  # bytes

    def open(self, bell: Bell, drain: Callable[[Callable[[], bool], float], None]) -> None:  # noqa: ARG002 - never revoked
        """Find the files, and where the last run of this job has come to.

        Raises:
            Misconfigured: There is no such file, no line to read, or the progress file is not ours.
        """
        files = self._files()
        self._saved = self._load()
        for path in files:
            name = path.name if self._path.is_dir() else self._path.name
            line, start = self._saved.get(name, [0, 0])
            if start > path.stat().st_size:
                raise Misconfigured(
                    f"{path}: is shorter than {self._progress} says was read of it; delete that to begin anew"
                )
            self._parts.append(Part(path, name, line, start))
        self._unread = deque(self._parts)
        self._clerk = Clerk(bell)

    def _files(self) -> list[Path]:
        if self._path.is_dir():
            files = sorted({file for pattern in PATTERNS for file in self._path.glob(pattern)})
            if not files:
                raise Misconfigured(f"{self._path}: no file in it is called {' or '.join(PATTERNS)}")
            return files
        if not self._path.is_file():
            raise Misconfigured(f"{self._path}: there is no such file")
        return [self._path]

    def _load(self) -> dict[str, list[int]]:
        try:
            saved = orjson.loads(self._progress.read_bytes())
            return {str(name): [int(line), int(start)] for name, (line, start) in saved["lines"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise Misconfigured(
                f"{self._progress}: cannot be read as the progress of a job; delete it to begin anew"
            ) from None

    def receive(self, limit: int) -> list[Message]:
        """The next lines, blank ones left out; those that were added to a file meanwhile, too."""
        self._unread = self._unread or self._grown()
        while self._unread:
            part = self._unread[0]
            lines = self._lines(part, limit)
            if not lines:
                self._close_file()
                self._unread.popleft()
                continue
            if messages := self._messages(part, lines):
                return messages
        return []

    def _grown(self) -> deque[Part]:
        """Files with more in them than was read."""
        for part in self._parts:
            part.size = part.path.stat().st_size
        return deque(part for part in self._parts if part.size > part.start)

    def _lines(self, part: Part, limit: int) -> list[bytes]:
        try:
            if self._file is None:
                self._file = part.path.open("rb", buffering=2**20)
                self._file.seek(part.start)
            return list(islice(self._file, limit))
        except OSError as error:
            self._close_file()
            raise Unavailable(f"{part.path}: cannot be read: {error.strerror}") from None

    def _messages(self, part: Part, lines: list[bytes]) -> list[Message]:
        first = part.line
        part.line += len(lines)
        part.start += sum(map(len, lines))
        self._read = [self._read[0] + len(lines), self._read[1] + sum(map(len, lines))]
        part.ends.append((part.line, part.start))
        bodies = list(map(bytes.strip, lines))
        numbers: Sequence[int] = range(first, part.line)
        if not all(bodies):
            numbers = [number for number, body in zip(numbers, bodies, strict=True) if body]
            bodies = list(filter(None, bodies))
        part.gaps.receive(numbers, 0)
        self._held += sum(map(len, bodies))
        ids = [f"{part.name}-{number}" for number in numbers]
        receipts = zip(repeat(part), numbers)
        return list(map(Message, ids, repeat(None), bodies, repeat(()), repeat(None), repeat(1), receipts))

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def settle(self, messages: Sequence[Message]) -> None:
        """Mark as done; saved within a moment."""
        for part, run in groupby([m.receipt for m in messages], PART):
            part.gaps.settle(map(LINE, run))
        self._held -= _bytes(messages)

    def release(self, messages: Sequence[Message]) -> None:
        """Nothing to tell: a line that is not saved comes again to the next run."""

    def inflight(self) -> tuple[int, int]:
        """Lines read and not saved as done, and the bytes of those that are not settled."""
        return sum(part.gaps.inflight_messages for part in self._parts), self._held

    def holds(self, message: Message) -> bool:
        """Not saved as done."""
        confirmed = PART(message.receipt).gaps.confirmed
        return confirmed is None or LINE(message.receipt) >= confirmed

    def tick(self, now: float) -> float:
        """Save progress that was made."""
        self._clerk.tick()
        if now >= self._save_at and not self._clerk.busy:
            moved = [(part, position) for part in self._parts if (position := part.gaps.unconfirmed()) is not None]
            if moved:
                self._save_at = now + SAVE_EVERY
                self._clerk.ask(partial(self._save, self._places(moved)), partial(self._saved_at, moved))
        return self._save_at if self._save_at > now else now + 1.0

    def _places(self, moved: Sequence[tuple[Part, int]]) -> dict[str, list[int]]:
        """What the progress file will say: a line, and a byte from which to count lines up to it."""
        places = dict(self._saved)
        for part, position in moved:
            while len(part.ends) > 1 and part.ends[1][0] <= position:
                part.ends.popleft()
            places[part.name] = self._at(part, position, *part.ends[0])
        return places

    def _at(self, part: Part, position: int, line: int, start: int) -> list[int]:
        """The byte at which a line begins, found from a line before it."""
        if position >= part.line:
            return [part.line, part.start]
        with part.path.open("rb") as file:
            file.seek(start)
            start += sum(map(len, islice(file, position - line)))
        return [position, start]

    def _save(self, places: dict[str, list[int]]) -> dict[str, list[int]] | str:
        """On the clerk's thread: what is saved now, or why it is not."""
        try:
            written_whole(self._progress, orjson.dumps({"lines": places}))
        except OSError as error:
            return f"{self._progress}: cannot be written: {error.strerror}"
        return places

    def _saved_at(self, moved: Sequence[tuple[Part, int]], answer: dict[str, list[int]] | str) -> None:
        if isinstance(answer, str):
            self._problem = answer
            self._save_at = self._clock() + BACKOFF[1] / 10
            return
        self._problem, self._saved = None, answer
        for part, position in moved:
            part.gaps.confirm(position)

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
        """`file-jsonl/line`, where the job would begin again now, and the run from there."""
        part = PART(messages[0].receipt)
        if part.gaps.unconfirmed() is not None:
            return None
        # Its suffix too, for `a.jsonl` and `a.ndjson` are two; but a folder is not to be taken for a file of that kind.
        folder = f"{part.path.stem}-{part.path.suffix[1:]}".rstrip("-")
        name = f"{folder}/{part.gaps.position or 0:012}"
        return name, part.gaps.run([LINE(m.receipt) for m in messages], messages)

    # Asked by others

    def rest(self) -> None:
        """Whatever there is is there already."""

    def ended(self) -> bool:
        """Every line has been received."""
        return not self._grown()

    def lag(self) -> int | None:
        """Lines left, by the size of those read; None before the first."""
        lines, size = self._read
        left = sum(part.size - part.start for part in self._parts)
        return round(left * lines / size) if size else None if left else 0

    def exhausted(self) -> bool:
        """Every line has been received."""
        return self.ended()

    def void(self, message: Message) -> bool:  # noqa: ARG002 - nobody takes lines away
        """Never, until it is closed."""
        return self._closed

    def locate(self, message: Message) -> str:
        """`file:name/line`, counted from 1 as editors do; in a folder `file:folder/name/line`."""
        inside = f"/{PART(message.receipt).name}" if self._path.is_dir() else ""
        return f"{self.name}{inside}/{LINE(message.receipt) + 1}"

    def healthy(self) -> str | None:
        """Why progress cannot be saved."""
        return self._problem

    def close(self) -> None:
        """Save what is settled."""
        if self._parts and not self._closed:
            self._closed = True
            self._close_file()
            until = self._clock() + BACKOFF[1]
            while self._clerk.busy and self._clock() < until:
                self._clerk.tick()
                time.sleep(0.001)
            moved = [(part, position) for part in self._parts if (position := part.gaps.unconfirmed()) is not None]
            if moved:
                self._saved_at(moved, self._save(self._places(moved)))
            self._clerk.close()


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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Folder:
    """A `Shelf` on this machine: each object a file, in sub-folders as its name says.

    Args:
        path: The folder; made where it is not.
    """

    def __init__(self, path: Path) -> None:
        self.name = f"file:{path}"
        self._path = path
        self._problem: str | None = None
        self._closing = False
        self._puts: SimpleQueue[tuple[str, Callable[[], bytes], Callable[[], None], Callable[[], bool]] | None]
        self._puts = SimpleQueue()
        self._done: deque[Callable[[], None]] = deque()
        self._thread = threading.Thread(target=self._run, name="folder", daemon=True)

    def open(self, bell: Bell) -> None:
        """Make the folder, and try to write in it.

        Raises:
            Unavailable: That fails.
        """
        probe = self._path / ".inferbus"
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            written_whole(probe, b"")
            probe.unlink()
        except OSError as error:
            raise Unavailable(f"{self._path}: cannot be written: {error.strerror}") from None
        self._bell = bell
        if not self._thread.is_alive():
            self._thread.start()

    def put(self, name: str, make: Callable[[], bytes], done: Callable[[], None], wanted: Callable[[], bool]) -> None:
        """See `Shelf`."""
        self._puts.put((name, make, done, wanted))

    def tick(self) -> None:
        """See `Shelf`."""
        while self._done:
            self._done.popleft()()

    def _run(self) -> None:
        while (put := self._puts.get()) is not None:
            name, make, done, wanted = put
            if self._stored(self._path / name, make(), wanted):
                self._done.append(done)
                self._bell.ring()

    def _stored(self, path: Path, content: bytes, wanted: Callable[[], bool]) -> bool:
        """Whether nobody need wait for it any more: it is there, or not wanted."""
        pause, longest = BACKOFF
        while not self._closing:
            try:
                if not wanted():
                    return True
                path.parent.mkdir(parents=True, exist_ok=True)
                written_whole(path, content)
            except OSError as error:
                self._problem = f"{path.parent}: cannot be written: {error.strerror}"
                time.sleep(pause)
                pause = min(longest, 2 * pause)
            else:
                self._problem = None
                return True
        return False

    def healthy(self) -> str | None:
        """Why nothing can be written."""
        return self._problem

    def close(self, timeout: float) -> None:
        """See `Shelf`."""
        self._puts.put(None)
        with contextlib.suppress(RuntimeError):  # never started
            self._thread.join(timeout)
        self._closing = True
        self.tick()
