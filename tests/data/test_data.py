"""Data sets, shapes and the loader."""

import contextlib
import inspect
import os
import shutil
import threading
import weakref

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data.loader as data_loader
from data.datasets import NAMES, TORCHVISION, ArraySet, balanced_rows, load
from data.loader import Loader, ordered_batches
from data.prefetch import prefetch
from data.shapes import CLASSES, FORMS, distance, shapes
from engine import distributed
from evaluation.features import knn

CPU = torch.device("cpu")
REAL = os.environ.get("DATASETS", "datasets")


def real(*path):
    """A real data set under ./datasets (or $DATASETS), or skip."""
    if not os.path.exists(os.path.join(REAL, *path)):
        pytest.skip(f"needs {os.path.join(*path)} in {REAL}")
    return os.path.join(REAL, path[0])


def loader(dataset, **settings):
    usual = dict(batch_size=8, n_views=2, augment="cifar", image_size=32, workers=0)
    return Loader(dataset, seed=0, device=CPU, **{**usual, **settings})


@pytest.fixture(scope="module")
def arrays():
    images, labels = map(torch.from_numpy, shapes(40))
    return ArraySet(images, labels, CLASSES, (0.5,) * 3, (0.25,) * 3)


def noise(n):
    """An ArraySet of n images."""
    images = torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8)
    return ArraySet(images, None, None, (0.0,) * 3, (1.0,) * 3)


