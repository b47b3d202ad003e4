"""report.py on runs/ and yaml/ that are written here: what stands in which cell, and what not."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import report
import train_linear
import yaml
from engine import config
from reporting.curves import curve
from reporting.runs import read_runs
from reporting.words import method

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROW = {
    "data": {"name": "cifar10", "augment": "cifar", "image_size": 32},
    "model": {"host": "ir", "backbone": "resnet10", "dim": 8},
    "loss": {"name": "nce"},
    "optim": {"epochs": 4, "batch_size": 8, "lr": 0.1},
    "linear": {"epochs": 2, "lr": [0.1, 1.0]},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with runs/ and yaml/ to stand in."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs")
    os.makedirs("yaml")
    return tmp_path


def row_file(name, host, row, column, loss="nce", also=None, **paper):
    """yaml/<name>.yaml"""
    row = (
        ROW
        | {
            "paper": {"table": "T 1", "row": row, "column": column, **paper},
            "model": ROW["model"] | {"host": host},
            "loss": {"name": loss},
        }
        | (also or {})
    )
    os.makedirs(os.path.dirname(f"yaml/{name}"), exist_ok=True)
    with open(f"yaml/{name}.yaml", "w") as f:
        yaml.safe_dump(row, f)


def own_file():
    """yaml/own.yaml, of no paper's table."""
    with open("yaml/own.yaml", "w") as f:
        yaml.safe_dump(ROW, f)


def train(file, name, *overrides, done=None, linear=None, knn=None, losses=1.0, hardware="a toy"):
    """runs/<name>/ as the scripts leave it. linear: top-1 of the probe; knn: of the last epoch."""
    cfg = config.load(f"yaml/{file}.yaml", [f"name={name}", *overrides])
    os.makedirs(f"runs/{name}")
    with open(f"runs/{name}/config.yaml", "w") as f:
        f.write(config.to_yaml(cfg))
    done = cfg["optim"]["epochs"] if done is None else done
    log = [
        {"epoch": e, "loss": losses / e, "seconds": 30, "chance": 2.0, "hardware": hardware}
        for e in range(1, done + 1)
    ]
    if knn:
        log = [{"epoch": 0, "knn": 10.0}, *log[:-1], log[-1] | {"knn": knn}]
    write(name, "log", *log)
    if linear:
        protocol = str(config.build(train_linear.Probe, cfg["linear"], file))
        rows = {
            "untrained encoder": {"knn": 20.0, "top-1, lr 0.1": 30.0, "top-1, lr 1": 31.0},
            name: {"knn": 40.0, "top-1, lr 0.1": linear, "top-1, lr 1": 99.0},
        }
        write(
            name,
            "linear",
            {
                "weights": f"runs/{name}/backbone.pt",
                "protocol": protocol,
                "knn": "kNN, k 5",
                "seed": cfg["seed"],
                "seconds": 1,
                "rows": rows,
            },
        )


def write(name, stem, *records):
    os.makedirs(f"runs/{name}", exist_ok=True)
    with open(f"runs/{name}/{stem}.jsonl", "a") as f:
        f.writelines(json.dumps(line) + "\n" for line in records)


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    report.main()
    return capsys.readouterr().out


@pytest.fixture
def out(here, capsys, monkeypatch):
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def line_of(text, start):
    """The words of the line that begins so, between runs of spaces."""
    rows = [line for line in text.splitlines() if line.startswith(start + "  ") or line == start]
    assert len(rows) == 1, (start, text)
    return [word.strip() for word in rows[0].split("  ") if word.strip()]


def test_a_table_is_whole_though_nothing_was_run(out):
    row_file("a_moco", "moco", "MoCo", "CIFAR-10", reported=67.5, source="moco README")
    row_file("a_moco_ring", "moco", "MoCo + Ring", "CIFAR-10", loss="ring")
    row_file("b_moco", "moco", "MoCo", "STL-10")
    row_file("part/c_ir", "ir", "IR", "CIFAR-10")
    row_file("detectron2/other", "ir", "another program's", "CIFAR-10")
    text = out("--all")
    assert text.splitlines() == [
        "T 1",
        "             CIFAR-10        STL-10",
        "             reported  ours  reported  ours",
        "IR",
        "MoCo         67.5 [1]",
        "MoCo + Ring",
        "[1] reported: moco README",
    ]


def test_tables_without_a_run_stay_out_and_own_runs_come_first(out):
    """One run prints a few lines, not all the papers' tables."""
    row_file("a_moco", "moco", "MoCo", "CIFAR-10")
    row_file("a_ir", "ir", "IR", "CIFAR-10")
    row_file(
        "b_ir",
        "ir",
        "IR",
        "CIFAR-10",
        also={"paper": {"table": "T 2", "row": "IR", "column": "CIFAR-10"}},
    )
    own_file()
    assert out() == "2 of the papers' 2 tables have no run yet; --all prints them\n"
    train("own", "mine", linear=40.0)
    text = out("--markdown", "report.md")
    titles = [line for line in text.splitlines() if line in ("Other runs", "T 1", "T 2")]
    assert titles == ["Other runs"]
    assert text.startswith("Other runs\n")
    assert len(text.splitlines()) < 10
    assert text.endswith("\n\n2 of the papers' 2 tables have no run yet; --all prints them\n")
    with open("report.md") as f:
        assert f.read().count("###") == 1

    train("a_ir", "a", linear=50.0)
    text = out()
    titles = [line for line in text.splitlines() if line in ("Other runs", "T 1", "T 2")]
    # the whole of a table in which a run stands
    assert titles == ["Other runs", "T 1"]
    assert "MoCo" in text
    assert "1 of the papers' 2 tables have no run yet" in text
    text = out("--all")
    assert [line for line in text.splitlines() if line in ("Other runs", "T 1", "T 2")] == [
        "Other runs",
        "T 1",
        "T 2",
    ]
    assert "no run yet" not in text


