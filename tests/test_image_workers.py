"""Runs whose image workers are starved or killed train, or end within seconds with a sentence.

What a worker does: tests/data/test_workers.py.

Every run is forked by test_faults's server. A run that hangs is killed, and fails its test.
"""

import ctypes
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from data import detection
from data.datasets import FolderSet
from engine import checkpoint
from models.resnet import ResNet
from processes import ROOT, SERVER, free_port, torchrun
from test_faults import assert_equal, at, child, images, undisturbed  # noqa: F401  (fixtures)
from test_pairs import PAIRS

HANG_SECONDS = 60  # a run takes 2 to 4; on a machine that does much else, ten times that
PAIR = PAIRS["ir-ring"]
WORKERS = ["data.workers=2"]
TWO_EPOCHS = [*PAIR, "optim.epochs=2", *WORKERS]
DETECT = [
    "--weights",
    "none",
    "model.backbone=resnet10",
    "model.stem=imagenet",
    "detect.task=box",
    "detect.train=a",
    "detect.val=a",
    "detect.iterations=3",
    "detect.batch_size=2",
    "detect.warmup_iterations=1",
    "detect.milestones=[]",
    "detect.min_size=[64]",
    "detect.max_size=96",
    "detect.proposals=16",
    "detect.channels=16",
    "detect.detections=5",
    "detect.norm=batch",
    "detect.workers=2",
    "detect.save_every=2",
]
PROBE = [
    "--no-baselines",
    "linear.features=augmented",
    "linear.augment=crop_flip",
    "linear.epochs=1",
    "linear.batch_size=12",
    *WORKERS,
]
# script -> its arguments. Batches, and images to detect in, are larger than 1 MB.
SCRIPTS = {
    "train_pretrain.py": [
        "data.image_size=64",
        "optim.epochs=1",
        "optim.batch_size=50",
        "model.stem=imagenet",
        *PAIR,
        *WORKERS,
    ],
    "train_linear.py": [
        "data.image_size=64",
        "model.stem=imagenet",
        "--weights",
        "resnet.pt",
        *PROBE,
    ],
    "train_detect.py": DETECT,
}


@pytest.fixture(scope="module")
def sources(images, tmp_path_factory):  # noqa: F811
    """script -> the argument that says where its images lie.

    A COCO folder of six images of 1.4 MB each; one of small ones; and one that has these twice.
    """
    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    os.makedirs(folder / "coco" / "annotations")
    os.makedirs(folder / "coco" / "a")
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for i in range(1, 7):
        small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        small.resize((800, 600)).save(folder / "coco" / "a" / f"{i}.jpg")
        coco["images"].append({"id": i, "width": 800, "height": 600, "file_name": f"{i}.jpg"})
        coco["annotations"].append(
            {
                "id": i,
                "image_id": i,
                "category_id": 1,
                "bbox": [100, 100, 300, 200],
                "area": 60000,
                "iscrowd": 0,
            }
        )
    (folder / "coco" / "annotations" / "instances_a.json").write_text(json.dumps(coco))
    for part in ("train", "val"):
        os.makedirs(folder / "classes", exist_ok=True)
        os.symlink(images.split("=")[1], folder / "classes" / part)
    return {
        "train_pretrain.py": images,
        "train_linear.py": f"data.root={folder / 'classes'}",
        "train_detect.py": f"detect.data={folder / 'coco'}",
    }


def start(script, folder, name, arguments, fault=None, suffix="", **environment):
    if script == "train_linear.py" and not os.path.exists(folder / "resnet.pt"):
        checkpoint.write(str(folder / "resnet.pt"), ResNet("resnet10", "imagenet", 8).state_dict())
    process = SERVER.Process(
        target=child, args=(str(folder), name, arguments, fault, environment, suffix, script)
    )
    process.start()
    return process


def end_of(process):
    """-> its exit code, or None for a hang, which is ended."""
    process.join(HANG_SECONDS)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code


def words(folder, name, suffix=""):
    """-> what a run printed, and its errors."""
    return [(folder / f"{name}{suffix}.{kind}").read_text() for kind in ("out", "err")]


def run(script, folder, name, *arguments, fault=None):
    """-> exit code, what it printed, its errors."""
    code = end_of(start(script, folder, name, arguments, fault))
    return code, *words(folder, name)


# -------------------------------------------------- little or no /dev/shm


