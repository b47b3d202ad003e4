"""The cache of decoded images: what it holds, when it is built, and that nobody but the clock can tell it from the folder."""

import errno
import glob
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
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
from processes import run

CPU = torch.device("cpu")
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def jpegs(tmp_path):
    """3 classes x 5 images for training, x 2 to test: 32 to 44 high, 54 to 42 wide, one of each class grey."""
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


def files(root, part="train", size=24):
    return sorted(
        os.path.splitext(f)[1]
        for f in os.listdir(f"{root}/{part}.cache{size}")
        if not f.endswith(".lock")
    )


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(np.asarray(a.decode(i)), np.asarray(b.decode(i))) for i in range(len(a))
    )


# ---------------------------------------------------------------------------------------------------- what it holds


def test_pixels_are_those_of_pil_and_small_images_stay_as_they_are(jpegs):
    plain, data = (load("pretrain", 0, name="folder", root=jpegs, cache=c) for c in (None, 38))
    assert isinstance(data, CachedSet) and len(data) == 15 and not hasattr(data, "images")
    assert list(data.files) == list(plain.files) and torch.equal(data.labels, plain.labels)
    assert (data.classes, data.mean, data.std) == (plain.classes, plain.mean, plain.std)
    shrunk = 0
    for i in range(15):
        image, got = plain.decode(i), data.decode(i)
        short, long = min(image.size), max(image.size)
        if short > 38:
            shrunk += 1
            other = 38 * long // short
            image = image.resize(
                (38, other) if image.size[0] == short else (other, 38), Image.Resampling.BILINEAR
            )
        assert (
            got.mode == "RGB"
            and got.size == image.size
            and np.array_equal(np.asarray(got), np.asarray(image))
        )
    assert shrunk == 6  # 41 x 45 and 44 x 42 in each class; 38 x 48 just not


@pytest.mark.parametrize("backend", ["batched", "pil"])
def test_views_of_images_that_were_not_shrunk_are_the_very_same(jpegs, backend):
    views = [
        [
            x
            for x, _ in Loader(
                load("pretrain", 0, name="folder", root=jpegs, cache=c),
                5,
                2,
                0,
                CPU,
                augment="moco_v2",
                image_size=24,
                augment_backend=backend,
                workers=w,
            ).epoch(3)
        ]
        for c, w in ((None, 0), (64, 0), (64, 2), (24, 0))
    ]
    equal = [
        all(torch.equal(a, b) for step in zip(views[0], other) for a, b in zip(*step))
        for other in views[1:]
    ]
    assert len(views[0]) == 3 and equal == [
        True,
        True,
        False,
    ]  # at 24 the crops are of smaller images


def test_rows_and_limits_are_taken_of_one_whole_cache(jpegs, builds):
    plain, data = (load("pretrain", 0, name="folder", root=jpegs, cache=c) for c in (None, 64))
    rows = torch.tensor([11, 2, 7])
    few, plain_few = data.select(rows), plain.select(rows)
    assert same(few, plain_few) and few.labels.tolist() == [2, 0, 1]
    assert list(few.files) == list(plain_few.files)
    for part in ("pretrain", "train"):
        assert same(
            *(load(part, 1, name="folder", root=jpegs, limit=6, cache=c) for c in (None, 64))
        )
    assert len(builds) == 1
    assert (
        same(*(load("test", 0, name="folder", root=jpegs, cache=c) for c in (None, 64)))
        and len(builds) == 2
    )
    assert load("test", 0, name="folder", root=os.path.join(jpegs, "train"), cache=64) is None


def test_parts_that_share_a_folder_have_files_of_their_own(tmp_path, builds):
    """DTD, as most of torchvision's sets, lists the files of both parts from one folder."""
    for split, grey in (("train", 10), ("test", 200)):
        os.makedirs(tmp_path / "dtd" / "dtd" / "labels", exist_ok=True)
        with open(tmp_path / "dtd" / "dtd" / "labels" / f"{split}1.txt", "w") as f:
            for texture in ("banded", "woven"):
                os.makedirs(tmp_path / "dtd" / "dtd" / "images" / texture, exist_ok=True)
                Image.new("RGB", (40, 30), (grey,) * 3).save(
                    tmp_path / "dtd" / "dtd" / "images" / texture / f"{split}.jpg"
                )
                f.write(f"{texture}/{split}.jpg\n")
    for _ in range(2):
        for part, grey in (("train", 10), ("test", 200)):
            image = load(part, 0, name="dtd", root=str(tmp_path), cache=15).decode(1)
            assert image.size == (20, 15) and image.getpixel((3, 3)) == (grey,) * 3
    assert len(builds) == 2 and files(tmp_path / "dtd" / "dtd", "images", 15) == [
        ".npy",
        ".npy",
        ".u8",
        ".u8",
    ]