def test_runs_at_a_scale_stand_in_a_table_of_their_own(out):
    """Never in the paper's row, beside a reported figure, or in a mean with the row's own runs."""
    row_file("ir", "ir", "IR", "CIFAR-10", reported=80, source="somebody")
    row_file("moco", "moco", "MoCo", "CIFAR-10")
    row_file("ir_stl", "ir", "IR", "STL-10")  # a column without a run at the scale stays out
    os.makedirs("yaml/scales")
    with open("yaml/scales/small.yaml", "w") as f:
        f.write("optim: {epochs: 2}\nlinear: {epochs: 1}\n")
    small = ["paper.scale=small", "optim.epochs=2", "linear.epochs=1"]
    train("ir", "full", linear=50.0)
    train("ir", "a", *small, linear=30.0)
    train("ir", "b", *small, "seed=1", linear=32.0)
    train("ir", "c", *small, "seed=2", "optim.lr=0.2", linear=99.0)
    train("ir", "d", *small, "seed=3", "weights=w.pt", "knn.data=cifar100", linear=77.0)
    text = out()
    paper, scaled = text.split("T 1, at the scale small: no figure beside the paper's\n")
    assert line_of(paper, "IR") == ["IR", "80 [1]", "50.0 (n 1) [3]"]
    assert "small" not in paper
    rows = scaled.splitlines()
    assert rows[0].split() == ["CIFAR-10"]
    assert rows[1].split() == ["[1]", "ours", "pre-training"]
    assert line_of(scaled, "IR") == ["IR", "31.0 ± 1.4 (n 2) [3]", "60 s"]
    assert line_of(scaled, "- other settings [4]") == ["- other settings [4]", "99.0 (n 1) [5]"]
    assert line_of(scaled, "- other settings [6]") == ["- other settings [6]", "77.0 (n 1) [7]"]
    assert "[6] NOT this row's setting: began from w.pt\n" in scaled
    assert line_of(scaled, "MoCo") == ["MoCo"]
    assert "each row has at most optim.epochs 2, linear.epochs 1, and what depends" in scaled
    assert "a, b: linear top-1 after 2 epochs, 1 min on a toy" in scaled
    assert "NOT this row's setting: optim.lr was 0.1 and is 0.2" in scaled

    os.remove("yaml/scales/small.yaml")
    text = out()
    assert "the scale small, whose file yaml/scales does not have" in text
    assert "NOT this row's setting: no file lays out this cell" in text


def test_seeds_are_averaged_with_their_spread(out):
    row_file("ir", "ir", "IR", "CIFAR-10", reported=80, source="somebody")
    train("ir", "a", linear=50.0)
    train("ir", "b", "seed=1", "data.root=/elsewhere", "data.workers=3", linear=52.0)
    text = out()
    assert line_of(text, "IR") == ["IR", "80 [1]", "51.0 ± 1.4 (n 2) [3]"]
    assert "[3] a, b: linear top-1 after 4 epochs, 2 min on a toy; protocol [2]" in text
    assert "[2] linear layer on standardized pooled features" in text
    assert "lr 0.1, momentum" in text
    assert "[1] reported: somebody" in text


def test_other_settings_never_stand_in_the_row(out):
    row_file("ir", "ir", "IR", "CIFAR-10")
    train("ir", "short", "optim.epochs=1", "data.limit=100", linear=33.0)
    train("ir", "killed", done=2, linear=44.0)
    train("ir", "probed", linear=55.0)
    write(
        "probed",
        "linear",
        {
            "weights": "runs/probed/last.pt",
            "protocol": "another",
            "seed": 0,
            "rows": {"probed": {"top-1, lr 9": 66.0}},
        },
    )
    text = out()
    row, ours = line_of(text, "IR")
    assert ours.startswith("55.0 (n 1) [")
    below = [line for line in text.splitlines() if line.startswith("- other settings")]
    assert len(below) == 3
    assert all(any(figure in line for line in below) for figure in ("33.0", "44.0", "66.0"))
    assert (
        "NOT this row's setting: data.limit was None and is 100; optim.epochs was 4 and is 1"
        in text
    )
    assert "NOT this row's setting: 2 of 4 epochs done" in text
    assert "NOT this row's setting: the file asks for linear layer on" in text


def test_unlike_runs_are_not_averaged(out):
    row_file("ir", "ir", "IR", "CIFAR-10")
    train("ir", "a", "optim.lr=0.2", linear=10.0)
    train("ir", "b", "optim.lr=0.3", "seed=1", linear=20.0)
    text = out()
    assert "10.0 (n 1)" in text
    assert "20.0 (n 1)" in text
    assert "15.0" not in text
    assert "optim.lr was 0.1 and is 0.2" in text
    assert "optim.lr was 0.1 and is 0.3" in text