def shm_of(nbytes):
    """/dev/shm is a tmpfs of `nbytes`, in a mount namespace of the process's own.

    0: a full one. None: one that takes no file."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(0x00020000 | 0x10000000):  # CLONE_NEWNS, CLONE_NEWUSER
        os._exit(77)
    for file, text in (
        ("uid_map", f"0 {user} 1"),
        ("setgroups", "deny"),
        ("gid_map", f"0 {group} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as f:
            f.write(text)
    options = b"ro" if nbytes is None else b"size=%d" % max(nbytes, 4096)
    if libc.mount(
        b"none", b"/dev/shm", b"tmpfs", nbytes is None, options if nbytes is not None else None
    ):  # 1: read-only
        os._exit(77)
    if nbytes == 0:
        with open("/dev/shm/full", "wb") as f:
            f.write(bytes(4096))
        try:
            with open("/dev/shm/more", "wb") as f:
                f.write(b"x")
        except OSError as error:
            assert error.errno == errno.ENOSPC


class SmallShm:
    """A fault that can be sent to the server."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def __call__(self):
        shm_of(self.nbytes)


@pytest.mark.parametrize(
    "nbytes", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (None, 2**20, 2**23, 2**26))]
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_trains_whatever_the_size_of_dev_shm(script, nbytes, sources, tmp_path):
    code, out, err = run(
        script, tmp_path, "a", sources[script], *SCRIPTS[script], fault=SmallShm(nbytes)
    )
    if code == 77:
        pytest.skip("the kernel lets no process have a mount namespace of its own")
    assert code == 0, out + err
    assert err == "", out + err
    left = {
        "train_pretrain.py": "backbone.pt",
        "train_linear.py": "linear.jsonl",
        "train_detect.py": "detect.jsonl",
    }[script]
    assert os.path.exists(tmp_path / "runs" / "a" / left)


# -------------------------------------------------- a worker that is lost


def kill_a_worker():
    """From outside, as the kernel does where memory runs out."""
    multiprocessing.active_children()[0].kill()


class KillsAWorker:
    """In that step of that epoch of pre-training, or of the probe."""

    def __init__(self, epoch, step):
        self.where = epoch, step

    def __call__(self):
        at(*self.where, kill_a_worker)


class WorkerDies:
    """A worker is lost with its n-th image or, where it has fewer, the next worker with its own."""

    def __init__(self, fate, number=1):
        self.fate, self.number = fate, number

    def __call__(self):
        main, seen = os.getpid(), []

        def faulty(plain):
            def read(*arguments):
                seen.append(1)
                if os.getpid() != main and len(seen) >= self.number:
                    if self.fate == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise {
                        "memory": MemoryError(),
                        "files": OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
                    }[self.fate]
                return plain(*arguments)

            return read

        FolderSet.decode = faulty(FolderSet.decode)
        detection.Images.__getitem__ = faulty(detection.Images.__getitem__)


SENTENCES = {
    "killed": r"image worker \d+ was killed by SIGKILL; most likely memory ran out, .*: lower ",
    "memory": "images could not be read: in a worker memory ran out; allow more, or take fewer",
    "files": r"images could not be read: in a worker Too many open files: .*raise ulimit -n",
}
KEPT = {
    "train_pretrain.py": "nothing was saved yet",
    "train_detect.py": "nothing was saved yet",
    "train_linear.py": "nothing was saved yet",
}


def assert_one_sentence(code, out, err, *parts):
    assert code == 1, (code, out + err)
    assert err.count("\n") == 1, (code, out + err)
    assert err.endswith("\n"), (code, out + err)
    for part in parts:
        assert re.search(part, err), err


@pytest.mark.parametrize("fate", SENTENCES)
@pytest.mark.parametrize("script", ["train_pretrain.py", "train_detect.py"])
def test_a_lost_worker_ends_the_run_with_one_sentence(script, fate, sources, tmp_path):
    ended = run(script, tmp_path, "a", sources[script], *SCRIPTS[script], fault=WorkerDies(fate))
    setting = {"train_pretrain.py": "data.workers", "train_detect.py": "detect.workers"}[script]
    assert_one_sentence(
        *ended,
        f"^{SENTENCES[fate]}",
        f"; {KEPT[script]}$",
        *[f"lower {setting}, now 2"] * (fate == "killed"),
    )


def test_a_worker_lost_in_the_augmented_probe(sources, tmp_path):
    script = "train_linear.py"
    ended = run(script, tmp_path, "a", sources[script], *SCRIPTS[script], fault=KillsAWorker(0, 2))
    assert_one_sentence(*ended, SENTENCES["killed"], f"; {KEPT[script]}$")


