"""How many processor cores this process may use, and torch's threads for so many.

torch takes the processor's cores for its own, however few of them a container is allowed. A
container with two cores of a large machine then runs its many threads in turns, and crawls.
"""

import math
import os

import torch

from .control_groups import TOP, folders, read_lines


def usable_cores():
    """Cores that this process may use.

    They are those of its affinity mask (taskset, SLURM, docker --cpuset-cpus), and no more than
    the quota of its control groups gives time for (docker --cpus, Kubernetes' limits).
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    # With 2.5 cores three threads would wait for the slowest of them.
    return max(1, math.floor(min([cores, *cpu_quotas()])))


def cores_per_process():
    """The share of this process, where torchrun started several on this machine."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def cpu_quotas(membership="/proc/self/cgroup", top=TOP):
    """The cores that each limited control group of this process gives time for, e.g. [2.5]."""
    quotas = []
    for version, folder in folders("cpu", membership, top):
        if version == 2:  # "250000 100000", or "max 100000"
            words = " ".join(read_lines(os.path.join(folder, "cpu.max"))).split()
        else:
            names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
            words = [line for name in names for line in read_lines(os.path.join(folder, name))]
        # No such group, or no limit: "max", and -1 in version 1.
        if len(words) == 2 and words[0].isdigit():
            quotas.append(int(words[0]) / int(words[1]))
    return quotas


def limit_threads():
    """Let torch compute with no more threads than this process has cores.

    OMP_NUM_THREADS counts where it is set; torchrun sets it to 1 for several processes.
    """
    cores = cores_per_process()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def busy_cores(path="/proc/loadavg"):
    """A sentence that other programs keep the cores busy, or None.

    torch's threads wait for one another many times in a step, and each time for the one that got no
    core. With two busy programs on two cores an epoch took 119 s instead of 1.8, and 13 s with one
    thread (alone: 2.5 s). It is oneDNN's own barrier, in the gradient of bf16 convolutions, that
    keeps a core busy meanwhile: OMP_WAIT_POLICY and GOMP_SPINCOUNT change little.
    """
    cores = os.cpu_count()
    words = " ".join(read_lines(path)).replace("/", " ").split()  # 2.95 4.02 4.67 3/184 5120
    # A container with a quota sees the load of the whole machine, which is not its own.
    if "OMP_NUM_THREADS" in os.environ or not words or usable_cores() < cores:
        return None
    # The mean of a minute may be that of a program which has just ended. This process runs, too.
    if min(float(words[0]), int(words[3]) - 1) < cores:
        return None
    return (
        f"other programs keep all {cores} cores of this machine busy, and threads that wait for "
        "one another make this many times as slow; put "
        f"OMP_NUM_THREADS={max(1, cores // 2)} before the command, or wait for them to end"
    )
