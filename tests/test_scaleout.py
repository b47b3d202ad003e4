"""One, two, three and four gloo processes, two torchruns and a SLURM job find the same figures.

The same seed gives the same bits.

Processes are forked by the server of processes.py, which has imported torch already.
FULL=1: longer curves.
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
from data.loader import Loader
from data.prefetch import prefetch
from data.shapes import shapes
from engine import checkpoint, distributed
from evaluation.features import KNN, extract
from models.resnet import Encoder
from processes import ROOT, SERVER, free_port, group_environments
from test_distributed import ALONE, TINY
from test_faults import QUICK, wait_until_a_run_waits
from test_pairs import PAIRS
from test_scripts import same

FULL = bool(os.environ.get("FULL"))
SCRIPT = os.path.join(ROOT, "slurm", "train.sbatch")


# ---------------------------------------------------------------------------------------- processes


def call_in_process(work, argument, folder, environment):
    """Call work(argument) in a folder, as one process of a group."""
    os.chdir(folder)
    os.environ.update(environment)
    output = f"said{environment.get('RANK', 0)}"
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    # Image workers are forked, as they are in a program that was started by itself. Otherwise each
    # gets a server that imports torch anew.
    multiprocessing.set_start_method("fork", force=True)
    # Several runs of a script share one process group.
    device = distributed.init_distributed()
    leave_group = distributed.cleanup
    distributed.init_distributed = lambda asked: device
    distributed.cleanup = lambda: None
    work(argument)
    leave_group()


def start_processes(world, folder, work, argument):
    """Start a group of `world` processes that call work(argument). -> the processes."""
    os.makedirs(folder, exist_ok=True)
    environments = [{}] if world == 1 else group_environments(world)
    processes = []
    for environment in environments:
        args = (work, argument, str(folder), environment)
        process = SERVER.Process(target=call_in_process, args=args)
        process.start()
        processes.append(process)
    return processes


def join_processes(processes, folder):
    for process in processes:
        process.join()
    outputs = [(folder / f"said{rank}").read_text() for rank in range(len(processes))]
    assert not any(process.exitcode for process in processes), "".join(outputs)


def run_processes(world, folder, work, argument):
    join_processes(start_processes(world, folder, work, argument), folder)


def pretrain(runs):
    """Train the runs {name: settings}, one after the other.

    ranks.json then holds {name: [epoch by epoch: [rank by rank: {part: hash}]]}: the hashes of what
    the checkpoints hold.
    """
    plain_save = checkpoint.save
    hashes = {name: [] for name in runs}

    def save(path, settings, epoch, **parts):
        plain_save(path, settings, epoch, **parts)
        hashes[settings["name"]].append(distributed.all_gather_object(hash_parts(parts)))

    checkpoint.save = save
    for name, settings in runs.items():
        sys.argv = ["train_pretrain.py", *settings, f"name={name}"]
        train_pretrain.main()
    if distributed.is_main():
        with open("ranks.json", "w") as f:
            json.dump(hashes, f)


def hash_parts(parts):
    hashes = {}
    for part in ("encoder", "host", "loss"):
        for key, value in parts[part].state_dict().items():
            content = value.contiguous().numpy().tobytes()
            hashes[f"{part}.{key}"] = hashlib.sha256(content).hexdigest()
    return hashes


def loss_curve(folder, name):
    with open(folder / "runs" / name / "log.jsonl") as f:
        return [json.loads(line)["loss"] for line in f]


def read_checkpoint(folder, name):
    return torch.load(folder / "runs" / name / "last.pt", weights_only=True)


# --------------------------------------------------------------------------------------- 1, 2 and 4

# There is no test part: that of shapes would take longer to draw than to train on.
FILES = ["data.name=folder", "data.limit=null", "data.workers=0"]
CURVE_EPOCHS = 20 if FULL else 6
# Of 32 images an epoch is one step, so that the log is the loss curve.
CURVES = {
    name: [
        *TINY,
        *ALONE[name],
        *FILES,
        "data.root=../32",
        f"optim.epochs={CURVE_EPOCHS}",
        "optim.lr=0.001",
    ]
    for name in ("moco", "ir", "cmc", "simclr")
}
CURVES["moco"].append("model.queue_size=32")
# 101 embeddings are shared out unevenly.
ROWS = {
    name: [*TINY, *PAIRS[name], *FILES, "data.root=../101"]
    for name in ("moco-ifnd+ring+mochi", "ir-ring", "cmc-ifnd")
}


def write_images(folder, count, kind="png", pixels=32):
    """Write `count` images of two classes. Those above 32 pixels differ somewhat in size."""
    for i, image in enumerate(shapes(count)[0]):
        class_folder = folder / "ab"[i % 2]
        os.makedirs(class_folder, exist_ok=True)
        image = Image.fromarray(image.transpose(1, 2, 0))
        if pixels != 32:
            image = image.resize((pixels + i % 7, pixels - i % 5))
        image.save(class_folder / f"{i:03d}.{kind}")
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Train all hosts with 1, 2 and 4 processes. -> the folder of the folders 1, 2 and 4.

    There are four BatchNorm groups of 8 images, whatever the number of processes.
    """
    folder = tmp_path_factory.mktemp("worlds")
    for count in (32, 101):
        write_images(folder / str(count), count)
    for world in (1, 2, 4):
        splits = f"model.bn_splits={4 // world}"
        runs = {name: [*settings, splits] for name, settings in CURVES.items()}
        if world == 4:
            runs |= ROWS
        run_processes(world, folder / f"{world}", pretrain, runs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
def test_the_loss_curve_of_one_is_that_of_two_and_of_four(name, worlds):
    """Weights, bank, queue and key encoder are the same, too.

    Rounding alone differs, and grows from step to step: see test_two_processes_train_as_one.
    """
    tolerances = {"curve": 1e-3, "state": 1e-2} if FULL else {"curve": 1e-4, "state": 1e-4}
    one = loss_curve(worlds / "1", name)
    assert len(one) >= 6
    assert max(one) - min(one) > 1e-3
    for world in (2, 4):
        curve = loss_curve(worlds / f"{world}", name)
        assert curve == pytest.approx(one, abs=tolerances["curve"])
        for part in ("encoder", "host"):
            state_of_one = read_checkpoint(worlds / "1", name)[part]
            state = read_checkpoint(worlds / f"{world}", name)[part]
            assert state.keys() == state_of_one.keys(), world
            for key, value in state.items():
                expected = state_of_one[key].float()
                assert torch.allclose(value.float(), expected, atol=tolerances["state"]), world


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_process_holds_the_same_rows_after_every_epoch(world, worlds):
    """Hashes tell: of bank, queue, key encoder, IFND's labels and ranks, and the encoder itself."""
    with open(worlds / f"{world}" / "ranks.json") as f:
        hashes = json.load(f)
    keys = set()
    for name, epochs in hashes.items():
        assert len(epochs) >= 2
        for ranks in epochs:
            assert len(ranks) == world, name
            assert all(rank == ranks[0] for rank in ranks), name
            keys |= set(ranks[0])
    assert {
        "host.bank.rows",
        "host.L.rows",
        "host.ab.rows",
        "host.queue.keys",
        "host.queue.index",
        "host.queue.pointer",
        "host.key_encoder.net.backbone.conv1.weight",
    } <= keys
    if world == 4:  # which trains IFND
        assert {"pseudo", "rank"} <= {key.rpartition(".")[2] for key in keys}
    # The rows change from epoch to epoch.
    for name, key in (("moco", "queue.keys"), ("ir", "bank.rows"), ("cmc", "L.rows")):
        first, second = hashes[name][0][0], hashes[name][1][0]
        assert first[f"host.{key}"] != second[f"host.{key}"]


# ------------------------------------------------------------ evaluation of data that do not divide


def save_evaluations(root):
    """Evaluate an encoder, and write what this process finds to found<rank>.pt."""
    cpu = torch.device("cpu")
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
    encoder = Encoder(cpu, backbone="resnet10", stem="cifar", width=8, precision="fp32")
    if distributed.is_main():
        torch.save(encoder.backbone.state_dict(), "weights.pt")
    distributed.barrier()
    train = load("train", 0, name="folder", root=root)
    test = load("test", 0, name="folder", root=root)
    images = {}
    for count in (1, 2, 4, 5, 101):
        first_images = test.select(torch.arange(count))
        images[count] = extract(flatten, first_images, 32, cpu, workers=0)
    monitor = KNN(train, test, 32, cpu, 0, k=10)
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


def flatten(images):
    return images.flatten(1)


@pytest.mark.slow
def test_three_processes_find_of_101_images_what_one_finds(tmp_path):
    """So they do of fewer images than there are processes.

    Embeddings are in the order of the images, none lost and none twice. The figures of kNN and the
    linear probe are equal.
    """
    write_images(tmp_path / "train", 64)
    write_images(tmp_path / "val", 101)
    for world in (1, 3):
        run_processes(world, tmp_path / str(world), save_evaluations, str(tmp_path))
    one = torch.load(tmp_path / "1" / "found0.pt")
    three = [torch.load(path) for path in (tmp_path / "3").glob("found*.pt")]
    assert len(three) == 3
    assert len(one["images"][101].unique(dim=0)) == 101
    for found in three:
        assert found["knn"] == one["knn"]
        for count, embeddings in one["images"].items():
            assert len(embeddings) == count
            assert torch.equal(embeddings, found["images"][count])
    rows = [
        json.loads((tmp_path / world / "runs" / "a" / "linear.jsonl").read_text())["rows"]
        for world in "13"
    ]
    assert rows[0] == rows[1]
    assert rows[0].keys() == {"raw pixels", "untrained encoder", "a"}


# ---------------------------------------------------------------------------------------- two nodes


@pytest.mark.slow
def test_two_torchruns_are_one(worlds):
    """The README's command for two nodes is run twice on this one, as two agents.

    They train bit for bit what two processes of one node train.
    """
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
    printed = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "".join(printed)
    assert sum("= 2 processes x 16" in words for words in printed) == 1
    a, b = read_checkpoint(worlds / "2", "moco"), read_checkpoint(folder, "moco")
    assert a.keys() == b.keys()
    assert all(same(a[part], b[part]) for part in a if part != "place")
    assert loss_curve(worlds / "2", "moco") == loss_curve(folder, "moco")


# -------------------------------------------------------------------------------------------- SLURM

# Stand-ins for the commands of a cluster.
CLUSTER = {
    # It gives the script what a job has, and becomes its shell.
    "sbatch": """
import os
import sys

with open(sys.argv[1]) as f:
    options = [line.split()[1] for line in f if line.startswith("#SBATCH")]
(nodes,) = [option.split("=")[1] for option in options if option.startswith("--nodes=")]
os.environ.update(
    SLURM_JOB_ID=os.environ["JOB"],
    SLURM_JOB_NODELIST="localhost,b",
    SLURM_NNODES=nodes,
    SLURM_GPUS_ON_NODE=os.environ["GPUS"],
    SLURM_CPUS_PER_TASK="64",
)
os.execvp("bash", ["bash", *sys.argv[1:]])
""",
    # It starts a task on each node, each in a process group of its own.
    "srun": """
import os
import subprocess
import sys

tasks = []
for node in range(int(os.environ["SLURM_NNODES"])):
    environment = {**os.environ, "SLURM_NODEID": str(node)}
    task = subprocess.Popen(sys.argv[2:], env=environment, start_new_session=True)
    tasks.append(task)
with open("steps", "w") as f:
    f.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
""",
    "scancel": """
import os
import signal
import sys

assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
with open("steps") as f:
    tasks = f.read().split()
for task in tasks:
    os.killpg(int(task), signal.SIGTERM)
""",
    "scontrol": """
import sys

if sys.argv[1] == "show":
    for node in sys.argv[3].split(","):
        print(node)
with open("scontrol", "a") as f:
    f.write(" ".join(sys.argv[1:]) + "\\n")
""",
}
# It writes down its arguments, and does what the last of them says: ends=CODE or waits=CODE.
TORCHRUN = f"""#!{sys.executable} -S
import os
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
node = os.environ["SLURM_NODEID"]
with open("torchrun" + node, "w") as f:
    f.write(" ".join(sys.argv[1:]))
action, _, code = sys.argv[-1].partition("=")
if action == "waits":
    open("fifo" + node, "w").close()
    signal.sigwait([signal.SIGTERM])
sys.exit(int(code))
"""


@pytest.fixture
def job():
    """The number of a job, whose port (slurm/train.sbatch) nobody uses."""
    return str(free_port(range(24711, 30000)) - 20000)


@pytest.fixture
def cluster(tmp_path, job):
    """cluster(torchrun, *arguments, gpus) -> the batch shell of a job.

    Both nodes of the job are this machine.
    """
    (tmp_path / "bin").mkdir()
    for name, program in CLUSTER.items():
        write_program(tmp_path / "bin" / name, f"#!{sys.executable} -S\n{program}")

    def submit(torchrun, *arguments, gpus=8):
        write_program(tmp_path / "bin" / "torchrun", torchrun)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "GPUS": str(gpus),
            "JOB": job,
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


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def requests_to_scontrol(folder):
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
    # There is no path from the root but that of the shell.
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
    ends, code, requeued, cluster, job, tmp_path
):
    """torchrun is told the same on each node.

    The job is queued again where it was told to stop and had more to do, and not where it is done
    or fails by itself.
    """
    for node in range(2):
        os.mkfifo(tmp_path / f"fifo{node}")
    shell = cluster(TORCHRUN, "--cfg", "some file.yaml", ends)
    if ends.startswith("waits"):
        for node in range(2):
            wait_until_a_run_waits(tmp_path / f"fifo{node}")
        # --signal=B:USR1 sends it to the shell alone.
        shell.send_signal(signal.SIGUSR1)
    out, _ = shell.communicate(timeout=300)
    assert shell.returncode == code, out
    assert out == "", out
    requests = ["show hostnames localhost,b"]
    if requeued:
        requests.append(f"requeue {job}")
    assert requests_to_scontrol(tmp_path) == requests
    arguments = (
        "--nnodes 2 --nproc_per_node 8 --max-restarts 3 "
        f"--rdzv_backend c10d --rdzv_endpoint localhost:2{job} --rdzv_id {job} "
        f"train_pretrain.py --cfg some file.yaml {ends}"
    )
    for node in range(2):
        assert (tmp_path / f"torchrun{node}").read_text() == arguments


