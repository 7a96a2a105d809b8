"""How many CPUs this process may really use.

Executors size their thread pools by it. In a container the machine's CPU count is a lie: the kernel's quota
is what counts, and more threads than the quota get throttled together for the rest of every scheduling
period.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def available_cpus(affinity: int | None = None, root: Path = Path("/")) -> int:
    """Whole CPUs left by the affinity mask and every cgroup quota above this process; at least 1.

    Args:
        affinity: CPUs of the affinity mask; None asks the kernel.
        root: Where `proc` and `sys` are mounted.
    """
    allowed = len(os.sched_getaffinity(0)) if affinity is None else affinity
    # Rounded down: a quota of 1.5 throttles two busy threads, and one is never throttled.
    return max(1, int(min([allowed, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs granted by each cgroup from the mount down to this process: v2 `cpu.max`, v1 `cpu.cfs_*`."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = mount if controllers == "" else mount / "cpu"
        # Seen from inside a container the path may be the host's, or climb out with `..`: what is not there
        # is skipped.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            folder = base.joinpath(*parts[:depth])
            if controllers == "":
                limit = _read(folder / "cpu.max").split()
            else:
                limit = [_read(folder / f"cpu.cfs_{what}_us").strip() for what in ("quota", "period")]
            if len(limit) == 2 and limit[0].isdigit() and limit[1].isdigit() and int(limit[1]) > 0:
                yield int(limit[0]) / int(limit[1])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
