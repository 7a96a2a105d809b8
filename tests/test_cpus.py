"""CPUs counted from made-up `/proc` and `/sys` trees."""

import os
from pathlib import Path

import pytest

from inferbus.models.cpus import available_cpus


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_cgroups_the_affinity_mask_counts(tmp_path: Path) -> None:
    assert available_cpus(6, tmp_path) == 6


def test_a_v2_quota_of_the_container_counts(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"})
    assert available_cpus(16, tmp_path) == 2


def test_no_quota_leaves_the_affinity_mask(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert available_cpus(16, tmp_path) == 16


def test_the_tightest_quota_on_the_way_down_counts(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pods/one\n",
            "sys/fs/cgroup/pods/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/pods/one/cpu.max": "max 100000\n",
        },
    )
    assert available_cpus(16, tmp_path) == 3


def test_a_quota_larger_than_the_affinity_mask_gives_no_cpus(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "800000 100000\n"})
    assert available_cpus(4, tmp_path) == 4


@pytest.mark.parametrize(("quota", "cpus"), [("50000", 1), ("150000", 1), ("250000", 2)])
def test_a_fraction_is_rounded_down_but_never_to_none(tmp_path: Path, quota: str, cpus: int) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert available_cpus(16, tmp_path) == cpus


def test_a_v1_quota_counts_and_minus_one_is_none(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "7:memory:/x\n4:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "500000\n",
            "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
        },
    )
    assert available_cpus(16, tmp_path) == 5


def test_a_path_of_the_host_falls_back_to_the_mounted_root(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"proc/self/cgroup": "0::/../../host/only\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
    )
    assert available_cpus(16, tmp_path) == 2


def test_this_process_has_at_least_one_and_at_most_its_mask() -> None:
    assert 1 <= available_cpus() <= len(os.sched_getaffinity(0))
