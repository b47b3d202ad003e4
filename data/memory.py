"""How much memory there is for image workers: the machine's, or what a control group still allows.

A container has a control group, and so has a SLURM job.
"""

import os

from engine.control_groups import TOP, folders, read_lines

from .workers import InputLost

# A worker's own memory: 30 to 60 MB of its interpreter that it does not share with the process it
# was forked from, and up to HELD decoded images (data/loader.py), of ImageNet's size 20 MB more.
WORKER_BYTES = 100_000_000


def available_bytes():
    """How many bytes this process may still use, and whose limit that is, in words.

    (None, "") where the system does not say. The processes of one node (torchrun's) share them
    equally.
    """
    limits = [(free, "on this machine") for free in [machine_bytes()] if free is not None]
    limits += [(free, "in this container or control group") for free in group_bytes()]
    free, whose = min(limits, default=(None, ""))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if free is not None and processes > 1:
        return max(0, free) // processes, f"{whose}, for each of {processes} processes"
    return (None if free is None else max(0, free)), whose


def machine_bytes(path="/proc/meminfo"):
    """What Linux takes for free, its page cache with it, which it can drop. None elsewhere."""
    for line in read_lines(path):
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def group_bytes(membership="/proc/self/cgroup", groups=TOP):
    """What each control group of this process that has a limit leaves, the innermost first.

    For both versions of control groups.
    """
    free = []
    for version, folder in folders("memory", membership, groups):
        if version == 2:
            names = "memory.max", "memory.current", ""
        else:
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        free += left_in_group(folder, *names)
    return free


def left_in_group(folder, limit, usage, prefix):
    """-> [bytes that a control group has left], its page cache too, or [] without a limit."""
    try:
        most, used = (int(read_lines(os.path.join(folder, name))[0]) for name in (limit, usage))
    # No such group, or its limit is "max".
    except (IndexError, ValueError):
        return []
    # How version 1 says that there is none.
    if most >= 2**60:
        return []
    cache = {f"{prefix}inactive_file", f"{prefix}active_file"}
    pairs = (line.split() for line in read_lines(os.path.join(folder, "memory.stat")))
    return [most - used + sum(int(value) for name, value in pairs if name in cache)]


def workers_that_fit(workers, batch_bytes, scratch_bytes=0):
    """As many image workers and batches as memory has room for.

    Where there is too little, first each worker gets one batch, not two, then there are fewer
    workers.

    Args:
        workers: how many are wanted.
        batch_bytes: of a batch in shared memory, where there is one more than are in flight, the
            one being trained on.
        scratch_bytes: what a worker needs beside it.

    Returns:
        How many workers, and how many batches in flight, two for each worker at best.

    Raises:
        InputLost: with the numbers, where not even one fits.
    """
    free, whose = available_bytes()

    def need(count, in_flight):
        return (in_flight + 1) * batch_bytes + count * (scratch_bytes + WORKER_BYTES)

    if free is None or need(workers, 2 * workers) <= free:
        return workers, 2 * workers
    for count in range(workers, 0, -1):
        for in_flight in range(2 * count, count - 1, -1):
            if need(count, in_flight) <= free:
                return count, in_flight
    raise InputLost(
        f"one image worker with one batch ahead of the step needs {need(1, 1) / 1e9:.2g} GB "
        f"(a batch is {batch_bytes / 1e9:.2g} GB), and {free / 1e9:.2g} GB are free {whose}; "
        "take a smaller batch_size or image_size, or allow more memory"
    )
