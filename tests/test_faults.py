"""Faults, done to real runs: killed, told to stop, a worker lost, a disk full or damaged, numbers that are none. Nothing is lost and nothing is silent.

Every run is a process of its own, forked by a server that has imported torch already (half a second each; most tests want several).
KILLS=n: so many SIGKILLs at random moments, where every run of the tests has one; twelve pairs of host and loss instead of four.
"""

import contextlib
import ctypes
import functools
import io
import json
import multiprocessing.util
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from torch import nn

import train_pretrain
from data.loader import Loader
from data.shapes import shapes
from engine import checkpoint, signals, weights
from engine.log import Log
from losses.nce import NCE
from processes import ROOT, SERVER, free_port, torchrun
from test_pairs import PAIRS
from test_scripts import QUICK, same, state
from training import summary

SMALL = [
    "--cfg",
    QUICK,
    "data.name=folder",
    "data.image_size=16",
    "data.workers=0",
    "optim.batch_size=12",
    "optim.epochs=3",
    "model.width=8",
    "knn.every=0",
]
TWELVE = [
    f"{host}-{loss}"
    for host in ("ir", "cmc", "moco", "simclr")
    for loss in ("ring", "mochi", "ifnd")
]
SOME = ["moco-ifnd"] + [
    pytest.param(pair, marks=pytest.mark.slow)
    for pair in (TWELVE if "KILLS" in os.environ else ["ir-ring", "cmc-mochi", "simclr-ifnd"])
    if pair != "moco-ifnd"
]


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """100 images of 16 pixels, a folder a class; and the server has started."""
    folder, first = tmp_path_factory.mktemp("images"), SERVER.Process(target=bool)
    first.start()
    first.join()
    for i, (image, label) in enumerate(zip(*shapes(100))):
        os.makedirs(folder / f"{label:02d}", exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).resize((16, 16)).save(
            folder / f"{label:02d}" / f"{i:03d}.png"
        )
    return f"data.root={folder}"


def child(folder, name, arguments, fault, environment, which="", script="train_pretrain.py"):
    os.chdir(folder)
    os.environ.update(environment)
    # of image workers, as in a program of its own
    multiprocessing.set_start_method("fork", force=True)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{which}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [script, *SMALL, *arguments, f"name={name}"]
    if fault:
        fault()
    runpy.run_path(os.path.join(ROOT, script), run_name="__main__")


def start(folder, name, *arguments, fault=None, script="train_pretrain.py", **environment):
    given = (str(folder), name, arguments, fault, environment, "", script)
    process = SERVER.Process(target=child, args=given)
    process.start()
    return process


def run(folder, name, *arguments, fault=None, code=0, **environment):
    """-> what it printed. code: what it must exit with."""
    process = start(folder, name, *arguments, fault=fault, **environment)
    process.join()
    out, err = ((folder / f"{name}.{kind}").read_text() for kind in ("out", "err"))
    assert process.exitcode == code, out + err
    return out + err


def refused(*given, **how):
    """A run that must end with one sentence. -> the sentence."""
    sentence = run(*given, code=1, **how).splitlines()[-1]
    err = (given[0] / f"{given[1]}.err").read_text()
    assert err == sentence + "\n"  # nothing else: no traceback
    return sentence


def two(folder, name, *arguments, faults=(None, None), script="train_pretrain.py"):
    """Two processes, without torchrun. -> their exit codes, and what the first printed."""
    ports = dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"
    )
    os.makedirs(folder / "1", exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.symlink(folder / "runs", folder / "1" / "runs")  # the second one's words go beside it
    processes = [
        start(
            folder / where,
            name,
            *arguments,
            fault=fault,
            script=script,
            RANK=rank,
            LOCAL_RANK=rank,
            **ports,
        )
        for rank, where, fault in (("0", "", faults[0]), ("1", "1", faults[1]))
    ]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes], (folder / f"{name}.out").read_text() + (
        folder / f"{name}.err"
    ).read_text()


def log(folder, name):
    """The log's lines, but for what no two runs share."""
    with open(folder / "runs" / name / "log.jsonl") as f:
        return [
            {
                k: v
                for k, v in json.loads(line).items()
                if k not in ("seconds", "images/s", "data wait")
            }
            for line in f
        ]


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """undisturbed(*settings) -> the folder of that run, and how long it took; each is run once."""

    @functools.cache
    def whole(*settings, processes=1):
        folder, began = tmp_path_factory.mktemp("whole"), time.time()
        if processes == 1:
            run(folder, "whole", images, *settings)
        else:
            codes, said = two(folder, "whole", images, *settings)
            assert codes == [0, 0], said
        return folder, time.time() - began

    return whole


def assert_equal(folder, name, whole):
    """A run ended as an undisturbed one, bit for bit: everything in the checkpoint, and the log."""
    a, b = state(whole, "whole"), state(folder, name)
    assert a.keys() == b.keys()
    for part in a:
        assert same(a[part], b[part]), part
    lines = log(folder, name)
    assert lines == log(whole, "whole")
    epochs = [line["epoch"] for line in lines]
    assert epochs == list(range(epochs[0], 1 + a["epoch"]))
    assert not [f for f in os.listdir(folder / "runs" / name) if f.endswith(".part")]


