"""Image workers: order, memory, and every way in which one can be lost.

Whole runs: tests/test_image_workers.py.
"""

import contextlib
import errno
import faulthandler
import functools
import gc
import multiprocessing
import os
import resource
import select
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from data import loader as data_loader
from data import memory, workers
from data.datasets import FolderSet, load
from data.loader import Loader, ordered_batches
from data.workers import InputLost, Slots, in_workers, say_what_is_kept

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 images of noise."""
    path, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)).save(
            path / f"{i:02d}.png"
        )
    return str(path)


def loader(folder, count, **settings):
    settings = {"augment": "moco_v2", "image_size": 32, "batch_size": 4, "n_views": 2, **settings}
    return Loader(
        load("pretrain", 0, name="folder", root=folder),
        seed=0,
        device=CPU,
        workers=count,
        **settings,
    )


def shared_maps():
    """How many maps of anonymous shared memory this process has."""
    gc.collect()
    with open("/proc/self/maps") as f:
        return sum("/dev/zero (deleted)" in line for line in f)


def open_files():
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def limit(kind, soft):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


# -------------------------------------------------- what workers do


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 3_000_000])
def test_answers_come_in_order_whatever_their_size(count, size):
    """3 MB are more than a pipe holds: an answer out of turn must not block the others."""

    def function(i):
        return i, {"x": [torch.full((size,), i, dtype=torch.uint8)]}

    got = list(in_workers(function, iter(range(10)), count))
    assert [i for i, _ in got] == list(range(10))
    assert all(answer["x"][0].shape == (size,) and (answer["x"][0] == i).all() for i, answer in got)
    assert not multiprocessing.active_children()


def test_jobs_are_taken_when_they_are_handed_out_and_no_more_than_in_flight():
    taken = []

    def jobs():
        for i in range(10):
            taken.append(i)
            yield i

    answers = in_workers(lambda i: i, jobs(), 2, in_flight=3)
    assert not taken
    for i in range(3):
        assert next(answers) == i
        assert len(taken) == 3 + i
    answers.close()
    assert not multiprocessing.active_children()


def test_epochs_leave_no_memory_files_or_processes_behind(folder):
    """Neither whole ones nor one that is left early. A batch that is kept keeps its slot alone."""
    ld = loader(folder, 2)
    list(ld.epoch(0))
    before = shared_maps(), open_files()
    for epoch in range(3):
        for _ in ld.epoch(epoch):
            pass
        next(ld.epoch(epoch))
    del _
    assert (shared_maps(), open_files()) == before
    assert not multiprocessing.active_children()
    kept = [views[0] for views, _ in ld.epoch(0)][0]
    assert shared_maps() == before[0] + 1
    assert torch.equal(kept, next(loader(folder, 0).epoch(0))[0][0])


@pytest.mark.parametrize("backend", ["batched", "pil"])
def test_whoever_keeps_all_batches_has_them_whole(folder, backend):
    """More than there are slots in shared memory: the rest comes through the pipe."""
    whole, kept = (
        list(loader(folder, count, augment_backend=backend).epoch(1)) for count in (0, 1)
    )
    assert len(kept) == 6
    for (a, i), (b, j) in zip(whole, kept):
        assert torch.equal(torch.stack(a), torch.stack(b))
        assert torch.equal(i, j)


def test_batches_do_not_travel_through_the_pipe_when_each_is_dropped_in_turn(folder, monkeypatch):
    sent, unpack = [], workers.unpack
    monkeypatch.setattr(workers, "unpack", lambda reply: sent.append(reply[1][1]) or unpack(reply))
    for views, _ in loader(folder, 2).epoch(0):
        assert views[0].shape == (4, 3, 32, 32)
    assert sent == [None] * 6


def test_evaluation_sends_bytes_and_no_more_rows_than_there_are(folder, monkeypatch):
    made = []
    monkeypatch.setattr(data_loader, "Slots", lambda *what: made.append(what) or Slots(*what))
    data = load("train", 0, name="folder", root=folder)
    (a, _), (b, _) = (
        next(ordered_batches(data, torch.arange(24), "eval", 16, CPU, workers=count))
        for count in (0, 2)
    )
    assert torch.equal(a, b)
    assert made[1] == (2, (24, 3, 16, 16), torch.uint8)


@pytest.mark.slow
def test_without_fork_the_views_are_the_same(folder, monkeypatch):
    """As on Windows: workers that import everything anew, and no memory that they share."""
    monkeypatch.setattr(workers, "can_fork", lambda: False)
    monkeypatch.setattr(workers, "process_context", lambda: multiprocessing.get_context("spawn"))
    spawned = list(loader(folder, 2).epoch(1))
    for (a, i), (b, j) in zip(loader(folder, 0).epoch(1), spawned, strict=True):
        assert torch.equal(torch.stack(a), torch.stack(b))
        assert torch.equal(i, j)


# -------------------------------------------------- how a worker is lost


def kill_oneself(number, i):
    if i == 2:
        faulthandler.disable()  # pytest's would print where
        os.kill(os.getpid(), number)
    return i


@pytest.mark.parametrize(
    "number,message",
    [
        (
            signal.SIGKILL,
            r"killed by SIGKILL; most likely memory ran out.* lower data.workers, now 2",
        ),
        (signal.SIGSEGV, r"image worker \d+ was killed by SIGSEGV; most likely a library"),
        (
            signal.SIGBUS,
            r"image worker \d+ was killed by SIGBUS; memory ran out, or the file of data.cache",
        ),
    ],
)
def test_a_worker_that_is_killed_is_named_with_its_signal(number, message):
    with pytest.raises(InputLost, match=message):
        list(in_workers(functools.partial(kill_oneself, number), range(10), 2))
    assert not multiprocessing.active_children()


def test_a_worker_that_ends_by_itself_is_no_hang():
    with pytest.raises(InputLost, match=r"image worker \d+ ended by itself, with status 3"):
        list(in_workers(lambda i: os._exit(3), range(10), 2))


@pytest.mark.parametrize("size", [1, 20_000_000])
def test_a_worker_that_is_killed_from_outside(size):
    """In the midst of a large answer, too, of which the pipe holds a part."""
    answers = in_workers(lambda i: (os.getpid(), np.zeros(size, np.uint8)), range(100), 1)
    os.kill(next(answers)[0], signal.SIGKILL)
    with pytest.raises(InputLost, match="killed by SIGKILL"):
        list(answers)


def out_of_files(i):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return open(os.devnull)


def out_of_memory(i):
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    return torch.zeros(2**32)


def raise_error(error, i):
    raise error


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize(
    "function,message",
    [
        (functools.partial(raise_error, MemoryError()), "memory ran out; allow more"),
        (functools.partial(raise_error, OSError(errno.ENOMEM, "")), "memory ran out; allow more"),
        (
            functools.partial(raise_error, OSError(errno.EMFILE, "")),
            r"Too many open files: .* \(\d+\); raise ulimit -n",
        ),
    ],
)
def test_what_was_short_is_said(count, function, message):
    with pytest.raises(InputLost, match=f"^images could not be read: .*{message}"):
        list(in_workers(function, range(4), count))


@pytest.mark.parametrize(
    "function,message",
    [
        (out_of_files, r"Too many open files.*\(\d+\); raise ulimit -n"),
        (out_of_memory, "memory ran out"),
    ],
)
def test_real_limits_in_a_worker(function, message):
    with pytest.raises(InputLost, match=message):
        list(in_workers(function, range(4), 2))


def test_an_answer_for_which_memory_runs_out_while_it_is_sent():
    class Large:
        def __reduce__(self):
            raise MemoryError

    with pytest.raises(InputLost, match="memory ran out"):
        list(in_workers(lambda i: Large(), range(4), 1))


@pytest.mark.parametrize(
    "make", [lambda i: 1 // 0, lambda i: lambda: i], ids=["error", "cannot be pickled"]
)
def test_a_fault_of_the_program_keeps_its_traceback(make):
    with pytest.raises(
        RuntimeError, match="image worker failed:\n(?s:.)*(ZeroDivisionError|pickle)"
    ):
        list(in_workers(make, range(4), 2))


@pytest.mark.parametrize(
    "error,message",
    [
        (MemoryError(), "memory ran out"),
        (OSError(errno.EMFILE, "Too many open files"), "raise ulimit -n"),
    ],
)
def test_an_image_is_not_called_broken_when_something_else_is_short(
    folder, monkeypatch, error, message
):
    """PIL's errors end up in "cannot be read as an image": the image is whole."""
    monkeypatch.setattr(
        Image, "open", functools.partial(lambda error, *_, **__: raise_error(error, 0), error)
    )
    for count in (0, 2):
        with pytest.raises(InputLost, match=message) as raised:
            list(loader(folder, count).epoch(0))
        assert "cannot be read as an image" not in str(raised.value)