def test_the_sentence_names_the_checkpoint_and_the_same_line_goes_on_from_it(
    undisturbed,  # noqa: F811
    images,  # noqa: F811
    tmp_path,
):
    script, arguments = "train_pretrain.py", [images, *PAIR, *WORKERS]
    ended = run(script, tmp_path, "cut", *arguments, fault=KillsAWorker(1, 2))
    assert_one_sentence(
        *ended,
        SENTENCES["killed"],
        "; runs/cut/last.pt holds the state after epoch 1 of 3, and the same line goes on from",
    )
    code, out, err = run(script, tmp_path, "cut", *arguments)
    assert code == 0, out + err
    assert "going on after epoch 1 of 3" in out, out + err
    assert_equal(tmp_path, "cut", undisturbed(*PAIR, *WORKERS)[0])


def test_detection_names_its_checkpoint(sources, tmp_path):
    """Saved after every second iteration; the only worker dies of its 13th image."""
    arguments = [sources["train_detect.py"], *DETECT, "detect.workers=1", "detect.iterations=8"]
    ended = run("train_detect.py", tmp_path, "a", *arguments, fault=WorkerDies("killed", 13))
    saved = r"; runs/a/detect/last.pt holds the state after iteration [246] of 8, and the same "
    assert_one_sentence(*ended, SENTENCES["killed"], saved)


def test_a_broken_image_is_said_with_the_checkpoint(images, tmp_path):  # noqa: F811
    shutil.copytree(images.split("=")[1], tmp_path / "own")
    code, out, err = run(
        "train_pretrain.py",
        tmp_path,
        "a",
        f"data.root={tmp_path / 'own'}",
        *TWO_EPOCHS,
        "optim.epochs=1",
        *WORKERS,
    )
    assert code == 0, out + err
    victim = next((tmp_path / "own").glob("*/*.png"))
    victim.write_bytes(b"no image")
    code, out, err = run(
        "train_pretrain.py", tmp_path, "b", f"data.root={tmp_path / 'own'}", *TWO_EPOCHS
    )
    assert_one_sentence(
        code,
        out,
        err,
        f"^{victim} cannot be read as an image .*; remove or replace it; nothing was saved yet$",
    )


# -------------------------------------------------- two processes


def test_two_processes_end_when_one_loses_a_worker(images, tmp_path):  # noqa: F811
    """Without torchrun, which would end the other one. Each has its own words."""
    ports = dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"
    )
    processes = [
        start(
            "train_pretrain.py",
            tmp_path,
            "two",
            [images, *TWO_EPOCHS],
            fault,
            str(rank),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **ports,
        )
        for rank, fault in enumerate((None, KillsAWorker(1, 2)))
    ]
    codes = [end_of(process) for process in processes]
    assert codes[1] == 1, words(tmp_path, "two", "0") + words(tmp_path, "two", "1")
    assert codes[0] not in (0, None), words(tmp_path, "two", "0") + words(tmp_path, "two", "1")
    err = words(tmp_path, "two", "1")[1]
    assert_one_sentence(
        codes[1],
        "",
        err,
        SENTENCES["killed"],
        "; runs/two/last.pt holds the state after epoch 1 of 2, and the same line goes on from",
    )


JOB = """import runpy, sys
sys.path[:0] = [{root!r}, {tests!r}]
import os
import test_image_workers
if os.environ["RANK"] == "1":
    test_image_workers.WorkerDies("killed")()
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_pretrain.py", "train_detect.py"])
def test_torchrun_ends_the_other_process(script, sources, tmp_path):
    path = os.path.join(ROOT, script)
    (tmp_path / "job.py").write_text(
        JOB.format(root=ROOT, tests=os.path.dirname(__file__), script=path)
    )
    small = [
        "--cfg",
        os.path.join(ROOT, "yaml", "quickstart.yaml"),
        "data.name=folder",
        "model.width=8",
        "knn.every=0",
    ]
    done = torchrun(
        2,
        [tmp_path / "job.py", *small, sources[script], *SCRIPTS[script], "name=a"],
        tmp_path,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "was killed by SIGKILL; most likely memory ran out" in done.stderr, (
        done.stdout + done.stderr
    )
    assert f"{KEPT[script]}\n" in done.stderr
    assert "[rank" not in done.stderr
