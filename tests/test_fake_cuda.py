"""The programs on a GPU that is not there: CUDA tensors of torch's FakeTensorMode have a device, a
shape and a type, but no values. CPU tensors stay real. So a machine without a GPU shows tensors on
two devices, half precision at a loss, and places where the CPU would wait for the GPU.

The autograd engine does not run on these tensors: `backward` gives every parameter a gradient of
its shape, and our own autograd functions are called by hand. Kernels and numbers are not tested.
"""

import contextlib
import functools
import os
import sys
import types
from unittest import mock

import pytest
import torch
import torch.cuda.amp.common
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import data.loader
import train_finetune
import train_linear
import train_pretrain
import training.build
from data.augment import RECIPES, Augment
from data.datasets import ArraySet
from data.loader import Loader
from engine import checkpoint, distributed
from evaluation.features import knn
from losses import Contrast, ifnd
from losses.diagnostics import step_diagnostics
from losses.jcl import JCL
from losses.kmeans import kmeans
from losses.mochi import MoCHi
from losses.nce import NCE
from losses.partition import LogPartition
from losses.ring import Ring
from losses.together import Together
from models.cmc import CMC
from models.ir import IR
from models.moco import MoCo
from models.resnet import Encoder
from models.simclr import SimCLR
from training.run import Run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GPU = torch.device("cuda", 0)
COPY = "copy to the GPU"  # one that waits: not non_blocking


# ------------------------------------------------------------------------------------ the stand-in