def test_too_few_files_for_the_workers():
    with limit(resource.RLIMIT_NOFILE, open_files() + 8), pytest.raises(InputLost) as raised:
        list(in_workers(lambda i: i, range(100), 50))
    assert "of 50 image workers could be started: Too many open files" in str(raised.value)
    assert "raise ulimit -n; or lower data.workers" in str(raised.value)
    assert not multiprocessing.active_children()


def test_too_little_memory_for_the_batches():
    with pytest.raises(
        InputLost, match=r"^3 batches of 1.4e\+05 GB in shared memory.* are more than there is"
    ):
        Slots(3, (2**47,), torch.uint8)


def test_workers_end_with_the_process_that_started_them():
    """Which was killed. The pipe is held by its workers alone then: it ends with the last one."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        for _ in in_workers(lambda i: i, range(100), 3):
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    os.waitpid(pid, 0)
    assert select.select([read], [], [], 30)[0]
    assert os.read(read, 1) == b""
    os.close(read)


def test_the_sentence_ends_with_what_is_kept():
    def batches():
        yield 1
        raise InputLost("a.jpg is broken")

    got = batches()
    sentence = "^a.jpg is broken; last.pt holds epoch 3$"
    kept = say_what_is_kept(lambda: "last.pt holds epoch 3")
    with pytest.raises(SystemExit, match=sentence), kept:
        assert next(got) == 1
        next(got)


def test_memory_that_runs_out_is_a_sentence():
    sentence = "^memory ran out; allow more; nothing was saved yet$"
    with pytest.raises(SystemExit, match=sentence), say_what_is_kept(lambda: None):
        raise MemoryError


def test_a_broken_image_is_an_input_lost(folder, monkeypatch):
    monkeypatch.setattr(
        FolderSet,
        "decode",
        functools.partial(lambda error, *_: raise_error(error, 0), ValueError("no image")),
    )
    for count in (0, 2):
        with pytest.raises(InputLost, match="^no image$"):
            list(loader(folder, count).epoch(0))


# -------------------------------------------------- memory


def write(path, **files):
    os.makedirs(path)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


def test_what_control_groups_leave(tmp_path):
    two = tmp_path / "v2"
    write(
        two / "job",
        memory__max="1000\n",
        memory__current="900\n",
        memory__stat="anon 5\ninactive_file 200\nactive_file 30\n",
    )
    write(two / "job" / "task", memory__max="max\n", memory__current="900\n")
    member = tmp_path / "cgroup"
    member.write_text("0::/job/task\n")
    assert memory.group_bytes(str(member), str(two)) == [330]
    member.write_text("0::/a/container/knows/no/outer/name\n")
    write(tmp_path / "inside", memory__max="500\n", memory__current="100\n")
    assert memory.group_bytes(str(member), str(tmp_path / "inside")) == [400]
    stat = "inactive_file 1\ntotal_inactive_file 7\ntotal_active_file 0\n"
    write(
        tmp_path / "v1" / "memory" / "job",
        memory__limit_in_bytes="100",
        memory__usage_in_bytes="60",
        memory__stat=stat,
    )
    (tmp_path / "v1" / "memory" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    (tmp_path / "v1" / "memory" / "memory.usage_in_bytes").write_text("5")
    member.write_text("4:memory:/job\n3:cpu:/job\n0::/\n")
    assert memory.group_bytes(str(member), str(tmp_path / "v1")) == [47]
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8 kB\n")
    assert memory.machine_bytes(str(tmp_path / "meminfo")) == 8192
    assert memory.machine_bytes(str(tmp_path / "none")) is None


def test_the_smallest_limit_counts_and_the_processes_of_a_node_share_it(monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 900)
    monkeypatch.setattr(memory, "group_bytes", lambda: [700, 800])
    assert memory.available_bytes() == (700, "in this container or control group")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.available_bytes() == (
        350,
        "in this container or control group, for each of 2 processes",
    )
    monkeypatch.setattr(memory, "group_bytes", list)
    monkeypatch.setattr(memory, "machine_bytes", lambda: None)
    assert memory.available_bytes() == (None, "")


def test_first_fewer_batches_then_fewer_workers_then_a_sentence(monkeypatch):
    monkeypatch.setattr(memory, "WORKER_BYTES", 10)
    for free, want in (
        (None, (4, 8)),
        (9 * 100 + 40, (4, 8)),
        (9 * 100 + 39, (4, 7)),
        (540, (4, 4)),
        (539, (3, 4)),
        (210, (1, 1)),
    ):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: (free, "here"))
        assert memory.workers_that_fit(4, 100) == want, free
    monkeypatch.setattr(memory, "available_bytes", lambda: (209, "here"))
    with pytest.raises(
        SystemExit,
        match=r"needs 2.1e-07 GB \(a batch is 1e-07 GB\), and 2.1e-07 GB are free here; take",
    ):
        memory.workers_that_fit(4, 100)


def test_a_loader_starts_as_many_workers_as_fit_and_makes_the_same_views(
    folder, monkeypatch, capsys
):
    whole = list(loader(folder, 0).epoch(1))
    batch = 4 * 2 * 3 * 32 * 32 * 4
    monkeypatch.setattr(
        memory, "available_bytes", lambda: (2 * memory.WORKER_BYTES + 6 * batch, "here")
    )
    ld = loader(folder, 4)
    assert (ld.workers, ld.running) == (4, 2)
    assert (
        "memory has room for 2 image workers, not 4; lower data.workers" in capsys.readouterr().out
    )
    for (a, i), (b, j) in zip(whole, ld.epoch(1), strict=True):
        assert torch.equal(torch.stack(a), torch.stack(b))
        assert torch.equal(i, j)
    monkeypatch.setattr(memory, "available_bytes", lambda: (batch, "here"))
    with pytest.raises(
        SystemExit, match="GB are free here; take a smaller batch_size or image_size"
    ):
        loader(folder, 4)


# -------------------------------------------------- one that never begins


def test_a_worker_that_never_begins_is_replaced(tmp_path, monkeypatch):
    """As a fork that waits for a lock which a thread of its parent held."""
    serve = workers.serve

    def stuck_at_first(*arguments):
        with contextlib.suppress(FileExistsError):
            (tmp_path / "first").touch(exist_ok=False)
            signal.pause()
        serve(*arguments)

    monkeypatch.setattr(workers, "serve", stuck_at_first)
    monkeypatch.setattr(workers, "BEGIN_SECONDS", (0.5, 60))
    assert list(in_workers(abs, [-1, -2, -3], 2)) == [1, 2, 3]
    assert (tmp_path / "first").exists()
    assert not multiprocessing.active_children()


def test_workers_that_never_begin_are_a_sentence(monkeypatch):
    monkeypatch.setattr(workers, "serve", lambda *arguments: signal.pause())
    monkeypatch.setattr(workers, "BEGIN_SECONDS", (0.1, 0.2))
    with pytest.raises(InputLost, match="did not begin within 0.2 s, nor did 1 before it.*0 needs"):
        list(in_workers(abs, [-1], 1))
    assert not multiprocessing.active_children()