def test_what_is_logged_and_what_auto_came_to_are_no_other_settings(out):
    auto = {"data": {**ROW["data"], "mean": "auto"}}
    row_file("ir", "ir", "IR", "CIFAR-10", also=auto)
    train("ir", "a", "data.mean=[0.1,0.2,0.3]", linear=50.0)
    logged = "log.pictures=2", "log.save_minutes=1"
    train("ir", "b", "seed=1", "data.mean=[0.1,0.2,0.3]", *logged, linear=60.0)
    train("ir", "c", "seed=2", "data.std=[0.1,0.2,0.3]", linear=99.0)
    text = out()
    assert line_of(text, "IR")[1].startswith("55.0 ± 7.1 (n 2) [")
    assert "NOT this row's setting: data.std was None and is [0.1, 0.2, 0.3]\n" in text


def test_runs_that_began_from_weights_are_never_taken_for_others(out):
    """Not in a paper's row, not in a mean, not as a baseline; and their kNN of epoch 0 is named."""
    row_file("ir", "ir", "IR", "CIFAR-10")
    train("ir", "a", linear=50.0)
    train("ir", "b", "seed=1", "weights=runs/x/last.pt", linear=60.0)
    own_file()
    train("own", "c", linear=40.0, knn=30.0)
    train("own", "d", "seed=1", "weights=w.pt", linear=70.0, knn=35.0)
    train("own", "e", "seed=1", "loss.name=ring", linear=80.0)
    text = out()
    assert line_of(text, "IR")[1].startswith("50.0 (n 1) [")
    (below,) = (line for line in text.splitlines() if line.startswith("- other settings"))
    assert "60.0 (n 1)" in below
    assert "NOT this row's setting: began from runs/x/last.pt" in text
    assert "b, began from runs/x/last.pt: linear top-1 after 4 epochs" in text
    (row,) = (line for line in text.splitlines() if line.startswith("d, began from w.pt "))
    assert "beside c: began from w.pt" in text
    note = row.split("10.0 ")[1].split()[0]
    assert f"{note} before training, but not untrained, began from w.pt" in text
    (ring,) = (line for line in text.splitlines() if line.startswith("e "))
    assert "+" not in ring
    assert method(config.load("runs/d/config.yaml")) == "ir, nce, began from w.pt"


def test_the_same_seed_twice_is_one_seed(out):
    row_file("ir", "ir", "IR", "CIFAR-10")
    train("ir", "a", linear=50.0)
    train("ir", "again", linear=50.0)
    text = out()
    assert "50.0 (n 1)" in text
    assert "runs/again has the settings, seed and epochs of runs/a, so it adds no seed" in text


def test_a_run_without_its_figure_is_named(out):
    row_file("ir", "ir", "IR", "CIFAR-10")
    train("ir", "a", done=3)
    assert "a has no linear top-1 yet; 3 of 4 epochs done" in out()


@pytest.mark.parametrize(
    "figure,expected",
    [
        (None, "50.0"),
        ("linear top-1", "50.0"),
        ("linear knn", "40.0"),
        ("knn", "45.0"),
        ("finetune top-1", "61.0"),
        ("detect box AP", "38.5"),
        ("svm mAP", "85.4"),
    ],
)
def test_which_figure_counts(out, figure, expected):
    row_file("ir", "ir", "IR", "C", **({"figure": figure} if figure else {}))
    train("ir", "a", linear=50.0, knn=45.0)
    write(
        "a",
        "finetune",
        {"weights": "runs/a/backbone.pt", "protocol": "p", "seed": 0, "figures": {"top-1": 60.0}},
        {"weights": "runs/a/backbone.pt", "protocol": "p", "seed": 0, "figures": {"top-1": 61.0}},
    )
    write(
        "a",
        "detect",
        {
            "weights": "runs/a/backbone.pt",
            "protocol": "p",
            "seed": 0,
            "figures": {"box AP": 38.5, "box AP50": 60.0},
        },
    )
    write(
        "a",
        "svm",
        {"weights": "runs/a/backbone.pt", "protocol": "p", "seed": 0, "figures": {"mAP": 85.4}},
    )
    text = out()
    table = text[: text.index("Other evaluations")]
    assert f"{expected} (n 1)" in table
    assert table.count("(n 1)") == 1
    assert ("finetune" in text[text.index("Other evaluations") :]) == (figure != "finetune top-1")


def test_the_figures_key_is_preferred_and_the_last_line_counts(out):
    row_file("ir", "ir", "IR", "C")
    train("ir", "a", linear=50.0)
    with open("runs/a/linear.jsonl") as f:
        line = json.loads(f.read())
    write(
        "a",
        "linear",
        line | {"rows": {"a": {"top-1, lr 0.1": 51.0}}},
        line | {"figures": {"top-1": 52.0}},
    )
    text = out()
    assert "52.0 (n 1)" in text
    assert "50.0" not in text
    assert "51.0" not in text


def test_other_peoples_weights_are_not_the_runs(out):
    row_file("ir", "ir", "IR", "C")
    train("ir", "a", linear=50.0)
    write(
        "a",
        "linear",
        {
            "weights": "downloads/resnet18.pth",
            "protocol": "p",
            "seed": 0,
            "figures": {"top-1": 70.0},
        },
    )
    write(
        "b",
        "linear",
        {
            "weights": "downloads/resnet18.pth",
            "protocol": "p",
            "seed": 0,
            "figures": {"top-1": 71.0, "knn": 60.0},
        },
    )
    text = out()
    assert "50.0 (n 1)" in line_of(text, "IR")[-1]
    assert "70.0" not in text[: text.index("Other evaluations")]
    assert "a of downloads/resnet18.pth" in text
    assert "b of downloads/resnet18.pth" in text
    assert "knn 60.0, top-1 71.0" in text


