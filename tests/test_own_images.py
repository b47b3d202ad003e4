"""docs/own_images.md as a story: its commands, in order, on imagenette without its labels."""

import glob
import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

import processes
from processes import ROOT

DATASETS = os.path.abspath(os.environ.get("DATASETS", "datasets"))
SETS = "imagenette96", "tiny_imagenet_10", "cifar-10-batches-py"
# What makes the steps small. Everything else is the page's.
SMALL = [
    "model.stem=imagenet",
    "model.width=32",
    "model.dim=64",
    "model.host=simclr",
    "loss.temperature=0.2",
    "optim.batch_size=128",
]


def commands(replaced):
    """The page's commands as lists of words, with some of its text replaced."""
    with open(os.path.join(ROOT, "docs", "own_images.md"), encoding="utf-8") as page:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read(), re.MULTILINE | re.DOTALL)
    text = "".join(block for language, block in blocks if not language)
    for old, new in {"\\\n": " ", **replaced}.items():
        text = text.replace(old, new)
    return [shlex.split(line)[1:] for line in text.splitlines()]


def copy_images(files, folder):
    """Copy images under names that say nothing of their classes."""
    os.makedirs(folder)
    for number, file in enumerate(files):
        shutil.copy(file, folder / f"{number:04}.jpg")


def files_in(*folder):
    """All files below a folder of the real data sets, sorted."""
    folder = os.path.join(DATASETS, *folder)
    return sorted(glob.glob(os.path.join(folder, "**", "*.*"), recursive=True))


@pytest.fixture
def replaced(tmp_path):
    """The page's words for folders, and its epochs, and what they are here.

    PHOTOS has 600 images without labels, LABELLED 150 and 200 images of each of ten classes.
    """
    for name in SETS:
        if not os.path.exists(os.path.join(DATASETS, name)):
            pytest.skip(f"there is no {name} in {DATASETS}; set DATASETS")
    photos, labelled = tmp_path / "photos", tmp_path / "labelled"
    copy_images(files_in("imagenette96", "train")[::5], photos)
    for name in os.listdir(os.path.join(DATASETS, "tiny_imagenet_10", "train")):
        files = files_in("tiny_imagenet_10", "train", name)
        copy_images(files[:150], labelled / "train" / name)
        copy_images(files[150:350], labelled / "val" / name)
    return {
        "PHOTOS": shlex.quote(str(photos)),
        "LABELLED": shlex.quote(str(labelled)),
        "yaml/": shlex.quote(os.path.join(ROOT, "yaml/")),
        "optim.epochs=20": "optim.epochs=2",
        "optim.epochs=30": "optim.epochs=3",
    }


def knn_by_epoch(folder, run):
    """{epoch: kNN in %} of a run's log."""
    with open(folder / "runs" / run / "log.jsonl") as file:
        lines = [json.loads(line) for line in file]
    return {line["epoch"]: line["knn"] for line in lines if "knn" in line}


@pytest.mark.slow
def test_the_story(replaced, tmp_path):
    def take_step(words, *settings):
        return processes.run(tmp_path, *words, *SMALL, *settings).stdout

    earlier, begin, at_random, train_on, embed = commands(replaced)
    begins = "optim.epochs=6", "optim.lr=0.4", "knn.every=0"
    take_step(earlier, f"data.root={DATASETS}", *begins)
    said = take_step(begin)
    assert "auto: data.mean=[0.4591, " in said
    assert "began from runs/cifar10_cpu/last.pt, one of our last.pt: its backbone" in said
    take_step(at_random)
    begun, random = knn_by_epoch(tmp_path, "photos"), knn_by_epoch(tmp_path, "photos_random")
    print(f"kNN by epoch from weights: {begun}, at random: {random}")
    assert begun.keys() == random.keys() == {0, 2}
    assert begun[2] > random[2] + 2

    take_step(train_on)
    assert knn_by_epoch(tmp_path, "photos").keys() == {0, 2, 3}

    take_step(embed)
    vectors = np.load(tmp_path / "vectors" / "embeddings.npy")
    names = (tmp_path / "vectors" / "files.txt").read_text().splitlines()
    assert names == sorted(os.listdir(tmp_path / "photos"))
    assert vectors.shape == (len(names), 256)
    assert np.isfinite(vectors).all()
    with Image.open(tmp_path / "vectors" / "neighbours.png") as picture:
        assert min(picture.size) > 8 * 32