@pytest.mark.slow
def test_a_slurm_job_at_its_time_limit_goes_on_in_the_next(cluster, job, tmp_path):
    """torchrun itself runs on two nodes, with a process each.

    The shell gets USR1 in the second epoch, all save and end, and the requeued job ends as an
    undisturbed one.
    """
    for folder in ("data", "engine", "evaluation", "losses", "models"):
        os.symlink(os.path.join(ROOT, folder), tmp_path / folder)
    settings = [*TINY, *PAIRS["moco-ifnd"], "optim.batch_size=4"]  # 32 steps an epoch
    run_processes(2, tmp_path / "whole", pretrain, {"a": settings})
    os.mkfifo(tmp_path / "fifo")
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    (tmp_path / "train_pretrain.py").write_text(f"""
import functools
import os
import runpy
import sys

sys.path[:0] = [{ROOT!r}, {os.path.dirname(__file__)!r}]
if os.path.exists("fifo") and os.environ["RANK"] == "1":
    import test_faults

    test_faults.at(1, 5, functools.partial(test_faults.wait_for_a_signal, "fifo"))
runpy.run_path({os.path.join(ROOT, "train_pretrain.py")!r}, run_name="__main__")
""")
    shell = cluster(torchrun, *settings, "name=a", gpus=1)
    wait_until_a_run_waits(tmp_path / "fifo")
    shell.send_signal(signal.SIGUSR1)
    out, _ = shell.communicate(timeout=300)
    assert shell.returncode == 1, out
    assert "told to stop: runs/a/last.pt holds the state after step 21 of 32 of epoch 2" in out, out
    assert requests_to_scontrol(tmp_path)[-1] == f"requeue {job}"
    os.remove(tmp_path / "fifo")
    shell = cluster(torchrun, *settings, "name=a", gpus=1)
    out, _ = shell.communicate(timeout=300)
    assert shell.returncode == 0, out
    assert "going on after step 21 of 32 of epoch 2" in out, out
    assert requests_to_scontrol(tmp_path)[-1].startswith("show"), out
    a, b = read_checkpoint(tmp_path / "whole", "a"), read_checkpoint(tmp_path, "a")
    assert all(same(a[part], b[part]) for part in ("encoder", "host", "loss", "optimizer", "rng"))