# --------------------------------------------------------- faults: what `child` does before it runs


def at(epoch, step, act):
    """act() when the loop asks for that step."""
    plain = Loader.epoch

    def epoch_(self, e, first=0):
        for i, item in enumerate(plain(self, e, first), first):
            if (e, i) == (epoch, step):
                act()
            yield item

    Loader.epoch = epoch_


def gets(number, epoch, step):
    return functools.partial(at, epoch, step, functools.partial(send, number))


def send(number):
    os.kill(os.getpid(), number)


def waits_for_a_signal(fifo):
    """Tells by the fifo that it is there, and goes on when a signal has come from outside."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    watched = signal.set_wakeup_fd(write)
    with open(fifo, "w") as f:
        f.write("there")
    while not signals.stop_requested():
        os.read(read, 1)
    signal.set_wakeup_fd(watched)


def there(fifo):
    """Wait until a run has come to its waits_for_a_signal."""
    with open(fifo) as f:
        return f.read()


def disk_is_full(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def disk_is_small(size):
    """runs/ is a tmpfs of `size` bytes, in a mount namespace of the process's own; what lies there at its end is copied to kept/."""
    os.makedirs("runs")
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x20000):  # CLONE_NEWUSER, CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "no namespaces")
    for file, text in (
        ("uid_map", f"0 {user} 1"),
        ("setgroups", "deny"),
        ("gid_map", f"0 {group} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as f:
            f.write(text)
    if libc.mount(b"none", b"runs", b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "no tmpfs")
    multiprocessing.util.Finalize(None, shutil.copytree, ("runs", "kept"), exitpriority=0)


def rights_are_a_users():
    """Root may write everywhere; without its capabilities it is held to a folder's mode."""
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def dies_in_mid_file(save):
    """Killed when half of the `save`-th checkpoint is written."""
    plain, count = torch.save, iter(range(1, 100))

    def half(value, f):
        if next(count) < save:
            return plain(value, f)
        plain(value, whole := io.BytesIO())
        f.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        f.flush()
        send(signal.SIGKILL)

    torch.save = half


def gets_at_an_epochs_end(epoch):
    """SIGTERM while the epoch's line is written, for which no step looks any more."""
    plain = Log.write

    def write(self, e, figures):
        plain(self, e, figures)
        if e == epoch:
            send(signal.SIGTERM)

    Log.write = write


def wrong(what, epoch, step):
    """A loss, or a gradient, that is not a number."""
    plain, due = NCE.forward, []

    def forward(self, contrast, now):
        output = plain(self, contrast, now)
        if not due:
            return output
        due.clear()
        loss = output.loss * torch.nan if what == "loss" else Broken.apply(output.loss)
        return output._replace(loss=loss)

    NCE.forward = forward
    at(epoch, step, lambda: due.append(True))


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


def scales_too_far():
    """The GradScaler of fp16, on a CPU, from a scale at which gradients are infinite: it skips these steps and halves the scale."""
    plain = torch.amp.GradScaler
    torch.amp.GradScaler = lambda device, enabled: plain(device, init_scale=2.0**127)


def both(*faults):
    for fault in faults:
        fault()


# ------------------------------------------------------------------------------------------- killed


def readable(folder, name):
    """No file of a run with a checkpoint's name is half a one."""
    for file in ("last.pt", "previous.pt", "backbone.pt"):
        if os.path.exists(path := folder / "runs" / name / file):
            checkpoint.read_checkpoint(str(path))


@pytest.mark.parametrize("pair", SOME)
def test_killed_at_random_moments_ends_as_if_undisturbed(pair, undisturbed, images, tmp_path):
    """Whenever it comes to an end in spite of it, another run begins."""
    whole, seconds = undisturbed(*PAIRS[pair])
    chance, kills = random.Random(pair), 0
    while kills < int(os.environ.get("KILLS", 1)):
        process = start(tmp_path, "cut", images, *PAIRS[pair])
        # a moment, not a synchronisation: any will do
        process.join(chance.uniform(0.1, 1) * seconds)
        process.kill()
        process.join()
        readable(tmp_path, "cut")
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            assert_equal(tmp_path, "cut", whole)
            shutil.rmtree(tmp_path / "runs")
    run(tmp_path, "cut", images, *PAIRS[pair])
    assert_equal(tmp_path, "cut", whole)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_file(undisturbed, images, tmp_path):
    whole, _ = undisturbed(*PAIRS["moco-ifnd"])
    for save in (1, 2, 1):  # the first epoch's; the second's; the second's again
        run(
            tmp_path,
            "cut",
            images,
            *PAIRS["moco-ifnd"],
            fault=functools.partial(dies_in_mid_file, save),
            code=-signal.SIGKILL,
        )
        readable(tmp_path, "cut")
        assert os.path.exists(tmp_path / "runs" / "cut" / "last.pt.part")
    assert state(tmp_path, "cut")["epoch"] == 1
    run(tmp_path, "cut", images, *PAIRS["moco-ifnd"])
    assert_equal(tmp_path, "cut", whole)


def parts(value):
    net = nn.Linear(2, 1)
    nn.init.constant_(net.weight, value)
    return {"encoder": net}


def save_and_die(line):
    """The third save, killed at the `line`-th line of it."""
    count = iter(range(1000))

    def trace(frame, event, argument):
        if event == "line" and next(count) == line:
            send(signal.SIGKILL)
        return trace

    sys.settrace(
        lambda frame, event, argument: (
            trace
            if frame.f_code in (checkpoint.write.__code__, checkpoint.append_checksum.__code__)
            else None
        )
    )
    checkpoint.save("last.pt", {}, 3, **parts(3))
    os._exit(0)


def unlinkable(*names):
    raise PermissionError("a disk without hard links")


def dies_at_every_line(folder, links):
    os.link, found, gaps = os.link if links else unlinkable, set(), 0
    for line in range(1000):
        os.makedirs(os.path.join(folder, str(line)))
        os.chdir(os.path.join(folder, str(line)))
        for epoch in (1, 2):
            checkpoint.save("last.pt", {}, epoch, **parts(epoch))
        if not (process := os.fork()):
            save_and_die(line)
        if os.waitpid(process, 0)[1] == 0:
            break
        gaps += not os.path.exists("last.pt")
        assert checkpoint.exists("last.pt")
        epoch = checkpoint.resume("last.pt", {}, **(after := parts(0)))
        assert after["encoder"].weight.eq(epoch).all()
        assert epoch == 2 or os.path.exists("last.pt")
        found.add(epoch)
        checkpoint.save("last.pt", {}, 3, **parts(3))  # what was left over is in nobody's way
        assert checkpoint.resume("last.pt", {}, **parts(0)) == 3
        assert checkpoint.read_checkpoint("previous.pt")["epoch"] >= 2
        assert sorted(os.listdir()) == ["last.pt", "previous.pt"]
    assert found == {2, 3}
    assert line > 15
    assert (gaps > 0) != links


@pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])
def test_killed_at_any_line_of_a_save(links, tmp_path):
    """Between the two renames too. The last whole checkpoint is found, and only a disk without hard links has a moment with previous.pt alone."""
    process = SERVER.Process(target=dies_at_every_line, args=(str(tmp_path), links))
    process.start()
    process.join()
    assert process.exitcode == 0


