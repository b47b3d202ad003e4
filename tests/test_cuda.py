"""A GPU beside the CPU: steps of all pairs, resuming, input, k-means, kNN, two processes.

    python -m pytest -m cuda                    where there is a GPU; elsewhere they are skipped
    TEST_DEVICE=cpu python -m pytest -m cuda    the CPU beside itself, to rehearse them

Everything is small: it takes seconds, and needs less than a gigabyte of the GPU's memory.
"""

import copy
import json
import os
import shutil
import sys
import textwrap

import pytest
import torch

import train_pretrain
from benchmarks.kmeans import grouped
from data import datasets
from data.augment import RECIPES, Augment
from data.datasets import ArraySet, load
from data.loader import Loader
from engine import checkpoint, config
from engine import device as devices
from evaluation.features import knn
from losses.kmeans import kmeans
from processes import ROOT, run
from test_distributed import TINY
from test_pairs import PAIRS
from test_scripts import same
from training.build import Builder

NAMED = os.environ.get("TEST_DEVICE")
if not NAMED and devices.accelerator()[0] != "cuda":
    pytest.skip(
        "there is no GPU; TEST_DEVICE=cpu runs these tests on the CPU", allow_module_level=True
    )
pytestmark = pytest.mark.cuda

# cuBLAS reads it when it is first used: with it, equal products have equal bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
CPU = torch.device("cpu")
DEVICE = devices.choose(NAMED or "cuda")
HALF = ["bf16"] if DEVICE == CPU else ["bf16", "fp16"]


@pytest.fixture(autouse=True)
def fp32_without_tf32():
    """Let fp32 be fp32; a test that wants TF32 asks for it."""
    yield allow_tf32(False)
    allow_tf32(False)
    torch.backends.cudnn.allow_tf32 = True  # as torch begins


def allow_tf32(is_allowed):
    torch.backends.cudnn.allow_tf32 = is_allowed
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")


def noise(n=64, side=16):
    """Images of noise. (On plain areas many pre-activations are equal, and ReLU cuts some of them
    by the last bit alone.)"""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
    return ArraySet(images, torch.arange(n) % 3, ["a", "b", "c"], (0.5,) * 3, (0.25,) * 3)


# ------------------------------------------------------------------------------ one training step

STEP = [
    *TINY[2:],
    "data.image_size=16",
    "data.augment=crop_flip",
    "model.backbone=resnet10",
    "optim.batch_size=16",
    "optim.epochs=10",
]
EPOCH = 5.5
# How far the loss may be (relatively), the gradient (its distance by its length) and the rows of
# queue or bank (absolutely). Measured were, on a CPU, with noise of 1e-6 on the images for fp32:
#     fp32  2e-7, 5e-4 (one unit cut by ReLU or not), 2e-6
#     fp16  7e-4, 0.11, 8e-4    10 bits of mantissa, as TF32
#     bf16  3e-3, 0.26, 6e-3    7 bits
# A gradient that is wrong by a factor of 2, by a sign or by a missing term is off by about 1. What
# is far in half precision is the boundary of the ring, where another candidate gets in.
TOLERANCES = {
    "fp32": (1e-5, 5e-3, 2e-5),
    "tf32": (5e-3, 0.25, 4e-3),
    "fp16": (5e-3, 0.25, 4e-3),
    "bf16": (2e-2, 0.5, 2e-2),
}