@pytest.fixture
def jpegs(tmp_path):
    """3 classes x 5 images of different sizes, one of them grey, and a validation part."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for c in "abc":
            os.makedirs(tmp_path / part / c)
            for i in range(count):
                image = rng.integers(0, 255, (40 + 3 * i, 50 - 2 * i, 3), dtype=np.uint8)
                Image.fromarray(image[..., 0] if i == 1 else image).save(
                    tmp_path / part / c / f"{i}.jpg"
                )
    return str(tmp_path)


# -------------------------------------------------- shapes


def test_shapes_are_deterministic_balanced_and_varied():
    images, labels = shapes(120)
    again, _ = shapes(120)
    other, _ = shapes(120, seed=1)
    assert np.array_equal(images, again)
    assert not np.array_equal(images, other)
    assert images.shape == (120, 3, 32, 32)
    assert (np.bincount(labels) == 10).all()
    assert len(FORMS) == 12
    assert shapes(12, size=48)[0].shape == (12, 3, 48, 48)


@pytest.mark.parametrize("classes", [2, 13, 100])
def test_shapes_have_as_many_classes_as_asked_for(classes):
    for part, count in ("pretrain", 1000), ("test", 2400):
        dataset = load(part, 0, name="shapes", limit=1000, classes=classes)
        assert dataset.classes == CLASSES[:classes]
        counts = dataset.labels.bincount()
        assert len(counts) == classes
        assert counts.sum() == count
        assert counts.max() - counts.min() <= 1
    assert load("train", 0, name="shapes", limit=24).classes == FORMS == CLASSES[:12]
    assert len(set(CLASSES)) == 100


def test_raw_pixels_do_badly_on_shapes():
    x, y = map(torch.from_numpy, shapes(3000, seed=0))
    x_test, y_test = map(torch.from_numpy, shapes(600, seed=1))
    bank, queries = x.flatten(1) / 255 - 0.5, x_test.flatten(1) / 255 - 0.5
    right = knn(bank, y, queries, 50, 0.1) == y_test
    assert right.float().mean() < 0.3  # chance is 0.083; see data/shapes.py for the whole set


@pytest.mark.parametrize("name", CLASSES)
def test_forms_are_where_they_should_be(name):
    """Inside somewhere, outside far away, and never steeper than a distance may be."""
    side = np.linspace(-2, 2, 201, dtype=np.float32)
    x, y = np.meshgrid(side, side)
    d = distance(name, x, y)
    area = (d < 0).mean() * 16
    assert 0.8 < area < 3.3
    assert d[0, 0] > 0.5
    assert np.abs(np.diff(d, axis=1)).max() <= 0.0201


# -------------------------------------------------- data sets


def test_limit_is_balanced_fixed_and_nested(arrays):
    labels = torch.arange(1000) % 10
    rows = balanced_rows(labels, 1000, 95, seed=0)
    counts = labels[rows].bincount()
    assert counts.max() - counts.min() <= 1
    assert len(rows.unique()) == 95
    assert torch.equal(rows, balanced_rows(labels, 1000, 95, seed=0))
    assert not torch.equal(rows, balanced_rows(labels, 1000, 95, seed=1))
    assert set(rows.tolist()) <= set(balanced_rows(labels, 1000, 200, seed=0).tolist())
    assert len(balanced_rows(None, 1000, 95, seed=0)) == 95
    assert len(load("train", 0, name="shapes", limit=30)) == 30
    assert len(load("test", 0, name="shapes", limit=30)) == 2400


def test_folder_with_classes_and_parts(jpegs):
    train = load("pretrain", 0, name="folder", root=jpegs)
    test = load("test", 0, name="folder", root=jpegs)
    assert (len(train), len(test), train.classes) == (15, 6, ["a", "b", "c"])
    assert train.labels.bincount().tolist() == [5, 5, 5]
    few = load("pretrain", 0, name="folder", root=jpegs, limit=6).files
    assert list(few) == list(load("train", 0, name="folder", root=jpegs, limit=6).files)
    assert len(few) == 6
    assert train.decode(1).mode == "RGB"  # the grey one


def test_a_worker_holds_few_decoded_images_at_once(jpegs, monkeypatch):
    """Of a batch of 45, whose views are those of a worker that held them all."""
    data = load("pretrain", 0, name="folder", root=jpegs)
    data.files = data.files.select(list(range(15)) * 3)
    held, most, decode = [], [], data.decode

    def counted(i):
        image = decode(i)
        held.append(weakref.ref(image))
        most.append(sum(reference() is not None for reference in held))
        return image

    monkeypatch.setattr(data, "decode", counted)
    seen = []
    for n in (100, 7):
        monkeypatch.setattr(data_loader, "HELD_IMAGES", n)
        for settings in ({"augment": "moco_v2"}, {"augment_backend": "pil"}):
            views, index = next(loader(data, batch_size=45, n_views=3, **settings).epoch(1))
            seen.append((torch.stack(views), index))
        assert max(most) == min(n, 45)
        held.clear()
        most.clear()
    assert all(
        torch.equal(a, b) for whole, parts in zip(seen[:2], seen[2:]) for a, b in zip(whole, parts)
    )


def test_labels_do_not_say_which_images_a_limit_takes(jpegs, tmp_path):
    """The same images without their classes, in the same order: the same ones are taken."""
    whole = load("pretrain", 0, name="folder", root=jpegs).files
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(whole):
        shutil.copy(file, flat / f"{i:02d}.jpg")
    a = load("pretrain", 1, name="folder", root=jpegs, limit=7).files
    b = load("pretrain", 1, name="folder", root=str(flat), limit=7).files
    assert [whole.index(file) for file in a] == [int(os.path.basename(file)[:2]) for file in b]


def test_flat_folder_has_no_labels(jpegs):
    root = os.path.join(jpegs, "train", "a")
    flat = load("pretrain", 0, name="folder", root=root)
    assert len(flat) == 5
    assert flat.labels is None
    assert load("test", 0, name="folder", root=root) is None
    views, index = next(loader(flat, batch_size=4).epoch(0))
    assert views[0].shape == (4, 3, 32, 32)
    assert len(index) == 4


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(name="cifar1"), r"data\.name is 'cifar1'; did you mean cifar10"),
        (dict(name="cifar10", split="unlabeled"), "stl10 has train, unlabeled"),
        (dict(name="shapes", limit=10**6), "data.limit is 1000000"),
        (dict(name="folder", root="nowhere"), "no folder nowhere"),
        (dict(name="imagenet", root="nowhere"), r"train/<class>/\*\.JPEG"),
        (dict(name="shapes", limit=0), "data.limit is 0"),
        (dict(name="shapes", classes=1), "data.classes is 1; shapes has 2 to 100 classes"),
        (dict(name="shapes", classes=101), "data.classes is 101; shapes has 2 to 100 classes"),
        (dict(name="cifar10", classes=5), "cifar10 has the classes that it has"),
        (dict(name="shapes", check_files=True, on_error="skip"), "leave one of the two out"),
    ],
)
def test_what_is_not_there_is_said(settings, message):
    with pytest.raises(SystemExit, match=message):
        load("pretrain", 0, **settings)


def test_an_empty_folder_is_said(tmp_path):
    with pytest.raises(SystemExit, match="no images"):
        load("pretrain", 0, name="folder", root=str(tmp_path))


def test_imagenet100_selects_its_classes_and_names_a_missing_one(tmp_path):
    with open(os.path.join(os.path.dirname(load.__code__.co_filename), "imagenet100.txt")) as f:
        classes = f.read().split()
    assert len(set(classes)) == 100
    for part in ("train", "val"):
        for c in [*classes, "n00000001"]:
            os.makedirs(tmp_path / "imagenet" / part / c)
            Image.new("RGB", (8, 8)).save(tmp_path / "imagenet" / part / c / "x.JPEG")
    data = load("pretrain", 0, name="imagenet100", root=str(tmp_path))
    assert len(data) == 100
    assert data.classes == sorted(classes)
    assert len(load("test", 0, name="imagenet", root=str(tmp_path))) == 101
    os.remove(tmp_path / "imagenet" / "train" / classes[0] / "x.JPEG")
    with pytest.raises(SystemExit, match=f"1 of its 100 classes.*{classes[0]}"):
        load("pretrain", 0, name="imagenet100", root=str(tmp_path))


def test_a_download_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", no_network)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(SystemExit) as refusal:
        load("pretrain", 0, name="cifar10", root=str(tmp_path))
    assert (
        f"cifar10 is not at {tmp_path}/cifar-10-batches-py and could not be downloaded "
        "(no network); put the extracted"
    ) in refusal.value.code
    assert "or set data.root (linear.root of a probe's own set, " in refusal.value.code


@pytest.mark.slow
def test_real_cifar10():
    root = real("cifar-10-batches-py") and REAL
    train = load("pretrain", 0, name="cifar10", root=root)
    test = load("test", 0, name="cifar10", root=root)
    assert train.images.shape == (50000, 3, 32, 32)
    assert len(test) == 10000
    assert train.labels.bincount().tolist() == [5000] * 10
    pixels = train.images.float().div(255)
    for value, written in (
        (pixels.mean((0, 2, 3)), train.mean),
        (pixels.std((0, 2, 3)), train.std),
    ):
        assert torch.allclose(value, torch.tensor(written), atol=1e-3)


def test_real_jpeg_folder():
    root = real("imagenette96", "train")
    train = load("pretrain", 0, name="folder", root=root)
    test = load("test", 0, name="folder", root=root)
    assert (len(train), len(test), len(train.classes)) == (3000, 1000, 10)
    views, index = next(loader(train, image_size=64, augment="moco_v2", workers=2).epoch(0))
    assert len(views) == 2
    assert views[0].shape == (8, 3, 64, 64)
    assert views[0].std() > 0.3


# -------------------------------------------------- loader


def test_an_epoch_visits_every_image_once_in_another_order_each_time(arrays):
    epochs = [torch.cat([index for _, index in loader(arrays).epoch(e)]) for e in (0, 1, 0)]
    assert sorted(epochs[0].tolist()) == list(range(40))
    assert epochs[0].tolist() != epochs[1].tolist()
    assert torch.equal(epochs[0], epochs[2])


def test_views_of_an_image_differ_and_index_names_it(arrays):
    ld = loader(arrays, augment="eval", n_views=2)
    for views, index in ld.epoch(0):
        plain = (arrays.images[index].float() / 255 - 0.5) / 0.25
        assert torch.allclose(views[0], plain, atol=1e-6)
    views, _ = next(loader(arrays).epoch(0))
    assert not torch.allclose(views[0], views[1])


@pytest.mark.parametrize("backend", ["batched", "pil"])
def test_workers_change_nothing_and_leave_the_random_state_alone(jpegs, backend):
    data = load("pretrain", 0, name="folder", root=jpegs)
    torch.manual_seed(5)
    state, runs = torch.get_rng_state(), []
    for workers in (0, 1, 3):
        ld = loader(data, batch_size=4, workers=workers, augment_backend=backend)
        runs.append([x for views, _ in ld.epoch(2) for x in views])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))
    assert len(runs[0]) == 6
    assert torch.equal(state, torch.get_rng_state())


def test_jpegs_are_cropped_as_arrays_are():
    """The same pixels as an array set and as files: the same crops, up to PIL's rounding."""
    images = torch.from_numpy(shapes(12, size=40)[0])
    arrays = ArraySet(images, None, None, (0.5,) * 3, (0.25,) * 3)

    class Files:  # an image set without `.images`, as FolderSet
        mean, std, labels = arrays.mean, arrays.std, None

        def __len__(self):
            return 12

        def decode(self, i):
            return arrays.decode(i)

    for size, recipe in ((40, "cifar"), (28, "crop_flip")):
        settings = dict(batch_size=4, augment=recipe, image_size=size)
        epochs = [loader(data, **settings).epoch(0) for data in (arrays, Files())]
        for (a, _), (b, _) in zip(*epochs):
            for x, y in zip(a, b):  # in units of std 0.25
                assert (x - y).abs().mean() < 0.01
                assert (x - y).abs().max() < 0.2