class FakeGPU(TorchDispatchMode):
    """Sees every operation. What touches the GPU is fake, everything else is computed.

    waits: (phase, what, file:line) of each place where the CPU waits for the GPU. phase: whatever
    a test sets. A value that is asked for is 0.0, 1 or True; of a mask, one row is True.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.phase = [], ""

    def record(self, what):
        frame, where = sys._getframe(1), "a test"
        while frame is not None:  # the innermost of ours
            path = frame.f_code.co_filename
            if path.startswith(ROOT) and path != __file__:
                where = f"{os.path.relpath(path, ROOT)}:{frame.f_lineno}"
                break
            frame = frame.f_back
        self.waits.append((self.phase, what, where))

    def kinds(self, phase=""):
        return {what for when, what, _ in self.waits if when == phase}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if x.device.type == "cuda"]
        to_gpu = any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves)
        if on_gpu:
            answer = self.read(name, on_gpu, tensors, args, kwargs)
            if answer is not NotImplemented:
                return answer
        elif to_gpu and name == "_to_copy" and not kwargs.get("non_blocking"):
            self.record(COPY)
        elif not to_gpu and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def read(self, name, on_gpu, tensors, args, kwargs):
        """The stand-in for the result of an operation that depends on values, or NotImplemented."""
        x = on_gpu[0]
        if name == "_local_scalar_dense":
            self.record("item")
            return x.dtype == torch.bool or (0.0 if x.is_floating_point() else 1)
        if name == "nonzero":
            self.record(name)
            return x.new_empty((1, x.dim()), dtype=torch.long)
        if name == "bincount":
            self.record(name)
            return x.new_empty(max(1, kwargs.get("minlength", 0)), dtype=torch.long)
        if name == "equal":
            self.record(name)
            return False
        if name in ("index", "index_put", "index_put_"):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.record("mask")
            elif any(i.device.type == "cpu" for i in indices):
                self.record(COPY)  # torch brings the index over itself
        if name in ("masked_select", "_unique2", "unique_dim", "unique_consecutive"):
            self.record(name)
        if name == "_to_copy" and getattr(kwargs.get("device"), "type", "") == "cpu":
            self.record("copy to the CPU")
            with unset_fake_temporarily():
                return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        if name == "_fused_sgd_":  # torch has no fake form of it
            assert len(on_gpu) == len(tensors)
            return None
        return NotImplemented


def move(module, *args, **kwargs):
    """Do what nn.Module.to does, which cannot move a fake tensor."""
    where = [x for x in (*args, *kwargs.values()) if isinstance(x, (str, torch.device))]
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(p.detach().to(*where), p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(*where)
    return module


@contextlib.contextmanager
def fake_gpu():
    """Let all that asks for a GPU find an A100. -> the FakeGPU."""
    optimizers, init = [], torch.optim.Optimizer.__init__

    def remember(self, *args, **kwargs):
        optimizers.append(self)
        init(self, *args, **kwargs)

    def backward(loss):
        assert loss.device == GPU
        assert loss.dtype == torch.float32
        assert loss.requires_grad
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for parameter in [p for group in groups for p in group["params"]]:
            parameter.grad = torch.empty_like(parameter)

    answers = dict(
        is_bf16_supported=True,
        get_device_capability=(8, 0),
        get_device_name="fake",
        mem_get_info=(2**36, 2**36),
    )
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        for where, name, value in (
            (nn.Module, "to", move),
            (torch.Tensor, "backward", backward),
            (torch.optim.Optimizer, "__init__", remember),
            (torch.cuda.amp.common, "amp_definitely_not_available", bool),
            (data.loader, "prefetch", lambda items, device: items),  # without its thread
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()))
        yield stack.enter_context(FakeGPU())


def check(contrasts):
    """What a host hands to a loss is on the GPU, and fp32 where it is not whole numbers."""
    for tensor in tree_leaves([tuple(c) for c in contrasts]):
        if tensor is not None:
            assert tensor.device == GPU
            assert not tensor.is_floating_point() or tensor.dtype == torch.float32, tensor.dtype


# ------------------------------------------------------------------------------- it finds faults


def test_two_devices_are_refused():
    with fake_gpu():
        x = torch.zeros(3, device=GPU)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.zeros(3)
        with pytest.raises(RuntimeError, match="same device"):
            nn.Linear(3, 3)(x)
        assert nn.Linear(3, 3).to(GPU)(x).device == (x + torch.tensor(1.0)).device == GPU


WAITS = {
    "item": lambda x: x.sum().item(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "copy to the CPU": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "bincount": lambda x: x.long().bincount(minlength=4),
    COPY: lambda x: x[torch.tensor([0])],
}


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_is_recorded(what):
    with fake_gpu() as gpu:
        x = torch.zeros(3, device=GPU)
        x.exp().topk(2).values.mean()
        x[torch.arange(2, device=GPU)].add_(1)
        torch.zeros(3).to(GPU, non_blocking=True)
        assert not gpu.waits
        WAITS[what](x)
        assert gpu.kinds() == {what}


def test_a_condition_and_a_list_are_waits():
    with fake_gpu() as gpu:
        x = torch.zeros(3, device=GPU)
        assert bool(x.sum() > 0)
        assert x.tolist() == [0.0] * 3
        assert len(gpu.waits) == 4
        assert gpu.kinds() == {"item"}


def test_half_precision_at_a_loss_is_found():
    with fake_gpu():
        net = Encoder(GPU, backbone="resnet10", stem="cifar", width=4, dim=8, precision="fp16")
        host, x = SimCLR(net), torch.zeros(2, 4, 3, 8, 8, device=GPU)
        index = torch.arange(4, device=GPU)
        check(host(net, list(x), index))
        with pytest.raises(AssertionError, match="float16"):
            check(host(lambda x: net(x).half(), list(x), index))


# ------------------------------------------------------------------------------------ pre-training


def small(*given, part, **settings):
    """16 images of 3 classes in place of a data set."""
    labels = torch.arange(16) % 3
    return ArraySet(
        torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8),
        labels,
        ["a", "b", "c"],
        (0.5, 0.5, 0.5),
        (0.2, 0.2, 0.2),
    )


@contextlib.contextmanager
def program(script, folder, monkeypatch, *arguments):
    """A script's main() on the fake GPU, with `small` data. -> (FakeGPU, what it saved by path)."""
    saved, epoch = {}, Loader.epoch

    def steps(self, *given):
        gpu.phase = "loading"
        for step, item in enumerate(epoch(self, *given)):
            gpu.phase = f"step {step}"
            yield item
            gpu.phase = "loading"
        gpu.phase = "end of the epoch"

    def write(path, value, keep=None):
        saved[path] = tree_map(lambda x: x.cpu() if torch.is_tensor(x) else x, value)
        open(path, "w").close()

    monkeypatch.chdir(folder)
    name = os.path.basename(script.__file__)
    monkeypatch.setattr(sys, "argv", [name, "--cfg", f"{ROOT}/yaml/quickstart.yaml", *arguments])
    monkeypatch.setattr(training.build, "load", functools.wraps(training.build.load)(small))
    monkeypatch.setattr(distributed, "init_distributed", lambda asked: GPU)
    monkeypatch.setattr(checkpoint, "write", write)
    monkeypatch.setattr(checkpoint, "read_checkpoint", saved.__getitem__)
    monkeypatch.setattr(Loader, "epoch", steps)
    # On fake values k-means never ends early, and each iteration is like the one before.
    monkeypatch.setattr(ifnd, "kmeans", functools.partial(kmeans, iterations=2, restarts=2))
    for Host in (IR, CMC, MoCo, SimCLR):
        monkeypatch.setattr(Host, "forward", checked(Host.forward))
    with fake_gpu() as gpu:
        yield gpu, saved


