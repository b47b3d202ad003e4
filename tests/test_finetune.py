"""Fine-tuning on few labels: which images, what moves, what is kept, what is refused.

The runs are tiny, and train on the built-in shapes.
"""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import train_finetune
from data.datasets import ArraySet, FolderSet
from engine import checkpoint, config
from models.resnet import Encoder
from processes import run
from test_scripts import QUICK, TINY, same
from train_finetune import Finetune

SETTINGS = [
    "--cfg",
    QUICK,
    *TINY,
    "model.precision=fp32",
    "finetune.labels=0.5",
    "finetune.batch_size=32",
    "finetune.epochs=3",
]


def backbone(path, seed):
    """Write the weights of a new encoder to a file, as train_pretrain.py leaves them."""
    torch.manual_seed(seed)
    os.makedirs(path.parent, exist_ok=True)
    torch.save(Encoder(backbone="resnet10", stem="cifar", width=8).backbone.state_dict(), path)
    return path


def state(folder, name):
    return torch.load(folder / "runs" / name / "finetune" / "last.pt", weights_only=True)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def finetune(tmp_path, monkeypatch, capsys):
    """Give a function that runs the script in this process and in tmp_path.

    It takes settings beside SETTINGS, and returns what was printed.
    """

    def run_here(*more):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train_finetune.py", *SETTINGS, *map(str, more)])
        train_finetune.main()
        return capsys.readouterr().out

    return run_here


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of eight epochs from the run's own backbone.pt, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    backbone(folder / "runs" / "a" / "backbone.pt", 5)
    return folder, run(
        folder, "train_finetune.py", *SETTINGS, "finetune.labels=1", "finetune.epochs=8", "name=a"
    ).stdout


# ------------------------------------------------------------------------------------- which images


def test_the_draw_is_balanced_the_same_for_a_seed_and_a_small_one_is_in_a_large_one():
    labels = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(10), 200)))
    train = ArraySet(
        torch.zeros(2000, 3, 8, 8, dtype=torch.uint8), labels, list("abcdefghij"), None, None
    )
    one_percent = Finetune(labels=0.01).choose(train, 3)
    ten_percent = Finetune(labels=0.1).choose(train, 3)
    another_seed = Finetune(labels=0.01).choose(train, 4)
    assert labels[one_percent].bincount().tolist() == [2] * 10
    assert labels[ten_percent].bincount().tolist() == [20] * 10
    assert torch.equal(one_percent, Finetune(labels=0.01).choose(train, 3))
    assert not torch.equal(one_percent, another_seed)
    assert set(one_percent.tolist()) < set(ten_percent.tolist())
    assert Finetune(labels=1.0).choose(train, 3).tolist() == list(range(2000))
    with pytest.raises(ValueError, match="is 2, fewer than the 10 classes; take at least 10/2000"):
        Finetune(labels=0.001).choose(train, 3)


def test_a_list_chooses_by_file_name(tmp_path):
    files = [f"x/{c}/{c}_{i}.JPEG" for c in "ab" for i in range(5)] + [
        "x/a/twin.png",
        "x/b/twin.png",
    ]
    train = FolderSet(files, torch.tensor([0] * 5 + [1] * 5 + [0, 1]), ["a", "b"], None, None)
    names = tmp_path / "1percent.txt"
    names.write_text("b_3.JPEG\na_0.JPEG\n\n")
    assert Finetune(list=str(names)).choose(train, 0).tolist() == [0, 8]
    for text, message in (
        (
            "a_0.JPEG\nc_7.JPEG\nc_8.JPEG\n",
            "2 of its 3 names are not among the 12 training images; the first is c_7.JPEG",
        ),
        ("twin.png\n", "twin.png is x/a/twin.png and x/b/twin.png"),
        ("\n", "is empty"),
    ):
        names.write_text(text)
        with pytest.raises(ValueError, match=message):
            Finetune(list=str(names)).choose(train, 0)
    with pytest.raises(ValueError, match="nowhere.txt cannot be read"):
        Finetune(list="nowhere.txt").choose(train, 0)


