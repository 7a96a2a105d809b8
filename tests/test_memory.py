"""Reading the system's own files; a stand-in tree where the real one would depend on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inferbus.worker.memory import Memory

PAGE = os.sysconf("SC_PAGE_SIZE")
RAM = os.sysconf("SC_PHYS_PAGES") * PAGE
MIB = 1024 * 1024


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_this_process_is_resident_and_below_the_limit() -> None:
    memory = Memory()
    resident = memory.resident()
    assert resident is not None
    assert memory.limit is not None
    assert 5 * MIB < resident < memory.limit <= RAM
    assert not memory.over_limit()


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{64 * MIB}\n"}, 64 * MIB),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": f"{32 * MIB}\n"}, 32 * MIB),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": f"{48 * MIB}\n",
            },
            48 * MIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/of/the/host\n",
                "sys/fs/cgroup/memory.max": f"{16 * MIB}\n",
            },
            16 * MIB,
        ),
        (
            {
                "proc/self/cgroup": "9:cpu,cpuacct:/x\n8:memory:/docker/abc\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{24 * MIB}\n",
            },
            24 * MIB,
        ),
        (
            {
                "proc/self/cgroup": "8:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            RAM,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, RAM),
        ({}, RAM),
    ],
    ids=["v2", "v2 group", "v2 parent", "v2 host path", "v1", "v1 unlimited", "v2 unlimited", "none"],
)
def test_the_limit_is_the_smallest_that_holds(tmp_path: Path, files: dict[str, str], limit: int) -> None:
    assert Memory(root=tree(tmp_path, files)).limit == limit


def test_workers_share_the_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{64 * MIB}\n"}
    assert Memory(sharers=4, root=tree(tmp_path, files)).limit == 16 * MIB


@pytest.mark.parametrize(("resident", "over"), [(89, False), (91, True)])
def test_nine_tenths_of_the_limit_are_the_limit(tmp_path: Path, resident: int, over: bool) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/statm": f"9999 {resident} 1 1 0 1 0\n",
        "sys/fs/cgroup/memory.max": f"{100 * PAGE}\n",
    }
    memory = Memory(root=tree(tmp_path, files))
    assert memory.resident() == resident * PAGE
    assert memory.over_limit() is over


def test_a_system_that_does_not_tell_is_never_over_the_limit(tmp_path: Path) -> None:
    memory = Memory(root=tmp_path)
    assert memory.resident() is None
    assert not memory.over_limit()


FAULTS = """
import resource, sys
from collections import deque
from inferbus.worker.memory import keep_freed
if sys.argv[1:]:
    assert keep_freed(64 * 2**20)
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def serve(times):
    for _ in range(times):
        waiting = [bytes(600_000) for _ in range(16)]
        for n in range(16):
            waiting[n] = None
serve(3)
before = pages()
serve(20)
print(pages() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_freed_memory_is_kept_and_not_faulted_in_again() -> None:
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, *how], capture_output=True, check=True).stdout)  # noqa: S603 - our own
        for how in ([], ["keep"])
    )
    assert kept < 1000 < given_back
