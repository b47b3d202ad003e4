"""The scripts as a user runs them, in a folder of their own, on tiny settings."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import train_linear
import train_pretrain
import yaml
from data.shapes import shapes
from engine import config
from processes import ROOT, run

QUICK = os.path.join(ROOT, "yaml", "quickstart.yaml")
TINY = [
    "data.limit=128",
    "optim.batch_size=32",
    "optim.epochs=3",
    "model.width=8",
    "knn.every=0",
    "linear.epochs=5",
    "linear.batch_size=64",
]


IFND = "{name: ifnd, temperature: 0.2, clusters: [3], reassign_every: 1}"
MOCHI = "{name: mochi, hardest: 8, mixed: 9, query_mixed: 5, warmup_epochs: 0}"
TIMES = "seconds", "images/s", "data wait"


def state(folder, name):
    """Read a run's checkpoint, without the times of its last epoch."""
    saved = torch.load(os.path.join(folder, "runs", name, "last.pt"), weights_only=True)
    figures = saved.get("place", {}).get("finished") or {}
    for figure in TIMES:
        figures.pop(figure, None)
    return saved


def same(a, b):
    """Are two checkpoints' contents equal, bit for bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "name")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def pretrain(folder, *arguments, check=True):
    return run(folder, "train_pretrain.py", "--cfg", QUICK, *TINY, *arguments, check=check)


def probe(folder, *arguments, check=True):
    return run(folder, "train_linear.py", "--cfg", QUICK, *TINY, *arguments, check=check)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, with kNN."""
    folder = tmp_path_factory.mktemp("finished")
    done = pretrain(folder, "knn.every=2", "name=a")
    return folder, done.stdout


def test_what_a_run_leaves_and_prints(finished):
    folder, out = finished
    a = folder / "runs" / "a"
    files = set(os.listdir(a))
    assert {"config.yaml", "log.jsonl", "last.pt", "backbone.pt", "augmentation.png"} <= files
    assert any(file.startswith("events") for file in files)
    with open(a / "log.jsonl") as f:
        log = [json.loads(line) for line in f]
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    assert [("knn" in line) for line in log] == [True, False, True, True]
    assert {
        "loss",
        "lr",
        "seconds",
        "images/s",
        "data wait",
        "chance",
        "K",
        "spread",
        "used %",
        "false negatives used %",
        "false negatives left out %",
    } <= set(log[1])
    assert "log(K+1)" in out
    assert "untrained" in out
    assert "after   3 epochs" in out
    assert "weighted kNN, k 12 (knn.k is 200, " in out  # of 128 images
    # The saved settings serve as a --cfg themselves.
    saved = config.load(str(a / "config.yaml"))
    assert saved["optim"]["epochs"] == 3
    assert saved == state(folder, "a")["settings"]


def test_a_finished_run_has_nothing_left_to_do(finished):
    folder, _ = finished
    before = state(folder, "a")
    out = pretrain(folder, "knn.every=2", "name=a").stdout
    assert "after epoch 3 of 3" in out
    assert same(before, state(folder, "a"))


def test_linear_probe(finished):
    folder, _ = finished
    out = probe(folder, "name=a").stdout
    assert "raw pixels" in out
    assert "untrained encoder" in out
    assert "did not move" in out
    assert "linear layer on standardized pooled features" in out
    with open(folder / "runs" / "a" / "linear.jsonl") as f:
        line = json.loads(f.read().splitlines()[-1])
    assert set(line["rows"]) == {"raw pixels", "untrained encoder", "a"}
    assert {
        "protocol",
        "seed",
        "weights",
    } <= set(line)
    for row in line["rows"].values():
        assert 0 <= row["top-1, lr 0.1"] <= row["top-5, lr 0.1"] <= 100
        assert "top-1, lr 0.01" in row
        assert "knn" in row