# ---------------------------------------------------------------------------------------------------- when it is built


def test_a_changed_folder_is_cached_anew(jpegs, builds, capsys):
    read = lambda: load("train", 0, name="folder", root=jpegs, cache=24)
    path = os.path.join(jpegs, "train", "b", "3.jpg")
    before, old = read(), np.asarray(read().decode(8))
    assert (
        len(builds) == 1
        and (said := capsys.readouterr().out).endswith("caching 15 images once\n")
        and said.count("\n") == 1
    )
    added = os.path.join(jpegs, "train", "b", "9.jpg")

    def other_size():  # and the old time
        time = os.stat(path).st_mtime_ns
        Image.new("RGB", (40, 40)).save(path)
        os.utime(path, ns=(time, time))

    changes = [
        lambda: Image.new("RGB", (41, 45), (200, 0, 0)).save(path),
        lambda: os.utime(path, ns=(1, 1)),
        other_size,
        lambda: os.remove(path),
        lambda: Image.new("RGB", (30, 60)).save(added),
        lambda: os.rename(added, path),
        lambda: os.rename(path, path[:-5] + "35.jpg"),
    ]
    for i, change in enumerate(changes):
        change()
        plain, data = load("train", 0, name="folder", root=jpegs), read()
        assert (
            len(builds) == i + 2
            and "caching" in (said := capsys.readouterr().out)
            and "anew" in said
            and said.count("\n") == 1
        )
        assert len(data) == len(plain) and np.array_equal(
            data.decode(7), plain.decode(7).resize(data.decode(7).size, Image.Resampling.BILINEAR)
        )
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


def test_a_build_that_was_killed_is_built_again(jpegs, builds, capsys):
    read = lambda: load("train", 0, name="folder", root=jpegs, cache=24)
    whole = read()
    base = os.path.splitext(whole.path)[0]
    for damage in (
        lambda: os.remove(base + ".npy"),
        lambda: os.remove(base + ".u8"),
        lambda: os.truncate(base + ".u8", 1000),
        lambda: os.truncate(base + ".npy", 0),
        lambda: (
            os.remove(base + ".npy"),
            os.rename(base + ".u8", os.path.join(jpegs, "train.cache24", "folder-train.part")),
        ),
    ):
        damage()
        builds.clear()
        assert same(read(), whole) and len(builds) == 1 and files(jpegs) == [".npy", ".u8"]


def test_a_build_that_fails_leaves_nothing(jpegs, monkeypatch):
    """What is wrong with an image is said in the words of a folder without cache."""
    broken = os.path.join(jpegs, "train", "b", "3.jpg")
    with open(broken, "wb") as f:
        f.write(b"not a picture")
    with pytest.raises(SystemExit) as plain:
        list(
            Loader(
                load("pretrain", 0, name="folder", root=jpegs),
                15,
                1,
                0,
                CPU,
                augment="eval",
                image_size=24,
                workers=0,
            ).epoch(0)
        )
    for workers in (1, 2):
        monkeypatch.setattr(cache, "default_workers", lambda: workers)
        with pytest.raises(SystemExit) as error:
            load("pretrain", 0, name="folder", root=jpegs, cache=24)
        assert (
            str(error.value) == str(plain.value)
            and broken in str(error.value)
            and files(jpegs) == []
        )


