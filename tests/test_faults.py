"""Faults, done to real runs. Nothing is lost, and nothing is silent.

Runs are killed and told to stop; they lose a worker; their disk is full or damaged; their numbers
are not finite.

Every run is a process of its own, forked by a server that has imported torch already. It takes half
a second, and most tests need several.

KILLS=n: n SIGKILLs at random moments instead of one, and twelve pairs of host and loss instead of
four.
"""

import contextlib
import ctypes
import functools
import io
import itertools
import json
import multiprocessing.util
import os
import random
import resource
import runpy
import select
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
from processes import ROOT, SERVER, free_port, group_environments, torchrun
from test_pairs import PAIRS
from test_scripts import QUICK, TIMES, same, state
from training import summary

TESTS = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(ROOT, "train_pretrain.py")
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
SLOW_PAIRS = TWELVE if "KILLS" in os.environ else ["ir-ring", "cmc-mochi", "simclr-ifnd"]
KILLED_PAIRS = ["moco-ifnd"] + [
    pytest.param(pair, marks=pytest.mark.slow) for pair in SLOW_PAIRS if pair != "moco-ifnd"
]


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write 100 images of 16 pixels, in a folder for each class. -> the setting that names them.

    This also starts the server, so that no test's time has its start in it.
    """
    first = SERVER.Process(target=bool)
    first.start()
    first.join()

    folder = tmp_path_factory.mktemp("images")
    for i, (image, label) in enumerate(zip(*shapes(100))):
        class_folder = folder / f"{label:02d}"
        class_folder.mkdir(exist_ok=True)
        image = Image.fromarray(image.transpose(1, 2, 0)).resize((16, 16))
        image.save(class_folder / f"{i:03d}.png")
    return f"data.root={folder}"


def child(folder, name, arguments, fault, environment, suffix="", script="train_pretrain.py"):
    """Be a run: this is what a fork of the server does. fault: a function that is called first."""
    os.chdir(folder)
    os.environ.update(environment)
    # Image workers are forked, as they are in a program that was started by itself.
    multiprocessing.set_start_method("fork", force=True)
    for descriptor, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{name}{suffix}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.argv = [script, *SMALL, *arguments, f"name={name}"]
    if fault:
        fault()
    runpy.run_path(os.path.join(ROOT, script), run_name="__main__")


def start(folder, name, *arguments, fault=None, script="train_pretrain.py", **environment):
    """Start a run in a process of its own. -> the process."""
    args = (str(folder), name, arguments, fault, environment, "", script)
    process = SERVER.Process(target=child, args=args)
    process.start()
    return process


def run(folder, name, *arguments, fault=None, code=0, **environment):
    """Run to the end. code: what it must exit with. -> what it printed."""
    process = start(folder, name, *arguments, fault=fault, **environment)
    process.join()
    printed = output(folder, name)
    assert process.exitcode == code, printed
    return printed


def output(folder, name):
    """Read what a run printed, on both streams."""
    return (folder / f"{name}.out").read_text() + (folder / f"{name}.err").read_text()


def refused(folder, name, *arguments, **options):
    """Run what must end with one sentence and no traceback. -> the sentence."""
    sentence = run(folder, name, *arguments, code=1, **options).splitlines()[-1]
    assert (folder / f"{name}.err").read_text() == sentence + "\n"
    return sentence


def two(folder, name, *arguments, faults=(None, None), script="train_pretrain.py"):
    """Run two processes, without torchrun. -> their exit codes, and what the first printed.

    The output of the second goes to a folder of its own, which shares runs/ with the first.
    """
    os.makedirs(folder / "1", exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.symlink(folder / "runs", folder / "1" / "runs")
    processes = []
    environments = group_environments(2)
    for cwd, fault, environment in zip((folder, folder / "1"), faults, environments):
        process = start(cwd, name, *arguments, fault=fault, script=script, **environment)
        processes.append(process)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes], output(folder, name)


def log(folder, name):
    """Read the lines of a log, without the times, which no two runs share."""
    with open(folder / "runs" / name / "log.jsonl") as f:
        lines = [json.loads(line) for line in f]
    for line in lines:
        for figure in TIMES:
            line.pop(figure, None)
    return lines


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """undisturbed(*settings) -> the folder of that run, and the seconds it took.

    Each is run once.
    """

    @functools.cache
    def run_once(*settings, processes=1):
        folder = tmp_path_factory.mktemp("whole")
        began = time.time()
        if processes == 1:
            run(folder, "whole", images, *settings)
        else:
            codes, printed = two(folder, "whole", images, *settings)
            assert codes == [0, 0], printed
        return folder, time.time() - began

    return run_once


def assert_equal(folder, name, whole):
    """A run ended as an undisturbed one, bit for bit: everything in the checkpoint, and the log.

    Args:
        folder, name: where the run is.
        whole: the folder of the undisturbed run.
    """
    expected, ended = state(whole, "whole"), state(folder, name)
    assert expected.keys() == ended.keys()
    for part in expected:
        assert same(expected[part], ended[part]), part
    lines = log(folder, name)
    assert lines == log(whole, "whole")
    epochs = [line["epoch"] for line in lines]
    assert epochs == list(range(epochs[0], 1 + expected["epoch"]))
    assert not [file for file in os.listdir(folder / "runs" / name) if file.endswith(".part")]


# ---------------------------------------------------- faults, which `child` calls before it runs


def at(epoch, step, act):
    """Call act() when the loop asks for that step."""
    plain_epoch = Loader.epoch

    def epoch_with_act(self, this_epoch, first=0):
        for i, item in enumerate(plain_epoch(self, this_epoch, first), first):
            if (this_epoch, i) == (epoch, step):
                act()
            yield item

    Loader.epoch = epoch_with_act


def send(number):
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


def send_at(number, epoch, step):
    """-> a fault: the run gets a signal when the loop asks for that step."""
    return functools.partial(at, epoch, step, functools.partial(send, number))


def wait_for_a_signal(fifo):
    """Tell by the fifo that the run has come here, and go on when it was told to stop."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous = signal.set_wakeup_fd(write)
    with open(fifo, "w") as f:
        f.write("there")
    while not signals.stop_requested():
        os.read(read, 1)
    signal.set_wakeup_fd(previous)


