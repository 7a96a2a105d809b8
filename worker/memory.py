"""How much memory this process has, and how much it may have.

Beside the path of a message: flow caps bound what the pipeline holds, but not what a client library
inflates while it decompresses. The worker looks here now and then and drains before the kernel kills it.

Invariant: where the system does not tell, nothing is over the limit.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, from glibc's malloc.h
_LARGEST_IN_HEAP = 32 * 2**20  # bytes; glibc takes no higher threshold


class Memory:
    """Resident memory of this process against the smallest limit that holds for it. All sizes in bytes.

    Args:
        sharers: Processes like this one under the same limit; each may have its part.
        root: Where `proc` and `sys` are mounted.

    Attributes:
        limit: What this process may have: its part of the container's or the machine's memory, or None.
    """

    def __init__(self, sharers: int = 1, root: Path = Path("/")) -> None:
        self._statm = root / "proc/self/statm"
        self._page = os.sysconf("SC_PAGE_SIZE")
        known = [*_cgroup_limits(root), *_total(self._page)]
        self.limit = min(known) // sharers if known else None

    def resident(self) -> int | None:
        """Bytes of this process in memory now; None where the system does not say."""
        try:
            return int(self._statm.read_text().split()[1]) * self._page
        except (OSError, ValueError, IndexError):
            return None

    def over_limit(self, share: float = 0.9) -> bool:
        """True when resident memory has passed `share` of the limit."""
        resident = self.resident()
        return resident is not None and self.limit is not None and resident > share * self.limit


def _total(page: int) -> list[int]:
    try:
        return [os.sysconf("SC_PHYS_PAGES") * page]
    except (OSError, ValueError):
        return []


def _cgroup_limits(root: Path) -> list[int]:
    """The limits of this process's control group and of the groups around it, of version 2 or 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if controllers == "":
            files += _upwards(root / "sys/fs/cgroup", inside, "memory.max")
        elif "memory" in controllers.split(","):
            files += _upwards(root / "sys/fs/cgroup/memory", inside, "memory.limit_in_bytes")
    return [limit for file in files if (limit := _read(file)) is not None]


def _upwards(mount: Path, inside: str, name: str) -> list[Path]:
    # In a container the path may be the host's and not exist here; the mount is then the container's group.
    group = mount / inside
    return [folder / name for folder in (group, *group.parents) if folder.is_relative_to(mount)]


def _read(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def keep_freed(size: int) -> bool:
    """Have the C allocator keep up to `size` freed bytes for the next batch; False where it is not glibc's.

    By default glibc gives large blocks back as soon as they are free, and every message and batch of some 100 KB then
    faults its pages in again: a fifth of the time of a worker that serves images. What flow may hold it held anyway.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    # The first switches off that glibc moves both as it sees fit, so neither is left alone.
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP) and mallopt(_TRIM_THRESHOLD, min(size, 2**31 - 1)))