# ------------------------------------------------------------------------------------ the same bits


@pytest.mark.slow
def test_the_same_seed_is_the_same_run_whatever_the_number_of_workers(tmp_path):
    """Two processes have two runs on JPEGs each.

    Everything that a checkpoint holds, and the log, are the same bit for bit.
    """
    root = write_images(tmp_path / "jpegs", 64, "jpg", 40)
    settings = [*TINY, *PAIRS["moco-ifnd+ring+mochi"], *FILES, f"data.root={root}"]
    workers_of = {"0": (0, 1), "1": (0, 2)}
    started = {}
    for folder, workers in workers_of.items():
        jobs = {f"workers{n}": [*settings, f"data.workers={n}"] for n in workers}
        started[folder] = start_processes(1, tmp_path / folder, pretrain, jobs)
    for folder, processes in started.items():
        join_processes(processes, tmp_path / folder)

    runs = [
        (tmp_path / folder, f"workers{n}")
        for folder, workers in workers_of.items()
        for n in workers
    ]
    first_state, *states = [read_checkpoint(*run) for run in runs]
    first_curve, *curves = [loss_curve(*run) for run in runs]
    for state, curve in zip(states, curves):
        for part in ("epoch", "encoder", "host", "loss", "optimizer", "scaler", "rng"):
            assert same(first_state[part], state[part]), part
        assert curve == first_curve
    assert len(first_curve) == 2
    # IFND clustered: it has labels that are not -1.
    labels = [value for key, value in first_state["loss"].items() if key.endswith("pseudo")]
    assert min(value.min() for value in labels) >= 0


