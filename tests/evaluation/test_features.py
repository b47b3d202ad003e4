"""Extraction and kNN: the same answers by blocks as at once, within the memory that is stated."""

import os
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_linear
from data.datasets import ArraySet, load
from data.shapes import shapes
from evaluation import features
from evaluation.features import (
    KNN,
    accuracy_percent,
    evenly_spaced,
    extract,
    knn,
    mean_per_class_accuracy,
    voters,
    where_features_fit,
)
from models.resnet import Encoder
from processes import run

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
QUICK = os.path.join(ROOT, "yaml", "quickstart.yaml")


class Sizes(TorchDispatchMode):
    """The bytes of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        made = func(*args, **kwargs or {})
        for x in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in before:
                self.made.append(x.untyped_storage().nbytes())
        return made


def knn_at_once(bank, labels, queries, k, temperature):
    """With the similarities of all queries to all of the bank in memory."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    similarity, rows = similarity.topk(min(k, len(bank)))
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = torch.zeros(len(queries), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[rows], weight).argmax(1)


def clusters(n, m, width, classes=7):
    """Made-up features with a class each: bank, labels, queries."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=g)
    labels = torch.randint(classes, (n + m,), generator=g)
    x = centres[labels] + 2 * torch.randn(n + m, width, generator=g)
    return x[:n], labels[:n], x[n:]


@pytest.mark.parametrize("rows", [1, 7, 64, 999, 1000, 5000])
@pytest.mark.parametrize("k", [1, 20, 2000])
def test_neighbours_by_blocks_are_those_of_the_whole_bank(rows, k, monkeypatch):
    """rows: of the bank in a block, some fewer than k."""
    bank, labels, queries = clusters(1000, 60, 16)
    expected = knn_at_once(bank, labels, queries, k, 0.1)
    monkeypatch.setattr(features, "QUERIES", 25)
    monkeypatch.setattr(features, "BLOCK_BYTES", 4 * 25 * rows)
    assert torch.equal(knn(bank, labels, queries, k, 0.1), expected)
    assert 0 < len(expected.unique()) <= 7


def test_a_bank_of_one_block_gives_the_same_bits_as_at_once():
    bank, labels, queries = clusters(3000, 500, 64)
    parts = features.nearest(bank, queries, 50, CPU)
    similarity, rows = (torch.cat(many) for many in zip(*parts))
    at_once = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(50)
    assert torch.equal(similarity, at_once.values)
    assert torch.equal(rows, at_once.indices)


@pytest.mark.parametrize("n, width", [(200_000, 16), (60_000, 512), (20_000, 2048)])
def test_neighbours_need_no_more_than_a_block(n, width):
    """Nothing is as large as the bank or as the similarities to all of it."""
    bank, labels, queries = torch.ones(n, width), torch.zeros(n, dtype=torch.long), torch.ones(3, 1)
    with Sizes() as sizes:
        knn(bank, labels, queries.expand(3, width), 200, 0.1)
    assert max(sizes.made) <= features.BLOCK_BYTES


def test_features_go_into_one_tensor():
    images = torch.from_numpy(shapes(1500)[0])
    data = ArraySet(images, None, None, (0.0,) * 3, (1.0,) * 3)
    with Sizes() as sizes:
        x = extract(lambda x: x.flatten(1), data, 32, CPU)
    assert torch.equal(x, images.float().flatten(1) / 255)
    assert sum(size >= x.nbytes // 2 for size in sizes.made) == 1


def test_extraction_draws_no_random_numbers():
    """The linear layers are initialised before it, and were once after it."""
    before = torch.get_rng_state()
    extract(lambda x: x.flatten(1), load("train", 0, name="shapes", limit=20), 32, CPU)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------------- how many vote


@pytest.mark.parametrize(
    "k, n, expected",
    [
        (200, 2000, 200),
        (200, 5000, 200),
        (200, 1999, 199),
        (200, 100, 10),
        (200, 9, 1),
        (1, 1, 1),
        (20, 200, 20),
        (200, 1_281_167, 200),
    ],
)
def test_a_tenth_of_the_images_vote_at_most(k, n, expected):
    assert voters(k, n) == expected


def test_the_monitor_says_how_many_vote_and_they_do():
    """All 100 images would vote for the most frequent class whatever the query."""
    data = load("train", 0, name="shapes", limit=100)
    few = KNN(data, data, 32, CPU, 0, k=200)
    assert "k 10 (knn.k is 200, but of 100 training images a tenth at most vote), T 0.1" in str(few)
    ten = KNN(data, data, 32, CPU, 0, k=10)
    assert str(ten).startswith("weighted kNN, k 10, T 0.1")
    torch.manual_seed(0)
    net = Encoder(backbone="resnet10", stem="cifar", width=8, precision="fp32")
    assert few(net) == ten(net)


# ---------------------------------------------------------------------------- fewer test images


def tiny_encoder():
    torch.manual_seed(0)
    return Encoder(backbone="resnet10", stem="cifar", width=8, precision="fp32")


def test_a_limit_takes_each_class_by_its_share():
    in_turn = torch.arange(10).repeat(60)  # every tenth image is of one class
    skewed = torch.tensor([0] * 500 + [1] * 50 + [2] * 50)
    for labels, expected in ((in_turn, [6] * 10), (skewed, [50, 5, 5])):
        rows = evenly_spaced(labels, 60)
        assert labels[rows].bincount().tolist() == expected
        assert torch.equal(rows, rows.unique())
    assert torch.equal(evenly_spaced(skewed, 600), torch.arange(600))


def test_the_monitor_asks_of_so_many_test_images_and_says_so(monkeypatch):
    train, test = (load(part, 0, name="shapes", limit=200) for part in ("train", "test"))
    asked = []
    real = features.embeddings

    def embeddings(encoder, dataset, *args):
        asked.append(len(dataset))
        return real(encoder, dataset, *args)

    monkeypatch.setattr(features, "embeddings", embeddings)
    few = KNN(train, test, 32, CPU, 0, limit=60)
    rows = evenly_spaced(test.labels, 60)
    alone = KNN(train, test.select(rows), 32, CPU, 0)
    net = tiny_encoder()
    assert few(net) == alone(net)
    assert asked == [200, 60, 200, 60]
    assert len(test) == 2400  # the set itself is as it was
    assert str(few) == f"{alone}, asked of 60 of 2400 test images (knn.limit)"

    for limit in (None, 2400, 5000):
        assert "test images" not in str(KNN(train, test, 32, CPU, 0, limit=limit))
    with pytest.raises(ValueError, match="knn: limit is 0; it must be above 0, or null"):
        KNN(train, test, 32, CPU, 0, limit=0)
    assert not KNN(train, None, 32, CPU, 0, limit=3).possible


MONITOR_JOB = """
import torch
from data.datasets import load
from engine import distributed
from evaluation import features
from models.resnet import Encoder