def test_a_list_with_folders_or_a_byte_order_mark(tmp_path):
    files = [f"x/{c}/{i}.png" for c in ("a", "b", "deep/a") for i in range(3)]
    train = FolderSet(files, torch.arange(9) // 3, ["a", "b", "c"], None, None)
    names = tmp_path / "some.txt"
    names.write_text("b/0.png\nx/a/1.png\n./b/2.png\ndeep/a/0.png\n", encoding="utf-8-sig")
    assert Finetune(list=str(names)).choose(train, 0).tolist() == [1, 3, 5, 6]
    names.write_text("a/1.png\n")
    with pytest.raises(ValueError, match="a/1.png is x/a/1.png and x/deep/a/1.png; write the fol"):
        Finetune(list=str(names)).choose(train, 0)
    names.write_text("b/9.png\n")
    with pytest.raises(ValueError, match="1 of its 1 names are not among .* the first is b/9.png"):
        Finetune(list=str(names)).choose(train, 0)
    names.write_bytes(b"b/0.png\r\nb/1.png\r\n")
    assert Finetune(list=str(names)).choose(train, 0).tolist() == [3, 4]


def test_images_that_a_list_leaves_out_are_never_read(finetune, tmp_path):
    """They are no images at all here, and nobody notices.

    Another list under the same name is another run.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 5)):
        for c in "ab":
            os.makedirs(tmp_path / "data" / part / c)
            for i in range(count):
                file = tmp_path / "data" / part / c / f"{c}_{i}.png"
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
                if part == "train" and i >= 4:
                    file.write_bytes(b"no image")
    listed = tmp_path / "some.txt"
    listed.write_text("\n".join(f"{c}_{i}.png" for c in "ab" for i in range(4)))
    settings = [
        "--weights",
        "none",
        "data.name=folder",
        f"data.root={tmp_path / 'data'}",
        "data.limit=null",
        "data.image_size=16",
        "data.workers=1",
        "name=a",
        "finetune.list=some.txt",
        "finetune.batch_size=8",
    ]
    protocol = "50 % of the labels: 8 of 16 training images, some.txt; 10 test images, 2 classes"
    assert protocol in finetune(*settings)
    assert json_lines(tmp_path / "runs" / "a" / "finetune.jsonl")[0]["figures"]["top-5"] == 100
    listed.write_text("\n".join(f"{c}_{i}.png" for c in "ab" for i in (7, 1, 2, 3)))
    with pytest.raises(SystemExit, match="another run: labelled was"):
        finetune(*settings)
    with pytest.raises(SystemExit, match="_7.png cannot be read as an image"):
        finetune(*settings, "--fresh")
    os.rename(tmp_path / "data" / "val" / "a", tmp_path / "data" / "val" / "c")
    with pytest.raises(SystemExit, match="class a is among the training images and not"):
        finetune(*settings)
    shutil.rmtree(tmp_path / "data" / "val")
    with pytest.raises(
        SystemExit, match="no fine-tuning on folder at .*: there are no validation images"
    ):
        finetune(*settings)


# ----------------------------------------------------------------------------------------- training


def test_the_loss_falls_and_figures_are_kept(finished):
    folder, out = finished
    log = json_lines(folder / "runs" / "a" / "finetune" / "log.jsonl")
    assert [line["epoch"] for line in log] == list(range(1, 9))
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    (line,) = json_lines(folder / "runs" / "a" / "finetune.jsonl")
    assert line["weights"] == os.path.join("runs", "a", "backbone.pt")
    assert {"protocol", "seed", "seconds", "figures"} <= set(line)
    assert "100 % of the labels: 128 of 128 training images, class-balanced" in line["protocol"]
    assert "random" not in line["protocol"]
    assert 0 < line["figures"]["top-1"] < line["figures"]["top-5"] <= 100
    assert line["protocol"] in out
    assert f"{line['figures']['top-1']:.2f}" in out


def test_it_starts_from_the_weights_given_every_layer_moves_and_each_part_at_its_own_rate(
    finetune, tmp_path
):
    given = torch.load(backbone(tmp_path / "given.pt", 6), weights_only=True)
    weights = [
        name for name, value in given.items() if value.is_floating_point() and "running" not in name
    ]
    finetune(
        "--weights", "given.pt", "name=slow", "finetune.lr=1e-12", "finetune.lr_classifier=0.1"
    )
    finetune("--weights", "given.pt", "name=a", "finetune.lr=0.05", "finetune.lr_classifier=1e-12")
    finetune("--weights", "none", "name=none", "finetune.lr=1e-12")
    slow = state(tmp_path, "slow")["model"]
    a = state(tmp_path, "a")["model"]
    none = state(tmp_path, "none")["model"]
    assert len(weights) > 30
    assert not any("head" in key for key in a)
    assert all(torch.allclose(slow[f"encoder.backbone.{k}"], given[k], atol=1e-9) for k in weights)
    assert not any(torch.equal(a[f"encoder.backbone.{k}"], given[k]) for k in weights)
    # BatchNorm is in training mode.
    assert not torch.equal(slow["encoder.backbone.bn1.running_mean"], given["bn1.running_mean"])
    assert not slow["fc.bias"].allclose(a["fc.bias"], atol=1e-3)
    assert a["fc.bias"].abs().max() < 1e-9
    assert not torch.allclose(
        none["encoder.backbone.conv1.weight"], given["conv1.weight"], atol=1e-2
    )
    (line,) = json_lines(tmp_path / "runs" / "none" / "finetune.jsonl")
    assert line["weights"] == "none"
    assert "fine-tuned from random weights on 50 %" in line["protocol"]
    # report.py finds the row by the saved settings.
    saved = config.load(str(tmp_path / "runs" / "none" / "config.yaml"))
    assert saved["finetune"]["lr"] == 1e-12


@pytest.mark.slow
def test_stopped_and_resumed_is_bit_equal_to_undisturbed(finetune, tmp_path, monkeypatch):
    backbone(tmp_path / "given.pt", 7)
    finetune("--weights", "given.pt", "name=whole")
    save = checkpoint.save

    def save_and_die(*args, **parts):
        save(*args, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    for _ in range(2):  # after the first epoch, and after the second
        with pytest.raises(KeyboardInterrupt):
            finetune("--weights", "given.pt", "name=cut")
    assert state(tmp_path, "cut")["epoch"] == 2
    assert not (tmp_path / "runs" / "cut" / "finetune.jsonl").exists()
    monkeypatch.setattr(checkpoint, "save", save)
    assert "going on after epoch 2 of 3" in finetune("--weights", "given.pt", "name=cut")
    whole, cut = state(tmp_path, "whole"), state(tmp_path, "cut")
    for part in ("epoch", "model", "optimizer", "scaler", "rng"):
        assert same(whole[part], cut[part]), part
    (whole,) = json_lines(tmp_path / "runs" / "whole" / "finetune.jsonl")
    (cut,) = json_lines(tmp_path / "runs" / "cut" / "finetune.jsonl")
    assert whole["figures"] == cut["figures"]
    log = json_lines(tmp_path / "runs" / "cut" / "finetune" / "log.jsonl")
    assert [line["epoch"] for line in log] == [1, 2, 3]


def test_cmc_is_fine_tuned_on_both_streams(finetune, tmp_path):
    finetune("--weights", "none", "model.host=cmc", "finetune.epochs=1", "name=a")
    model = state(tmp_path, "a")["model"]
    assert {"encoder.backbone.L.conv1.weight", "encoder.backbone.ab.conv1.weight"} <= set(model)
    assert model["fc.weight"].shape == (12, 64)


@pytest.mark.slow
def test_two_processes_fine_tune_as_one(tmp_path):
    backbone(tmp_path / "given.pt", 8)
    settings = [
        *SETTINGS,
        "--weights",
        "given.pt",
        "finetune.lr=0.001",
        "finetune.lr_classifier=0.01",
    ]
    run(tmp_path, "train_finetune.py", *settings, "name=two", processes=2)
    run(tmp_path, "train_finetune.py", *settings, "name=one", "model.bn_splits=2")
    one, two = (state(tmp_path, name)["model"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key].float(), two[key].float(), atol=1e-4) for key in one)
    (one,) = json_lines(tmp_path / "runs" / "one" / "finetune.jsonl")
    (two,) = json_lines(tmp_path / "runs" / "two" / "finetune.jsonl")
    assert one["figures"] == pytest.approx(two["figures"], abs=0.2)


# ---------------------------------------------------------------------------------- what is refused


def test_a_finished_run_says_so_and_another_in_its_folder_is_refused_until_fresh(
    finetune, tmp_path
):
    backbone(tmp_path / "given.pt", 9)
    backbone(tmp_path / "other.pt", 10)
    settings = ["name=a", "finetune.epochs=2"]
    finetune("--weights", "given.pt", *settings)
    shutil.copy(tmp_path / "given.pt", tmp_path / "copy.pt")
    # These are the same weights under another name.
    out = finetune("--weights", "copy.pt", *settings, "knn.k=5")
    assert "is finished, all 2 epochs; its figures are in" in out
    assert len(json_lines(tmp_path / "runs" / "a" / "finetune.jsonl")) == 1
    for more, message in (
        (["--weights", "other.pt"], "weights was 'sha256 "),
        (["--weights", "none"], "is now 'none'"),
        (
            ["--weights", "given.pt", "finetune.lr=0.7"],
            "of another run: finetune.lr was 0.05 and is now 0.7",
        ),
        (
            ["--weights", "given.pt", "finetune.labels=0.6"],
            "of another run: finetune.labels was 0.5 and is now 0.6",
        ),
        (["--weights", "given.pt", "seed=1"], "seed was 0 and is now 1"),
    ):
        with pytest.raises(SystemExit, match=message) as refused:
            finetune(*settings, *more)
        assert "--fresh" in str(refused.value)
    finetune("--fresh", "--weights", "other.pt", *settings, "finetune.labels=0.6")
    assert [line["weights"] for line in json_lines(tmp_path / "runs" / "a" / "finetune.jsonl")] == [
        "given.pt",
        "other.pt",
    ]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ["finetune.labels=0"],
            "labels is 0; it is a share of the training labels, above 0 and at most 1",
        ),
        (
            ["finetune.labels=10"],
            "labels is 10; it is a share of the training labels, above 0 and at most 1, "
            "so 1 % is 0.01",
        ),
        (
            ["finetune.labels=0.01"],
            "labels 0.01 of 128 training images is 1, fewer than the 12 classes",
        ),
        (
            ["finetune.list=1percent.txt"],
            "finetune: list names image files, and this data set has none",
        ),
        (
            ["finetune.batch_size=256"],
            "finetune.batch_size 256 is larger than the 64 labelled images; "
            "lower finetune.batch_size",
        ),
        (["finetune.lr_classifier=0"], "lr_classifier is 0.0; it must be above 0"),
        (["finetune.momentum=-1"], "finetune: Invalid momentum value: -1.0"),
        (["finetune.augment=moco_v9"], "augment 'moco_v9' is not a recipe"),
        (["finetune.milestones=[2]"], "milestones are given, but schedule is 'cosine'"),
        (
            ["finetune.lr_clasifier=1"],
            "finetune.lr_clasifier is not a setting; did you mean lr_classifier?",
        ),
        (["finetune.lr=1e30"], "try a lower finetune.lr or finetune.lr_classifier"),
        (
            ["model.bn_splits=7"],
            "finetune.batch_size 32 gives each process 32 images, "
            "which model.bn_splits 7 does not divide",
        ),
        (["--weights", "nowhere.pt"], "nowhere.pt does not exist"),
    ],
)
def test_bad_input_is_one_sentence(finetune, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        finetune("--weights", "none", *arguments)
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_without_weights_it_says_how_to_get_them(tmp_path):
    done = run(tmp_path, "train_finetune.py", *SETTINGS, "name=nothing", check=False)
    assert done.returncode == 1
    assert "holds no backbone.pt; first run: python train_pretrain.py" in done.stderr
    assert "--weights none" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