@contextlib.contextmanager
def torch_threads(n):
    """Let torch use n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder_of_jpegs(tmp_path_factory):
    root = write_images(tmp_path_factory.mktemp("jpegs"), 24, "jpg", 110)
    return load("pretrain", 0, name="folder", root=str(root))


def views_of_an_epoch(data, recipe, size, workers=0, depth=None):
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
    steps = loader.epoch(1) if depth is None else prefetch(loader.epoch(1), loader.device, depth)
    # (2 steps x 2 views, n / 2, 3, S, S)
    return torch.stack([view for step_views, _ in steps for view in step_views])


@pytest.mark.slow
def test_neither_workers_nor_threads_nor_what_is_made_ahead_change_a_bit_of_a_view(folder_of_jpegs):
    """The colours of JPEGs are changed by a worker, which has one thread.

    Without workers the process does it itself, with all of its threads.
    """
    for recipe, size in (("moco_v2", 32), ("moco_v1", 32), ("moco_v2", 96), ("moco_v1", 96)):
        with torch_threads(1):
            expected = views_of_an_epoch(folder_of_jpegs, recipe, size)
        with torch_threads(2):
            for workers, depth in ((0, None), (1, 1), (2, 3)):
                views = views_of_an_epoch(folder_of_jpegs, recipe, size, workers, depth)
                assert torch.equal(expected, views), (recipe, size, workers)


@pytest.mark.parametrize(
    "pixels,size",
    [
        (32, 32),
        pytest.param(48, 32, marks=pytest.mark.slow),
        pytest.param(96, 96, marks=pytest.mark.slow),
        pytest.param(224, 224, marks=pytest.mark.slow),
    ],
)
def test_threads_change_no_bit_of_an_array_sets_views(pixels, size):
    """Threads share out grains of 32,768 numbers. Larger images are tried in two recipes of all."""
    images, _ = shapes(24 if size < 224 else 4)
    images = F.interpolate(torch.from_numpy(images), (pixels, pixels))
    data = ArraySet(images, None, None, (0.5,) * 3, (0.25,) * 3)
    # Threads that wait for one another are slow on a busy machine.
    recipes = RECIPES if FULL or size == 32 else ("moco_v1", "moco_v2")
    for recipe in recipes:
        with torch_threads(1):
            by_one_thread = views_of_an_epoch(data, recipe, size)
        with torch_threads(2):
            by_two_threads = views_of_an_epoch(data, recipe, size)
        assert torch.equal(by_one_thread, by_two_threads), recipe
