"""What a run asks its encoder now and then: kNN on its own data or another set, and without labels.

The runs are tiny ones, by train_pretrain.py.
"""

import os
import sys

import pytest
import torch

import train_pretrain
from data.datasets import ArraySet, load
from engine.log import lines
from evaluation.features import labelled_parts
from processes import ROOT
from test_odd_folders import put_images
from training.build import Datasets, Monitor
from training.summary import probe_command

QUICK = os.path.join(ROOT, "yaml", "quickstart.yaml")
TINY = [
    "data.limit=32",
    "data.image_size=16",
    "data.workers=0",
    "optim.batch_size=16",
    "optim.epochs=2",
    "model.backbone=resnet10",
    "model.width=4",
    "model.precision=fp32",
    "model.queue_size=32",
    "knn.every=1",
    "knn.k=5",
    "knn.limit=20",
    "name=a",
]
UNLABELLED = ["data.name=folder", "data.root=flat", "data.limit=null"]
FIGURES = {"RankMe", "alignment", "uniformity"}


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """start(*settings): run train_pretrain.py in a folder of its own -> what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*settings):
        monkeypatch.setattr(sys, "argv", ["x", "--cfg", QUICK, *TINY, *settings])
        train_pretrain.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def folders(start):
    """`flat`, without labels, and `labelled`, with two classes."""
    put_images("flat", 32, 16)
    for part in ("train", "val"):
        for seed, name in enumerate("ab"):
            put_images(f"labelled/{part}/{name}", 16, 16, seed)


def test_the_monitor_is_due_with_and_without_labels():
    class Knn:
        every, possible = 5, False

    monitor = Monitor(Knn, lambda encoder: {"RankMe": 2.0})
    assert [epoch for epoch in range(13) if monitor.due(epoch, 12)] == [0, 5, 10, 12]
    assert monitor(None) == {"RankMe": 2.0}
    Knn.every = 0
    assert not monitor.due(10, 10)


# ---------------------------------------------------------------------------- without labels


def test_a_folder_without_labels_is_watched(start, folders):
    out = start(*UNLABELLED, "knn.sample=20")
    assert "no kNN: there are no validation images" in out
    assert "RankMe, alignment and uniformity of 20 training images, two views each" in out
    assert "untrained: RankMe" in out
    printed = [line for line in out.splitlines() if "  RankMe " in line]
    assert len(printed) == 2
    assert max(map(len, printed)) < 100
    log = lines("runs/a/log.jsonl")
    assert [line["epoch"] for line in log] == [0, 1, 2]
    assert all(line.keys() >= FIGURES and "knn" not in line for line in log)
    assert all(1 <= line["RankMe"] <= 20 and -4.5 < line["uniformity"] < 0 for line in log)


def test_training_is_the_same_bits_with_and_without_it(start):
    saved, logs = [], []
    for name, settings in {"a": [], "b": ["knn.sample=0"], "c": ["knn.every=0"]}.items():
        out = start(*settings, f"name={name}")
        assert ("RankMe" in out) == (name == "a")
        checkpoint = torch.load(f"runs/{name}/last.pt", weights_only=True)
        saved.append([*checkpoint["encoder"].values(), *checkpoint["host"].values()])
        logs.append([line["loss"] for line in lines(f"runs/{name}/log.jsonl") if "loss" in line])
    assert logs[0] == logs[1] == logs[2]
    for other in saved[1:]:
        assert all(map(torch.equal, saved[0], other))


# ---------------------------------------------------------------------------- another set


def test_knn_of_another_set(start, folders):
    settings = [*UNLABELLED, "knn.data=folder", "knn.root=labelled"]
    out = start(*settings)
    words = "(knn.k is 5, but of 32 training images a tenth at most vote)"
    assert f"k 3 {words}, T 0.1, on the output of 32 training images of folder at labelled" in out
    assert "asked of 20 of 32 test images" in out
    assert "no kNN" not in out
    log = lines("runs/a/log.jsonl")
    assert all(line.keys() >= FIGURES | {"knn", "knn voters"} for line in log)
    # The probe is told of the same set.
    command = next(line for line in out.splitlines() if line.startswith("next: "))
    assert command.endswith("linear.data=folder linear.root=labelled")
    assert "after epoch 2 of 2" in start(*settings, "knn.data=null", "knn.root=null")


def test_another_set_is_whole_and_normalised_as_the_encoder_s_input(folders):
    pretrain = ArraySet(torch.zeros(4, 3, 8, 8), None, None, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    settings = {
        "cache": None,
        "check_files": False,
        "limit": 4,
        "mean": None,
        "name": "shapes",
        "on_error": "skip",
        "root": "nowhere",
        "split": "train",
        "std": None,
    }
    own = Datasets(pretrain, pretrain, None)
    assert labelled_parts(own, settings, 0) == (pretrain, None, "")
    train, test, source = labelled_parts(own, settings, 0, data="folder", root="labelled")
    assert (len(train), len(test), source) == (32, 32, "folder at labelled")
    assert not train.skip
    for part in (train, test):
        assert part.mean == (0.1, 0.2, 0.3)
        assert part.std == (0.4, 0.5, 0.6)
    assert load("train", 0, name="folder", root="labelled").mean != train.mean


def test_the_probe_takes_the_set_that_was_asked_for():
    cfg = {"knn": {"data": "cifar10", "root": None}, "linear": {"data": None}}
    command = probe_command(cfg, "no labels", "a.yaml", [])
    assert command.endswith("linear.data=cifar10 linear.root=datasets")
    assert probe_command(cfg, None, "a.yaml", []) == "python train_linear.py --cfg a.yaml"
    cfg["linear"]["data"] = "dtd"
    assert probe_command(cfg, "no labels", "a.yaml", []) == "python train_linear.py --cfg a.yaml"


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            ["knn.data=folder", "knn.root=nowhere"],
            r"folder: there is no folder nowhere; set .* knn\.root of kNN's",
        ),
        (
            ["knn.data=folder", "knn.root=flat"],
            "knn: there is no kNN on data folder at flat: there are no validation images",
        ),
        (
            ["knn.data=folder", "knn.root=labelled/train"],
            "knn: there is no kNN on data folder at labelled/train: there are no validation",
        ),
        (
            ["knn.data=folder", "knn.root=mixed"],
            "knn: there is no kNN on data folder at mixed: the validation images in mixed/val are",
        ),
        (["knn.data=folder"], r"knn: data is folder, but root is null; .* knn\.root=PATH"),
        (["knn.root=labelled"], "knn: root is labelled, but data is null; name the set"),
        (["knn.data=shape"], "knn: data is 'shape'; did you mean shapes?; there are shapes, "),
        (["knn.data=voc2007"], "knn: data is 'voc2007'.*; there are shapes, "),
        (["knn.sample=1"], ".yaml: knn: sample is 1; it must be from 2 to 10000, or 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(settings, sentence, start, folders):
    for name in "ab":
        put_images(f"mixed/train/{name}", 16, 16)
    put_images("mixed/val", 16, 16)
    with pytest.raises(SystemExit, match=sentence.replace("?;", r"\?;")) as refusal:
        start(*UNLABELLED, *settings)
    assert "\n" not in refusal.value.code
    assert not os.path.exists("runs/a/log.jsonl")