def test_transfer_rows_say_whose_weights_and_how_long_those_were_trained(out):
    """A folder with config.yaml and linear.jsonl alone, as train_linear.py leaves it that was given
    --weights runs/other/backbone.pt.
    """
    row_file("ir", "ir", "IR", "CIFAR-10")
    also = {"linear": ROW["linear"] | {"data": "dtd"}}
    row_file("ir_dtd", "ir", "IR", "DTD", also=also)
    for name, seed, epochs in (("long_0", 0, 4), ("long_1", 1, 4), ("short", 2, 1)):
        train("ir", name, f"seed={seed}", f"optim.epochs={epochs}", linear=50.0)
        train("ir_dtd", f"dtd_{name}", done=0)
        protocol = str(
            config.build(train_linear.Probe, config.load("yaml/ir_dtd.yaml")["linear"], "")
        )
        write(
            f"dtd_{name}",
            "linear",
            {
                "weights": f"runs/{name}/backbone.pt",
                "data": "dtd",
                "protocol": protocol,
                "seed": 0,
                "figures": {"top-1": 60.0 + seed},
            },
        )
    text = out()
    assert "60.5 ± 0.7 (n 2)" in line_of(text, "IR")[-1]
    runs = "dtd_long_0 of long_0, dtd_long_1 of long_1"
    assert f"{runs}: linear top-1 after 4 epochs, 2 min on a toy; protocol [" in text
    assert "] evaluated on dtd: linear layer" in text
    assert "62.0 (n 1)" in text
    assert "optim.epochs was 4 and is 1" in text
    assert "Other runs" not in text


def test_an_evaluation_on_other_data_is_not_the_rows(out):
    row_file("ir", "ir", "IR", "CIFAR-10")
    train("ir", "a")
    protocol = str(config.build(train_linear.Probe, config.load("yaml/ir.yaml")["linear"], ""))
    write(
        "a",
        "linear",
        {
            "weights": "runs/a/backbone.pt",
            "data": "dtd",
            "protocol": protocol,
            "seed": 0,
            "figures": {"top-1": 60.0},
        },
    )
    text = out()
    assert line_of(text, "IR") == ["IR"]
    assert "60.0 (n 1)" in text
    assert "NOT this row's setting: the file asks for linear layer" in text


def test_fine_tuning_on_another_share_of_labels_is_not_the_rows(out):
    row_file("ir", "ir", "IR", "1 %", also={"finetune": {"labels": 0.01}}, figure="finetune top-1")
    train("ir", "a")
    train_finetune = pytest.importorskip("train_finetune")
    words = config.build(train_finetune.Finetune, config.load("yaml/ir.yaml")["finetune"], "")
    for share, top1 in ((1, 40.0), (10, 70.0)):
        write(
            "a",
            "finetune",
            {
                "weights": "runs/a/backbone.pt",
                "protocol": f"all layers fine-tuned on {share} % of the labels: ...; {words}",
                "seed": 0,
                "figures": {"top-1": top1},
            },
        )
    text = out()
    assert "40.0 (n 1)" in line_of(text, "IR")[-1]
    assert [line for line in text.splitlines() if "70.0 (n 1)" in line][0].startswith(
        "- other settings"
    )


def test_detection_by_the_rows_own_protocol_stands_in_the_row_and_from_random_weights_does_not(out):
    pytest.importorskip("train_detect")
    from train_detect import Detect

    row_file(
        "ir",
        "ir",
        "IR",
        "AP",
        figure="detect box AP",
        also={"detect": {"task": "box", "data": "datasets/coco"}},
    )
    train("ir", "a")
    protocol = str(
        config.build(
            Detect, config.load("yaml/ir.yaml", ["detect.data=elsewhere/coco"])["detect"], ""
        )
    )
    write(
        "a",
        "detect",
        {
            "weights": "runs/a/backbone.pt",
            "protocol": protocol,
            "seed": 0,
            "iteration": 90000,
            "figures": {"box AP": 38.5},
        },
    )
    train("ir", "b", done=0)
    write(
        "b",
        "detect",
        {
            "weights": "none",
            "protocol": protocol,
            "seed": 0,
            "iteration": 90000,
            "figures": {"box AP": 11.5},
        },
    )
    text = out()
    assert "38.5 (n 1)" in line_of(text, "IR")[-1]
    assert "it began from random weights" in text
    assert [line for line in text.splitlines() if "11.5 (n 1)" in line][0].startswith(
        "- other settings"
    )


def test_an_evaluation_cut_off_before_its_end_is_marked(out):
    row_file("ir", "ir", "IR", "AP", figure="detect box AP")
    train("ir", "a")
    write(
        "a",
        "detect",
        *(
            {
                "weights": "runs/a/backbone.pt",
                "protocol": "SGD, 90000 iterations",
                "seed": 0,
                "iteration": i,
                "figures": {"box AP": 30.0 + i / 1e4},
            }
            for i in (10000, 20000)
        ),
    )
    text = out()
    assert "32.0 (n 1)" in text
    assert "31.0" not in text
    assert line_of(text, "IR") == ["IR"]
    assert "NOT this row's setting: evaluated before the end, at iteration 20000" in text


