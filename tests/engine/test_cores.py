"""Cores that a process may use: by its affinity mask and by the quotas of its control groups."""

import os

import pytest
import torch

from data.loader import default_workers
from engine import control_groups, cores

LINUX = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="affinity masks are Linux's"
)


def write(folder, **files):
    os.makedirs(folder, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def quotas(tmp_path, membership):
    file = tmp_path / "membership"
    file.write_text(membership)
    return cores.cpu_quotas(str(file), str(tmp_path / "groups"))


def test_the_quotas_of_version_2_outer_groups_among_them(tmp_path):
    groups = tmp_path / "groups"
    write(groups / "job" / "task", cpu__max="max 100000\n")
    write(groups / "job", cpu__max="250000 100000\n")
    assert quotas(tmp_path, "0::/job/task\n") == [2.5]
    write(groups / "job" / "task", cpu__max="50000 50000\n")
    assert quotas(tmp_path, "0::/job/task\n") == [1.0, 2.5]


def test_the_quotas_of_version_1(tmp_path):
    groups = tmp_path / "groups" / "cpu"
    write(groups / "job", cpu__cfs_quota_us="400000\n", cpu__cfs_period_us="100000\n")
    write(groups, cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert quotas(tmp_path, "5:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/\n0::/\n") == [4.0]


def test_a_container_that_cannot_see_the_name_of_its_group(tmp_path):
    write(tmp_path / "groups", cpu__max="200000 100000\n")
    assert quotas(tmp_path, "0::/docker/a1b2\n") == [2.0]


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cores.cpu_quotas(str(tmp_path / "none"), str(tmp_path)) == []
    write(tmp_path / "groups", cpu__max="damaged\n")
    assert quotas(tmp_path, "0::/\n") == []


def test_a_folder_is_walked_to_the_top(tmp_path):
    (tmp_path / "membership").write_text("3:cpu:/\n0::/a/b\n")
    assert control_groups.folders("cpu", str(tmp_path / "membership"), "/top") == [
        (1, "/top/cpu"),
        (2, "/top/a/b"),
        (2, "/top/a"),
        (2, "/top"),
    ]


@LINUX
@pytest.mark.parametrize(
    "mask, limits, processes, expected",
    [
        (64, [], 1, 64),
        (64, [2.0], 1, 2),
        (64, [8.0, 3.5], 1, 3),
        (64, [0.5], 1, 1),
        (4, [16.0], 1, 4),
        (64, [16.0], 4, 4),
        (2, [], 8, 1),
    ],
)
def test_the_smallest_limit_counts_and_processes_share_it(
    mask, limits, processes, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(mask)))
    monkeypatch.setattr(cores, "cpu_quotas", lambda: limits)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert cores.cores_per_process() == expected
    assert default_workers() == min(8, expected)


@pytest.mark.parametrize(
    "given, cores_there, expected", [(None, 3, 3), (None, 64, 8), ("8", 3, 8), (None, 8, 8)]
)
def test_torch_gets_no_more_threads_than_cores(given, cores_there, expected, monkeypatch):
    """8 are torch's own choice: it never gets more than these."""
    threads = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(cores, "cores_per_process", lambda: cores_there)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    cores.limit_threads()
    assert threads[-1] == expected


@pytest.mark.parametrize(
    "load, given, usable, is_said",
    [
        ("4.20 3.10 2.90 6/180 4711", None, 4, True),
        ("4.20 3.10 2.90 1/180 4711", None, 4, False),  # the programs have ended
        ("1.20 3.10 2.90 6/180 4711", None, 4, False),  # they have just begun
        ("4.20 3.10 2.90 6/180 4711", "2", 4, False),  # the user has chosen
        ("4.20 3.10 2.90 6/180 4711", None, 2, False),  # a container on a busy machine
        ("", None, 4, False),
    ],
)
def test_busy_cores_are_said(load, given, usable, is_said, tmp_path, monkeypatch):
    (tmp_path / "loadavg").write_text(load)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(cores, "usable_cores", lambda: usable)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    sentence = cores.busy_cores(str(tmp_path / "loadavg"))
    assert (sentence is not None) == is_said
    assert not is_said or "put OMP_NUM_THREADS=2 before the command" in sentence
