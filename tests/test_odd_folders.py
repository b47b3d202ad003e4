"""Folders of images as people have them, through the scripts: what trains, and what is said."""

import os
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

import train_linear
import train_pretrain
from data.datasets import find_obstacle, load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUICK = os.path.join(ROOT, "yaml", "quickstart.yaml")
TINY = [
    "data.name=folder",
    "data.limit=null",
    "data.image_size=8",
    "data.workers=0",
    "optim.batch_size=8",
    "optim.epochs=1",
    "model.width=8",
    "model.precision=fp32",
    "model.queue_size=16",
    "linear.epochs=1",
    "linear.batch_size=8",
    "name=a",
]


def put_images(folder, n=8):
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(os.path.join(folder, f"{i}.png"))


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """start(script, *settings): run a script's main() on tmp_path/data -> what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    def run(script, *settings):
        arguments = [script.__name__, "--cfg", QUICK, *TINY, "data.root=data", *settings]
        monkeypatch.setattr(sys, "argv", arguments)
        script.main()
        return capsys.readouterr().out

    return run


def test_validation_images_without_class_folders(start):
    """As ILSVRC2012 and tiny-imagenet unpack."""
    for folder in ("train/a", "train/b", "val/images"):
        put_images(f"data/{folder}")
    out = start(train_pretrain)
    reason = "the validation images in data/val/images are not in two or more class folders; move"
    assert f"no kNN: {reason} each" in out and "epoch   1/1" in out
    assert "linear.data=folder linear.root=PATH\n      where PATH holds train/<class>/" in out
    with pytest.raises(SystemExit) as refusal:
        start(train_linear)
    assert f"no linear probe on folder at data: {reason}" in refusal.value.code
    assert "\n" not in refusal.value.code
    for part in ("train", "val"):  # the way out works
        for name in "ab":
            put_images(f"probe/{part}/{name}")
    assert "raw pixels" in start(train_linear, "linear.data=folder", "linear.root=probe")


def test_a_class_that_one_part_lacks_does_not_stop_training(start):
    for folder in ("train/a", "train/b", "train/c", "val/a", "val/b"):
        put_images(f"data/{folder}")
    os.mkdir("data/val/c")  # empty, it is no class either
    out = start(train_pretrain)
    reason = "class c is among the training images and not among the validation images"
    assert f"no kNN: {reason}" in out and "epoch   1/1" in out
    with pytest.raises(SystemExit, match=f"no linear probe on folder at data: {reason}"):
        start(train_linear)


def test_a_flat_folder_is_told_of_a_probe_that_can_run(start):
    put_images("data")
    out = start(train_pretrain, "linear.data=cifar10")
    assert "no kNN: there are no validation images" in out and "linear.root=PATH" not in out
    out = start(train_pretrain, "name=b")
    command = out[out.index("next: ") :].splitlines()[0]
    assert command.endswith("name=b linear.data=folder linear.root=PATH")


def test_skipping_says_before_training_that_knn_does_not(start, capsys):
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        put_images(f"data/{folder}")
    with open("data/val/b/3.png", "wb") as f:
        f.write(b"broken")
    with pytest.raises(SystemExit, match="val/b/3.png cannot be read .*nothing was saved yet"):
        start(train_pretrain, "data.on_error=skip")
    out = capsys.readouterr().out
    assert "kNN stops the run at the first image that cannot be read" in out
    assert "epoch   1/1" in start(train_pretrain, "data.on_error=skip", "knn.every=0")


# -------------------------------------------------- find_obstacle


def obstacle(root):
    train, test = (load(part, 0, name="folder", root=str(root)) for part in ("train", "test"))
    return find_obstacle(train, test)


def test_names_that_print_alike_are_told_apart(tmp_path):
    for part, form in (("train", "NFD"), ("val", "NFC")):
        put_images(tmp_path / part / unicodedata.normalize(form, "caf\u00e9"), 1)
        put_images(tmp_path / part / "tea", 1)
    said = obstacle(tmp_path)
    assert r"class 'cafe\u0301' (beside 'caf\xe9', which prints alike) is among the train" in said


def test_obstacles_of_either_part(tmp_path):
    for folder in ("train/a", "train/b", "val/a", "val/b", "val/c", "val/d"):
        put_images(tmp_path / folder, 1)
    assert obstacle(tmp_path).startswith("class c and 1 more are among the validation images and")
    for name in "cd":
        shutil.rmtree(tmp_path / "val" / name)
    assert obstacle(tmp_path) is None
    shutil.rmtree(tmp_path / "train" / "b")
    assert obstacle(tmp_path).startswith(f"the training images in {tmp_path}/train/a are not in")
    shutil.rmtree(tmp_path / "val")
    assert obstacle(tmp_path).startswith("there are no validation images")
    shapes = load("train", 0, name="shapes", limit=12)
    assert find_obstacle(shapes, load("test", 0, name="shapes")) is None