def checked(forward):
    def run(self, encoder, views, index):
        contrasts = forward(self, encoder, views, index)
        check(contrasts)
        return contrasts

    return run


TINY = [
    "optim.batch_size=4",
    "model.width=2",
    "model.dim=4",
    "data.image_size=8",
    "data.augment=moco_v2",
    "knn.every=2",
]
HOSTS = {"ir": ["model.candidates=12"], "cmc": [], "moco": ["model.queue_size=8"], "simclr": []}
IFND, RING, MOCHI = (
    "{name: ifnd, temperature: 0.2, clusters: [2, 3], reassign_every: 1}",
    "{name: ring, temperature: 0.2, inner: 0.1, outer: 0.6}",
    "{name: mochi, temperature: 0.2, hardest: 4, mixed: 3, warmup_epochs: 0}",
)
LOSSES = {
    "nce": ["loss=[{name: nce}]"],
    "draws": ["loss=[{name: nce, n_negatives: 3}]"],
    "ring": [f"loss=[{RING}]"],
    "mochi": [f"loss=[{MOCHI}]"],
    "ifnd": [f"loss=[{IFND}]"],
    "jcl": ["loss=[{name: jcl}]", "model.n_views=3"],
    "attract": [f"loss=[{IFND[:-1]}, mode: attract}}]"],
    "list": [f"loss=[{IFND}, {RING}, {MOCHI}]"],
    "list with jcl": [f"loss=[{RING}, {{name: jcl, temperature: 0.2}}]", "model.n_views=3"],
}
PRECISIONS = ("bf16", "fp16", "fp32")
QUICK = [
    ("ir", "ring", "bf16"),
    ("cmc", "nce", "fp32"),
    ("moco", "list", "fp16"),
    ("simclr", "jcl", "bf16"),
]
# Each pair in one precision, or with FULL=1 in all of them.
REST = [
    (host, loss, precision)
    for i, host in enumerate(HOSTS)
    for j, loss in enumerate(LOSSES)
    for k, precision in enumerate(PRECISIONS)
    if (host, loss, precision) not in QUICK and ((i + j + k) % 3 == 0 or os.environ.get("FULL"))
]


