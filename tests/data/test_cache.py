"""The cache of decoded images: what it holds, and when it is built.

Nobody but the clock can tell it from the folder.
"""

import errno
import glob
import hashlib
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from data import cache
from data.cache import CachedSet
from data.datasets import load
from data.loader import Loader
from engine import checkpoint, config
from processes import group_environments, run

CPU = torch.device("cpu")
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def jpegs(tmp_path):
    """3 classes x 5 images for training, x 2 to test.

    They are 32 to 44 high, 54 to 42 wide, and one of each class is grey.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for c in "abc":
            os.makedirs(tmp_path / "jpegs" / part / c)
            for i in range(count):
                image = rng.integers(0, 255, (32 + 3 * i, 54 - 3 * i, 3), dtype=np.uint8)
                Image.fromarray(image[..., 0] if i == 1 else image).save(
                    tmp_path / "jpegs" / part / c / f"{i}.jpg"
                )
    return str(tmp_path / "jpegs")


@pytest.fixture
def builds(monkeypatch):
    """A list that grows by one with each build."""
    seen, write = [], cache.write
    monkeypatch.setattr(cache, "write", lambda *a: seen.append(a) or write(*a))
    return seen


def read(root, part="train", cache=24, **settings):
    return load(part, 0, name="folder", root=root, cache=cache, **settings)


def files(root, part="train", size=24):
    names = os.listdir(f"{root}/{part}.cache{size}")
    return sorted(os.path.splitext(name)[1] for name in names if not name.endswith(".lock"))


def same(a, b):
    pairs = zip(decoded(a), decoded(b))
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in pairs)


def decoded(data):
    return [np.asarray(data.decode(i)) for i in range(len(data))]


# -------------------------------------------------- what it holds


def test_pixels_are_those_of_pil_and_small_images_stay_as_they_are(jpegs):
    uncached, data = read(jpegs, "pretrain", None), read(jpegs, "pretrain", 38)
    assert isinstance(data, CachedSet)
    assert len(data) == 15
    assert not hasattr(data, "images")
    assert list(data.files) == list(uncached.files)
    assert torch.equal(data.labels, uncached.labels)
    assert (data.classes, data.mean, data.std) == (uncached.classes, uncached.mean, uncached.std)
    shrunk = 0
    for i in range(15):
        image, got = uncached.decode(i), data.decode(i)
        short, long = min(image.size), max(image.size)
        if short > 38:
            shrunk += 1
            other = 38 * long // short
            size = (38, other) if image.size[0] == short else (other, 38)
            image = image.resize(size, Image.Resampling.BILINEAR)
        assert got.mode == "RGB"
        assert got.size == image.size
        assert np.array_equal(np.asarray(got), np.asarray(image))
    assert shrunk == 6  # 41 x 45 and 44 x 42 in each class; 38 x 48 just not


@pytest.mark.parametrize("backend", ["batched", "pil"])
def test_views_of_images_that_were_not_shrunk_are_the_very_same(jpegs, backend):
    epochs = []
    for size, workers in ((None, 0), (64, 0), (64, 2), (24, 0)):
        data = read(jpegs, "pretrain", size)
        settings = dict(augment="moco_v2", image_size=24, augment_backend=backend, workers=workers)
        steps = Loader(data, 5, 2, 0, CPU, **settings).epoch(3)
        epochs.append(torch.stack([torch.stack(views) for views, _ in steps]))
    assert len(epochs[0]) == 3
    equal = [torch.equal(epochs[0], other) for other in epochs[1:]]
    assert equal == [True, True, False]  # at 24 the crops are of smaller images


def test_rows_and_limits_are_taken_of_one_whole_cache(jpegs, builds):
    uncached, data = read(jpegs, "pretrain", None), read(jpegs, "pretrain", 64)
    rows = torch.tensor([11, 2, 7])
    few, plain_few = data.select(rows), uncached.select(rows)
    assert same(few, plain_few)
    assert few.labels.tolist() == [2, 0, 1]
    assert list(few.files) == list(plain_few.files)
    for part in ("pretrain", "train"):
        assert same(read(jpegs, part, None, limit=6), read(jpegs, part, 64, limit=6))
    assert len(builds) == 1
    assert same(read(jpegs, "test", None), read(jpegs, "test", 64))
    assert len(builds) == 2
    assert read(os.path.join(jpegs, "train"), "test", 64) is None


def test_parts_that_share_a_folder_have_files_of_their_own(tmp_path, builds):
    """DTD, as most of torchvision's sets, lists the files of both parts from one folder."""
    dtd = tmp_path / "dtd" / "dtd"
    for split, grey in (("train", 10), ("test", 200)):
        names = [f"{texture}/{split}.jpg" for texture in ("banded", "woven")]
        os.makedirs(dtd / "labels", exist_ok=True)
        (dtd / "labels" / f"{split}1.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            os.makedirs((dtd / "images" / name).parent, exist_ok=True)
            Image.new("RGB", (40, 30), (grey,) * 3).save(dtd / "images" / name)
    for _ in range(2):
        for part, grey in (("train", 10), ("test", 200)):
            image = load(part, 0, name="dtd", root=str(tmp_path), cache=15).decode(1)
            assert image.size == (20, 15)
            assert image.getpixel((3, 3)) == (grey,) * 3
    assert len(builds) == 2
    assert files(dtd, "images", 15) == [".npy", ".npy", ".u8", ".u8"]


# -------------------------------------------------- when it is built


def other_size_and_the_old_time(path):
    time = os.stat(path).st_mtime_ns
    Image.new("RGB", (40, 40)).save(path)
    os.utime(path, ns=(time, time))


def test_a_changed_folder_is_cached_anew(jpegs, builds, capsys):
    path = os.path.join(jpegs, "train", "b", "3.jpg")
    added = os.path.join(jpegs, "train", "b", "9.jpg")
    before = read(jpegs)
    old = np.asarray(read(jpegs).decode(8))
    printed = capsys.readouterr().out
    assert printed.endswith("caching 15 images once\n")
    assert printed.count("\n") == 1
    assert len(builds) == 1
    changes = [
        lambda: Image.new("RGB", (41, 45), (200, 0, 0)).save(path),
        lambda: os.utime(path, ns=(1, 1)),
        lambda: other_size_and_the_old_time(path),
        lambda: os.remove(path),
        lambda: Image.new("RGB", (30, 60)).save(added),
        lambda: os.rename(added, path),
        lambda: os.rename(path, path[:-5] + "35.jpg"),
    ]
    for i, change in enumerate(changes):
        change()
        uncached, data = read(jpegs, cache=None), read(jpegs)
        printed = capsys.readouterr().out
        assert len(builds) == i + 2
        assert "caching" in printed
        assert "anew" in printed
        assert printed.count("\n") == 1
        assert len(data) == len(uncached)
        shrunk = uncached.decode(7).resize(data.decode(7).size, Image.Resampling.BILINEAR)
        assert np.array_equal(data.decode(7), shrunk)
        assert files(jpegs) == [".npy", ".u8"]  # the old one is gone ...
    assert np.array_equal(before.decode(8), old)  # ... but for who had it
    with pytest.raises(ValueError, match="cached them anew; start this one again"):
        pickle.loads(pickle.dumps(before)).decode(8)


@pytest.mark.parametrize("root", ["jpegs", "./jpegs/", "jpegs/train/a"])
def test_caches_of_earlier_versions_are_found(jpegs, monkeypatch, root):
    """Their names hold a hash, made as here, of a list of str."""
    monkeypatch.chdir(os.path.dirname(jpegs))
    files = list(load("train", 0, name="folder", root=root).files)
    folder = os.path.commonpath([os.path.abspath(os.path.dirname(file)) for file in files])
    h = hashlib.sha256()
    for file in files:
        status, name = os.stat(file), os.path.abspath(file)[len(folder) :]
        h.update(b"%s %d %d\n" % (os.fsencode(name), status.st_size, status.st_mtime_ns))
    path = load("train", 0, name="folder", root=root, cache=24).path
    assert path == f"{folder}.cache24/folder-train-{h.hexdigest()[:16]}.u8"


def leave_part_of_an_earlier_version(base):
    os.remove(base + ".npy")
    os.rename(base + ".u8", os.path.join(os.path.dirname(base), "folder-train.part"))


def test_a_build_that_was_killed_is_built_again(jpegs, builds):
    whole = read(jpegs)
    base = os.path.splitext(whole.path)[0]
    for damage in (
        lambda: os.remove(base + ".npy"),
        lambda: os.remove(base + ".u8"),
        lambda: os.truncate(base + ".u8", 1000),
        lambda: os.truncate(base + ".npy", 0),
        lambda: leave_part_of_an_earlier_version(base),
    ):
        damage()
        builds.clear()
        assert same(read(jpegs), whole)
        assert len(builds) == 1
        assert files(jpegs) == [".npy", ".u8"]


def test_a_build_that_fails_leaves_nothing(jpegs, monkeypatch):
    """What is wrong with an image is said in the words of a folder without cache."""
    broken = os.path.join(jpegs, "train", "b", "3.jpg")
    with open(broken, "wb") as f:
        f.write(b"not a picture")
    uncached = read(jpegs, "pretrain", None)
    with pytest.raises(SystemExit) as without:
        list(Loader(uncached, 15, 1, 0, CPU, augment="eval", image_size=24, workers=0).epoch(0))
    for workers in (1, 2):
        monkeypatch.setattr(cache, "default_workers", lambda workers=workers: workers)
        with pytest.raises(SystemExit) as error:
            read(jpegs, "pretrain")
        assert str(error.value) == str(without.value)
        assert broken in str(error.value)
        assert files(jpegs) == []


def test_a_disk_that_is_too_small_is_said(jpegs, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(
        cache.shutil, "disk_usage", lambda path: usage(30000 - os.path.getsize(path))
    )
    with pytest.raises(SystemExit) as refusal:
        read(jpegs, cache=32)
    assert (
        f"data.cache is 32: the 15 images take about 5.99e-05 GB in {jpegs}/train.cache32, "
        "3e-05 GB are free there; make room"
    ) in refusal.value.code
    assert files(jpegs, size=32) == []
    assert len(read(jpegs, "test", 32)) == 6
    os.makedirs(tmp_path / "many")
    for i in range(400):  # 76,800 bytes: no need to go on until there is no room
        Image.new("RGB", (8, 8)).save(tmp_path / "many" / f"{i:03d}.png")
    with open(tmp_path / "many" / "200.png", "wb") as f:
        f.write(b"not a picture")
    with pytest.raises(SystemExit, match="the 400 images take about 7.68e-05 GB"):
        read(str(tmp_path / "many"), "pretrain", 32)


@pytest.mark.parametrize("call", ["makedirs", "open"])
def test_a_place_that_cannot_be_written_is_named(jpegs, monkeypatch, call):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    module = os if call == "makedirs" else cache
    monkeypatch.setattr(module, call, refuse, raising=False)
    with pytest.raises(SystemExit) as refusal:
        read(jpegs)
    start = f"data.cache is 24, but {jpegs}/train.cache24 cannot be written (Permission denied);"
    assert refusal.value.code.startswith(start)
    assert "links to the folders of images" in refusal.value.code
    monkeypatch.undo()
    whole = read(jpegs)
    monkeypatch.setattr(cache, "build", refuse)  # one that is there wants no permission
    assert same(read(jpegs), whole)


def test_two_runs_that_start_at_once_build_once(jpegs, builds, capsys):
    fcntl = pytest.importorskip("fcntl")
    os.makedirs(os.path.join(jpegs, "train.cache24"))
    with open(os.path.join(jpegs, "train.cache24", "folder-train.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a first run is at it
        runs = [threading.Thread(target=read, args=(jpegs,)) for _ in range(2)]
        for thread in runs:
            thread.start()
        runs[0].join(0.3)
        assert all(thread.is_alive() for thread in runs)
        assert not builds
    # It was killed: one of the waiting builds, the other finds it built.
    for thread in runs:
        thread.join(30)
    assert len(builds) == 1
    assert files(jpegs) == [".npy", ".u8"]
    assert "another run is writing it; waiting" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_building_leaves_the_random_state_alone(jpegs, monkeypatch, workers):
    monkeypatch.setattr(cache, "default_workers", lambda: workers)
    state = torch.get_rng_state()
    assert same(read(jpegs, cache=None), read(jpegs, cache=64))
    assert torch.equal(state, torch.get_rng_state())


TWO_NODES = """
import pickle

import numpy as np
import torch

from data import cache
from data.datasets import load
from engine import distributed

distributed.init_distributed()
rank = distributed.rank()
calls = []
plain_write = cache.write
plain_hash_files = cache.hash_files

def write(*args):
    calls.append("write")
    return plain_write(*args)

def hash_files(*args):
    calls.append("hash")
    return plain_hash_files(*args)

cache.write = write
cache.hash_files = hash_files

def decode(data, count):
    return [torch.from_numpy(np.array(data.decode(i))) for i in range(count)]

def calls_and_images(root):
    calls.clear()
    data = load("train", 0, name="folder", root=root, cache=24)
    return list(calls), decode(data, 15)

shared = calls_and_images("jpegs")
of_this_node = calls_and_images(f"own{rank}")
# From here on, both processes are of one node.
distributed.node_firsts = [0, 0]
on_one_node = calls_and_images("jpegs")
with open("test.pkl", "rb") as f:
    unpickled = decode(pickle.load(f), 2)
torch.save((shared, of_this_node, on_one_node, unpickled), f"saw{rank}.pt")
distributed.cleanup()
"""


def run_on_two_nodes(folder):
    """-> what each of two processes printed, of which each is alone on its node."""
    started = []
    for rank, environment in enumerate(group_environments(2)):
        environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
        process = subprocess.Popen(
            [sys.executable, "job.py"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": ROOT, "CUDA_VISIBLE_DEVICES": "", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    return printed


@pytest.mark.slow
def test_two_processes_build_once_and_read_the_same(jpegs, tmp_path):
    """As two nodes that share a folder; and as two with a copy each, of which each builds its own.

    Then as two processes of one node, of which one looks at the files. A set that comes pickled, as
    to a worker that was not forked, opens a map of its own.
    """
    read(jpegs)
    changed = os.path.join(jpegs, "train", "b", "3.jpg")
    Image.new("RGB", (41, 45), (200, 0, 0)).save(changed)
    test = read(jpegs, "test").select(torch.tensor([4, 1]))
    assert len(pickled := pickle.dumps(test)) < 3000  # no pixels
    (tmp_path / "test.pkl").write_bytes(pickled)
    for node in (0, 1):
        shutil.copytree(os.path.join(jpegs, "train"), tmp_path / f"own{node}")
    (tmp_path / "job.py").write_text(TWO_NODES)
    printed = run_on_two_nodes(tmp_path)
    assert "caching 15 images anew" in printed[0]
    assert "jpegs/train" not in printed[1]
    assert "own0.cache24: caching 15" in printed[0]
    assert "own1.cache24: caching 15" in printed[1]
    saw = [torch.load(tmp_path / f"saw{rank}.pt") for rank in (0, 1)]
    assert [did for (did, _), *_ in saw] == [["hash", "write"], ["hash"]]
    assert [did for _, (did, _), *_ in saw] == [["hash", "write"]] * 2
    assert [did for _, _, (did, _), _ in saw] == [["hash"], []]
    uncached = read(jpegs)
    for *sets, few in saw:
        for _, images in sets:
            assert all(np.array_equal(x, uncached.decode(i)) for i, x in enumerate(images))
        assert all(np.array_equal(x, test.decode(i)) for i, x in enumerate(few))
    assert (np.asarray(uncached.decode(8)).mean((0, 1)) - [200, 0, 0]).max() < 3


# -------------------------------------------------- a build that ends early


@pytest.fixture
def stops(monkeypatch):
    """stops(count, error): the build fails after `count` jobs of 8 images, each of them recorded.

    stops(None) lets it go on, and -> the rows that were decoded since the last call.
    """
    decoded, limit = [], {"count": None}
    monkeypatch.setattr(cache, "default_workers", lambda: 0)
    monkeypatch.setattr(cache, "RECORD_SECONDS", 0)
    original = cache.Shrunk.__call__

    def call(self, rows):
        if limit["count"] is not None and len(decoded) == limit["count"]:
            limit["error"]()
        decoded.append(rows)
        return original(self, rows)

    def stop_after(count, error=None):
        before = sum(decoded, [])
        decoded.clear()
        limit.update(count=count, error=error)
        return before

    monkeypatch.setattr(cache.Shrunk, "__call__", call)
    return stop_after


def interrupt():
    raise KeyboardInterrupt


def contents(root, part="train"):
    """{name: bytes} of the files of a part's caches."""
    folder = pathlib.Path(f"{root}/{part}.cache24")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".lock"}


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("end", [interrupt, kill_self])
def test_a_build_goes_on_where_it_was_and_makes_the_same_bytes(jpegs, stops, capsys, end):
    read(jpegs)
    uninterrupted = contents(jpegs)
    shutil.rmtree(f"{jpegs}/train.cache24")
    stops(1, end)
    child = multiprocessing.get_context("fork").Process(target=read, args=(jpegs,))
    child.start()
    child.join()
    assert child.exitcode == (-signal.SIGKILL if end is kill_self else 1)
    assert files(jpegs) == [".part", ".u8"]
    with open(glob.glob(f"{jpegs}/train.cache24/*.u8")[0], "ab") as f:
        f.write(b"pixels that no row of the index knows")
    capsys.readouterr()
    stops(None)
    read(jpegs)
    assert stops(None) == list(range(8, 15))
    assert contents(jpegs) == uninterrupted
    assert "caching 15 images, going on after 8\n" in capsys.readouterr().out


def leave_half(root, stops):
    """Of the 15 images of a training part, 8 are in its cache."""
    shutil.rmtree(f"{root}/train.cache24")
    stops(1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(root)


def save_index(path, index):
    with open(path, "wb") as f:
        np.save(f, index)


def test_what_is_left_of_a_build_is_taken_only_where_it_fits(jpegs, stops):
    read(jpegs)
    uninterrupted = contents(jpegs)
    base = glob.glob(f"{jpegs}/train.cache24/*.u8")[0][:-3]

    for damage in (
        lambda: os.truncate(base + ".part", 200),
        lambda: os.truncate(base + ".u8", 1000),
        lambda: os.remove(base + ".u8"),
        lambda: save_index(base + ".part", np.zeros((3, 3), np.int64)),
    ):
        leave_half(jpegs, stops)
        damage()
        stops(None)
        read(jpegs)
        assert stops(None) == list(range(15))
        assert contents(jpegs) == uninterrupted
    leave_half(jpegs, stops)
    os.utime(f"{jpegs}/train/c/1.jpg", ns=(1, 1))
    stops(None)
    read(jpegs)
    assert stops(None) == list(range(15))
    assert files(jpegs) == [".npy", ".u8"]


def test_what_skip_left_out_stops_a_build_that_goes_on_without(jpegs, stops):
    broken = f"{jpegs}/train/a/3.jpg"
    with open(broken, "wb") as f:
        f.write(b"not a picture")
    stops(1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(jpegs, on_error="skip")
    stops(None)
    with pytest.raises(SystemExit, match="a/3.jpg cannot be read as an image .cannot identify"):
        read(jpegs)
    assert stops(None) == list(range(3, 11))


def test_the_old_cache_stays_until_the_new_one_is_whole(jpegs, stops):
    old = read(jpegs)
    before = contents(jpegs)
    os.utime(f"{jpegs}/train/c/1.jpg", ns=(1, 1))
    stops(1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(jpegs)
    assert before.items() < contents(jpegs).items()
    assert len(contents(jpegs)) == 4
    stops(None)
    assert same(read(jpegs), old)
    assert len(contents(jpegs)) == 2
    assert not set(contents(jpegs)) & set(before)


@pytest.mark.parametrize("full_at", [1, 3, 4, 6])
def test_a_disk_that_becomes_full_keeps_nothing_half_made(jpegs, stops, monkeypatch, full_at):
    """At the first sync the index is made; the last ones are those of the last rows."""
    old = read(jpegs)
    os.utime(f"{jpegs}/train/c/1.jpg", ns=(1, 1))
    calls, original = [], cache.sync

    def sync(file):
        calls.append(file)
        if len(calls) == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file)

    monkeypatch.setattr(cache, "sync", sync)
    with pytest.raises(SystemExit) as refusal:
        read(jpegs)
    if full_at > 2:
        done = {3: 8, 4: 8, 6: 15}[full_at]
        assert f"full after {done} of 15 images, and what was made" in refusal.value.code
        assert "is removed; make room, lower data.cache or leave it out; or remove " in str(
            refusal.value
        )
        assert old.path in refusal.value.code
    else:
        assert "cannot be written (No space left on device)" in refusal.value.code
    assert files(jpegs) == [".npy", ".u8"]
    assert old.decode(3).size


def test_a_disk_too_small_for_old_and_new_names_the_old(jpegs, stops, monkeypatch):
    old = read(jpegs)
    os.utime(f"{jpegs}/train/c/1.jpg", ns=(1, 1))
    stops(None)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(20000))
    with pytest.raises(SystemExit, match="2e-05 GB are free there; make room, .*; or remove .*u8,"):
        read(jpegs)
    assert stops(None) == []
    assert os.path.exists(old.path)
    assert len(contents(jpegs)) == 2


def test_a_disk_that_others_fill_meanwhile_keeps_nothing_half_made(jpegs, stops, monkeypatch):
    usage = namedtuple("usage", "free")
    calls = []
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(10**6 if not calls else 100))
    original = cache.UnfinishedCache.record
    monkeypatch.setattr(cache.UnfinishedCache, "record", lambda self: calls.append(original(self)))
    with pytest.raises(SystemExit, match="free there, those of 8 images that were made and are re"):
        read(jpegs)
    assert files(jpegs) == []


def test_a_truncated_image_ends_two_processes_with_one_sentence(jpegs, tmp_path):
    broken = f"{jpegs}/train/b/3.jpg"
    os.truncate(broken, os.path.getsize(broken) // 2)
    (tmp_path / "job.py").write_text(
        textwrap.dedent(f"""
        from data.datasets import load
        from engine import distributed
        distributed.init_distributed()
        load("pretrain", 0, name="folder", root={jpegs!r}, cache=24)
    """)
    )
    done = run(tmp_path, tmp_path / "job.py", processes=2, check=False)
    assert done.returncode == 1
    printed = done.stderr + (tmp_path / "said1.err").read_text()
    assert printed.count("\n") == 1
    assert printed.startswith(f"{broken} cannot be read as an image (")


# -------------------------------------------------- where it lies


def test_the_cache_of_a_single_class_lies_beside_its_part(jpegs, builds):
    for name in "bc":
        os.rename(f"{jpegs}/train/{name}", f"{jpegs}/{name}")
    assert read(jpegs).labels is None
    assert os.listdir(f"{jpegs}/train") == ["a"]
    # Earlier versions had it beside the class folder.
    os.rename(f"{jpegs}/train.cache24", f"{jpegs}/train/a.cache24")
    assert read(jpegs).path.startswith(f"{jpegs}/train/a.cache24/")
    assert len(builds) == 1
    os.rename(f"{jpegs}/b", f"{jpegs}/train/b")
    data = read(jpegs)
    assert data.classes == ["a", "b"]
    assert data.path.startswith(f"{jpegs}/train.cache24/")
    os.mkdir(f"{jpegs}/train/d.cache24")  # there is no class d
    with pytest.raises(SystemExit, match="d.cache24 holds no images"):
        read(jpegs)


# -------------------------------------------------- large photographs


def photograph(width, height, seed=0):
    """Noise of all sizes, as photographs have it."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for side in (8, 32, 128):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += (np.asarray(noise.resize((width, height), 3), float) - 128) / 3
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_large_photographs_are_reduced_by_the_jpeg_decoder(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    os.makedirs(folder / "small")
    for i, (width, height) in enumerate([(403, 301), (97, 211), (193, 131)]):
        photograph(width, height, i).save(folder / f"{i}.jpg", quality=95)
    photograph(403, 301).save(folder / "3.png")
    photograph(403, 301).convert("L").save(folder / "4.jpg", quality=95)
    photograph(90, 80).save(folder / "small" / "0.jpg")
    uncached = load("pretrain", 0, name="folder", root=str(folder))
    reduced = load("pretrain", 0, name="folder", root=str(folder), cache=24)
    state = cache.hash_files(uncached.files, skip=False)
    assert state not in reduced.path
    differences = []
    for i in range(len(uncached)):
        image = uncached.decode(i)
        size = (24 * image.width // min(image.size), 24 * image.height // min(image.size))
        wanted = np.asarray(image.resize(size, Image.Resampling.BILINEAR), float)
        assert reduced.decode(i).size == size
        differences.append(np.abs(np.asarray(reduced.decode(i)) - wanted).mean())
    # 0, 1 and 2 and the grey one are JPEGs of four times 24 pixels and more.
    assert all(0 < difference < 1.5 for difference in np.array(differences)[[0, 1, 2, 4]])
    assert differences[3] == differences[5] == 0
    # Without a photograph, and where an earlier version's cache is found, the state is the old one.
    small = load("pretrain", 0, name="folder", root=str(folder / "small"), cache=24)
    assert cache.hash_files(small.files, skip=False) in small.path
    base = os.path.join(os.path.dirname(reduced.path), f"folder-train-{state}")
    for ending in (".u8", ".npy"):
        os.rename(os.path.splitext(reduced.path)[0] + ending, base + ending)
    monkeypatch.setattr(cache, "build", None)
    assert load("pretrain", 0, name="folder", root=str(folder), cache=24).path == base + ".u8"


# -------------------------------------------------- the key


def test_what_makes_no_sense_is_refused(jpegs):
    with pytest.raises(SystemExit, match="data.cache is 256, but shapes is in memory already"):
        load("pretrain", 0, name="shapes", limit=12, cache=256)
    # Of a probe that goes elsewhere, by linear.data:
    assert len(load("train", 0, name="shapes", limit=12, cache=256)) == 12
    with pytest.raises(SystemExit, match="data.cache is 7; it must be at least 8"):
        load("pretrain", 0, name="folder", root=jpegs, cache=7)
    assert not glob.glob(jpegs + "/*.cache*")


def test_a_run_goes_on_with_its_own_cache_only():
    file = os.path.join(ROOT, "yaml", "quickstart.yaml")
    plain, other = config.load(file, ()), config.load(file, ("data.cache=128",))
    assert plain["data"]["cache"] is None
    difference = config.difference(plain, other, checkpoint.MAY_CHANGE)
    assert difference == "data.cache was None and is now 128"
    del plain["data"]["cache"]  # of a version that had no such key
    other["data"]["cache"] = None
    assert config.difference(plain, other, checkpoint.MAY_CHANGE) is None