def wait_until_a_run_waits(fifo, seconds=300):
    """Wait until a run has come to its wait_for_a_signal, but not for ever: it may have failed."""
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    is_there, _, _ = select.select([reader], [], [], seconds)
    os.close(reader)
    assert is_there, f"no run came to {fifo} in {seconds} seconds"


def fill_disk(size):
    """Let no file grow above `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def mount_small_disk(size):
    """Let runs/ be a tmpfs of `size` bytes, in a mount namespace of this process.

    What lies there when the process ends is copied to kept/.
    """
    os.makedirs("runs")
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    clone_newuser, clone_newns = 0x10000000, 0x20000
    if libc.unshare(clone_newuser | clone_newns):
        raise OSError(ctypes.get_errno(), "no namespaces")
    # Within the namespace this user is root, who may mount.
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


def drop_capabilities():
    """Take root's capabilities away: it may write everywhere, and obeys a folder's mode then."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    no_capabilities = (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, no_capabilities)


def die_in_mid_file(number):
    """Kill the run when half of the checkpoint of this number is written. They count from 1."""
    plain_save = torch.save
    count = itertools.count(1)

    def save_or_die(value, file):
        if next(count) < number:
            return plain_save(value, file)
        buffer = io.BytesIO()
        plain_save(value, buffer)
        content = buffer.getvalue()
        file.write(content[: len(content) // 2])
        file.flush()
        send(signal.SIGKILL)

    torch.save = save_or_die


def send_at_the_end_of_epoch(epoch):
    """Send SIGTERM while the line of the epoch is written. No step comes that looks for it."""
    plain_write = Log.write

    def write_and_send(self, this_epoch, figures):
        plain_write(self, this_epoch, figures)
        if this_epoch == epoch:
            send(signal.SIGTERM)

    Log.write = write_and_send


def spoil_numbers(quantity, epoch, step):
    """Let the loss of a step be not a number, or its gradient. quantity: "loss" or "gradient"."""
    plain_forward = NCE.forward
    pending = []

    def forward(self, contrast, now):
        output = plain_forward(self, contrast, now)
        if not pending:
            return output
        pending.clear()
        if quantity == "loss":
            return output._replace(loss=output.loss * torch.nan)
        return output._replace(loss=GradientOfNan.apply(output.loss))

    NCE.forward = forward
    at(epoch, step, functools.partial(pending.append, True))


class GradientOfNan(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


def scale_too_far():
    """Use the GradScaler of fp16, on a CPU, with a first scale at which gradients are infinite.

    It skips these steps, and halves the scale.
    """
    plain_scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda device, enabled: plain_scaler(device, init_scale=2.0**127)


def apply_faults(*faults):
    """Be several faults at once."""
    for fault in faults:
        fault()


# ------------------------------------------------------------------------------------------- killed


def assert_readable(folder, name):
    """No file of a run that is named as a checkpoint is half a one."""
    for file in ("last.pt", "previous.pt", "backbone.pt"):
        if os.path.exists(path := folder / "runs" / name / file):
            checkpoint.read_checkpoint(str(path))


@pytest.mark.parametrize("pair", KILLED_PAIRS)
def test_killed_at_random_moments_ends_as_if_undisturbed(pair, undisturbed, images, tmp_path):
    """Whenever the run comes to its end before it is killed, another run begins."""
    whole, seconds = undisturbed(*PAIRS[pair])
    random_moment = random.Random(pair)
    kills = 0
    while kills < int(os.environ.get("KILLS", 1)):
        process = start(tmp_path, "cut", images, *PAIRS[pair])
        # This waits for no event: any moment will do.
        process.join(random_moment.uniform(0.1, 1) * seconds)
        process.kill()
        process.join()
        assert_readable(tmp_path, "cut")
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            assert_equal(tmp_path, "cut", whole)
            shutil.rmtree(tmp_path / "runs")
    run(tmp_path, "cut", images, *PAIRS[pair])
    assert_equal(tmp_path, "cut", whole)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_file(undisturbed, images, tmp_path):
    whole, _ = undisturbed(*PAIRS["moco-ifnd"])
    # The first epoch's; the second's; and, as a resumed run's first, the second's again.
    for number in (1, 2, 1):
        run(
            tmp_path,
            "cut",
            images,
            *PAIRS["moco-ifnd"],
            fault=functools.partial(die_in_mid_file, number),
            code=-signal.SIGKILL,
        )
        assert_readable(tmp_path, "cut")
        assert os.path.exists(tmp_path / "runs" / "cut" / "last.pt.part")
    assert state(tmp_path, "cut")["epoch"] == 1
    run(tmp_path, "cut", images, *PAIRS["moco-ifnd"])
    assert_equal(tmp_path, "cut", whole)


def parts(value):
    net = nn.Linear(2, 1)
    nn.init.constant_(net.weight, value)
    return {"encoder": net}


def save_and_die(line):
    """Save a third time, and die at the `line`-th line of the functions that write."""
    functions = checkpoint.write, checkpoint.keep_file, checkpoint.append_checksum
    traced_code = [function.__code__ for function in functions]
    count = itertools.count()

    def trace_line(frame, event, argument):
        if event == "line" and next(count) == line:
            send(signal.SIGKILL)
        return trace_line

    def trace_call(frame, event, argument):
        return trace_line if frame.f_code in traced_code else None

    sys.settrace(trace_call)
    checkpoint.save("last.pt", {}, 3, **parts(3))
    os._exit(0)


def refuse_link(*names):
    raise PermissionError("a disk without hard links")


def die_at_every_line(folder, has_links):
    """Save twice and die at a line of the third save, for each line in turn.

    has_links: does the disk have hard links?
    """
    if not has_links:
        os.link = refuse_link
    resumed_epochs = set()
    gaps = 0  # how often only previous.pt was left
    for line in range(1000):
        os.makedirs(os.path.join(folder, str(line)))
        os.chdir(os.path.join(folder, str(line)))
        for epoch in (1, 2):
            checkpoint.save("last.pt", {}, epoch, **parts(epoch))
        process = os.fork()
        if process == 0:
            save_and_die(line)
        _, status = os.waitpid(process, 0)
        if status == 0:
            break
        gaps += not os.path.exists("last.pt")
        assert checkpoint.exists("last.pt")
        after = parts(0)
        epoch = checkpoint.resume("last.pt", {}, **after)
        assert after["encoder"].weight.eq(epoch).all()
        assert epoch == 2 or os.path.exists("last.pt")
        resumed_epochs.add(epoch)
        # What was left over does not hinder the next save.
        checkpoint.save("last.pt", {}, 3, **parts(3))
        assert checkpoint.resume("last.pt", {}, **parts(0)) == 3
        assert checkpoint.read_checkpoint("previous.pt")["epoch"] >= 2
        assert sorted(os.listdir()) == ["last.pt", "previous.pt"]
    assert resumed_epochs == {2, 3}
    assert line > 15
    assert (gaps > 0) != has_links


@pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])
def test_killed_at_any_line_of_a_save(links, tmp_path):
    """The last whole checkpoint is found, also when death comes between the two renames.

    Only a disk without hard links has a moment with previous.pt alone.
    """
    process = SERVER.Process(target=die_at_every_line, args=(str(tmp_path), links))
    process.start()
    process.join()
    assert process.exitcode == 0


# ------------------------------------------------------------------------------------- told to stop


@pytest.mark.parametrize("pair", KILLED_PAIRS)
def test_told_to_stop_it_goes_on_in_mid_epoch(pair, undisturbed, images, tmp_path):
    """SIGTERM comes in one epoch and SIGUSR1 in a later one.

    The run finishes the step, saves, says so, and exits with 75. It ends as an undisturbed run.
    """
    whole, _ = undisturbed(*PAIRS[pair])
    chance = random.Random(pair)
    for epoch, number in ((chance.choice((0, 1)), signal.SIGTERM), (2, signal.SIGUSR1)):
        # The last step is among them, after which nothing but the end of the epoch is left.
        step = chance.randrange(8)
        printed = run(
            tmp_path, "cut", images, *PAIRS[pair], fault=send_at(number, epoch, step), code=75
        )
        assert printed.splitlines()[-1] == (
            f"told to stop: runs/cut/last.pt holds the state after step {step + 1} of 8 "
            f"of epoch {epoch + 1}, and the same line goes on from there"
        )
        assert state(tmp_path, "cut")["epoch"] == epoch
        assert state(tmp_path, "cut")["place"]["step"] == step + 1
    assert f"going on after step {step + 1} of 8 of epoch 3" in run(
        tmp_path, "cut", images, *PAIRS[pair]
    )
    assert_equal(tmp_path, "cut", whole)


def test_told_to_stop_at_an_epochs_end(undisturbed, images, tmp_path):
    """There is no step to go on from. After the last epoch only the weights are left to write."""
    whole, _ = undisturbed(*PAIRS["moco-ifnd"])
    for epoch in (1, 2, 3):
        printed = run(
            tmp_path,
            "cut",
            images,
            *PAIRS["moco-ifnd"],
            fault=functools.partial(send_at_the_end_of_epoch, epoch),
            code=75,
        )
        assert f"last.pt holds the state after epoch {epoch} of 3," in printed.splitlines()[-1]
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
        fault=send_at(signal.SIGKILL, 1, 3),
        code=-signal.SIGKILL,
    )
    path = tmp_path / "runs" / "old" / "last.pt"
    saved = torch.load(path, weights_only=True)
    del saved["place"]
    torch.save(saved, path)  # without a checksum, too
    assert "going on after epoch 1 of 3" in run(tmp_path, "old", images, *PAIRS["moco-ifnd"])
    assert_equal(tmp_path, "old", whole)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_image_workers_at_work(
    undisturbed, images, tmp_path
):
    """torchrun and SLURM send signals so. The processes that decode images outlive the signal.

    So the step can be finished. The run is a program that is started by itself, for its exit.
    """
    whole, _ = undisturbed(*PAIRS["ir-ring"])
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "job.py").write_text(f"""
import functools
import runpy
import sys

sys.path[:0] = [{ROOT!r}, {TESTS!r}]
import test_faults

test_faults.at(1, 2, functools.partial(test_faults.wait_for_a_signal, "fifo"))
runpy.run_path({SCRIPT!r}, run_name="__main__")
""")
    process = subprocess.Popen(
        [sys.executable, "job.py", *SMALL, images, *PAIRS["ir-ring"], "data.workers=2", "name=cut"],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until_a_run_waits(tmp_path / "fifo")
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
    """The second alone gets the signal. Both look for it where they wait for one another.

    That is the 21st step. Each goes on with its own BatchNorm statistics.
    """
    whole, _ = undisturbed(*MANY_STEPS, processes=2)
    codes, printed = two(
        tmp_path, "cut", images, *MANY_STEPS, faults=(None, send_at(signal.SIGTERM, 1, 3))
    )
    assert codes == [75, 75], printed
    assert "after step 21 of 25 of epoch 2" in printed.splitlines()[-1], printed
    shutil.copytree(tmp_path / "runs" / "cut", tmp_path / "runs" / "alone")
    codes, printed = two(tmp_path, "cut", images, *MANY_STEPS)
    assert codes == [0, 0]
    assert "going on after step 21" in printed
    assert_equal(tmp_path, "cut", whole)
    # One process alone goes on from there, too.
    assert "is of 2 processes, now there are 1" in run(tmp_path, "alone", images, *MANY_STEPS)
    assert log(tmp_path, "alone")[1]["loss"] == pytest.approx(
        log(whole, "whole")[1]["loss"], rel=0.2
    )


def run_agent(folder, arguments):
    """Be torchrun, which forks its two workers here.

    torchrun itself starts programs, which import torch each.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(folder)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        start_method="fork",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0},
    )
    elastic_launch(config, run_worker)(folder, arguments)


def run_worker(folder, arguments):
    """Be a run under the agent. The second process is killed, the first time."""
    rank = os.environ["RANK"]
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    is_killed = rank == "1" and restarts == "0"
    fault = send_at(signal.SIGKILL, 1, 5) if is_killed else None
    child(folder, "cut", arguments, fault, environment={}, suffix=f".{rank}{restarts}")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again(undisturbed, images, tmp_path):
    """It is one of two, killed in the second epoch.

    torchrun's agent ends the other one too, and both go on from the first epoch's checkpoint.
    """
    whole, _ = undisturbed(*MANY_STEPS, processes=2)
    # --fresh counts the first time only.
    process = SERVER.Process(
        target=run_agent, args=(str(tmp_path), [images, *MANY_STEPS, "--fresh"])
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "going on after epoch 1 of 2" in (tmp_path / "cut.01.out").read_text()
    assert_equal(tmp_path, "cut", whole)


def write_job(folder, fault):
    """Write a script for torchrun: train_pretrain.py, whose second process has a fault once.

    fault: the statement that brings it about, the first time that the process is started.
    """
    (folder / "job.py").write_text(f"""
import functools
import os
import runpy
import signal
import sys

sys.path[:0] = [{ROOT!r}, {TESTS!r}]
print("begins", flush=True)
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    import test_faults
    {fault}
runpy.run_path({SCRIPT!r}, run_name="__main__")
""")
    return folder / "job.py"


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again_by_torchrun(undisturbed, images, tmp_path):
    """The same with torchrun itself."""
    whole, _ = undisturbed(*MANY_STEPS, processes=2)
    script = write_job(tmp_path, "test_faults.send_at(signal.SIGKILL, 1, 5)()")
    # --fresh counts the first time only.
    settings = [*SMALL, images, *MANY_STEPS, "--fresh", "name=cut"]
    done = torchrun(2, ["--max-restarts", 1, script, *settings], tmp_path)
    assert done.stdout.count("begins") == 4
    assert done.stdout.count("going on after epoch 1 of 2") == 1
    assert_equal(tmp_path, "cut", whole)


@pytest.mark.slow
def test_torchrun_is_told_to_stop(undisturbed, images, tmp_path):
    """It passes SIGTERM on to its workers' process groups, and waits."""
    whole, _ = undisturbed(*MANY_STEPS, processes=2)
    os.mkfifo(tmp_path / "fifo")
    fifo = str(tmp_path / "fifo")
    wait = f"functools.partial(test_faults.wait_for_a_signal, {fifo!r})"
    script = write_job(tmp_path, f"test_faults.at(1, 5, {wait})")
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
    wait_until_a_run_waits(tmp_path / "fifo")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode != 0, out
    assert "told to stop" in out, out
    assert state(tmp_path, "cut")["place"]["step"] == 21, out
    codes, printed = two(tmp_path, "cut", images, *MANY_STEPS)
    assert codes == [0, 0], printed
    assert_equal(tmp_path, "cut", whole)


# -------------------------------------------------------------------------------------------- disks


def fill_disk_before_the_log(epoch, size):
    """The disk takes the checkpoint of an epoch and not its line in the log."""
    plain_write = Log.write

    def fill_and_write(self, this_epoch, figures):
        if this_epoch == epoch:
            fill_disk(size)
        plain_write(self, this_epoch, figures)

    Log.write = fill_and_write


@pytest.mark.parametrize(
    ("fault", "file", "epoch"),
    [
        (functools.partial(at, 1, 7, functools.partial(fill_disk, 300_000)), "last.pt", 1),
        (functools.partial(fill_disk_before_the_log, 2, 30_000), "log.jsonl", 2),
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


def can_mount():
    """May a user of this machine mount in a namespace?"""
    if not shutil.which("unshare"):
        return False
    command = ["unshare", "--user", "--mount", "true"]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def test_a_disk_that_fills_up(undisturbed, images, tmp_path):
    """A small tmpfs has room for one checkpoint, and not for the second beside it."""
    if not can_mount():
        pytest.skip("needs a Linux that lets users mount in a namespace")
    whole, _ = undisturbed(*PAIRS["moco-ifnd"])
    size = int(1.7 * os.path.getsize(whole / "runs" / "whole" / "last.pt")) + 100_000
    fault = functools.partial(mount_small_disk, size)
    sentence = refused(tmp_path, "full", images, *PAIRS["moco-ifnd"], fault=fault)
    words = "cannot be written: No space left on device; what was there before is as it was"
    assert sentence == f"runs/full/last.pt {words}"
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
    sentence = refused(tmp_path, "a", images, fault=drop_capabilities)
    words = "cannot be written: Permission denied; what was there before is as it was"
    assert sentence == f"runs/a {words}"


def test_every_flipped_bit_is_noticed(tmp_path):
    """Flip one bit in every fifth byte of a checkpoint, and each bit of its last bytes.

    There the checksum is. Files that are cut short are noticed, too. (torch.load minds one flip in
    ten.)
    """
    path, chance = str(tmp_path / "last.pt"), random.Random(0)
    checkpoint.save(path, {}, 1, **parts(1))
    with open(path, "rb") as f:
        good = f.read()
    last_bytes = range(len(good) - 60, len(good))
    flips = [(i, chance.randrange(8)) for i in range(0, len(good), 5)]
    flips += [(i, bit) for i in last_bytes for bit in range(8)]
    for i, bit in flips:
        with open(path, "wb") as f:
            f.write(good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1 :])
        with pytest.raises(SystemExit, match="read safely"):
            checkpoint.read_checkpoint(path)
    for size in (*range(0, len(good), 200), *last_bytes):
        with open(path, "wb") as f:
            f.write(good[:size])
        with pytest.raises(SystemExit, match="read safely"):
            checkpoint.read_checkpoint(path)


def flip_a_bit(path):
    """Damage a file, a third of the way into it."""
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 3)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("damage", [pytest.param("flipped", marks=pytest.mark.slow), "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, undisturbed, images, tmp_path):
    whole, _ = undisturbed(*PAIRS["moco-ifnd"])
    run(
        tmp_path,
        "a",
        images,
        *PAIRS["moco-ifnd"],
        fault=send_at(signal.SIGKILL, 2, 4),
        code=-signal.SIGKILL,
    )
    last, previous = tmp_path / "runs" / "a" / "last.pt", tmp_path / "runs" / "a" / "previous.pt"
    if damage == "gone":
        os.remove(last)
    else:
        flip_a_bit(last)
    # The resumed run is killed once more, before it has saved.
    printed = run(
        tmp_path,
        "a",
        images,
        *PAIRS["moco-ifnd"],
        fault=send_at(signal.SIGKILL, 1, 4),
        code=-signal.SIGKILL,
    )
    reasons = {
        "gone": "does not exist",
        "flipped": "is not a checkpoint that can be read safely",
    }
    assert f"runs/a/last.pt {reasons[damage]}" in printed
    assert "going on from the one before, runs/a/previous.pt" in printed
    assert "going on after epoch 1 of 3" in printed
    run(tmp_path, "a", images, *PAIRS["moco-ifnd"])
    assert_equal(tmp_path, "a", whole)
    if damage != "flipped":
        return
    for file in (last, previous):
        flip_a_bit(file)
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
    """The new run is killed in its first epoch, and once more.

    What the old one left is there under other names, and nothing of it is evaluated.
    """
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
    dies = {"fault": send_at(signal.SIGKILL, 0, 3), "code": -signal.SIGKILL}
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
        match="backbone.pt.before was not trained with the settings of runs/whole/config.yaml: "
        "loss.temperature was 0.2 and is now 0.3",
    ):
        weights.read_backbone("runs/whole/backbone.pt.before")
    run(tmp_path, "whole", images, *PAIRS["moco-nce"], "loss.temperature=0.3")
    assert weights.read_backbone("runs/whole/backbone.pt")[0]


def test_a_second_process_on_one_folder_is_refused(images, tmp_path):
    """It is refused as long as the first one lives.

    It is not when the first was killed, though the image workers live for some seconds more.
    """
    os.mkfifo(tmp_path / "fifo")
    wait = functools.partial(at, 0, 2, functools.partial(wait_for_a_signal, tmp_path / "fifo"))
    first = start(tmp_path, "a", images, "data.workers=1", fault=wait)
    wait_until_a_run_waits(tmp_path / "fifo")
    sentence = refused(tmp_path, "a", images)
    assert sentence.startswith(f"runs/a is in use: process {first.pid} on ")
    assert sentence.endswith("choose another name=...")
    run(tmp_path, "b", images)
    first.kill()
    first.join()
    run(tmp_path, "a", images)


def test_a_run_that_is_refused_leaves_no_lock(tmp_path, monkeypatch):
    """A notebook keeps the traceback, and all that the frames in it hold."""
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


def can_others_lock(folder):
    """Does another process get the lock? (A process's own locks are no obstacle to itself.)"""
    process = os.fork()
    if process == 0:
        try:
            checkpoint.acquire_lock(folder)
        except SystemExit:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return status == 0


def test_a_lock_that_is_removed_does_not_let_two_in(tmp_path, monkeypatch):
    """One process has opened the file when its owner removes it.

    Another process comes and makes a new one.
    """
    folder, path = str(tmp_path), str(tmp_path / "lock")
    owner = checkpoint.acquire_lock(folder)
    plain_lockf = checkpoint.fcntl.lockf
    opened = []
    assert not can_others_lock(folder)

    def owner_ends_first(file, operation):
        opened.append(os.fstat(file.fileno()).st_ino)
        if len(opened) == 1:
            checkpoint.release_lock(owner)
            assert not os.path.exists(path)
        plain_lockf(file, operation)

    monkeypatch.setattr(checkpoint.fcntl, "lockf", owner_ends_first)
    held = checkpoint.acquire_lock(folder)
    monkeypatch.undo()
    assert len(opened) == 2
    assert os.stat(path).st_ino == opened[1] == os.fstat(held.fileno()).st_ino
    assert not can_others_lock(folder)  # as it would, if that first file counted
    checkpoint.release_lock(held)
    assert os.listdir(folder) == []
    assert can_others_lock(folder)


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "lockf", no_locks)
    with checkpoint.lock_run_folder(str(tmp_path / "a")):
        pass
    warning = (
        "cannot be locked ([Errno 37] No locks available): "
        "see to it yourself that no second process trains there"
    )
    assert warning in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("signalled", [False, True], ids=["", "and told to stop"])
@pytest.mark.parametrize("quantity", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(
    quantity, signalled, undisturbed, images, tmp_path
):
    fault = functools.partial(spoil_numbers, quantity, 1, 3)
    if signalled:
        fault = functools.partial(apply_faults, fault, send_at(signal.SIGTERM, 1, 3))
    sentence = refused(tmp_path, "nan", images, fault=fault)
    if quantity == "loss":
        reason = "the loss is nan at epoch 2, step 4 of 8"
    elif signalled:
        reason = "a weight is not finite at epoch 2, step 4 of 8"
    else:  # the weights are seen in the loss of the next step
        reason = "the loss is nan at epoch 2, step 5 of 8"
    assert sentence == (
        f"{reason}; runs/nan/last.pt holds the state after epoch 1 of 3; "
        "try a lower optim.lr, with --fresh or another name=..."
    )
    saved = state(tmp_path, "nan")
    assert checkpoint.not_finite(saved) is None
    assert saved["epoch"] == 1
    assert saved["place"]["step"] == 0
    if not signalled:
        # It was no fault of the settings.
        run(tmp_path, "nan", images)
        assert_equal(tmp_path, "nan", undisturbed()[0])


def test_two_processes_end_together_when_one_has_no_loss(images, tmp_path):
    faults = (None, functools.partial(spoil_numbers, "loss", 1, 3))
    codes, printed = two(tmp_path, "nan", images, *PAIRS["moco-nce"], faults=faults)
    assert codes == [1, 1], printed
    assert printed.splitlines()[-1].startswith(
        "the loss is nan at epoch 2, step 4 of 8; runs/nan/last.pt holds the state after epoch 1"
    ), printed
    # The other process says nothing, so that the sentence is printed once.
    assert (tmp_path / "1" / "nan.err").read_text() == ""


def test_nothing_that_is_not_finite_can_be_saved(tmp_path):
    path, bad = str(tmp_path / "last.pt"), parts(1)
    checkpoint.save(path, {}, 1, **bad)
    nn.init.constant_(bad["encoder"].bias, torch.inf)
    with pytest.raises(SystemExit, match="last.pt is not written, for encoder.bias is not finite"):
        checkpoint.save(path, {}, 2, **bad)
    assert checkpoint.resume(path, {}, **parts(0)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_value_that_is_not_finite_is_found(dtype):
    """It is found in every shape that a state has. Integers and empty tensors have none."""
    finite = {
        "scalar": torch.zeros((), dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "step": torch.arange(3),
    }
    assert checkpoint.not_finite(finite) is None
    for bad in (torch.nan, torch.inf, -torch.inf):
        for shape, row in (
            ((), ()),
            ((999, 33), (998, 32)),
            ((999, 33), (0, 0)),
            ((999, 33), (500, 7)),
        ):
            value = torch.randn(shape).to(dtype)
            value[row] = bad
            assert checkpoint.not_finite({**finite, "host": [{"bank": value}]}) == "host.0.bank"
            if shape:
                assert checkpoint.not_finite({"bank": value.T}) == "bank"


class RecordSizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Record the number of elements of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, (list, tuple)) else [result]
        self.sizes += [x.numel() for x in results if torch.is_tensor(x)]
        return result


def test_looking_for_what_is_not_finite_takes_no_memory():
    """The bank is of 64 MiB, and nothing of its size is made beside it, on no device."""
    bank = torch.zeros(131072, 128)
    with RecordSizes() as record:
        assert checkpoint.not_finite({"bank": bank}) is None
    assert record.sizes
    assert max(record.sizes) <= 2


def test_a_skipped_step_of_fp16_is_no_fault(images, tmp_path):
    run(tmp_path, "fp16", images, fault=scale_too_far)
    scaler = state(tmp_path, "fp16")["scaler"]
    assert scaler["scale"] < 2.0**127
    assert [line["epoch"] for line in log(tmp_path, "fp16")] == [
        1,
        2,
        3,
    ]


def scale_the_loss():
    """Scale the loss as fp16 does, on a CPU, whose precisions need no scaling."""
    plain_scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda device, enabled: plain_scaler(device, init_scale=2.0)


@pytest.mark.parametrize("first, then", [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_goes_on_on_hardware_of_another_precision(first, then, images, tmp_path):
    """fp32 stands for fp16, the precision with loss scaling.

    In a run that began without it, the scaler starts afresh. In one that began with it, its state
    is left out.
    """
    faults = {"fp32": [scale_the_loss], "bf16": []}
    stops = send_at(signal.SIGTERM, 1, 3)
    run(
        tmp_path,
        "a",
        images,
        f"model.precision={first}",
        fault=functools.partial(apply_faults, *faults[first], stops),
        code=75,
    )
    assert bool(state(tmp_path, "a")["scaler"]) == (first == "fp32")
    printed = run(
        tmp_path,
        "a",
        images,
        f"model.precision={then}",
        fault=functools.partial(apply_faults, *faults[then]),
    )
    assert f"runs/a/last.pt was trained in {first} so far, and goes on in {then}" in printed
    assert "going on after step 4 of 8 of epoch 2" in printed
    saved = state(tmp_path, "a")
    assert saved["epoch"] == 3
    assert bool(saved["scaler"]) == (then == "fp32")
    assert [line["epoch"] for line in log(tmp_path, "a")] == [1, 2, 3]


@pytest.mark.parametrize(
    "old, new", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "mps"), ("cpu", "cpu")]
)
def test_random_states_of_another_device_are_no_obstacle(old, new, tmp_path, monkeypatch, capsys):
    """The state of the CPU's generator is taken, and the others are left alone.

    A state that does not fit its generator is left alone, too.
    """
    path = str(tmp_path / "last.pt")
    checkpoint.save(path, {}, 1, **parts(1))
    expected, saved = torch.rand(3), checkpoint.read_checkpoint(path)
    if old != "cpu":
        saved["rng"][0][old] = torch.zeros(16, dtype=torch.uint8)
        torch.save(saved, path)
    monkeypatch.setattr(checkpoint.devices, "current", torch.device(new))
    assert checkpoint.resume(path, {}, **parts(0)) == 1
    assert torch.equal(torch.rand(3), expected)
    words = (
        f"{path} was written on {old}, and goes on on {new}: "
        "from here on its random numbers are others\n"
    )
    assert capsys.readouterr().out == (words if old != new else "")

    saved["rng"][0]["cpu"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(saved, path)
    assert checkpoint.resume(path, {}, **parts(0)) == 1
    assert f"was written on another kind of {old}, and goes on on {new}" in capsys.readouterr().out


def test_a_collapse_is_warned_of_once(images, tmp_path):
    """With so strong a weight decay no weights are left, and all images look alike."""
    printed = run(tmp_path, "point", images, "optim.weight_decay=20", "loss.name=nce")
    assert printed.count("WARNING: the embeddings collapse: their spread is 0.0") == 1
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