def test_prefetch_keeps_the_order_runs_ahead_stops_early_and_passes_errors_on():
    made, begun = [], threading.Event()

    def items(n, error=None):
        for i in range(n):
            made.append(i)
            if i == 3:
                begun.set()
            yield i
        if error:
            raise error

    assert list(prefetch(items(10), CPU)) == list(range(10))
    assert list(prefetch(iter([]), CPU)) == []
    made.clear()
    begun.clear()
    few = prefetch(items(1000), CPU)
    # two wait, one is in hand
    assert next(few) == 0
    assert begun.wait(10)
    few.close()
    assert len(made) < 7
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
    for error in (ValueError("broken"), SystemExit("broken")):
        got = prefetch(items(2, error), CPU)
        assert [next(got), next(got)] == [0, 1]
        with pytest.raises(type(error), match="broken"):
            next(got)


def test_on_cuda_a_batch_is_used_after_its_event_and_its_memory_after_the_step(monkeypatch):
    """What is asked of CUDA, and by which thread, for there may be none here."""
    calls = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            calls.append((threading.current_thread().name, current[-1].name, "event"))
            return len(calls)

        def wait_event(self, event):
            calls.append((threading.current_thread().name, self.name, f"waits for {event}"))

        def wait_stream(self, other):
            calls.append((threading.current_thread().name, self.name, f"waits for {other.name}"))

    class Batch:
        def record_stream(self, stream):
            calls.append((threading.current_thread().name, stream.name, "uses"))

    @contextlib.contextmanager
    def use(stream):
        current.append(stream)
        yield
        current.pop()

    steps = Stream("steps")
    current = [steps]
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: steps)
    monkeypatch.setattr(torch.cuda, "stream", use)
    batch = Batch(), Batch()
    assert list(prefetch(iter([batch]), torch.device("cuda"))) == [batch]
    assert calls == [
        ("MainThread", "side", "waits for steps"),
        ("prefetch", "side", "event"),
        ("MainThread", "steps", "waits for 2"),
        ("MainThread", "steps", "uses"),
        ("MainThread", "steps", "uses"),
    ]
    assert current == [steps]