def test_a_probe_of_an_unfinished_run_stays_marked_when_the_run_has_gone_on(out):
    row_file("ir", "ir", "IR", "C")
    train("ir", "a", linear=50.0)
    with open("runs/a/linear.jsonl") as f:
        line = f.read()
    with open("runs/a/linear.jsonl", "w") as f:
        f.write(line.replace("backbone.pt", "last.pt"))
    text = out()
    assert line_of(text, "IR") == ["IR"]
    assert "50.0 (n 1)" in text
    assert "of last.pt at an epoch that was not noted" in text


def test_other_runs(out):
    row_file("ir", "ir", "IR", "CIFAR-10")
    with open("yaml/own.yaml", "w") as f:
        yaml.safe_dump(
            ROW
            | {
                "data": ROW["data"] | {"limit": 500},
                "loss": [{"name": "ifnd"}, {"name": "ring"}],
                "model": ROW["model"] | {"host": "moco"},
            },
            f,
        )
    train("own", "x_0", linear=50.0, knn=44.0)
    train("own", "x_1", "seed=1", linear=51.0, knn=46.0)
    train("own", "y", "optim.lr=0.5", done=3)
    text = out("--all")
    other = text[text.index("Other runs") :]
    assert line_of(other, "x_0, _1") == [
        "x_0, _1",
        "moco",
        "ifnd + ring",
        "cifar10, 500 images, 32 px",
        "4",
        "10.0 ± 0.0",
        "45.0 ± 1.4 [1]",
        "30.0 ± 0.0",
        "50.5 ± 0.7 [2]",
        "2",
        "2 min on a toy",
    ]
    assert line_of(other, "y") == [
        "y",
        "moco",
        "ifnd + ring",
        "cifar10, 500 images, 32 px",
        "3 of 4",
        "1",
        "2 min on a toy",
    ]
    assert line_of(text, "IR") == ["IR"]  # not touched


def test_other_runs_that_look_alike_say_what_differs(out):
    own_file()
    train("own", "a")
    train("own", "b", "optim.lr=0.5")
    assert "beside a: optim.lr was 0.1 and is 0.5" in out()


def test_two_folders_of_images_are_two_experiments(out):
    """Of equal names too; but one folder, written otherwise, is one. A set with a name is the same
    wherever it lies.
    """
    own_file()
    for name, seed, root, figure in (
        ("a0", 0, "x/birds", 50.0),
        ("a1", 1, "x/./birds/", 52.0),
        ("b0", 0, "y/birds", 10.0),
        ("c1", 1, "fish", 90.0),
    ):
        train("own", name, f"seed={seed}", "data.name=folder", f"data.root={root}", linear=figure)
    for name, seed, root in (("d0", 0, "here"), ("d1", 1, "there")):
        train("own", name, f"seed={seed}", f"data.root={root}", linear=30.0 + seed)
    text = out()
    other = text[text.index("Other runs") :]
    assert "51.0 ± 1.4" in next(line for line in other.splitlines() if line.startswith("a0, a1 "))
    assert "30.5 ± 0.7" in next(line for line in other.splitlines() if line.startswith("d0, d1 "))
    for name, figure, data in (("b0", "10.0", "folder birds"), ("c1", "90.0", "folder fish")):
        (line,) = (line for line in other.splitlines() if line.startswith(f"{name} "))
        assert figure in line
        assert data in line
    assert "beside a0: data.root was 'x/birds' and is 'y/birds'" in other
    assert "adds no seed" not in text


def test_two_folders_are_no_baseline_for_one_another(out):
    own_file()
    train("own", "a", "data.name=folder", "data.root=x", linear=50.0)
    train("own", "b", "data.name=folder", "data.root=y", "loss.name=ring", linear=60.0)
    assert "+10.0" not in out()
    train("own", "c", "data.name=folder", "data.root=x/", "loss.name=ring", linear=60.0)
    assert "+10.0" in out()


def test_a_probe_on_the_runs_own_folder_is_its_own(out):
    """train_linear.py calls a folder by its own name; another is elsewhere, as another set is."""
    own_file()
    train("own", "a", "data.name=folder", "data.root=images/birds")
    for data, figure in (("folder birds", 50.0), ("folder fish", 60.0), ("dtd", 70.0)):
        write(
            "a",
            "linear",
            {
                "weights": "runs/a/backbone.pt",
                "data": data,
                "protocol": "p",
                "seed": 0,
                "figures": {"top-1": figure},
            },
        )
    text = out()
    assert "50.0 [1]" in next(line for line in text.splitlines() if line.startswith("a "))
    elsewhere = text[text.index("Other evaluations") :]
    assert "50.0" not in elsewhere
    assert "evaluated on folder birds" not in text
    assert "evaluated on folder fish: p" in elsewhere
    assert "evaluated on dtd: p" in elsewhere
    assert "60.0" in elsewhere


def linear_line(figure, **more):
    """A line of a probe of runs/a."""
    figures = {"top-1": figure}
    line = {"weights": "runs/a/backbone.pt", "protocol": "p", "seed": 0, "figures": figures}
    return line | more