# ------------------------------------------------------------------------------------- told to stop


@pytest.mark.parametrize("pair", SOME)
def test_told_to_stop_it_goes_on_in_mid_epoch(pair, undisturbed, images, tmp_path):
    """SIGTERM in one epoch and SIGUSR1 in the next: it finishes the step, saves, says so, exits with 75, and the end is that of an undisturbed run."""
    whole, _ = undisturbed(*PAIRS[pair])
    chance = random.Random(pair)
    for epoch, number in ((chance.choice((0, 1)), signal.SIGTERM), (2, signal.SIGUSR1)):
        step = chance.randrange(8)  # the last is among them: nothing but the epoch's end is left
        said = run(tmp_path, "cut", images, *PAIRS[pair], fault=gets(number, epoch, step), code=75)
        assert said.splitlines()[-1] == (
            f"told to stop: runs/cut/last.pt holds the state after step {step + 1} of 8 of epoch {epoch + 1}, "
            "and the same line goes on from there"
        )
        assert state(tmp_path, "cut")["epoch"] == epoch
        assert state(tmp_path, "cut")["place"]["step"] == step + 1
    assert f"going on after step {step + 1} of 8 of epoch 3" in run(
        tmp_path, "cut", images, *PAIRS[pair]
    )
    assert_equal(tmp_path, "cut", whole)


def test_told_to_stop_at_an_epochs_end(undisturbed, images, tmp_path):
    """Then there is no step to go on from; after the last epoch only the weights are left."""
    whole, _ = undisturbed(*PAIRS["moco-ifnd"])
    for epoch in (1, 2, 3):
        said = run(
            tmp_path,
            "cut",
            images,
            *PAIRS["moco-ifnd"],
            fault=functools.partial(gets_at_an_epochs_end, epoch),
            code=75,
        )
        assert f"last.pt holds the state after epoch {epoch} of 3," in said.splitlines()[-1]
        assert state(tmp_path, "cut")["place"]["step"] == 0
    run(tmp_path, "cut", images, *PAIRS["moco-ifnd"])
    assert_equal(tmp_path, "cut", whole)