class Step:
    """The encoder, the host and the loss of a pair on a device, from the same seed everywhere."""

    def __init__(self, pair, device, precision, images):
        settings = [*STEP, *PAIRS[pair], f"model.precision={precision}"]
        cfg = config.load(f"{ROOT}/yaml/quickstart.yaml", settings)
        build = Builder(cfg, pair)
        torch.manual_seed(0)
        self.encoder, self.host = build.host(images, device)
        self.loss_fn = build.loss(images, self.host, device)
        optimizer, schedule, _ = build.optimizer(self.encoder, device)
        self.loader = build.loader(images, self.host, self.encoder, schedule, device)
        embed = build.embedder(self.encoder, self.host, images, self.loader)
        if hasattr(self.loss_fn, "before_epoch"):
            self.loss_fn.before_epoch(int(EPOCH), embed)
        if hasattr(self.host, "queue"):  # so that IFND knows its keys
            slots = self.host.queue.index
            slots.copy_(torch.arange(len(slots)) % len(images))

    def take(self, views, index):
        """The loss, the gradient (P,), and the rows of queue or bank after the step."""
        device, is_fp16 = index.device, self.encoder.precision == "fp16"
        # It begins low, so that no gradient overflows and is skipped.
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=is_fp16)
        torch.manual_seed(1)
        contrasts = self.host(self.encoder, views, index)
        loss = sum(self.loss_fn(contrast, EPOCH).loss for contrast in contrasts)
        scaler.scale(loss).backward()
        gradients = [p.grad.flatten() for p in self.encoder.parameters()]
        self.host.update_memory()
        memory = [
            value.flatten()
            for name, value in self.host.state_dict().items()
            if name.endswith(("queue.keys", "rows"))
        ]
        gradient = torch.cat(gradients) / scaler.get_scale()
        memory = torch.cat(memory or [torch.zeros(1)])  # SimCLR has none
        return loss.item(), gradient.cpu(), memory.cpu()


@pytest.fixture
def draws_of_the_cpu(monkeypatch):
    """Let every device draw the CPU's random numbers, and the same candidates by them.

    Ring draws columns of what topk leaves in any order, and each device has an order of its own.
    """
    for name in ("rand", "randint", "randperm"):
        monkeypatch.setattr(torch, name, drawn_on_the_cpu(getattr(torch, name)))
    plain_topk = torch.Tensor.topk

    def topk_in_order(x, k, sorted=False, **options):
        return plain_topk(x, k, sorted=True, **options)

    monkeypatch.setattr(torch.Tensor, "topk", topk_in_order)


def drawn_on_the_cpu(draw):
    return lambda *shape, device=None, **options: draw(*shape, **options).to(device or CPU)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_step_is_that_of_the_cpu_in_fp32(pair, draws_of_the_cpu):
    reference = Step(pair, CPU, "fp32", noise())
    views, index = next(iter(reference.loader.epoch(0)))
    host = copy.deepcopy(reference.host.state_dict())
    loss_fn = reference.loss_fn.state_dict()
    loss, gradient, memory = reference.take(views, index)
    for precision in ("fp32", "tf32", *HALF):
        allow_tf32(precision == "tf32")
        step = Step(pair, DEVICE, precision.replace("tf32", "fp32"), noise().to(DEVICE))
        step.host.load_state_dict(host)
        step.loss_fn.load_state_dict(loss_fn)  # with the CPU's clusters
        moved = [x.to(DEVICE) for x in views]
        taken = step.take(moved, index.to(DEVICE))
        off = (
            abs(taken[0] - loss) / abs(loss),
            ((taken[1] - gradient).norm() / gradient.norm()).item(),
            (taken[2] - memory).abs().max().item(),
        )
        is_near = map(float.__lt__, off, TOLERANCES[precision])
        assert all(is_near), f"{precision}: loss, gradient, rows are off by {off}"


# ------------------------------------------------------------------------------------------ input


@pytest.mark.parametrize("tf32", [False, True], ids=["fp32", "TF32"])
@pytest.mark.parametrize("side", [16, 40])
@pytest.mark.parametrize("recipe", RECIPES)
def test_augmented_images_are_those_of_the_cpu(recipe, side, tf32):
    """In levels of 255. side: of the images, which are enlarged or reduced to 24 pixels.

    The blur of a GPU goes as far as the widest of the batch, not to three sigma of each image.
    TF32 rounds the crop, and the jitter stretches contrasts.
    """
    allow_tf32(tf32)
    images = noise(32, side).images
    augment = Augment(recipe, 24)
    drawn = augment.sample_parameters(len(images), torch.Generator().manual_seed(0))
    expected = augment.apply(images, drawn)
    off = 255 * (augment.apply(images.to(DEVICE), drawn).cpu() - expected).abs()
    most = 5 if tf32 else 1.5 if "blur" in drawn else 0.1
    assert off.max() < most
    assert off.mean() < 0.5