def test_a_loader_that_runs_ahead_gives_the_very_views(arrays):
    one, other = loader(arrays), loader(arrays)
    for (a, i), (b, j) in zip(one.epoch(2), prefetch(other.epoch(2), CPU)):
        assert torch.equal(torch.stack(a), torch.stack(b))
        assert torch.equal(i, j)


def test_ordered_batches_are_in_order(jpegs):
    data = load("train", 0, name="folder", root=jpegs)
    parts = list(ordered_batches(data, torch.arange(15), "eval", 24, CPU, batch_size=4, workers=2))
    assert torch.cat([index for _, index in parts]).tolist() == list(range(15))
    assert parts[0][0].shape == (4, 3, 24, 24)


def test_a_broken_image_is_named(jpegs):
    broken = os.path.join(jpegs, "train", "b", "3.jpg")
    with open(broken, "wb") as f:
        f.write(b"not a picture")
    data = load("pretrain", 0, name="folder", root=jpegs)
    for workers in (0, 2):
        with pytest.raises(SystemExit, match=f"{broken} cannot be read as an image"):
            list(loader(data, batch_size=5, workers=workers).epoch(0))


def test_batches_that_cannot_be_are_refused(arrays):
    with pytest.raises(ValueError, match="batch_size 41 is larger than the data set of 40"):
        loader(arrays, batch_size=41)
    with pytest.raises(ValueError, match="image_size is 4"):
        loader(arrays, image_size=4)