def test_a_checkpoint_from_before_there_was_a_place_still_resumes(undisturbed, images, tmp_path):
    whole, _ = undisturbed(*PAIRS["moco-ifnd"])
    run(
        tmp_path,
        "old",
        images,
        *PAIRS["moco-ifnd"],
        fault=gets(signal.SIGKILL, 1, 3),
        code=-signal.SIGKILL,
    )
    path = tmp_path / "runs" / "old" / "last.pt"
    # no checksum either
    torch.save({k: v for k, v in torch.load(path, weights_only=True).items() if k != "place"}, path)
    assert "going on after epoch 1 of 3" in run(tmp_path, "old", images, *PAIRS["moco-ifnd"])
    assert_equal(tmp_path, "old", whole)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_image_workers_at_work(
    undisturbed, images, tmp_path
):
    """As torchrun and SLURM send it. The processes that decode images outlive it, so that the step can be finished. (A program of its own, for its exit.)"""
    whole, _ = undisturbed(*PAIRS["ir-ring"])
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "job.py").write_text(
        f"import runpy, sys; sys.path[:0] = [{ROOT!r}, {os.path.dirname(__file__)!r}]; import test_faults\n"
        "test_faults.at(1, 2, lambda: test_faults.waits_for_a_signal('fifo'))\n"
        f"runpy.run_path({os.path.join(ROOT, 'train_pretrain.py')!r}, run_name='__main__')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "job.py", *SMALL, images, *PAIRS["ir-ring"], "data.workers=2", "name=cut"],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    there(tmp_path / "fifo")
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 75, out + err
    assert err == "", out + err
    assert "after step 3 of 8 of epoch 2" in out.splitlines()[-1], out + err
    run(tmp_path, "cut", images, *PAIRS["ir-ring"])
    assert_equal(tmp_path, "cut", whole)


# -------------------------------------------------------------------------------- several processes

MANY_STEPS = [*PAIRS["moco-ifnd"], "optim.batch_size=4", "optim.epochs=2"]  # 25 an epoch


def test_two_processes_stop_at_the_same_step(undisturbed, images, tmp_path):
    """The second alone gets the signal. Both look for it where they wait for one another: at the 21st step. Each goes on with its own BatchNorm statistics."""
    whole, _ = undisturbed(*MANY_STEPS, processes=2)
    codes, said = two(
        tmp_path, "cut", images, *MANY_STEPS, faults=(None, gets(signal.SIGTERM, 1, 3))
    )
    assert codes == [75, 75], said
    assert "after step 21 of 25 of epoch 2" in said.splitlines()[-1], said
    shutil.copytree(tmp_path / "runs" / "cut", tmp_path / "runs" / "alone")
    codes, said = two(tmp_path, "cut", images, *MANY_STEPS)
    assert codes == [0, 0]
    assert "going on after step 21" in said
    assert_equal(tmp_path, "cut", whole)
    # and a lone one goes on too
    assert "is of 2 processes, now there are 1" in run(tmp_path, "alone", images, *MANY_STEPS)
    assert log(tmp_path, "alone")[1]["loss"] == pytest.approx(
        log(whole, "whole")[1]["loss"], rel=0.2
    )


def agent(folder, arguments):
    """What torchrun is, but that it forks its two workers, where torchrun starts programs that import torch each."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(folder)
    config = LaunchConfig(
        1,
        1,
        2,
        max_restarts=1,
        start_method="fork",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0},
    )
    elastic_launch(config, worker)(folder, arguments)


def worker(folder, arguments):
    rank, again = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    child(
        folder,
        "cut",
        arguments,
        None if again == "1" or rank == "0" else gets(signal.SIGKILL, 1, 5),
        {},
        f".{rank}{again}",
    )


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again(undisturbed, images, tmp_path):
    """One of two, in the second epoch. torchrun's agent ends the other one too, and both go on from the first epoch's checkpoint."""
    whole, _ = undisturbed(*MANY_STEPS, processes=2)
    # --fresh is meant for the first time
    process = SERVER.Process(target=agent, args=(str(tmp_path), [images, *MANY_STEPS, "--fresh"]))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "going on after epoch 1 of 2" in (tmp_path / "cut.01.out").read_text()
    assert_equal(tmp_path, "cut", whole)


def job(folder, fault):
    """A script for torchrun: train_pretrain.py with a fault of the second process's, the first time."""
    (folder / "job.py").write_text(f"""import functools, os, runpy, signal, sys
sys.path[:0] = [{ROOT!r}, {os.path.dirname(__file__)!r}]
print("begins", flush=True)
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    import test_faults
    {fault}
runpy.run_path({os.path.join(ROOT, "train_pretrain.py")!r}, run_name="__main__")
""")
    return folder / "job.py"


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again_by_torchrun(undisturbed, images, tmp_path):
    """The same with torchrun itself."""
    whole, _ = undisturbed(*MANY_STEPS, processes=2)
    script = job(tmp_path, "test_faults.gets(signal.SIGKILL, 1, 5)()")
    # which is meant for the first time
    done = torchrun(
        2,
        ["--max-restarts", 1, script, *SMALL, images, *MANY_STEPS, "--fresh", "name=cut"],
        tmp_path,
    )
    assert done.stdout.count("begins") == 4
    assert done.stdout.count("going on after epoch 1 of 2") == 1
    assert_equal(tmp_path, "cut", whole)


@pytest.mark.slow
def test_torchrun_is_told_to_stop(undisturbed, images, tmp_path):
    """It passes SIGTERM on to its workers' process groups, and waits."""
    whole, _ = undisturbed(*MANY_STEPS, processes=2)
    os.mkfifo(tmp_path / "fifo")
    script = job(
        tmp_path,
        f"test_faults.at(1, 5, functools.partial(test_faults.waits_for_a_signal, {str(tmp_path / 'fifo')!r}))",
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        str(script),
        *SMALL,
        images,
        *MANY_STEPS,
        "data.workers=1",
        "name=cut",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    there(tmp_path / "fifo")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode != 0, out
    assert "told to stop" in out, out
    assert state(tmp_path, "cut")["place"]["step"] == 21, out
    codes, said = two(tmp_path, "cut", images, *MANY_STEPS)
    assert codes == [0, 0], said
    assert_equal(tmp_path, "cut", whole)


# -------------------------------------------------------------------------------------------- disks


def fills_before_the_log(epoch, size):
    """The disk takes the checkpoint of an epoch and not its line in the log."""
    plain = Log.write

    def write(self, e, figures):
        if e == epoch:
            disk_is_full(size)
        plain(self, e, figures)

    Log.write = write


@pytest.mark.parametrize(
    ("fault", "file", "epoch"),
    [
        (functools.partial(at, 1, 7, functools.partial(disk_is_full, 300_000)), "last.pt", 1),
        (functools.partial(fills_before_the_log, 2, 30_000), "log.jsonl", 2),
    ],
    ids=["checkpoint", "log"],
)
def test_a_full_disk(fault, file, epoch, undisturbed, images, tmp_path):
    whole, _ = undisturbed(*PAIRS["moco-ifnd"])
    sentence = refused(tmp_path, "full", images, *PAIRS["moco-ifnd"], fault=fault)
    words = "cannot be written: File too large; what was there before is as it was"
    assert sentence == f"runs/full/{file} {words}"
    assert state(tmp_path, "full")["epoch"] == epoch
    assert not os.path.exists(tmp_path / "runs" / "full" / "last.pt.part")
    run(tmp_path, "full", images, *PAIRS["moco-ifnd"])
    assert_equal(tmp_path, "full", whole)


def test_a_disk_that_fills_up(undisturbed, images, tmp_path):
    """A small tmpfs, with room for one checkpoint and not for the second beside it."""
    if (
        not shutil.which("unshare")
        or subprocess.run(
            ["unshare", "--user", "--mount", "true"], stderr=subprocess.DEVNULL
        ).returncode
    ):
        pytest.skip("needs a Linux that lets users mount in a namespace")
    whole, _ = undisturbed(*PAIRS["moco-ifnd"])
    size = int(1.7 * os.path.getsize(whole / "runs" / "whole" / "last.pt")) + 100_000
    sentence = refused(
        tmp_path, "full", images, *PAIRS["moco-ifnd"], fault=functools.partial(disk_is_small, size)
    )
    assert (
        sentence
        == "runs/full/last.pt cannot be written: No space left on device; what was there before is as it was"
    )
    os.rmdir(tmp_path / "runs")
    os.rename(tmp_path / "kept", tmp_path / "runs")
    assert state(tmp_path, "full")["epoch"] == 1
    assert not os.path.exists(tmp_path / "runs" / "full" / "last.pt.part")
    run(tmp_path, "full", images, *PAIRS["moco-ifnd"])
    assert_equal(tmp_path, "full", whole)


@pytest.mark.parametrize("folder", ["runs", "runs/a"])
def test_a_folder_that_may_not_be_written(folder, images, tmp_path):
    os.makedirs(tmp_path / folder)
    os.chmod(tmp_path / folder, 0o555)
    assert (
        refused(tmp_path, "a", images, fault=rights_are_a_users)
        == "runs/a cannot be written: Permission denied; what was there before is as it was"
    )


def test_every_flipped_bit_is_noticed(tmp_path):
    """One in every fifth byte of a checkpoint, and all in its last bytes, where the checksum is; and a file cut short. (torch.load minds one flip in ten.)"""
    path, chance = str(tmp_path / "last.pt"), random.Random(0)
    checkpoint.save(path, {}, 1, **parts(1))
    with open(path, "rb") as f:
        good = f.read()
    flips = [(i, chance.randrange(8)) for i in range(0, len(good), 5)] + [
        (i, bit) for i in range(len(good) - 60, len(good)) for bit in range(8)
    ]
    for i, bit in flips:
        with open(path, "wb") as f:
            f.write(good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1 :])
        with pytest.raises(SystemExit, match="read safely"):
            checkpoint.read_checkpoint(path)
    for size in (*range(0, len(good), 200), *range(len(good) - 60, len(good))):
        with open(path, "wb") as f:
            f.write(good[:size])
        with pytest.raises(SystemExit, match="read safely"):
            checkpoint.read_checkpoint(path)


def damage(path):
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 3)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("how", [pytest.param("flipped", marks=pytest.mark.slow), "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(how, undisturbed, images, tmp_path):
    whole, _ = undisturbed(*PAIRS["moco-ifnd"])
    run(
        tmp_path,
        "a",
        images,
        *PAIRS["moco-ifnd"],
        fault=gets(signal.SIGKILL, 2, 4),
        code=-signal.SIGKILL,
    )
    last, previous = tmp_path / "runs" / "a" / "last.pt", tmp_path / "runs" / "a" / "previous.pt"
    if how == "gone":
        os.remove(last)
    else:
        damage(last)
    # and once more before it has saved
    said = run(
        tmp_path,
        "a",
        images,
        *PAIRS["moco-ifnd"],
        fault=gets(signal.SIGKILL, 1, 4),
        code=-signal.SIGKILL,
    )
    assert (
        f"runs/a/last.pt {'does not exist' if how == 'gone' else 'is not a checkpoint that can be read safely'}"
        in said
    )
    assert "going on from the one before, runs/a/previous.pt" in said
    assert "going on after epoch 1 of 3" in said
    run(tmp_path, "a", images, *PAIRS["moco-ifnd"])
    assert_equal(tmp_path, "a", whole)
    if how != "flipped":
        return
    for file in (last, previous):
        damage(file)
    sentence = refused(tmp_path, "a", images, *PAIRS["moco-ifnd"])
    assert "last.pt is not" in sentence
    assert "previous.pt is not" in sentence
    assert sentence.endswith("start over with --fresh")
    run(tmp_path, "a", images, *PAIRS["moco-ifnd"], "--fresh")
    assert_equal(tmp_path, "a", whole)


@pytest.mark.parametrize(
    "settings,difference",
    [
        (PAIRS["ir-nce"], "model.host was 'moco' and is now 'ir'"),
        (PAIRS["moco-ring"], "loss.name was 'nce' and is now 'ring'"),
        ([*PAIRS["moco-nce"], "model.width=16"], "model.width was 8 and is now 16"),
        ([*PAIRS["moco-nce"], "data.limit=99"], "data.limit was None and is now 99"),
        (PAIRS["moco-nce"], "it is of 100 images, and now there are 101"),
    ],
    ids=["host", "loss", "network", "fewer images", "another folder"],
)
def test_another_runs_checkpoint_is_refused(settings, difference, undisturbed, images, tmp_path):
    whole, _ = undisturbed(*PAIRS["moco-nce"])
    shutil.copytree(whole / "runs" / "whole", tmp_path / "runs" / "whole")
    if settings == PAIRS["moco-nce"]:
        shutil.copytree(images.partition("=")[2], tmp_path / "images")
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / "00" / "more.png")
        images = f"data.root={tmp_path / 'images'}"
    assert difference in refused(tmp_path, "whole", images, *settings)


def test_fresh_leaves_nothing_of_the_old_weights_to_be_taken(
    undisturbed, images, tmp_path, monkeypatch
):
    """The new run is killed in its first epoch, and once more: what the old one left is there under other names, and nothing of it is evaluated."""
    whole, _ = undisturbed(*PAIRS["moco-nce"])
    folder = tmp_path / "runs" / "whole"
    shutil.copytree(whole / "runs" / "whole", folder)
    for part in ("finetune", "detect"):
        os.makedirs(folder / part)
        (folder / part / "last.pt").write_text(part)
        (folder / f"{part}.jsonl").write_text(part)
        os.makedirs(folder / f"{part}.before" / "of an older run")
    old = {
        name: (folder / name).read_bytes()
        for name in (
            "backbone.pt",
            "last.pt",
            "previous.pt",
            "config.yaml",
            "log.jsonl",
            "detect.jsonl",
        )
    }
    dies = {"fault": gets(signal.SIGKILL, 0, 3), "code": -signal.SIGKILL}
    run(tmp_path, "whole", images, *PAIRS["moco-nce"], "loss.temperature=0.3", "--fresh", **dies)
    run(tmp_path, "whole", images, *PAIRS["moco-nce"], "loss.temperature=0.3", **dies)
    assert all((folder / f"{name}.before").read_bytes() == value for name, value in old.items())
    for part in ("finetune", "detect"):
        assert (folder / f"{part}.before" / "last.pt").read_text() == part
        assert not (folder / part).exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="runs/whole holds no backbone.pt; first run"):
        weights.of_run(None, "runs/whole", "FILE")
    # An older version left backbone.pt where it was: then it is refused by what it says of itself.
    with pytest.raises(
        SystemExit,
        match=r"backbone.pt.before was not trained with the settings of runs/whole/config.yaml: loss.temperature was 0.2 and is now 0.3",
    ):
        weights.read_backbone("runs/whole/backbone.pt.before")
    run(tmp_path, "whole", images, *PAIRS["moco-nce"], "loss.temperature=0.3")
    assert weights.read_backbone("runs/whole/backbone.pt")[0]


