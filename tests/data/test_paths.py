"""Paths: what a list of str would give, in two arrays."""

import gc
import hashlib
import os
import pickle

import numpy as np
import pytest
import torch

from data.image_files import FolderSet
from data.paths import Paths

NAMES = [
    "b/2.jpg",
    "b/10.jpg",
    "a line\n.png",
    "café/ü.png",
    os.fsdecode(b"caf\xe9/x.png"),
    "b/2.jpg",
]
LISTS = {
    "one folder": [f"/data/set/train/{name}" for name in NAMES],
    "nothing in common": NAMES,
    "relative": [f"./{name}" for name in NAMES],
    "one": ["/data/one.jpg"],
    "all the same": ["/data/one.jpg"] * 3,
    "a name that begins another": ["/data/a", "/data/a/b", "/data/ab"],
    "the root": ["/a.jpg", "/b.jpg"],
    "cut within a letter": ["/data/é/a.jpg", "/data/è/b.jpg"],
    "two separators": ["data//a.jpg", "data//b.jpg"],
}


def fingerprint_of(files):
    """As a list of str had it: checkpoints hold it."""
    folder = len(os.path.dirname(os.path.commonprefix(files)))
    names = "\0".join(file[folder:] for file in files)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]


@pytest.mark.parametrize("name", LISTS)
def test_paths_are_the_list_they_come_from(name):
    files = LISTS[name]
    paths = Paths.of(files)
    assert list(paths) == files
    assert len(paths) == len(files)
    assert paths[-1] == files[-1]
    assert paths[np.int64(0)] == paths[torch.tensor(0)] == files[0]
    assert files[-1] in paths
    assert paths.index(files[-1]) == files.index(files[-1])
    assert list(pickle.loads(pickle.dumps(paths))) == files
    with pytest.raises(IndexError):
        paths[len(files)]
    folder = os.path.dirname(os.path.commonprefix(files))
    assert paths.common_folder() == os.fsencode(folder)
    assert FolderSet(files, None, None, None, None).fingerprint() == fingerprint_of(files)


def test_many_paths_are_iterated_in_parts():
    for n in (0, 1, 999, 1000, 1001, 2500):
        files = [f"x/{i}.jpg" for i in range(n)]
        paths = Paths.of(files)
        assert list(paths) == [paths[i] for i in range(n)] == files


@pytest.mark.parametrize("rows", [[], [3], [-1, 0], [4, 4, 1, 0, 2]])
def test_rows_are_taken_in_their_order(rows):
    files = LISTS["one folder"]
    expected = [files[row] for row in rows]
    for given in (rows, np.array(rows, int), torch.tensor(rows, dtype=torch.int64)):
        some = Paths.of(files).select(given)
        assert list(some) == expected
        assert len(some) == len(rows)
        assert some.select(range(len(rows))).names_below() == some.names_below()
    assert FolderSet(some, None, None, None, None).fingerprint() == fingerprint_of(expected)


def test_no_python_object_is_kept_for_each_path():
    """Forked workers copy the pages of those that they look at."""
    files = [f"/data/{i % 7}/{i}.jpg" for i in range(20000)]
    paths = Paths.of(files)
    objects = [value for value in vars(paths).values()]
    assert len(objects) == 3
    assert sum(isinstance(value, np.ndarray) for value in objects) == 2
    assert all(value.dtype != object for value in objects if isinstance(value, np.ndarray))
    gc.collect()
    before = len(gc.get_objects())
    kept = [Paths.of(files[:n]) for n in (10, 20000)]
    assert len(gc.get_objects()) - before < 20
    assert len(kept[1]) == 20000
    assert len(pickle.dumps(paths)) < 20 * 20000 + 8 * 20000 + 1000


def test_a_zero_byte_is_refused():
    with pytest.raises(SystemExit, match=r"'a\\x00b.jpg' holds a zero byte"):
        Paths.of(["a.jpg", "a\0b.jpg"])