def test_examples_are_pictures(arrays, jpegs):
    for data, backend in (
        (arrays, "batched"),
        (arrays, "pil"),
        (load("pretrain", 0, name="folder", root=jpegs), "batched"),
    ):
        x = loader(data, augment_backend=backend).examples()
        assert x.shape == (64, 3, 32, 32)
        assert x.min() >= 0
        assert x.max() <= 1


def test_examples_are_evenly_spaced(jpegs):
    """Files are sorted by class: the first ones would be of one class."""
    data = load("pretrain", 0, name="folder", root=jpegs)
    plain = loader(data).examples(3)[::3]  # (3, 3, S, S), each row's image without augmentation
    rows = torch.tensor([0, 5, 10])
    ((wanted, _),) = ordered_batches(data, rows, "eval", 32, CPU, workers=0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    assert torch.allclose(plain, wanted * std + mean, atol=1e-6)
    assert data.labels[rows].tolist() == [0, 1, 2]


def test_torchvision_has_every_set_that_is_named():
    for kind, train, test in TORCHVISION.values():
        keys = inspect.signature(getattr(torchvision.datasets, kind).__init__).parameters
        assert set(train) | set(test) <= set(keys)
        assert "download" in keys
    ours = {"shapes", "folder", "list", "imagenet", "imagenet100", "voc2007"}
    assert ours | set(TORCHVISION) == set(NAMES)


def test_the_last_smaller_batch_is_dropped_or_kept():
    """30 images in batches of 8: 8, 8, 8 and, kept, 6. Whole batches are the same either way."""
    data = noise(30)
    dropped = list(loader(data, image_size=16, drop_last=True).epoch(3))
    kept = list(loader(data, image_size=16, drop_last=False).epoch(3))
    assert [len(index) for _, index in dropped] == [8, 8, 8]
    assert [len(index) for _, index in kept] == [8, 8, 8, 6]
    for (views, index), (others, other_index) in zip(dropped, kept):
        assert torch.equal(index, other_index)
        assert all(torch.equal(a, b) for a, b in zip(views, others))
    assert torch.cat([index for _, index in kept]).sort().values.tolist() == list(range(30))
    assert kept[-1][0][1].shape == (6, 3, 16, 16)
    large = loader(data, image_size=16, batch_size=64, drop_last=False)
    assert [len(index) for _, index in large.epoch(0)] == [30]


@pytest.mark.parametrize("n", [30, 29, 25])  # a last batch of 6, 5 and 1
def test_processes_share_the_last_batch_equally(n, monkeypatch):
    """Together they have what one has, and as many images twice as make it divide."""
    data = noise(n)
    *_, (_, index) = loader(data, image_size=16, drop_last=False).epoch(0)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "world_size", lambda: 4)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(list(loader(data, image_size=16, drop_last=False).epoch(0))[-1])
    assert len({len(part_index) for _, part_index in parts}) == 1
    together = torch.cat([part_index for _, part_index in parts])
    assert together[: len(index)].tolist() == index.tolist()
    assert len(together) == -(-len(index) // 4) * 4
    assert set(together.tolist()) == set(index.tolist())