def test_a_disk_that_is_too_small_is_said(jpegs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        cache.shutil,
        "disk_usage",
        lambda path: type("usage", (), {"free": 30000 - os.path.getsize(path)}),
    )  # bytes
    with pytest.raises(
        SystemExit,
        match=r"data\.cache is 32: the 15 images take about 5.99e-05 GB in .*train\.cache32, 3e-05 GB are free there; make room",
    ):
        load("train", 0, name="folder", root=jpegs, cache=32)
    assert (
        files(jpegs, size=32) == []
        and len(load("test", 0, name="folder", root=jpegs, cache=32)) == 6
    )
    os.makedirs(tmp_path / "many")
    for i in range(400):  # 76,800 bytes: no need to go on until there is no room
        Image.new("RGB", (8, 8)).save(tmp_path / "many" / f"{i:03d}.png")
    with open(tmp_path / "many" / "200.png", "wb") as f:
        f.write(b"not a picture")
    with pytest.raises(SystemExit, match="the 400 images take about 7.68e-05 GB"):
        load("pretrain", 0, name="folder", root=str(tmp_path / "many"), cache=32)


@pytest.mark.parametrize("call", ["makedirs", "open"])
def test_a_place_that_cannot_be_written_is_named(jpegs, monkeypatch, call):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "makedirs", refuse) if call == "makedirs" else monkeypatch.setattr(
        cache, "open", refuse, raising=False
    )
    with pytest.raises(
        SystemExit,
        match=r"data\.cache is 24, but .*jpegs/train\.cache24 cannot be written \(Permission denied\);.*links to the folders of images",
    ):
        load("train", 0, name="folder", root=jpegs, cache=24)
    monkeypatch.undo()
    whole = load("train", 0, name="folder", root=jpegs, cache=24)
    monkeypatch.setattr(cache, "build", refuse)  # one that is there wants no permission
    assert same(load("train", 0, name="folder", root=jpegs, cache=24), whole)