def test_a_probe_on_another_folder_of_that_name_is_not_the_runs_own(out):
    """Lines name the folder of late: two may be called birds."""
    own_file()
    train("own", "a", "data.name=folder", "data.root=x/birds")
    write("a", "linear", linear_line(50.0, data="folder birds", root="x/./birds/"))
    write("a", "linear", linear_line(60.0, data="folder birds", root="y/birds"))
    text = out()
    assert "50.0 [1]" in next(line for line in text.splitlines() if line.startswith("a "))
    elsewhere = text[text.index("Other evaluations") :]
    assert "evaluated on folder y/birds: p" in elsewhere
    assert "top-1 60.0" in elsewhere
    assert "50.0" not in elsewhere
    write("a", "linear", linear_line(70.0, data="folder birds"))  # an older line
    assert "70.0" in next(line for line in out().splitlines() if line.startswith("a "))


def test_a_set_with_a_name_is_itself_wherever_it_lies(out):
    own_file()
    train("own", "a")
    write("a", "linear", linear_line(50.0, data="cifar10", root="/elsewhere"))
    text = out()
    assert "50.0 [1]" in next(line for line in text.splitlines() if line.startswith("a "))
    assert "Other evaluations" not in text


def test_a_transfer_row_to_a_folder_asks_for_that_folder(out):
    row_file(
        "ir",
        "ir",
        "IR",
        "birds",
        also={
            "data": ROW["data"] | {"name": "folder", "root": "x/birds"},
            "linear": ROW["linear"] | {"data": "folder", "root": "y/birds"},
        },
    )
    train("ir", "a")
    protocol = str(config.build(train_linear.Probe, config.load("yaml/ir.yaml")["linear"], ""))
    line = linear_line(60.0, data="folder birds", root="y/birds", protocol=protocol)
    write("a", "linear", line)
    text = out()
    assert "60.0 (n 1)" in line_of(text, "IR")[-1]
    assert "] evaluated on folder y/birds: linear layer" in text
    write("a", "linear", line | {"root": "x/birds", "figures": {"top-1": 77.0}})
    text = out()
    assert "60.0 (n 1)" in line_of(text, "IR")[-1]
    assert "77.0 (n 1)" not in line_of(text, "IR")[-1]


def test_detection_on_other_images_says_so(out):
    own_file()
    train("own", "a")
    line = {"weights": "runs/a/backbone.pt", "protocol": "p", "seed": 0}
    write("a", "detect", line | {"root": "d/coco", "figures": {"box AP": 30.0}})
    write("a", "detect", line | {"root": "d/voc/", "figures": {"box AP": 40.0}})
    text = out()
    assert "evaluated on coco: p" in text
    assert "evaluated on voc: p" in text
    assert "box AP 30.0" in text
    assert "box AP 40.0" in text


@pytest.mark.parametrize(
    "overrides, noted, label",
    [
        ([], {}, "weighted kNN, k 200, T 0.1, on the output"),
        ([], {"knn voters": 200.0}, "weighted kNN, k 200, T 0.1, on the output"),
        (["data.limit=100"], {"knn voters": 10.0}, "weighted kNN, k 10, T 0.1, on the output"),
        (
            ["knn.limit=50"],
            {"knn voters": 200.0},
            "weighted kNN, k 200, T 0.1, on the output, at most 50 test images",
        ),
    ],
)
def test_the_label_of_knn_says_how_many_vote(out, overrides, noted, label):
    row_file("ir", "ir", "IR", "CIFAR-10", figure="knn")
    train("ir", "a", *overrides)
    write("a", "log", {"epoch": 5, "knn": 45.0, **noted})
    text = out()
    assert "45.0 (n 1)" in text
    assert any(line.split("] ", 1)[-1] == label for line in text.splitlines())


@pytest.mark.parametrize(
    "one, other, expected",
    [
        (["knn.data=folder", "knn.root=x/"], ["knn.data=folder", "knn.root=./x"], "folder at x"),
        (["knn.data=folder", "knn.root=x"], ["knn.data=folder", "knn.root=y"], None),
        (["knn.data=cifar10", "knn.root=x"], ["knn.data=cifar10", "knn.root=y"], "cifar10"),
        (["knn.data=cifar10"], ["knn.data=cifar100"], None),
        (["knn.data=cifar10"], [], None),
    ],
)
def test_knn_of_different_sets_is_not_averaged(out, one, other, expected):
    """expected: the set of both, in the protocol; None where the sets differ."""
    row_file("ir", "ir", "IR", "CIFAR-10", figure="knn")
    own_file()
    for file in ("ir", "own"):
        train(file, f"{file}0", *one, knn=44.0)
        train(file, f"{file}1", "seed=1", *other, knn=46.0)
        train(file, f"{file}2", "seed=1", *one, "loss.name=ring", knn=49.0)
    text = out()
    assert text.count("45.0 ± 1.4") == (2 if expected else 0)
    assert text.count("+3.0") == bool(expected)
    if expected:
        assert f"weighted kNN, k 200, T 0.1, labels of {expected}, on the output" in text


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("option", ["--png", "--markdown", "--own"])
@pytest.mark.parametrize("path", ["nowhere/file", "runs"])
def test_a_file_that_cannot_be_written_costs_no_table(out, option, path, capsys, monkeypatch):
    """It was told after the work, in a traceback, and the other files were left out."""
    row_file("ir", "ir", "IR", "CIFAR-10")
    train("ir", "a", linear=50.0)
    for name in ("draw", "draw_own"):
        monkeypatch.setattr(report, name, lambda path, runs: pytest.fail("draws"))
    others = [] if option == "--markdown" else ["--markdown", "report.md"]
    with pytest.raises(SystemExit) as refusal:
        out(option, path, *others)
    assert refusal.value.code.startswith(f"{option} {path} cannot be written: ")
    assert refusal.value.code.endswith("; name another file")
    assert "\n" not in refusal.value.code
    assert "50.0 (n 1)" in capsys.readouterr().out
    assert os.path.exists("report.md") == (option != "--markdown")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_is_one_sentence(out, capsys):
    row_file("ir", "ir", "IR", "CIFAR-10")
    train("ir", "a", linear=50.0)
    with pytest.raises(SystemExit, match="--markdown /dev/full cannot be written: No space left"):
        out("--markdown", "/dev/full")
    assert "50.0 (n 1)" in capsys.readouterr().out


