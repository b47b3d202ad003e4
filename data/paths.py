"""A million file names that forked workers share with their parent."""

import os
from collections.abc import Sequence

import numpy as np


class Paths(Sequence):
    """n paths of files, in two arrays: `paths[i]` is a str, made when it is asked for.

    A list of str would be copied by every worker that reads it: Python counts references inside
    each str, and a page that is written is no longer shared with the parent. Of ImageNet's
    1.28 million files that is 140 MB a worker; the arrays take 53 MB once.

    Args:
        folder: what all paths begin with.
        names: bytes, the rest of each path and a zero byte, one path after the other. They are what
            the system knows the files by, which need not be text.

    Attributes:
        names: the same, (bytes,) uint8.
        ends: (n,) int64, where in `names` the zero byte of each path is.
    """

    def __init__(self, folder, names):
        self.folder = folder
        self.names = np.frombuffer(names, np.uint8)
        self.ends = np.flatnonzero(self.names == 0)

    @classmethod
    def of(cls, paths):
        """From a list of str. SystemExit names one that holds a zero byte, which no file's can."""
        folder = os.path.dirname(os.path.commonprefix(paths))
        names = "".join(path[len(folder) :] + "\0" for path in paths)
        if names.count("\0") != len(paths):
            path = next(path for path in paths if "\0" in path)
            raise SystemExit(
                f"{path!r} holds a zero byte, so it is no file's name; remove it from "
                "the list that names it"
            )
        return cls(folder, os.fsencode(names))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        i = range(len(self))[i]  # counts from the end where i is negative
        start = self.ends[i - 1] + 1 if i else 0
        return self.folder + os.fsdecode(self.names[start : self.ends[i]].tobytes())

    def __iter__(self):
        for first in range(0, len(self), 1000):  # faster than one by one
            start = self.ends[first - 1] + 1 if first else 0
            stop = self.ends[min(first + 1000, len(self)) - 1]
            for name in os.fsdecode(self.names[start:stop].tobytes()).split("\0"):
                yield self.folder + name

    def select(self, rows):
        """The paths of rows (m,), in that order."""
        rows = np.asarray(rows, np.int64)
        names = self.names.tobytes()
        starts = self.starts()[rows].tolist()
        stops = (self.ends[rows] + 1).tolist()
        selected = [names[start:stop] for start, stop in zip(starts, stops)]
        return Paths(self.folder, b"".join(selected))

    def starts(self):
        """(n,) int64, where in `names` each path begins."""
        if not len(self):
            return self.ends
        return np.concatenate([[0], self.ends[:-1] + 1])

    def common_folder(self):
        """The innermost folder that holds all of them, as bytes."""
        starts = self.starts()
        same = 0  # so many first bytes
        shortest = (self.ends - starts).min(initial=len(self.names))
        while same < shortest and (self.names[starts + same] == self.names[same]).all():
            same += 1
        return os.path.dirname(os.fsencode(self.folder) + self.names[:same].tobytes())

    def names_below(self):
        """The paths without their common folder, as bytes, a zero byte between each two."""
        folder = self.common_folder()
        if folder == os.fsencode(self.folder):
            return self.names[:-1].tobytes()
        return b"\0".join(os.fsencode(path)[len(folder) :] for path in self)
