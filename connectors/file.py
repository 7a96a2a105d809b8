"""Files on this machine: those of a job, to be read, and objects into a folder.

Invariant: a file that was written is whole, under its name, or not there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from typing import BinaryIO, NoReturn

from inferbus.connectors.base import Bell, Fatal, Misconfigured, Unavailable
from inferbus.connectors.job import Found, synced, written_whole
from inferbus.connectors.objects import Make
from inferbus.connectors.request_rows import BUFFER
from inferbus.connectors.settings import normalised

BACKOFF = (0.1, 10.0)  # seconds between tries, the first and the longest


class Files:
    """A `Place` on this machine: one file, or those in a folder and in the folders inside.

    Args:
        path: The file or the folder.
    """

    def __init__(self, path: Path) -> None:
        self.name = f"file:{path.name}"  # not where it lies: it is in every error record
        self.whereabouts = str(normalised(path))
        self._path = path
        self._folder = path.parent

    def open(self, bell: Bell) -> list[Found]:  # noqa: ARG002 - whatever is there is there already
        """See `Place`.

        Raises:
            Misconfigured: There is no such file or folder.
            Unavailable: It may not be read.
        """
        try:
            if self._path.is_dir():
                self._folder = self._path
                return sorted(self._found(file) for file in self._walked())
            if self._path.is_file():
                return [self._found(self._path)._replace(chosen=True)]
        except OSError as error:
            raise Unavailable(f"{self._path}: cannot be read: {error.strerror}") from None
        raise Misconfigured(f"{self._path}: there is no such file")

    def _walked(self) -> list[Path]:
        files: list[Path] = []
        for folder, inside, names in os.walk(self._path, onerror=_raised):
            inside[:] = [name for name in inside if name[0] not in "._"]
            files += [path for name in names if name[0] not in "._" and (path := Path(folder, name)).is_file()]
        return files

    def _found(self, path: Path) -> Found:
        name, status = path.relative_to(self._folder).as_posix(), path.stat()
        return Found(name, status.st_size, f"{status.st_size} bytes at {status.st_mtime_ns}", grows=True)

    def tail(self, file: Found, size: int) -> bytes:
        """See `Place`."""
        try:
            with self._at(file.name).open("rb") as content:
                content.seek(-min(size, file.size), os.SEEK_END)
                return content.read()
        except OSError as error:
            raise Unavailable(f"{self._at(file.name)}: cannot be read: {error.strerror}") from None

    def ahead(self, file: Found, start: int) -> None:
        """See `Place`: it is here."""

    def take(self, file: Found, start: int) -> BinaryIO:  # noqa: ARG002 - all of it is here
        """See `Place`."""
        return self._at(file.name).open("rb", buffering=BUFFER)

    def size(self, file: Found) -> int:
        """See `Place`; of one that is not there any more, as it was."""
        try:
            return self._at(file.name).stat().st_size
        except OSError:
            return file.size

    def _at(self, name: str) -> Path:
        return self._folder / name

    def where(self, name: str) -> str:
        """See `Place`: `file:name`, in a folder `file:folder/name`."""
        return f"{self.name}/{name}" if self._folder == self._path else self.name

    def healthy(self) -> None:
        """See `Place`: a file that cannot be read is told of when it is taken."""

    def close(self) -> None:
        """See `Place`: nothing is held."""


class Folder:
    """A `Shelf` on this machine: each object a file, in sub-folders as its name says.

    Args:
        path: The folder; made where it is not.
    """

    def __init__(self, path: Path) -> None:
        self.name = f"file:{path}"
        self._path = path
        self._problem: str | None = None
        self._broken: Exception | None = None
        self._closing = False
        self._puts: SimpleQueue[tuple[Path, Make, Callable[[], None], Callable[[], bool]] | None] = SimpleQueue()
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

    def put(self, name: str, make: Make, done: Callable[[], None], wanted: Callable[[], bool]) -> None:
        """See `Shelf`.

        Raises:
            Fatal: That is no place in this folder.
        """
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise Fatal(f"{self.name}: an object called {name!r} would lie elsewhere")
        self._puts.put((self._path / inside, make, done, wanted))

    def tick(self) -> None:
        """See `Shelf`."""
        while self._done:
            self._done.popleft()()
        broken, self._broken = self._broken, None
        if broken is not None:
            raise Fatal(f"{self.name}: an object cannot be written: {broken!r}")

    def _run(self) -> None:
        while (put := self._puts.get()) is not None:
            path, make, done, wanted = put
            try:
                stored = self._stored(path, make(), wanted)
            except Exception as error:  # noqa: BLE001 - else this thread would end, and the pipeline wait for ever
                self._broken = error
                stored = False
            if stored:
                self._done.append(done)
            self._bell.ring()

    def _stored(self, path: Path, content: bytes | None, wanted: Callable[[], bool]) -> bool:
        """Whether nobody need wait for it any more: it is there, or not wanted."""
        pause, longest = BACKOFF
        while not self._closing:
            try:
                if not wanted():
                    return True
                _place(path, content)
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
        while self._done:
            self._done.popleft()()


def _raised(error: OSError) -> NoReturn:
    raise error


def _place(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        written_whole(path, content)
    elif path.exists():
        path.unlink()
        synced(path.parent)