@pytest.mark.parametrize(
    "host, loss, precision",
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_pretraining(host, loss, precision, tmp_path, monkeypatch):
    """An epoch of four steps (two epochs where there are clusters), with augmentation, kNN and
    checkpoints. Steps 1 and 2 never wait: step 0 and the last one of an epoch look at the loss.
    Augmentation asks the GPU for nothing, but it waits for what it copies there."""
    epochs = 2 if loss in ("ifnd", "attract", "list") else 1
    settings = [
        *TINY,
        f"optim.epochs={epochs}",
        f"model.host={host}",
        f"model.precision={precision}",
        *HOSTS[host],
        *LOSSES[loss],
    ]
    if (host, loss, precision) not in QUICK:  # those have all of augmentation, and the pictures
        settings += ["data.augment=crop_flip", "log.pictures=0"]
    with program(train_pretrain, tmp_path, monkeypatch, *settings) as (gpu, saved):
        train_pretrain.main()
        assert gpu.kinds("step 0") >= {"item"} <= gpu.kinds("step 3")
        in_step = [wait for wait in gpu.waits if wait[0] in ("step 1", "step 2")]
        assert not in_step, in_step
        assert gpu.kinds("loading") <= {COPY}
        assert {os.path.basename(path) for path in saved} == {"last.pt", "backbone.pt"}
        if loss == "nce":
            train_pretrain.main()  # loads last.pt, and has no step to take


# ------------------------------------------------------------------------------- the other scripts


@pytest.mark.parametrize(
    "host, precision", [pytest.param("moco", "bf16", marks=pytest.mark.slow), ("cmc", "fp16")]
)
def test_finetuning(host, precision, tmp_path, monkeypatch):
    settings = [
        *TINY,
        f"model.host={host}",
        f"model.precision={precision}",
        "finetune.epochs=1",
        "finetune.labels=1",
        "finetune.batch_size=4",
        "--weights",
        "none",
    ]
    with program(train_finetune, tmp_path, monkeypatch, *settings) as (gpu, saved):
        train_finetune.main()
        in_step = [wait for wait in gpu.waits if wait[0] in ("step 1", "step 2")]
        assert not in_step, in_step
        assert saved


@pytest.mark.parametrize("keep_on", [GPU, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("augmented", [False, True])
def test_linear_probe(augmented, keep_on, tmp_path, monkeypatch):
    """keep_on: where the features are kept. Those on the CPU are moved batch by batch."""
    monkeypatch.setattr(checkpoint, "save", lambda *given, **parts: None)
    settings = {"seed": 0, "knn": {"every": 0, "k": 3, "temperature": 0.1, "feature": "output"}}
    source = {
        "name": "shapes",
        "image_size": 8,
        "workers": 0,
        "augment_backend": "batched",
        "augment": "crop_flip",
    }
    build = training.build.Builder(settings, "a.yaml")
    probe = train_linear.Probe(epochs=2, batch_size=8)
    train = small(part="train")
    with fake_gpu() as gpu:
        train = train.to(GPU)
        encoders = {"a.b": lambda images: images.flatten(1)[:, :12]}
        evaluation = train_linear.Evaluation(build, probe, source, encoders, train, train, GPU)
        features = torch.zeros(16, 12, device=keep_on)
        monkeypatch.setattr(evaluation, "extract", lambda name: (features, features))
        gpu.waits.clear()
        if augmented:
            with Run(str(tmp_path / "linear"), {}, probe.epochs) as run:
                rows = evaluation.of_augmented_images(run)
        else:
            rows = evaluation.of_cached_features()
        tops = {f"top-{k}, lr {lr:g}" for k in (1, 5) for lr in (0.01, 0.1)}
        assert set(rows["a.b"]) == {"knn"} | tops
        waits = {(what, where.split(":")[0]) for _, what, where in gpu.waits if what != COPY}
        # At the end; for the rows of a batch, where the CPU looks them up; and what a Run does in
        # every 20th step and at an epoch's end.
        expected = {("item", "train_linear.py"), ("item", "evaluation/features.py")}
        if augmented:
            files = "training/run.py", "training/epoch.py", "engine/distributed.py"
            expected |= {("item", file) for file in files}
            expected.add(("copy to the CPU", "data/datasets.py"))  # the data's fingerprint
        elif keep_on != GPU:
            expected.add(("copy to the CPU", "train_linear.py"))
        assert waits == expected


# ------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("side", [8, 24])
def test_augmentation(recipe, side):
    """side: of the images, which are enlarged or reduced to 16 pixels."""
    augment = Augment(recipe, 16)
    u = augment.sample_parameters(6, torch.Generator().manual_seed(0))
    with fake_gpu() as gpu:
        views = augment.apply(torch.zeros(6, 3, side, side, dtype=torch.uint8, device=GPU), u)
        assert views.device == GPU
        assert views.shape == (6, 3, 16, 16)
        assert views.dtype == torch.float32
        assert gpu.kinds() <= {COPY}


def test_neighbours_and_clusters():
    with fake_gpu():
        x, labels = torch.zeros(20, 4, device=GPU), torch.zeros(20, dtype=torch.long, device=GPU)
        classes = knn(x, labels, x[:7], 5, 0.1)
        assert classes.device == GPU
        assert classes.shape == (7,)
        assert classes.dtype == torch.long
        centroids, cluster = kmeans(x, 3)
        assert centroids.device == cluster.device == GPU
        assert centroids.shape == (3, 4)
        assert cluster.shape == (20,)


class Context(types.SimpleNamespace):
    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("which", ["plain", "mask", "own", "levels"])
def test_log_partition_forward_and_backward(which):
    with fake_gpu() as gpu:
        q, n = F.normalize(torch.zeros(5, 4, device=GPU)), torch.zeros(9, 4, device=GPU)
        mask = torch.ones(5, 9, dtype=torch.bool, device=GPU) if which == "mask" else None
        self_index = torch.arange(5, device=GPU) if which == "own" else None
        has_levels = which == "levels"
        q_labels = torch.zeros(2, 5, 1, dtype=torch.int, device=GPU) if has_levels else None
        n_labels = torch.zeros(2, 1, 9, dtype=torch.int, device=GPU) if has_levels else None
        context = Context()
        Z = LogPartition.forward(context, q, n, 0.1, mask, self_index, q_labels, n_labels)
        gradient, *none = LogPartition.backward(context, torch.zeros_like(Z))
        assert Z.shape == ((2, 5) if has_levels else (5,))
        assert gradient.shape == q.shape
        assert Z.dtype == gradient.dtype == torch.float32
        assert gradient.device == GPU
        assert none == [None] * 6
        assert not gpu.waits


@pytest.mark.parametrize("name", ["nce", "ring", "jcl", "mochi", "ifnd", "attract", "list"])
def test_figures_of_a_loss_wait_for_nothing(name):
    """But IFND, which compares the labels of all images once an epoch."""
    given = {"temperature": 0.2}
    losses = {
        "nce": NCE(**given),
        "ring": Ring(9, **given),
        "jcl": JCL(9, **given),
        "mochi": MoCHi(mixed=3, query_mixed=2, warmup_epochs=0, **given),
        "ifnd": ifnd.IFND(9, 30, clusters=[2, 3], reassign_every=2, **given),
        "attract": ifnd.IFND(9, 30, clusters=[2], reassign_every=2, mode="attract", **given),
    }
    losses["list"] = Together([losses[part] for part in ("ifnd", "ring", "mochi", "jcl")])
    with fake_gpu() as gpu:
        loss_fn = move(losses[name], GPU)
        q, k, n = (torch.zeros(*shape, 4, device=GPU) for shape in ((40,), (40, 2), (9,)))
        index = torch.zeros(40, dtype=torch.long, device=GPU)
        contrast = Contrast(q, k, n, index, index[:9])
        gpu.waits.clear()  # moving the loss
        output = loss_fn(contrast, 3.0)
        labels = None if name in ("ifnd", "attract", "list") else index[:30]
        figures = step_diagnostics(loss_fn, [contrast], [output], labels, 3.0)
        assert {value.device for value in figures.values()} == {GPU}
        assert not gpu.waits


def test_gather_forward_and_backward(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x)
    with fake_gpu() as gpu:
        x = torch.zeros(5, 4, device=GPU)
        y = distributed.AllGather.forward(Context(), x)
        gradient = distributed.AllGather.backward(Context(), torch.zeros_like(y))
        assert y.device == gradient.device == GPU
        assert gradient.shape == x.shape
        assert not gpu.waits
