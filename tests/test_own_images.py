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
# What makes the steps small. Everything else is the page's.
SMALL = [
    *("model.stem=imagenet", "model.width=32", "model.dim=64", "model.host=simclr"),
    *("loss.temperature=0.2", "optim.batch_size=128"),
]
EPOCHS = {"20": "2", "30": "3"}  # of the page, and here


def commands(folders):
    """The page's commands as lists of words, its folders replaced by others."""
    with open(os.path.join(ROOT, "docs", "own_images.md"), encoding="utf-8") as page:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read(), re.MULTILINE | re.DOTALL)
    text = "".join(block for language, block in blocks if not language)
    for line in text.replace("\\\n", " ").splitlines():
        for name, folder in folders.items():
            line = line.replace(name, str(folder))
        line = re.sub(r"optim.epochs=(\d+)", lambda word: f"optim.epochs={EPOCHS[word[1]]}", line)
        yield shlex.split(line)[1:]


def copy_images(files, folder):
    """Copy images under names that say nothing of their classes."""
    os.makedirs(folder)
    for number, file in enumerate(files):
        shutil.copy(file, folder / f"{number:04}.jpg")


@pytest.fixture
def folders(tmp_path):
    """The page's folders: 600 images without labels, and ten classes of 150 and 200 images."""
    for name in ("imagenette96", "tiny_imagenet_10", "cifar-10-batches-py"):
        if not os.path.exists(os.path.join(DATASETS, name)):
            pytest.skip(f"there is no {name} in {DATASETS}; set DATASETS")
    photos, labelled = tmp_path / "photos", tmp_path / "labelled"
    files = sorted(glob.glob(os.path.join(DATASETS, "imagenette96", "train", "*", "*")))
    copy_images(files[::5], photos)
    for source in glob.glob(os.path.join(DATASETS, "tiny_imagenet_10", "train", "*")):
        files = sorted(glob.glob(os.path.join(source, "**", "*.*"), recursive=True))
        copy_images(files[:150], labelled / "train" / os.path.basename(source))
        copy_images(files[150:350], labelled / "val" / os.path.basename(source))
    return {"PHOTOS": photos, "LABELLED": labelled, "yaml/": os.path.join(ROOT, "yaml/")}


def knn_by_epoch(folder, run):
    """{epoch: kNN in %} of a run's log."""
    with open(folder / "runs" / run / "log.jsonl") as file:
        lines = [json.loads(line) for line in file]
    return {line["epoch"]: line["knn"] for line in lines if "knn" in line}


@pytest.mark.slow
def test_the_story(folders, tmp_path):
    def take_step(words, *settings):
        return processes.run(tmp_path, *words, *SMALL, *settings).stdout

    earlier, begin, at_random, train_on, embed = commands(folders)
    take_step(earlier, f"data.root={DATASETS}", "optim.epochs=6", "optim.lr=0.4", "knn.every=0")
    said = take_step(begin)
    assert "auto: data.mean=[0.4591, " in said
    assert "began from runs/cifar10_cpu/last.pt, one of our last.pt: its backbone" in said
    take_step(at_random)
    begun, random = knn_by_epoch(tmp_path, "photos"), knn_by_epoch(tmp_path, "photos_random")
    print(f"kNN by epoch, begun from weights: {begun}; at random: {random}")
    assert begun.keys() == random.keys() == {0, 2}
    assert begun[2] > random[2] + 2

    take_step(train_on)
    assert knn_by_epoch(tmp_path, "photos").keys() == {0, 2, 3}

    take_step(embed)
    vectors = np.load(tmp_path / "vectors" / "embeddings.npy")
    names = (tmp_path / "vectors" / "files.txt").read_text().splitlines()
    assert names == sorted(os.listdir(folders["PHOTOS"]))
    assert vectors.shape == (len(names), 256)
    assert np.isfinite(vectors).all()
    with Image.open(tmp_path / "vectors" / "neighbours.png") as picture:
        assert min(picture.size) > 8 * 32