@pytest.mark.parametrize("source", ["in memory", "image files"])
def test_the_loader_gives_the_views_of_the_cpu(source, tmp_path):
    """On a GPU they are made by a thread, ahead of the steps."""
    images = noise(24)
    if source == "image files":
        for i, label in enumerate(images.labels.tolist()):
            folder = tmp_path / str(label)
            folder.mkdir(exist_ok=True)
            images.decode(i).save(folder / f"{i}.png")
        images = load("pretrain", 0, name="folder", root=str(tmp_path))
    kinds = {"augment": "cifar", "image_size": 16, "workers": 2}
    expected = list(Loader(images, 8, 2, 0, CPU, **kinds).epoch(3))
    if source == "in memory":
        images.to(DEVICE)
    loader = Loader(images, 8, 2, 0, DEVICE, **kinds)
    steps = list(loader.epoch(3))
    assert len(steps) == len(expected) == 3
    for (views, index), (expected_views, expected_index) in zip(steps, expected):
        assert index.device.type == DEVICE.type
        assert torch.equal(index.cpu(), expected_index)
        for view, expected_view in zip(views, expected_views):
            assert view.device.type == DEVICE.type
            off = (view.cpu() - expected_view).abs().max()
            assert off < 0.02  # about a level of 255
    begun_later = [index for _, index in loader.epoch(3, first_step=2)]
    assert torch.equal(begun_later[0].cpu(), expected[2][1])


def test_batches_are_made_beside_the_steps_and_whole():
    """Long products stand in for steps. A batch that was taken too early, or whose memory was given
    away too early, would differ.
    """
    images = noise(256, 32)
    kinds = {"augment": "cifar", "image_size": 32}
    expected = [views for views, _ in Loader(images, 32, 2, 0, CPU, **kinds).epoch(0)]
    images.to(DEVICE)
    side = 2048 if DEVICE.type == "cuda" else 64
    weights = torch.randn(side, side, device=DEVICE)
    for _ in range(3):
        kept = []
        for views, _ in Loader(images, 32, 2, 0, DEVICE, **kinds).epoch(0):
            for _ in range(20):
                weights = weights @ weights
                weights /= weights.norm()
            kept.append([view.clone() for view in views])
            del views
        for batch, expected_batch in zip(kept, expected):
            for view, expected_view in zip(batch, expected_batch):
                assert (view.cpu() - expected_view).abs().max() < 0.02


def test_a_data_set_moves_to_a_device_that_has_room(monkeypatch):
    images = noise()
    fingerprint, nbytes = images.fingerprint(), images.images.nbytes
    monkeypatch.setattr(datasets.devices, "free_memory", lambda device: 2 * nbytes)
    assert images.to(DEVICE).images.device == CPU
    monkeypatch.setattr(datasets.devices, "free_memory", lambda device: 2 * nbytes + 2)
    assert images.to(DEVICE).images.device.type == DEVICE.type
    assert images.fingerprint() == fingerprint
    rows = torch.tensor([5, 3])
    assert torch.equal(images.select(rows).images.cpu(), noise().images[rows])
    assert images.decode(3).tobytes() == noise().decode(3).tobytes()


# -------------------------------------------------------------------------- clusters, neighbours


def objective(x, centroids, labels):
    return (x - centroids[labels]).double().square().sum().item()


@pytest.mark.parametrize("tf32", [False, True], ids=["fp32", "TF32"])
def test_kmeans_is_as_good_as_on_the_cpu_and_repeats_its_bits(tf32):
    allow_tf32(tf32)
    x = grouped(2000, 60)
    x_there = x.to(DEVICE)
    centroids, labels = kmeans(x_there, 40, restarts=3)
    again = kmeans(x_there, 40, restarts=3)
    assert torch.equal(centroids, again[0])
    assert torch.equal(labels, again[1])
    expected = objective(x, *kmeans(x, 40, restarts=3))
    assert objective(x_there, centroids, labels) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("tf32", [False, True], ids=["fp32", "TF32"])
