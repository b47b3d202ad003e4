"""The control groups of this process, by which Linux limits a container or a SLURM job."""

import os

TOP = "/sys/fs/cgroup"


def folders(controller, membership="/proc/self/cgroup", top=TOP):
    """Where the limits of one controller are written.

    A group's own group limits it as well. In a container the names of the outer groups are often
    not there to be read: what is mounted at the top is the container's own group then, which the
    walk reaches at its end.

    Args:
        controller: `memory` or `cpu`.
        membership: the file that names the groups of this process.
        top: where the groups are mounted.

    Returns:
        A list of pairs (1 or 2, folder), innermost group first. The number is the version of
        control groups that the folder is of; the two name their files differently.
    """
    found = []
    for line in read_lines(membership):
        controllers, path = line.split(":", 2)[1:]
        if controllers == "":
            version, root = 2, top
        elif controller in controllers.split(","):
            version, root = 1, os.path.join(top, controller)
        else:
            continue
        path = path.strip("/")
        while path:
            found.append((version, os.path.join(root, path)))
            path = os.path.dirname(path)
        found.append((version, root))
    return found


def read_lines(path):
    """The lines of a small file of the system's; none where it is not there."""
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []
