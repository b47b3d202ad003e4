"""One, two, three and four gloo processes, two torchruns and a SLURM job: the same figures everywhere. The same seed: the same bits.

Processes are forked by the server of test_faults, which has imported torch already. FULL=1: longer curves.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import train_linear
import train_pretrain
from data.augment import RECIPES
from data.datasets import ArraySet, load
from data.loader import Loader, prefetch
from data.shapes import shapes
from engine import checkpoint, distributed
from evaluation.features import KNN, extract
from models.resnet import Encoder
from processes import ROOT, SERVER, free_port
from test_distributed import ALONE, TINY
from test_faults import QUICK, there
from test_pairs import PAIRS
from test_scripts import same

FULL = bool(os.environ.get("FULL"))
SCRIPT = os.path.join(ROOT, "slurm", "train.sbatch")


# ---------------------------------------------------------------------------------------- processes


def child(work, argument, folder, environment):
    os.chdir(folder)
    os.environ.update(environment)
    os.dup2(os.open(f"said{environment.get('RANK', 0)}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    # image workers are forked, as in a program of its own; else each gets a server that imports torch anew
    multiprocessing.set_start_method("fork", force=True)
    device, stop = distributed.init_distributed(), distributed.cleanup
    # one group for several runs of a script
    distributed.init_distributed, distributed.cleanup = (
        lambda asked: device,
        lambda: None,
    )
    work(argument)
    stop()


def begin(world, folder, work, argument):
    ports = (
        {}
        if world == 1
        else dict(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
        )
    )
    os.makedirs(folder, exist_ok=True)
    processes = [
        SERVER.Process(
            target=child,
            args=(
                work,
                argument,
                str(folder),
                ports if world == 1 else ports | dict(RANK=str(r), LOCAL_RANK=str(r)),
            ),
        )
        for r in range(world)
    ]
    [process.start() for process in processes]
    return processes


def end(processes, folder):
    [process.join() for process in processes]
    assert not any(process.exitcode for process in processes), "".join(
        (folder / f"said{r}").read_text() for r in range(len(processes))
    )


def pretrain(runs):
    """{name: settings}, one after the other. -> folder/ranks.json: for each run the hashes, epoch by epoch and rank by rank, of what its checkpoint holds."""
    plain, found = checkpoint.save, {}

    def save(path, settings, epoch, **parts):
        plain(path, settings, epoch, **parts)
        state = {
            f"{part}.{key}": value
            for part in ("encoder", "host", "loss")
            for key, value in parts[part].state_dict().items()
        }
        found[name].append(
            distributed.all_gather_object(
                {
                    key: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
                    for key, value in state.items()
                }
            )
        )

    checkpoint.save = save
    for name, settings in runs.items():
        found[name] = []
        sys.argv = ["train_pretrain.py", *settings, f"name={name}"]
        train_pretrain.main()
    if distributed.is_main():
        with open("ranks.json", "w") as f:
            json.dump(found, f)


def losses(folder, name):
    with open(folder / "runs" / name / "log.jsonl") as f:
        return [json.loads(line)["loss"] for line in f]


def last(folder, name):
    return torch.load(folder / "runs" / name / "last.pt", weights_only=True)


# --------------------------------------------------------------------------------------- 1, 2 and 4

# no test part: shapes' own would take longer to draw than to train on
FILES = [
    "data.name=folder",
    "data.limit=null",
    "data.workers=0",
]
# an epoch is a step, so the log is the curve
CURVES = {
    name: [
        *TINY,
        *ALONE[name],
        *FILES,
        "data.root=../32",
        f"optim.epochs={20 if FULL else 6}",
        "optim.lr=0.001",
    ]
    + ["model.queue_size=32"] * (name == "moco")
    for name in ("moco", "ir", "cmc", "simclr")
}
# 101 embeddings, shared out unevenly
ROWS = {
    name: [*TINY, *PAIRS[name], *FILES, "data.root=../101"]
    for name in ("moco-ifnd+ring+mochi", "ir-ring", "cmc-ifnd")
}


def pictures(folder, count, kind="png", pixels=32):
    """count images in two classes, larger ones of somewhat different sizes."""
    for i, image in enumerate(shapes(count)[0]):
        os.makedirs(folder / "ab"[i % 2], exist_ok=True)
        image = Image.fromarray(image.transpose(1, 2, 0))
        (image if pixels == 32 else image.resize((pixels + i % 7, pixels - i % 5))).save(
            folder / "ab"[i % 2] / f"{i:03d}.{kind}"
        )
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """folder/<processes>; each number of processes trains all hosts in one go, with four BatchNorm groups of 8 images whatever the number."""
    folder = tmp_path_factory.mktemp("worlds")
    [pictures(folder / str(n), n) for n in (32, 101)]
    for world in (1, 2, 4):
        runs = {
            name: [*settings, f"model.bn_splits={4 // world}"] for name, settings in CURVES.items()
        } | (ROWS if world == 4 else {})
        end(begin(world, folder / f"{world}", pretrain, runs), folder / f"{world}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
def test_the_loss_curve_of_one_is_that_of_two_and_of_four(name, worlds):
    """And weights, bank, queue and key encoder. (Rounding alone differs, and grows from step to step: see test_two_processes_train_as_one.)"""
    one = losses(worlds / "1", name)
    assert len(one) >= 6
    assert max(one) - min(one) > 1e-3
    for world in (2, 4):
        assert losses(worlds / f"{world}", name) == pytest.approx(one, abs=1e-3 if FULL else 1e-4)
        for part in ("encoder", "host"):
            a, b = last(worlds / "1", name)[part], last(worlds / f"{world}", name)[part]
            assert a.keys() == b.keys(), world
            assert all(
                torch.allclose(a[k].float(), b[k].float(), atol=1e-2 if FULL else 1e-4) for k in a
            ), world


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_process_holds_the_same_rows_after_every_epoch(world, worlds):
    """Bank, queue, key encoder, IFND's labels and ranks, the encoder itself: by hash."""
    with open(worlds / f"{world}" / "ranks.json") as f:
        found = json.load(f)
    seen = set()
    for name, epochs in found.items():
        assert len(epochs) >= 2
        for epoch in epochs:
            assert len(epoch) == world, name
            assert all(rank == epoch[0] for rank in epoch), name
            seen |= set(epoch[0])
    assert {
        "host.bank.rows",
        "host.L.rows",
        "host.ab.rows",
        "host.queue.keys",
        "host.queue.index",
        "host.queue.pointer",
        "host.key_encoder.net.backbone.conv1.weight",
    } <= seen
    assert world == 2 or {"pseudo", "rank"} <= {key.rpartition(".")[2] for key in seen}
    for name, of in (("moco", "queue.keys"), ("ir", "bank.rows"), ("cmc", "L.rows")):
        assert found[name][0][0][f"host.{of}"] != found[name][1][0][f"host.{of}"]  # they move


# ------------------------------------------------------------ evaluation of data that do not divide


def evaluate(root):
    """What every process finds, to folder/found<rank>.pt."""
    settings = [
        "data.name=folder",
        f"data.root={root}",
        "data.limit=null",
        "data.image_size=32",
        "data.workers=0",
        "model.width=8",
        "model.precision=fp32",
        "knn.k=10",
    ]
    torch.manual_seed(0)
    encoder = Encoder(
        torch.device("cpu"), backbone="resnet10", stem="cifar", width=8, precision="fp32"
    )
    if distributed.is_main():
        torch.save(encoder.backbone.state_dict(), "weights.pt")
    distributed.barrier()
    train, test = (load(part, 0, name="folder", root=root) for part in ("train", "test"))
    images = {
        n: extract(lambda x: x.flatten(1), some(test, n), 32, torch.device("cpu"), workers=0)
        for n in (1, 2, 4, 5, 101)
    }
    monitor = KNN(train, test, 32, torch.device("cpu"), 0, k=10)
    sys.argv = [
        "train_linear.py",
        "--cfg",
        QUICK,
        *settings,
        "linear.epochs=3",
        "name=a",
        "--weights",
        "weights.pt",
    ]
    train_linear.main()
    torch.save({"images": images, "knn": monitor(encoder)}, f"found{distributed.rank()}.pt")