@pytest.mark.parametrize("keep_on", [CPU, DEVICE], ids=["kept on the CPU", "kept on the device"])
def test_neighbours_are_those_of_the_cpu(keep_on, tf32):
    allow_tf32(tf32)
    x, labels = grouped(1300, 30), torch.arange(1000) % 10
    bank, queries = x[:1000], x[1000:]
    expected = knn(bank, labels, queries, 20, 0.1)
    bank, queries = bank.to(keep_on), queries.to(keep_on)
    classes = knn(bank, labels.to(DEVICE), queries, 20, 0.1)
    assert classes.device.type == DEVICE.type
    n_same = (classes.cpu() == expected).sum()
    assert n_same >= (285 if tf32 else 299)


# ------------------------------------------------------------------------------------- whole runs

# A checkpoint is due at once, and so is written after the first step of each epoch.
SHORT = [*TINY, "data.limit=64", "optim.batch_size=16", "model.backbone=resnet10"]
SHORT += ["log.save_minutes=1e-9", "--device", str(DEVICE)]


@pytest.fixture
def deterministic(monkeypatch):
    """Let a run take kernels that add in the same order each time, not the fastest ones."""
    plain_use = devices.use

    def use(device):
        plain_use(device)
        torch.backends.cudnn.benchmark = False

    monkeypatch.setattr(devices, "use", use)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pretrain(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", *SHORT, *arguments])
    train_pretrain.main()


@pytest.mark.parametrize("precision", ["fp32", *HALF])
@pytest.mark.parametrize("pair", ["moco-nce", "moco-ifnd+ring+mochi"])
def test_a_run_cut_within_an_epoch_ends_as_the_whole_one(
    pair, precision, tmp_path, monkeypatch, deterministic
):
    """Bit for bit, where the kernels are deterministic (a GPU's usual ones are not)."""
    plain_save = checkpoint.save

    def save(path, settings, epoch, **parts):
        plain_save(path, settings, epoch, **parts)
        if (epoch, parts["place"].step) == (1, 1):  # what a run that is killed then leaves
            (tmp_path / "runs" / "cut").mkdir()
            shutil.copy(path, tmp_path / "runs" / "cut")

    monkeypatch.chdir(tmp_path)
    settings = [*PAIRS[pair], f"model.precision={precision}"]
    monkeypatch.setattr(checkpoint, "save", save)
    pretrain(monkeypatch, "name=whole", *settings)
    monkeypatch.setattr(checkpoint, "save", plain_save)
    pretrain(monkeypatch, "name=cut", *settings)
    whole = torch.load(tmp_path / "runs" / "whole" / "last.pt")
    cut = torch.load(tmp_path / "runs" / "cut" / "last.pt")
    assert whole["epoch"] == cut["epoch"] == 2
    for part in ("encoder", "host", "loss", "optimizer", "scaler", "rng"):
        assert same(whole[part], cut[part]), part


JOB = """
    import sys

    sys.path.insert(0, {root!r})
    import train_pretrain
    from engine import device as devices

    # NCCL refuses two processes on one GPU; gloo moves its tensors through the CPU.
    devices.refuse_sharing = lambda *given: None
    devices.backend = lambda kind: "gloo"
    sys.argv = ["train_pretrain.py", *{arguments!r}]
    train_pretrain.main()
"""


@pytest.mark.parametrize("pair", ["moco-ifnd", "simclr-ring"])
def test_two_processes_on_one_device_train_as_two_on_the_cpu(pair, tmp_path):
    """Gradients, keys, clusters and BatchNorm's statistics go between them by gloo."""
    losses = {}
    for name, device in (("there", DEVICE), ("here", CPU)):
        arguments = [*TINY, *PAIRS[pair], f"name={name}", "--device", str(device)]
        job = textwrap.dedent(JOB).format(root=ROOT, arguments=arguments)
        (tmp_path / "job.py").write_text(job)
        run(tmp_path, tmp_path / "job.py", processes=2)
        log = (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in log]
    assert losses["there"][0] == pytest.approx(losses["here"][0], rel=2e-2)
    # Clusters that are found after an epoch of rounding may be others.
    assert losses["there"][1] == pytest.approx(losses["here"][1], rel=0.1)