def test_linear_probe_with_augmentation_and_other_weights(finished):
    folder, _ = finished
    out = probe(
        folder,
        "name=b",
        "linear.features=augmented",
        "linear.standardize=false",
        "linear.lr=0.1",
        "linear.epochs=2",
        "--weights",
        "runs/a/last.pt",
        "--no-baselines",
    ).stdout
    assert "augmentation crop_flip" in out
    assert "untrained" not in out
    done = probe(folder, "name=nothing", check=False)
    assert done.returncode == 1
    assert "holds no backbone.pt; first run: python train_pretrain.py" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_probe_finds_a_linear_rule_and_nothing_where_there_is_none(tmp_path):
    """The images are noise, and their colour is their class, which raw pixels tell.

    The same images under labels drawn by lot tell nobody anything.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("val", 20)):
        for i in range(3 * count):
            image = rng.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            image[..., i % 3] += 55
            for rule, label in (("colour", i % 3), ("lot", rng.integers(3))):
                folder = tmp_path / rule / part / str(label)
                os.makedirs(folder, exist_ok=True)
                Image.fromarray(image).save(folder / f"{i}.png")
    settings = [
        "data.name=folder",
        "data.limit=null",
        "data.image_size=16",
        "optim.epochs=1",
        "data.workers=1",
        "linear.epochs=30",
    ]
    top1 = {}
    for rule in ("colour", "lot"):
        pretrain(
            tmp_path,
            *settings,
            f"data.root={tmp_path / rule}",
            f"name={rule}",
        )
        probe(
            tmp_path,
            *settings,
            f"data.root={tmp_path / rule}",
            f"name={rule}",
        )
        with open(tmp_path / "runs" / rule / "linear.jsonl") as f:
            top1[rule] = json.loads(f.read())["rows"]["raw pixels"]["top-1, lr 0.01"]
    assert top1["colour"] > 95
    assert top1["lot"] < 60  # chance is 33


def test_the_backbone_of_a_run_says_how_its_images_are_made(finished):
    """Whoever loads it elsewhere need not guess the normalisation and the crop."""
    folder = finished[0] / "runs" / "a"
    expected = {"resize": 37, "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    weights = torch.load(folder / "backbone.pt", weights_only=True)
    assert weights.preprocessing == expected
    assert config.read_yaml(str(folder / "backbone.preprocessing.yaml")) == expected


@pytest.mark.slow
def test_cmc_is_probed_on_both_streams_side_by_side(tmp_path):
    settings = ["model.host=cmc", "optim.epochs=1", "knn.every=1", "name=a"]
    out = pretrain(tmp_path, *settings).stdout
    assert "chance: 2 log(K+1)" in out
    assert "kNN" in out
    weights = torch.load(tmp_path / "runs" / "a" / "backbone.pt", weights_only=True)
    assert weights["L.conv1.weight"].shape[:2] == (8, 1)
    assert weights["ab.conv1.weight"].shape[:2] == (8, 2)
    # The stages are half as wide. The stem is not.
    assert weights["L.layer1.0.conv1.weight"].shape[:2] == (4, 8)
    probe(tmp_path, *settings)
    done = probe(
        tmp_path,
        *settings,
        "model.host=moco",
        "--weights",
        "runs/a/backbone.pt",
        check=False,
    )
    assert done.returncode == 1
    assert "it is of another network than model.backbone" in done.stderr


def test_backbone_loads_into_torchvision(tmp_path):
    pretrain(
        tmp_path,
        "name=a",
        "optim.epochs=1",
        "model.backbone=resnet18",
        "model.stem=imagenet",
        "model.width=64",
    )
    weights = torch.load(tmp_path / "runs" / "a" / "backbone.pt", weights_only=True)
    missing = torchvision.models.resnet18().load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert not missing.unexpected_keys


@pytest.mark.slow
def test_a_flat_folder_trains_as_one_with_classes(tmp_path):
    """The same images give identical weights. (tests/test_pairs.py shuffles the labels.)"""
    images, labels = shapes(64)
    for i, (image, label) in enumerate(zip(images, labels)):
        # Both folders list the images in the same order.
        for file in (
            tmp_path / "classes" / f"{label:02d}" / f"{i:03d}.png",
            tmp_path / "flat" / f"{label:02d}_{i:03d}.png",
        ):
            os.makedirs(file.parent, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(file)
    settings = [
        "data.name=folder",
        "data.limit=null",
        "data.image_size=32",
        "optim.epochs=2",
        "data.workers=1",
        "model.queue_size=80",
        f"loss=[{IFND}, {MOCHI}]",
    ]
    for name in ("classes", "flat"):
        pretrain(
            tmp_path,
            *settings,
            f"data.root={tmp_path / name}",
            f"name={name}",
        )
    a, b = state(tmp_path, "classes"), state(tmp_path, "flat")
    assert same(a["encoder"], b["encoder"])
    assert same(a["host"], b["host"])


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["loss.temprature=1"], "loss.temprature is not a setting; did you mean temperature?"),
        (
            ["optim.batch_size=4096"],
            "optim: batch_size 4096 is larger than the data set of 128 images",
        ),
        (["data.name=folder", "data.root=nowhere"], "there is no folder nowhere"),
        (["loss.name=ring", "loss.inner=0.5"], "inner 0.5 and outer 0.1 do not bound a ring"),
        (
            ["model.host=ir", "loss.name=jcl"],
            "jcl wants several keys of each image, and this host with its model.n_views gives one",
        ),
        (["loss=[{name: mochi}, {name: ring, temperature: 0.2}]"], "ring cannot follow mochi"),
        (
            ["loss.name=ifnd", "loss.clusters=[1000]"],
            "clusters [1000] must be one number a level, each from 1 to the 128 images there are",
        ),
        (["data.augment=moco_v9"], "augment 'moco_v9' is not a recipe"),
        (["model.precision=fp16"], "fp16 is for GPUs"),
        (["optim.lr=1e30", "model.precision=fp32"], "the loss is nan at epoch"),
        (
            ["model.bn_splits=7"],
            "optim.batch_size 32 gives each process 32 images, "
            "which optim.accumulate 1 times model.bn_splits 7 does not divide",
        ),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", "--cfg", QUICK, *TINY, *arguments])
    with pytest.raises(SystemExit) as refusal:
        train_pretrain.main()
    assert message in refusal.value.code
    assert "\n" not in refusal.value.code


def test_a_refusal_is_a_non_zero_exit_without_a_traceback(tmp_path):
    done = pretrain(tmp_path, "loss.temprature=1", check=False)
    assert done.returncode == 1
    assert "did you mean temperature?" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_runs_folder_is_refused_and_fresh_starts_over(tmp_path):
    pretrain(tmp_path, "name=a", "optim.epochs=1")
    done = pretrain(
        tmp_path,
        "name=a",
        "optim.epochs=1",
        "loss.temperature=0.5",
        check=False,
    )
    assert done.returncode == 1
    assert "loss.temperature was" in done.stderr
    assert "--fresh" in done.stderr
    (tmp_path / "runs" / "a" / "linear.jsonl").write_text("{}\n")  # figures of the weights that go
    pretrain(
        tmp_path,
        "--fresh",
        "name=a",
        "optim.epochs=1",
        "loss.temperature=0.5",
    )
    assert state(tmp_path, "a")["settings"]["loss"]["temperature"] == 0.5
    assert not os.path.exists(tmp_path / "runs" / "a" / "linear.jsonl")
    assert os.path.exists(tmp_path / "runs" / "a" / "linear.jsonl.before")


@pytest.mark.parametrize("script", [train_pretrain, train_linear], ids=["pretrain", "linear"])
def test_print_config_prints_and_does_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", "--cfg", QUICK, "seed=3", "--print-config"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code is None
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 3
    assert not os.listdir(tmp_path)


def test_the_readmes_loss_works(tmp_path):
    """The example under "Add a loss" in docs/design.md, put where it says, trains."""
    for folder in ("data", "engine", "evaluation", "losses", "models", "training"):
        shutil.copytree(os.path.join(ROOT, folder), tmp_path / folder)
    for script in ("train_pretrain.py", "train_linear.py"):
        shutil.copy(os.path.join(ROOT, script), tmp_path)
    with open(os.path.join(ROOT, "docs", "design.md"), encoding="utf-8") as f:
        snippet = f.read().split("```python\n")[1].split("```")[0]
    (tmp_path / "losses" / "margin.py").write_text(snippet)
    assert len(snippet.strip().splitlines()) <= 22
    done = subprocess.run(
        [
            sys.executable,
            "train_pretrain.py",
            "--cfg",
            QUICK,
            *TINY,
            "optim.epochs=1",
            "loss.name=margin",
            "loss.margin=0.2",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