def some(data, n):
    return data.select(torch.arange(n))


@pytest.mark.slow
def test_three_processes_find_of_101_images_what_one_finds(tmp_path):
    """And of fewer than there are processes. Embeddings in the images' order, none lost and none twice; kNN and the linear probe figure for figure."""
    pictures(tmp_path / "train", 64), pictures(tmp_path / "val", 101)
    for world in (1, 3):
        end(begin(world, tmp_path / str(world), evaluate, str(tmp_path)), tmp_path / str(world))
    one, *three = (
        torch.load(tmp_path / f"{world}" / f"found{rank}.pt")
        for world in (1, 3)
        for rank in range(world)
    )
    assert len(three) == 3
    assert len(one["images"][101].unique(dim=0)) == 101
    for found in three:
        assert found["knn"] == one["knn"]
        assert all(
            torch.equal(x, found["images"][n]) and len(x) == n for n, x in one["images"].items()
        )
    rows = [
        json.loads((tmp_path / world / "runs" / "a" / "linear.jsonl").read_text())["rows"]
        for world in "13"
    ]
    assert rows[0] == rows[1]
    assert rows[0].keys() == {"raw pixels", "untrained encoder", "a"}


# ---------------------------------------------------------------------------------------- two nodes


@pytest.mark.slow
def test_two_torchruns_are_one(worlds):
    """The README's line for two nodes, as two agents on this one: bit for bit what two processes of one node train."""
    port, folder = free_port(), worlds / "torchruns"
    folder.mkdir()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"localhost:{port}",
        os.path.join(ROOT, "train_pretrain.py"),
        *CURVES["moco"],
        "model.bn_splits=2",
        "name=moco",
    ]
    agents = [
        subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    said = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "".join(said)
    assert sum("= 2 processes x 16" in words for words in said) == 1
    a, b = last(worlds / "2", "moco"), last(folder, "moco")
    assert a.keys() == b.keys()
    assert all(same(a[part], b[part]) for part in a if part != "place")
    assert losses(worlds / "2", "moco") == losses(folder, "moco")


# -------------------------------------------------------------------------------------------- SLURM

CLUSTER = {
    # gives the script what a job has, and becomes its shell
    "sbatch": """import os, sys
header = [line.split()[1] for line in open(sys.argv[1]) if line.startswith("#SBATCH")]
nodes = next(word.split("=")[1] for word in header if word.startswith("--nodes"))
os.environ.update(SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="localhost,b", SLURM_NNODES=nodes, SLURM_GPUS_ON_NODE=os.environ["GPUS"], SLURM_CPUS_PER_TASK="64")
os.execvp("bash", ["bash", *sys.argv[1:]])""",
    # a task on each node, in a process group each
    "srun": """import os, subprocess, sys
tasks = [subprocess.Popen(sys.argv[2:], env={**os.environ, "SLURM_NODEID": str(i)}, start_new_session=True) for i in range(int(os.environ["SLURM_NNODES"]))]
open("steps", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))""",
    "scancel": """import os, signal, sys
assert sys.argv[1:] == ["--signal=TERM", "4711"]
[os.killpg(int(task), signal.SIGTERM) for task in open("steps").read().split()]""",
    "scontrol": """import sys
if sys.argv[1] == "show":
    print("\\n".join(sys.argv[3].split(",")))
open("scontrol", "a").write(" ".join(sys.argv[1:]) + "\\n")""",
}
TORCHRUN = """import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open("torchrun" + os.environ["SLURM_NODEID"], "w").write(" ".join(sys.argv[1:]))
if sys.argv[-1].startswith("waits"):
    open("fifo" + os.environ["SLURM_NODEID"], "w").close()
    signal.sigwait([signal.SIGTERM])
sys.exit(int(sys.argv[-1].partition("=")[2]))"""


@pytest.fixture
def cluster(tmp_path):
    """cluster(torchrun, *arguments, gpus) -> the batch shell of a job, two nodes of which are this machine."""
    for name in CLUSTER:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable} -S\n{CLUSTER[name]}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def submit(torchrun, *arguments, gpus=8):
        (tmp_path / "bin" / "torchrun").write_text(torchrun)
        (tmp_path / "bin" / "torchrun").chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "GPUS": str(gpus),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            ["sbatch", SCRIPT, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return submit


def asked_of_scontrol(folder):
    return (folder / "scontrol").read_text().splitlines()


def test_the_slurm_script_names_no_machine():
    with open(SCRIPT) as f:
        text = f.read()
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    header = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert {
        "--nodes=2",
        "--gpus-per-node=8",
        "--ntasks-per-node=1",
        "--signal=B:USR1@120",
        "--requeue",
    } <= set(header)
    # no path from the root, but that of the shell
    assert not re.search(r"(?<!#!)(?<![\w.])/\w", text)


@pytest.mark.parametrize(
    "ends,code,requeued",
    [
        ("ends=0", 0, False),
        ("ends=1", 1, False),
        ("ends=75", 75, True),
        ("waits=1", 1, True),
        ("waits=0", 0, False),
    ],
)
def test_the_slurm_script_passes_the_signal_on_and_requeues(
    ends, code, requeued, cluster, tmp_path
):
    """What torchrun is told on each node; and the job is queued again where it was told to stop and had to, not where it is done or fails by itself."""
    [os.mkfifo(tmp_path / f"fifo{node}") for node in range(2)]
    shell = cluster(f"#!{sys.executable} -S\n{TORCHRUN}\n", "--cfg", "some file.yaml", ends)
    if ends.startswith("waits"):
        there(tmp_path / "fifo0"), there(tmp_path / "fifo1")
        shell.send_signal(signal.SIGUSR1)  # as --signal=B:USR1 does: to the shell alone
    out, _ = shell.communicate(timeout=300)
    assert shell.returncode == code, out
    assert out == "", out
    assert (
        asked_of_scontrol(tmp_path) == ["show hostnames localhost,b"] + ["requeue 4711"] * requeued
    )
    for node in range(2):
        assert (tmp_path / f"torchrun{node}").read_text() == (
            "--nnodes 2 --nproc_per_node 8 --max-restarts 3 --rdzv_backend c10d --rdzv_endpoint localhost:24711 --rdzv_id 4711 train_pretrain.py --cfg some file.yaml "
            + ends
        )


@pytest.mark.slow
def test_a_slurm_job_at_its_time_limit_goes_on_in_the_next(cluster, tmp_path):
    """torchrun itself, on two nodes of one process: USR1 to the shell in the second epoch, all save and end, and the requeued job ends as an undisturbed one."""
    for folder in ("data", "datasets", "engine", "evaluation", "losses", "models"):
        if folder != "datasets":
            os.symlink(os.path.join(ROOT, folder), tmp_path / folder)
    settings = [*TINY, *PAIRS["moco-ifnd"], "optim.batch_size=4"]  # 32 steps an epoch
    end(begin(2, tmp_path / "whole", pretrain, {"a": settings}), tmp_path / "whole")
    os.mkfifo(tmp_path / "fifo")
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    script = (
        f"import os, runpy, sys\nsys.path[:0] = [{ROOT!r}, {os.path.dirname(__file__)!r}]\n"
        "if os.path.exists('fifo') and os.environ['RANK'] == '1':\n    import functools, test_faults\n"
        "    test_faults.at(1, 5, functools.partial(test_faults.waits_for_a_signal, 'fifo'))\n"
        f"runpy.run_path({os.path.join(ROOT, 'train_pretrain.py')!r}, run_name='__main__')\n"
    )
    (tmp_path / "train_pretrain.py").write_text(script)
    shell = cluster(torchrun, *settings, "name=a", gpus=1)
    there(tmp_path / "fifo")
    shell.send_signal(signal.SIGUSR1)
    out, _ = shell.communicate(timeout=300)
    assert shell.returncode == 1, out
    assert "told to stop: runs/a/last.pt holds the state after step 21 of 32 of epoch 2" in out, out
    assert asked_of_scontrol(tmp_path)[-1] == "requeue 4711"
    os.remove(tmp_path / "fifo")
    out, _ = (shell := cluster(torchrun, *settings, "name=a", gpus=1)).communicate(timeout=300)
    assert shell.returncode == 0, out
    assert "going on after step 21 of 32 of epoch 2" in out, out
    assert asked_of_scontrol(tmp_path)[-1].startswith("show"), out
    a, b = last(tmp_path / "whole", "a"), last(tmp_path, "a")
    assert all(same(a[part], b[part]) for part in ("encoder", "host", "loss", "optimizer", "rng"))


# ------------------------------------------------------------------------------------ the same bits


@pytest.mark.slow
def test_the_same_seed_is_the_same_run_whatever_the_number_of_workers(tmp_path):
    """Two processes, each with two runs on JPEGs: everything a checkpoint holds, and the log, bit for bit."""
    root = pictures(tmp_path / "jpegs", 64, "jpg", 40)
    settings = [*TINY, *PAIRS["moco-ifnd+ring+mochi"], *FILES, f"data.root={root}"]
    both = [
        begin(
            1,
            tmp_path / f"{i}",
            pretrain,
            {f"workers{w}": [*settings, f"data.workers={w}"] for w in workers},
        )
        for i, workers in enumerate(((0, 1), (0, 2)))
    ]
    [end(processes, tmp_path / f"{i}") for i, processes in enumerate(both)]
    runs = [
        (tmp_path / folder, f"workers{w}") for folder, w in (("0", 0), ("0", 1), ("1", 0), ("1", 2))
    ]
    states, curves = [last(*run) for run in runs], [losses(*run) for run in runs]
    for state, curve in zip(states[1:], curves[1:]):
        assert all(
            same(states[0][part], state[part])
            for part in ("epoch", "encoder", "host", "loss", "optimizer", "scaler", "rng")
        )
        assert curve == curves[0]
    # it clustered
    assert len(curves[0]) == 2
    assert min(v.min() for k, v in states[0]["loss"].items() if k.endswith("pseudo")) >= 0


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder_of_jpegs(tmp_path_factory):
    return load(
        "pretrain",
        0,
        name="folder",
        root=str(pictures(tmp_path_factory.mktemp("jpegs"), 24, "jpg", 110)),
    )


def views(data, recipe, size, workers=0, depth=None):
    loader = Loader(
        data,
        batch_size=len(data) // 2,
        n_views=2,
        seed=0,
        device=torch.device("cpu"),
        augment=recipe,
        image_size=size,
        workers=workers,
    )
    steps = loader.epoch(1) if depth is None else prefetch(loader.epoch(1), depth)
    # (2 steps x 2 views, n / 2, 3, S, S)
    return torch.stack([x for some, _ in steps for x in some])


@pytest.mark.slow
def test_neither_workers_nor_threads_nor_what_is_made_ahead_change_a_bit_of_a_view(folder_of_jpegs):
    """JPEGs, whose colours a worker with one thread does, and with none the process itself with all of its own."""
    for recipe, size in (("moco_v2", 32), ("moco_v1", 32), ("moco_v2", 96), ("moco_v1", 96)):
        with threads(1):
            one = views(folder_of_jpegs, recipe, size)
        with threads(2):
            assert torch.equal(one, views(folder_of_jpegs, recipe, size)), (recipe, size)
            for workers, depth in ((1, 1), (2, 3)):
                assert torch.equal(one, views(folder_of_jpegs, recipe, size, workers, depth)), (
                    recipe,
                    size,
                    workers,
                )


@pytest.mark.parametrize(
    "pixels,size",
    [
        (32, 32),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((48, 32), (96, 96), (224, 224))),
    ],
)
def test_threads_change_no_bit_of_an_array_sets_views(pixels, size):
    """In all recipes (of larger images in two), where grains of 32,768 numbers are shared out."""
    data = ArraySet(
        F.interpolate(torch.from_numpy(shapes(24 if size < 224 else 4)[0]), (pixels, pixels)),
        None,
        None,
        (0.5,) * 3,
        (0.25,) * 3,
    )
    for recipe in (
        RECIPES if FULL or size == 32 else ("moco_v1", "moco_v2")
    ):  # threads that wait for one another are slow on a busy machine
        seen = []
        for n in (1, 2):
            with threads(n):
                seen.append(views(data, recipe, size))
        assert torch.equal(*seen), recipe