def test_asking_leaves_a_file_as_it_is(here):
    assert report.why_not_writable("--png", "new.png") is None
    assert not os.path.exists("new.png")
    with open("old.md", "w") as f:
        f.write("old")
    assert report.why_not_writable("--markdown", "old.md") is None
    with open("old.md") as f:
        assert f.read() == "old"


def test_a_setting_that_runs_do_not_differ_in_costs_no_table(out, capsys):
    row_file("ir", "ir", "IR", "CIFAR-10")
    train("ir", "a", linear=50.0)
    with pytest.raises(SystemExit, match="--against optim.lr: no two finished runs differ"):
        out("--against", "optim.lr", "a.png", "--markdown", "report.md")
    assert "50.0 (n 1)" in capsys.readouterr().out
    assert os.path.exists("report.md")
    assert not os.path.exists("a.png")


def test_nothing_to_draw_costs_no_table(out, capsys):
    pytest.importorskip("matplotlib")
    row_file("ir", "ir", "IR", "CIFAR-10")
    with pytest.raises(SystemExit, match="no run has a log.jsonl.*; no run logs anything"):
        out("--all", "--png", "a.png", "--own", "b.png", "--markdown", "report.md")
    assert "CIFAR-10" in capsys.readouterr().out
    assert os.path.exists("report.md")


def test_truncated_lines_and_files_that_do_not_load_are_survived(out):
    row_file("ir", "ir", "IR", "CIFAR-10", figure="knn")
    row_file("wrong", "ir", "IR", "X", also={"loss": {"name": "nce", "temprature": 1}})
    row_file("z_twice", "ir", "IR", "CIFAR-10")
    train("ir", "a", knn=45.0)
    with open("runs/a/log.jsonl", "a") as f:
        f.write('{"epoch": 5, "kn')
    os.makedirs("runs/empty")
    os.makedirs("runs/broken")
    with open("runs/broken/config.yaml", "w") as f:
        f.write("model: [")
    text = out()
    assert "45.0 (n 1)" in text
    assert (
        "Left out: yaml/wrong.yaml: loss.temprature is not a setting; did you mean temperature?"
        in text
    )
    assert (
        "Left out: yaml/z_twice.yaml: T 1, IR, CIFAR-10 is already the cell of yaml/ir.yaml" in text
    )
    assert "Left out: runs/broken/config.yaml is not YAML" in text


def test_a_cell_that_no_file_lays_out_is_shown_as_such(out):
    row_file("ir", "ir", "IR", "CIFAR-10")
    train(
        "ir",
        "a",
        "paper.row=IR of old",
        "paper.reported=75.8",
        "paper.source=somebody",
        linear=50.0,
    )
    text = out()
    # its recipe may have changed since
    assert "75.8" not in text
    assert "somebody" not in text
    assert "IR of old" in text
    assert "NOT this row's setting: no file lays out this cell" in text


def test_single_runs_several_folders_and_order(out):
    row_file("ir", "ir", "IR", "CIFAR-10")
    for i in (10, 9):
        train("ir", f"a{i}", f"seed={i}", linear=float(i))
    text = out()
    assert "a9, a10: linear top-1" in text
    assert "9.5 ± 0.7 (n 2)" in text
    assert out() == text
    assert "10.0 (n 1)" in out("runs/a10")
    assert "9.5 ± 0.7 (n 2)" in out("runs/a10", "runs/a9")


def test_a_gain_is_of_equal_seeds(out):
    """Differences of seeds that both have: 1 and 3, not the difference of the means, which would be
    of other images. Another lr is no baseline.
    """
    own_file()
    for name, seed, loss, figure in (
        ("a0", 0, "nce", 50.0),
        ("a1", 1, "nce", 40.0),
        ("a2", 2, "nce", 10.0),
        ("b0", 0, "ring", 51.0),
        ("b1", 1, "ring", 43.0),
    ):
        train("own", name, f"seed={seed}", f"loss.name={loss}", linear=figure)
    train("own", "long", "optim.epochs=6", "loss.name=jcl", linear=49.0)
    train("own", "other", "optim.lr=0.2", "loss.name=ring", linear=70.0)
    train("own", "moco", "model.host=moco", "loss.name=ring", linear=70.0)
    text = out()
    assert "+2.0 ± 1.4  2" in next(line for line in text.splitlines() if line.startswith("b0, b1 "))
    (line,) = (line for line in text.splitlines() if line.startswith("long "))
    note = line.split("-1.0 ")[1].split()[0]
    assert f"{note} beside 4 epochs" in text
    assert [
        line.count("+") for line in text.splitlines() if line.startswith(("a0", "other", "moco"))
    ] == [0, 0, 0]