def test_two_runs_that_start_at_once_build_once(jpegs, builds, capsys):
    fcntl = pytest.importorskip("fcntl")
    os.makedirs(os.path.join(jpegs, "train.cache24"))
    with open(os.path.join(jpegs, "train.cache24", "folder-train.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a first run is at it
        runs = [
            threading.Thread(
                target=load, args=("train", 0), kwargs=dict(name="folder", root=jpegs, cache=24)
            )
            for _ in range(2)
        ]
        [run.start() for run in runs]
        runs[0].join(0.3)
        assert all(run.is_alive() for run in runs) and not builds
    [
        run.join(30) for run in runs
    ]  # it was killed: one of the waiting builds, the other finds it built
    assert (
        len(builds) == 1
        and files(jpegs) == [".npy", ".u8"]
        and "another run is writing it; waiting" in capsys.readouterr().out
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_building_leaves_the_random_state_alone(jpegs, monkeypatch, workers):
    monkeypatch.setattr(cache, "default_workers", lambda: workers)
    state = torch.get_rng_state()
    assert same(*(load("train", 0, name="folder", root=jpegs, cache=c) for c in (None, 64)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_two_processes_build_once_and_read_the_same(jpegs, tmp_path):
    """As two nodes that share a folder; as two with a copy each, of which each builds its own; and
    as two processes of one node, of which one looks at the files. A set that comes pickled, as to
    a worker that was not forked, opens a map of its own."""
    load("train", 0, name="folder", root=jpegs, cache=24)
    changed = os.path.join(jpegs, "train", "b", "3.jpg")
    Image.new("RGB", (41, 45), (200, 0, 0)).save(changed)
    test = load("test", 0, name="folder", root=jpegs, cache=24).select(torch.tensor([4, 1]))
    assert len(pickled := pickle.dumps(test)) < 3000  # no pixels
    (tmp_path / "test.pkl").write_bytes(pickled)
    for node in (0, 1):
        shutil.copytree(os.path.join(jpegs, "train"), tmp_path / f"own{node}")
    (tmp_path / "job.py").write_text(
        textwrap.dedent(f"""
        import os, pickle, numpy as np, torch
        from data import cache
        from data.datasets import load
        from engine import distributed
        distributed.start()
        rank, did, write, state = distributed.rank(), [], cache.write, cache.hash_files
        cache.write = lambda *a: did.append("write") or write(*a)
        cache.hash_files = lambda *a: did.append("state") or state(*a)

        def seen(root):
            did.clear()
            data = load("train", 0, name="folder", root=root, cache=24)
            return list(did), [torch.from_numpy(np.array(data.decode(i))) for i in range(15)]

        shared, own = seen({jpegs!r}), seen(f"own{{rank}}")
        distributed.node_firsts = [0, 0]                   # from here on, two of one node
        node = seen({jpegs!r})
        few = pickle.load(open("test.pkl", "rb"))
        few = [torch.from_numpy(np.array(few.decode(i))) for i in range(2)]
        torch.save((shared, own, node, few), f"saw{{rank}}.pt")
        distributed.stop()
    """)
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # what torchrun sets, without its own seconds
    env = {
        **os.environ,
        "PYTHONPATH": ROOT,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, "job.py"],
            cwd=tmp_path,
            env={**env, "RANK": str(r), "GROUP_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    said = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "caching 15 images anew" in said[0] and f"{jpegs}/train" not in said[1]
    assert "own0.cache24: caching 15" in said[0] and "own1.cache24: caching 15" in said[1]
    saw = [torch.load(tmp_path / f"saw{r}.pt") for r in (0, 1)]
    assert [did for (did, _), *_ in saw] == [["state", "write"], ["state"]]
    assert [did for _, (did, _), *_ in saw] == [["state", "write"]] * 2
    assert [did for _, _, (did, _), _ in saw] == [["state"], []]
    plain = load("train", 0, name="folder", root=jpegs, cache=24)
    for *sets, few in saw:
        for _, images in sets:
            assert all(np.array_equal(x, plain.decode(i)) for i, x in enumerate(images))
        assert all(np.array_equal(x, test.decode(i)) for i, x in enumerate(few))
    assert (np.asarray(plain.decode(8)).mean((0, 1)) - [200, 0, 0]).max() < 3


# ------------------------------------------------------------------------------- a build that ends early


def read(root, part="train", **settings):
    return load(part, 0, name="folder", root=root, cache=24, **settings)


@pytest.fixture
def stops(monkeypatch):
    """stops(count, error): the build fails after `count` jobs of 8 images, each of them recorded.

    stops(None) lets it go on, and -> the rows that were decoded since the last call.
    """
    decoded, limit = [], {"count": None}
    monkeypatch.setattr(cache, "default_workers", lambda: 0)
    monkeypatch.setattr(cache, "RECORD_SECONDS", 0)
    plain = cache.Shrunk.__call__

    def call(self, rows):
        if limit["count"] is not None and len(decoded) == limit["count"]:
            limit["error"]()
        decoded.append(rows)
        return plain(self, rows)

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
    folder = f"{root}/{part}.cache24"
    names = [name for name in os.listdir(folder) if not name.endswith(".lock")]
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(names)}


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
    assert stops(None) == list(range(8, 15)) and contents(jpegs) == uninterrupted
    assert "caching 15 images, going on after 8\n" in capsys.readouterr().out


def test_what_is_left_of_a_build_is_taken_only_where_it_fits(jpegs, stops):
    read(jpegs)
    uninterrupted = contents(jpegs)
    base = glob.glob(f"{jpegs}/train.cache24/*.u8")[0][:-3]

    def leave_half():
        shutil.rmtree(f"{jpegs}/train.cache24")
        stops(1, interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(jpegs)

    for damage in (
        lambda: os.truncate(base + ".part", 200),
        lambda: os.truncate(base + ".u8", 1000),
        lambda: os.remove(base + ".u8"),
        lambda: np.save(open(base + ".part", "wb"), np.zeros((3, 3), np.int64)),
    ):
        leave_half()
        damage()
        stops(None)
        read(jpegs)
        assert stops(None) == list(range(15)) and contents(jpegs) == uninterrupted
    leave_half()
    os.utime(f"{jpegs}/train/c/1.jpg", ns=(1, 1))
    stops(None)
    read(jpegs)
    assert stops(None) == list(range(15)) and files(jpegs) == [".npy", ".u8"]


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
    assert before.items() < contents(jpegs).items() and len(contents(jpegs)) == 4
    stops(None)
    assert same(read(jpegs), old) and len(contents(jpegs)) == 2
    assert not set(contents(jpegs)) & set(before)


@pytest.mark.parametrize("full_at", [1, 3, 4, 6])
def test_a_disk_that_becomes_full_keeps_nothing_half_made(jpegs, stops, monkeypatch, full_at):
    """At the first sync the index is made; the last ones are those of the last rows."""
    old = read(jpegs)
    os.utime(f"{jpegs}/train/c/1.jpg", ns=(1, 1))
    calls, plain = [], cache.sync

    def sync(file):
        calls.append(file)
        if len(calls) == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(file)

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
    assert files(jpegs) == [".npy", ".u8"] and old.decode(3).size


def test_a_disk_too_small_for_old_and_new_names_the_old(jpegs, stops, monkeypatch):
    old = read(jpegs)
    os.utime(f"{jpegs}/train/c/1.jpg", ns=(1, 1))
    stops(None)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(20000))
    with pytest.raises(SystemExit, match="2e-05 GB are free there; make room, .*; or remove .*u8,"):
        read(jpegs)
    assert stops(None) == [] and os.path.exists(old.path) and len(contents(jpegs)) == 2


def test_a_truncated_image_ends_two_processes_with_one_sentence(jpegs, tmp_path):
    broken = f"{jpegs}/train/b/3.jpg"
    os.truncate(broken, os.path.getsize(broken) // 2)
    (tmp_path / "job.py").write_text(
        textwrap.dedent(f"""
        from data.datasets import load
        from engine import distributed
        distributed.start()
        load("pretrain", 0, name="folder", root={jpegs!r}, cache=24)
    """)
    )
    done = run(tmp_path, tmp_path / "job.py", processes=2, check=False)
    assert done.returncode == 1
    said = done.stderr + (tmp_path / "said1.err").read_text()
    assert said.count("\n") == 1 and said.startswith(f"{broken} cannot be read as an image (")


# ------------------------------------------------------------------------------- where it lies


def test_the_cache_of_a_single_class_lies_beside_its_part(jpegs, builds):
    for name in "bc":
        os.rename(f"{jpegs}/train/{name}", f"{jpegs}/{name}")
    assert read(jpegs).labels is None and os.listdir(f"{jpegs}/train") == ["a"]
    # Earlier versions had it beside the class folder.
    os.rename(f"{jpegs}/train.cache24", f"{jpegs}/train/a.cache24")
    assert read(jpegs).path.startswith(f"{jpegs}/train/a.cache24/") and len(builds) == 1
    os.rename(f"{jpegs}/b", f"{jpegs}/train/b")
    data = read(jpegs)
    assert data.classes == ["a", "b"] and data.path.startswith(f"{jpegs}/train.cache24/")
    os.mkdir(f"{jpegs}/train/d.cache24")  # there is no class d
    with pytest.raises(SystemExit, match="d.cache24 holds no images"):
        read(jpegs)


# ------------------------------------------------------------------------------- large photographs


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
    plain = load("pretrain", 0, name="folder", root=str(folder))
    reduced = load("pretrain", 0, name="folder", root=str(folder), cache=24)
    state = cache.hash_files(plain.files, skip=False)
    assert state not in reduced.path
    differences = []
    for i in range(len(plain)):
        image = plain.decode(i)
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


# ---------------------------------------------------------------------------------------------------- the key


def test_what_makes_no_sense_is_refused(jpegs):
    with pytest.raises(SystemExit, match="data.cache is 256, but shapes is in memory already"):
        load("pretrain", 0, name="shapes", limit=12, cache=256)
    assert (
        len(load("train", 0, name="shapes", limit=12, cache=256)) == 12
    )  # of a probe that goes elsewhere, by linear.data
    with pytest.raises(SystemExit, match="data.cache is 7; it must be at least 8"):
        load("pretrain", 0, name="folder", root=jpegs, cache=7)
    assert not glob.glob(jpegs + "/*.cache*")


def test_a_run_goes_on_with_its_own_cache_only():
    plain, other = (
        config.load(os.path.join(ROOT, "yaml", "quickstart.yaml"), o)
        for o in ((), ("data.cache=128",))
    )
    assert (
        plain["data"]["cache"] is None
        and config.difference(plain, other, checkpoint.MAY_CHANGE)
        == "data.cache was None and is now 128"
    )
    del plain["data"]["cache"]  # of a version that had no such key
    assert (
        config.difference(
            plain, {**other, "data": {**other["data"], "cache": None}}, checkpoint.MAY_CHANGE
        )
        is None
    )