def test_a_second_process_on_one_folder_is_refused(images, tmp_path):
    """As long as the first one lives; not when it was killed, though its image workers live for some seconds more."""
    os.mkfifo(tmp_path / "fifo")
    wait = functools.partial(at, 0, 2, functools.partial(waits_for_a_signal, tmp_path / "fifo"))
    first = start(tmp_path, "a", images, "data.workers=1", fault=wait)
    there(tmp_path / "fifo")
    sentence = refused(tmp_path, "a", images)
    assert sentence.startswith(f"runs/a is in use: process {first.pid} on ")
    assert sentence.endswith("choose another name=...")
    run(tmp_path, "b", images)
    first.kill()
    first.join()
    run(tmp_path, "a", images)


def test_a_run_that_is_refused_leaves_no_lock(tmp_path, monkeypatch):
    """In a notebook, which keeps the traceback and all that the frames in it hold."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", *SMALL, "data.root=nowhere", "name=a"])
    with pytest.raises(SystemExit, match="there is no folder nowhere") as kept:
        train_pretrain.main()
    assert kept.traceback
    assert not os.path.exists("runs/a")
    os.makedirs("runs/a")  # a folder that was there before stays
    with pytest.raises(SystemExit, match="there is no folder nowhere"):
        train_pretrain.main()
    assert os.listdir("runs/a") == []


def others_may_lock(folder):
    """Does a process of its own get the lock? (To this one its own locks are no obstacle.)"""
    if not (child := os.fork()):
        try:
            checkpoint.acquire_lock(folder)
        except SystemExit:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_a_lock_that_is_removed_does_not_let_two_in(tmp_path, monkeypatch):
    """One process has opened the file when its owner removes it; another comes and makes a new one."""
    folder, path = str(tmp_path), str(tmp_path / "lock")
    owner, plain, opened = checkpoint.acquire_lock(folder), checkpoint.fcntl.lockf, []
    assert not others_may_lock(folder)

    def owner_ends_first(file, how):
        opened.append(os.fstat(file.fileno()).st_ino)
        if len(opened) == 1:
            checkpoint.release_lock(owner)
            assert not os.path.exists(path)
        plain(file, how)

    monkeypatch.setattr(checkpoint.fcntl, "lockf", owner_ends_first)
    held = checkpoint.acquire_lock(folder)
    monkeypatch.undo()
    assert len(opened) == 2
    assert os.stat(path).st_ino == opened[1] == os.fstat(held.fileno()).st_ino
    assert not others_may_lock(folder)  # as it would, if that first file counted
    checkpoint.release_lock(held)
    assert os.listdir(folder) == []
    assert others_may_lock(folder)


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "lockf", no_locks)
    with checkpoint.lock_run_folder(str(tmp_path / "a")):
        pass
    assert (
        "cannot be locked ([Errno 37] No locks available): see to it yourself that no second process trains there"
        in capsys.readouterr().out
    )


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("signalled", [False, True], ids=["", "and told to stop"])
@pytest.mark.parametrize("what", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(
    what, signalled, undisturbed, images, tmp_path
):
    fault = functools.partial(wrong, what, 1, 3)
    sentence = refused(
        tmp_path,
        "nan",
        images,
        fault=functools.partial(both, fault, gets(signal.SIGTERM, 1, 3)) if signalled else fault,
    )
    named = (
        "the loss is nan at epoch 2, step 4 of 8"
        if what == "loss"
        # a weight is seen in the next step's loss
        else (
            "a weight is not finite at epoch 2, step 4 of 8"
            if signalled
            else "the loss is nan at epoch 2, step 5 of 8"
        )
    )
    assert (
        sentence
        == f"{named}; runs/nan/last.pt holds the state after epoch 1 of 3; try a lower optim.lr, with --fresh or another name=..."
    )
    assert checkpoint.not_finite(saved := state(tmp_path, "nan")) is None
    assert saved["epoch"] == 1
    assert saved["place"]["step"] == 0
    if not signalled:
        run(tmp_path, "nan", images)  # it was no fault of the settings
        assert_equal(tmp_path, "nan", undisturbed()[0])


def test_two_processes_end_together_when_one_has_no_loss(images, tmp_path):
    codes, said = two(
        tmp_path,
        "nan",
        images,
        *PAIRS["moco-nce"],
        faults=(None, functools.partial(wrong, "loss", 1, 3)),
    )
    assert codes == [1, 1], said
    assert said.splitlines()[-1].startswith(
        "the loss is nan at epoch 2, step 4 of 8; runs/nan/last.pt holds the state after epoch 1"
    ), said
    assert (tmp_path / "1" / "nan.err").read_text() == ""  # said once


def test_nothing_that_is_not_finite_can_be_saved(tmp_path):
    path, bad = str(tmp_path / "last.pt"), parts(1)
    checkpoint.save(path, {}, 1, **bad)
    nn.init.constant_(bad["encoder"].bias, torch.inf)
    with pytest.raises(SystemExit, match="last.pt is not written, for encoder.bias is not finite"):
        checkpoint.save(path, {}, 2, **bad)
    assert checkpoint.resume(path, {}, **parts(0)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_value_that_is_not_finite_is_found(dtype):
    """By aminmax alone, in every shape that a state has; of integers and of nothing there is none."""
    fine = {
        "scalar": torch.zeros((), dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "step": torch.arange(3),
    }
    assert checkpoint.not_finite(fine) is None
    for bad in (torch.nan, torch.inf, -torch.inf):
        for shape, row in (
            ((), ()),
            ((999, 33), (998, 32)),
            ((999, 33), (0, 0)),
            ((999, 33), (500, 7)),
        ):
            value = torch.randn(shape).to(dtype)
            value[row] = bad
            assert checkpoint.not_finite({**fine, "host": [{"bank": value}]}) == "host.0.bank"
            if shape:
                assert checkpoint.not_finite({"bank": value.T}) == "bank"


def test_looking_for_what_is_not_finite_takes_no_memory():
    """A bank of 64 MiB: nothing of its size is made beside it, on no device."""
    made = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            result = function(*arguments, **(kwargs or {}))
            made.extend(
                x.numel()
                for x in (result if isinstance(result, (list, tuple)) else [result])
                if torch.is_tensor(x)
            )
            return result

    bank = torch.zeros(131072, 128)
    with Count():
        assert checkpoint.not_finite({"bank": bank}) is None
    assert made
    assert max(made) <= 2


def test_a_skipped_step_of_fp16_is_no_fault(images, tmp_path):
    run(tmp_path, "fp16", images, fault=scales_too_far)
    scaler = state(tmp_path, "fp16")["scaler"]
    assert scaler["scale"] < 2.0**127
    assert [line["epoch"] for line in log(tmp_path, "fp16")] == [
        1,
        2,
        3,
    ]


def scales_the_loss():
    """As fp16 does, on a CPU, whose other precisions need no scaling."""
    plain = torch.amp.GradScaler
    torch.amp.GradScaler = lambda device, enabled: plain(device, init_scale=2.0)


@pytest.mark.parametrize("first, then", [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_goes_on_on_hardware_of_another_precision(first, then, images, tmp_path):
    """fp32 stands for fp16, the one with loss scaling. Begun without it, the scaler starts afresh; begun with it, its state is left out."""
    faults = {"fp32": [scales_the_loss], "bf16": []}
    stops = gets(signal.SIGTERM, 1, 3)
    run(
        tmp_path,
        "a",
        images,
        f"model.precision={first}",
        fault=functools.partial(both, *faults[first], stops),
        code=75,
    )
    assert bool(state(tmp_path, "a")["scaler"]) == (first == "fp32")
    said = run(
        tmp_path,
        "a",
        images,
        f"model.precision={then}",
        fault=functools.partial(both, *faults[then]),
    )
    assert f"runs/a/last.pt was trained in {first} so far, and goes on in {then}" in said
    assert "going on after step 4 of 8 of epoch 2" in said
    saved = state(tmp_path, "a")
    assert saved["epoch"] == 3
    assert bool(saved["scaler"]) == (then == "fp32")
    assert [line["epoch"] for line in log(tmp_path, "a")] == [1, 2, 3]


@pytest.mark.parametrize(
    "old, new", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "mps"), ("cpu", "cpu")]
)
def test_random_states_of_another_device_are_no_obstacle(old, new, tmp_path, monkeypatch, capsys):
    """Those of the CPU are taken, the others left alone; a state that does not fit its generator is too."""
    path = str(tmp_path / "last.pt")
    checkpoint.save(path, {}, 1, **parts(1))
    expected, saved = torch.rand(3), checkpoint.read_checkpoint(path)
    if old != "cpu":
        saved["rng"][0][old] = torch.zeros(16, dtype=torch.uint8)
        torch.save(saved, path)
    monkeypatch.setattr(checkpoint.devices, "current", torch.device(new))
    assert checkpoint.resume(path, {}, **parts(0)) == 1
    assert torch.equal(torch.rand(3), expected)
    words = f"{path} was written on {old}, and goes on on {new}: from here on its random numbers are others\n"
    assert capsys.readouterr().out == (words if old != new else "")

    saved["rng"][0]["cpu"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(saved, path)
    assert checkpoint.resume(path, {}, **parts(0)) == 1
    assert f"was written on another kind of {old}, and goes on on {new}" in capsys.readouterr().out


def test_a_collapse_is_warned_of_once(images, tmp_path):
    """So strong a weight decay leaves no weights, and all images look alike."""
    said = run(tmp_path, "point", images, "optim.weight_decay=20", "loss.name=nce")
    assert said.count("WARNING: the embeddings collapse: their spread is 0.0") == 1
    assert log(tmp_path, "point")[2]["spread"] < 0.05


# -------------------------------------------------------------------------------- what the end says


@pytest.mark.parametrize(
    "log, words",
    [
        (
            [{"epoch": 0, "knn": 12.0}, {"epoch": 1, "knn": 17.0}, {"epoch": 2, "knn": 43.0}],
            "\n  kNN    untrained  12.0 %\n  after   2 epochs  43.0 %\n\n",
        ),
        # knn.every was 0 at first, and 1 after a resume.
        (
            [{"epoch": 1}, {"epoch": 2, "knn": 17.0}, {"epoch": 3, "knn": 43.0}],
            "\n  kNN after   3 epochs  43.0 %\n\n",
        ),
        # knn.every was 1 at first, and 0 after a resume: the last figure is not the end's.
        (
            [{"epoch": 0, "knn": 12.0}, {"epoch": 1, "knn": 17.0}, {"epoch": 2}],
            "\n  kNN    untrained  12.0 %\n  after   1 epochs  17.0 %\n\n",
        ),
        ([{"epoch": 0, "knn": 12.0}, {"epoch": 1}], "\n  kNN    untrained  12.0 %\n\n"),
        ([{"epoch": 1}], ""),
    ],
)
def test_only_epoch_0_is_untrained(log, words):
    assert summary.knn_summary(log) == words
