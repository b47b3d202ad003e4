"""Sets for transfer, in torchvision's own layouts made here, and the probe on them."""

import gzip
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import FolderSet, load
from processes import ROOT, run
from test_scripts import QUICK, TINY
from train_linear import Probe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a short run of its own."""
    folder = tmp_path_factory.mktemp("transfer")
    run(
        folder,
        "train_pretrain.py",
        "--cfg",
        QUICK,
        *TINY,
        "name=a",
        "optim.epochs=1",
        "model.stem=imagenet",
    )
    return folder


def probe(folder, *settings, **options):
    settings = ["--cfg", QUICK, *TINY, "model.stem=imagenet", *settings]
    return run(folder, "train_linear.py", *settings, **options)


def idx(path, array):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for file in (path, path + ".gz"):
        with (gzip.open if file.endswith(".gz") else open)(file, "wb") as f:
            f.write(
                struct.pack(">HBB", 0, 8, array.ndim)
                + struct.pack(f">{array.ndim}I", *array.shape)
                + array.tobytes()
            )


def test_mnist_has_three_equal_channels(tmp_path):
    images, labels = (
        np.arange(5 * 28 * 28, dtype=np.uint8).reshape(5, 28, 28),
        np.array([3, 1, 4, 1, 5], np.uint8),
    )
    for part in ("train", "t10k"):
        idx(str(tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte"), images)
        idx(str(tmp_path / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte"), labels)
    for part in ("train", "test"):
        data = load(part, 0, name="mnist", root=str(tmp_path))
        assert data.images.shape == (5, 3, 28, 28)
        assert torch.equal(data.images[:, 0], torch.from_numpy(images))
        assert torch.equal(data.images[:, 0], data.images[:, 2])
        assert data.labels.tolist() == labels.tolist()
        assert len(data.classes) == 10


def test_sets_of_files_are_read_as_folders_are(tmp_path):
    """DTD: files named in lists. The workers decode them, as any folder's."""
    for split in ("train", "test"):
        os.makedirs(tmp_path / "dtd" / "dtd" / "labels", exist_ok=True)
        with open(tmp_path / "dtd" / "dtd" / "labels" / f"{split}1.txt", "w") as f:
            for texture in ("banded", "woven"):
                os.makedirs(tmp_path / "dtd" / "dtd" / "images" / texture, exist_ok=True)
                name = f"{texture}/{split}.jpg"
                Image.new("RGB", (40, 30), (10, 20, 30)).save(
                    tmp_path / "dtd" / "dtd" / "images" / name
                )
                f.write(name + "\n")
    data = load("test", 0, name="dtd", root=str(tmp_path))
    assert isinstance(data, FolderSet)
    assert data.labels.tolist() == [0, 1]
    assert data.decode(1).size == (40, 30)
    assert data.files[1].endswith("woven/test.jpg")


def voc(root):
    rng = np.random.default_rng(0)
    os.makedirs(root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main")
    os.makedirs(root / "VOCdevkit" / "VOC2007" / "JPEGImages")
    for split, n in (("trainval", 60), ("test", 30)):
        there = rng.integers(0, 2, (n, 3)) * 2 - 1
        there[:3, 0] = 0
        for i, values in enumerate(there):  # each class is a channel that is bright
            image = rng.integers(0, 120, (16, 16, 3)) + 120 * (values > 0)
            Image.fromarray(image.astype(np.uint8)).save(
                root / "VOCdevkit" / "VOC2007" / "JPEGImages" / f"{split}{i:03d}.jpg", quality=95
            )
        for c, name in enumerate(("aeroplane", "bird", "cat")):
            with open(
                root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / f"{name}_{split}.txt", "w"
            ) as f:
                f.writelines(f"{split}{i:03d} {v:2d}\n" for i, v in enumerate(there[:, c]))


def test_voc2007_and_its_svm_through_the_script(trained, tmp_path):
    pytest.importorskip("sklearn")
    voc(tmp_path)
    data = load("train", 0, name="voc2007", root=str(tmp_path))
    assert data.labels.shape == (60, 3)
    assert set(data.labels.unique().tolist()) == {-1, 0, 1}
    assert data.classes == ["aeroplane", "bird", "cat"]
    out = probe(
        trained,
        "name=voc",
        "--weights",
        "runs/a/backbone.pt",
        "linear.data=voc2007",
        f"linear.root={tmp_path}",
        "linear.classifier=svm",
        "data.workers=0",
    ).stdout
    assert "linear SVM a class" in out
    assert "mAP" in out
    with open(trained / "runs" / "voc" / "linear.jsonl") as f:
        line = json.loads(f.read())
    assert line["figures"] == line["rows"]["voc"]
    assert 0 < line["figures"]["mAP"] <= 100
    assert line["rows"]["raw pixels"]["mAP"] > 90
    assert line["data"] == "voc2007"


def test_what_makes_no_sense_is_refused(tmp_path):
    for settings in ({"classifier": "svm"}, {"data": "voc2007"}):
        with pytest.raises(
            ValueError, match="voc2007, with several classes an image, and svm belong together"
        ):
            Probe(**settings)
    for name, part, message in [
        ("voc2007", "train", "as in VOCdevkit"),
        ("dtdd", "train", "did you mean dtd"),
        ("voc2007", "pretrain", "take data.name=folder"),
    ]:
        with pytest.raises(SystemExit, match=message):
            load(part, 0, name=name, root=str(tmp_path))


@pytest.mark.parametrize(
    "name", [pytest.param("imagenette96", marks=pytest.mark.slow), "tiny_imagenet_10"]
)
def test_transfer_to_a_folder_at_its_own_size_with_another_runs_weights(name, trained):
    root = os.path.join(os.environ.get("DATASETS", os.path.join(ROOT, "datasets")), name)
    if not os.path.isdir(root):
        pytest.skip(f"{root} is not there")
    out = probe(
        trained,
        f"name={name}",
        "linear.data=folder",
        f"linear.root={root}",
        "linear.image_size=32",
        "linear.epochs=2",
        "--weights",
        "runs/a/backbone.pt",
        "--no-baselines",
    ).stdout
    assert f"runs/a/backbone.pt on folder {name}" in out
    assert "10 classes" in out
    with open(trained / "runs" / name / "linear.jsonl") as f:
        line = json.loads(f.read())
    assert set(line["figures"]) == {"knn", "top-1", "top-5"}
    assert line["figures"]["top-1"] == line["rows"][name]["top-1, lr 0.01"]
    assert os.path.exists(trained / "runs" / name / "config.yaml")


def test_export_through_the_script(trained):
    out = probe(trained, "name=a", "--export", "detectron2", "a.pkl").stdout
    assert "a.pkl: runs/a/backbone.pt, for detectron2" in out
    with open(trained / "a.pkl", "rb") as f:
        assert "stem.conv1.weight" in pickle.load(f)["model"]
    out = probe(trained, "name=a", "--export", "torchvision", "a.pt").stdout
    assert "a.pt: runs/a/backbone.pt, for torchvision; " in out
    for name in ("a.preprocessing.yaml", "runs/a/backbone.preprocessing.yaml"):
        assert "mean: [" in (trained / name).read_text()