def test_what_methods_log_of_themselves(out, capsys):
    pytest.importorskip("matplotlib")
    own_file()
    train("own", "a")
    with pytest.raises(SystemExit, match="no run logs anything of its own to draw in own.png"):
        out("--own", "own.png")
    for seed in (0, 1):
        train("own", f"r{seed}", f"seed={seed}", "loss.name=ring", done=0)
        write(
            f"r{seed}",
            "log",
            *(
                {
                    "epoch": e,
                    "loss": 1.0,
                    "inner threshold": 0.5 + seed,
                    "outer threshold": 0.2,
                    "false negatives used %": 10.0 + e,
                    "false negatives left out %": 9.0,
                }
                for e in range(1, 5)
            ),
        )
    out("--own", "own.png")
    out("--own", "again.png")
    with open("own.png", "rb") as a, open("again.png", "rb") as b:
        assert a.read() == b.read()
    with Image.open("own.png") as image:
        assert image.size == (1200, 320)
        assert len(image.convert("RGB").getcolors(10**6)) > 50


def test_figures_of_a_strangers_loss_have_panels_of_their_own(out):
    """Figures that all losses log, and settings over time, have no panel.

    The figures of a list of losses have the loss as a prefix.
    """
    pytest.importorskip("matplotlib")
    own_file()
    train("own", "a", "loss.name=ring", done=0)
    figures = {"K": 9.0, "used %": 10.0, "lambda": 1.0, "mochi: inner threshold": 0.1}
    lines = [{"epoch": e, "loss": 1.0, **figures} for e in range(1, 5)]
    for names, height in (((), 320), (("margin", "ifnd: NMI, k=3"), 320), (tuple("abcd"), 640)):
        write("a", "log", *(line | {name: 0.5 for name in names} for line in lines))
        out("--own", "own.png")
        with Image.open("own.png") as image:
            assert image.size == (1200, height)


def test_markdown(out):
    row_file("ir", "ir", "IR | bank", "CIFAR-10", reported=80.5, source="somebody")
    train("ir", "a", linear=50.0)
    out("--markdown", "report.md")
    with open("report.md") as f:
        text = f.read().splitlines()
    assert text[:5] == [
        "### T 1",
        "",
        "|  | CIFAR-10<br>reported | CIFAR-10<br>ours |",
        "|---|---|---|",
        "| IR \\| bank | 80.5 [1] | 50.0 (n 1) [3] |",
    ]
    assert text[6].startswith("[1] reported: somebody")
    assert text[8].startswith("[3] a: linear top-1 after 4 epochs")


def test_picture(out):
    pytest.importorskip("matplotlib")
    row_file("ir", "ir", "IR", "CIFAR-10")
    row_file("moco", "moco", "MoCo", "CIFAR-10")
    train("ir", "a", knn=40.0)
    train("ir", "b", "seed=1", knn=44.0, losses=2.0)
    train("moco", "c", "data.limit=100", done=2)  # without kNN, in panels of its own
    out("--png", "a.png")
    out("--png", "b.png")
    with Image.open("a.png") as image:
        assert image.format == "PNG"
        assert image.size[0] == 1100
        assert len(image.convert("RGB").getcolors(10**6)) > 50
    with open("a.png", "rb") as a, open("b.png", "rb") as b:
        assert a.read() == b.read()


def test_figures_without_labels_have_a_row_of_panels(out):
    pytest.importorskip("matplotlib")
    own_file()
    train("own", "a", knn=40.0)
    heights = []
    for figures in ({}, {"RankMe": 3.0, "alignment": 0.5, "uniformity": -1.0}):
        write("a", "log", {"epoch": 4, "loss": 1.0, **figures})
        out("--png", "a.png")
        with Image.open("a.png") as image:
            heights.append(image.size[1])
    assert heights == [350, 630]


def test_a_band_is_the_spread_of_seeds_where_all_have_the_figure(here):
    row_file("ir", "ir", "IR", "CIFAR-10")
    train("ir", "a", losses=1.0)
    train("ir", "b", "seed=1", losses=3.0)
    write("b", "log", {"epoch": 5, "loss": 9.0})
    runs, _ = read_runs(["runs"], [])
    epochs, middle, low, high = curve(runs, "loss")
    assert epochs == [1, 2, 3, 4]
    assert middle[0] == 2.0
    assert high[0] - low[0] == pytest.approx(2 * torch.tensor([1.0, 3.0]).std().item())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["nowhere"], "there is no folder nowhere; train first"),
        (
            ["--yaml", "nowhere"],
            "there is no folder nowhere; name the one whose files lay out the tables",
        ),
        (["--png", "a.png"], "no run has a log.jsonl with a loss to draw in a.png"),
    ],
)
def test_bad_input_is_one_sentence(out, arguments, message):
    with pytest.raises(SystemExit, match=message):
        out(*arguments)


def test_no_runs_folder_is_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "report.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("there is no folder runs; train first, e.g.")
    assert done.stderr.count("\n") == 1