device = distributed.init_distributed()
rank = distributed.rank()
train, test = (load(part, 0, name="shapes", limit=200) for part in ("train", "test"))
torch.manual_seed(0)
net = Encoder(backbone="resnet10", stem="cifar", width=8, precision="fp32")
value = features.KNN(train, test, 32, device, 0, limit=61)(net)
print("asked", value, flush=True)
if rank == 1:
    features.available_bytes = lambda: (10**6, "here")
features.KNN(train, test, 32, device, 0)(net)
"""


def test_two_processes_ask_of_the_same_images_and_refuse_together(tmp_path):
    """Where one of them lacks the memory both end, with one sentence."""
    (tmp_path / "job.py").write_text(MONITOR_JOB)
    done = run(tmp_path, tmp_path / "job.py", processes=2, check=False)
    assert done.returncode == 1
    assert done.stderr.count("kNN: the features of 200 training and 2400 test images") == 1
    train, test = (load(part, 0, name="shapes", limit=200) for part in ("train", "test"))
    alone = KNN(train, test, 32, CPU, 0, limit=61)(tiny_encoder())
    told = done.stdout.split()
    assert told[0] == "asked"
    assert float(told[1]) == pytest.approx(alone)


# ---------------------------------------------------------------------------- per class


def test_each_class_counts_alike():
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 3, 3])
    predictions = torch.tensor([0, 0, 0, 0, 0, 0, 0, 3, 3, 1])
    assert accuracy_percent(predictions == labels) == 80.0
    assert mean_per_class_accuracy(predictions, labels) == round(100 * (7 / 8 + 1 / 2) / 2, 3)
    assert mean_per_class_accuracy(labels, labels) == 100.0
    assert mean_per_class_accuracy(labels + 1, labels) == 0.0


def test_it_is_scikit_learns_balanced_accuracy():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(20, (500,), generator=g) % torch.randint(1, 20, (500,), generator=g)
    predictions = torch.where(torch.rand(500, generator=g) < 0.5, labels, labels.roll(1))
    expected = 100 * metrics.balanced_accuracy_score(labels, predictions)
    assert mean_per_class_accuracy(predictions, labels) == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------------------- where they fit


def test_the_monitor_refuses_before_it_extracts_what_fits_nowhere(monkeypatch):
    data = load("train", 0, name="shapes", limit=100)
    monkeypatch.setattr(features, "available_bytes", lambda: (10**6, "here"))
    monkeypatch.setattr(features, "extract", lambda *given, **named: pytest.fail("extracts"))
    monitor = KNN(data, data, 32, CPU, 0, feature="backbone", limit=50)
    message = (
        r"kNN: the features of 100 training and 50 test images, 64 numbers an image, need "
        r"0\.268 GB of memory, but 0\.001 GB are free here; take fewer training images with "
        r"data\.limit or test images with knn\.limit, train without kNN \(knn\.every=0\)"
    )
    net = tiny_encoder().train()
    before = [buffer.clone() for buffer in net.buffers()]
    with pytest.raises(SystemExit, match=message) as refusal:
        monitor(net)
    assert "\n" not in refusal.value.code
    assert net.training
    assert all(map(torch.equal, before, net.buffers()))


def test_the_monitor_keeps_features_where_they_fit_and_asks_once(monkeypatch):
    data = load("train", 0, name="shapes", limit=100)
    monitor, net, asked = KNN(data, data, 32, CPU, 0), tiny_encoder(), []

    def somewhere(needed, device):
        asked.append(needed)
        return CPU, None

    monkeypatch.setattr(features, "where_features_fit", somewhere)
    assert monitor(net) == monitor(net)
    assert asked == [4 * 128 * 200 + features.KNN_BYTES]


@pytest.mark.parametrize(
    "device, free, free_here, expected",
    [
        (GPU, 101, 0, GPU),
        (GPU, 99, 80, CPU),
        (GPU, 0, 0, GPU),  # 0: torch can't say
        (GPU, 99, None, CPU),
        (CPU, 0, 75, CPU),
        (CPU, 0, None, CPU),
        (GPU, 99, 74, "0.074 GB are free here, and 0.099 GB on cuda:0"),
        (CPU, 0, 74, "0.074 GB are free here"),
    ],
)
def test_where_features_fit(device, free, free_here, expected, monkeypatch):
    """75 MB of them; of a GPU's memory three quarters are taken at most."""
    million = 10**6
    here = None if free_here is None else free_here * million
    monkeypatch.setattr(features.devices, "free_memory", lambda device: free * million)
    monkeypatch.setattr(features, "available_bytes", lambda: (here, "here"))
    fit, lacking = where_features_fit(75 * million, device)
    assert (lacking if fit is None else fit) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [],
            r"of 60 training and 2400 test images, 3072 numbers an image \(raw pixels\), need "
            r"0\.299 GB of memory, but 0\.001 GB are free here; leave out raw pixels and the "
            r"untrained encoder with --no-baselines, or take fewer training images with "
            r"data\.limit, or allow",
        ),
        (
            ["--no-baselines"],
            r"64 numbers an image \(tiny\), need 0\.269 GB.*free here; take fewer",
        ),
    ],
    ids=["with baselines", "without"],
)
def test_features_that_fit_nowhere_are_refused_before_the_extraction(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    encoder = Encoder(backbone="resnet10", stem="cifar", width=8)
    torch.save(encoder.backbone.state_dict(), "w.pt")
    monkeypatch.setattr(features, "available_bytes", lambda: (10**6, "here"))
    monkeypatch.setattr(train_linear, "extract", lambda *given, **named: pytest.fail("extracts"))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "x",
            "--cfg",
            QUICK,
            "--weights",
            "w.pt",
            "name=tiny",
            "data.limit=60",
            "model.width=8",
            "model.backbone=resnet10",
            *arguments,
        ],
    )
    with pytest.raises(SystemExit, match=message) as refusal:
        train_linear.main()
    assert "\n" not in refusal.value.code
