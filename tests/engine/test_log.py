"""The log: flat names in log.jsonl, groups and explanations in TensorBoard, for every figure."""

import errno
import json
import os
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_pretrain
from engine.log import FIGURES, UNKNOWN, Log, explain, lines, tensorboard_tag
from processes import ROOT

QUICK = os.path.join(ROOT, "yaml", "quickstart.yaml")
TINY = [
    "data.limit=64",
    "optim.batch_size=16",
    "optim.epochs=2",
    "model.backbone=resnet10",
    "model.width=4",
    "knn.every=1",
    "knn.limit=20",
    "data.workers=0",
    "name=a",
]
# Together these log everything that the losses and the hosts have to tell.
RUNS = {
    "nce": ["loss.name=nce", "model.host=simclr"],
    "ring": ["loss.name=ring", "model.host=ir"],
    "ring on cmc": ["loss.name=ring", "model.host=cmc"],
    "jcl": ["loss.name=jcl", "model.n_views=3"],
    "ifnd": ["loss=[{name: ifnd, clusters: [5], reassign_every: 1, mode: attract}]"],
    "several": [
        "loss=[{name: ifnd, temperature: 0.2, clusters: [5, 9], reassign_every: 1}, {name: mochi}]"
    ],
    "mochi": [
        "loss.name=mochi",
        "loss.warmup_epochs=0",
        "loss.hardest=8",
        "loss.mixed=4",
        "loss.query_mixed=4",
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_every_figure_of_a_run_is_explained(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--cfg", QUICK, *TINY, *RUNS[name]])
    train_pretrain.main()
    figures = {
        figure
        for line in lines("runs/a/log.jsonl")
        for figure, value in line.items()
        if not isinstance(value, str) and figure != "epoch"
    }
    assert "knn" in figures
    assert len(figures) > 8
    assert not [figure for figure in figures if explain(figure) == UNKNOWN]


def test_every_figure_of_the_shipped_logs_is_explained():
    figures = set()
    for folder, _, files in os.walk(os.path.join(ROOT, "results")):
        for file in files:
            if file == "log.jsonl":
                figures |= {key for line in lines(os.path.join(folder, file)) for key in line}
    figures -= {"epoch", "hardware"}
    assert len(figures) > 25
    assert not [figure for figure in figures if explain(figure) == UNKNOWN]


def test_detections_losses_are_explained():
    """train_detect.py logs what torchvision's detector returns."""
    detection = pytest.importorskip("torchvision.models.detection")
    words = detection.roi_heads.__file__, detection.rpn.__file__
    names = set()
    for file in words:
        with open(file) as f:
            names |= {word for word in f.read().split('"') if word.startswith("loss_")}
    assert len(names) == 6
    assert not [name for name in names if explain(name) == UNKNOWN]


def test_explanations_are_sentences_in_groups():
    for group, sentence in [*FIGURES.values(), UNKNOWN]:
        assert group.isidentifier()
        assert sentence[0].isupper() or sentence[0].isdigit()
        assert sentence.endswith(".")
        assert len(sentence) < 100


@pytest.mark.parametrize(
    "figure, tag",
    [
        ("loss", "loss/loss"),
        ("images/s", "time/images_per_second"),
        ("used %", "negatives/used_percent"),
        ("ring: inner threshold", "ring/ring_inner_threshold"),
        ("recall %, k=100", "ifnd/recall_percent_k=100"),
        ("ifnd: NMI, k=5", "ifnd/ifnd_NMI_k=5"),
        ("my own", "method/my_own"),
        ("margin: my own", "method/margin_my_own"),
    ],
)
def test_groups(figure, tag):
    assert tensorboard_tag(figure) == tag


def test_tensorboard_has_groups_and_a_page_and_the_file_flat_names(tmp_path):
    log = Log(str(tmp_path))
    log.write(0, {"knn": 10.0})
    log.write(1, {"loss": 2.5, "used %": 40.0, "mine": 1, "hardware": "a toy"})
    log.write(2, {"loss": 1.5, "used %": 50.0, "mine": 2, "hardware": "a toy"})
    with open(log.path) as f:
        flat = {"epoch": 1, "loss": 2.5, "used %": 40.0, "mine": 1, "hardware": "a toy"}
        assert json.loads(f.readlines()[1]) == flat

    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == [
        "evaluation/knn",
        "loss/loss",
        "method/mine",
        "negatives/used_percent",
    ]
    assert [(e.step, e.value) for e in board.Scalars("loss/loss")] == [(1, 2.5), (2, 1.5)]
    pages = board.Tensors("figures/text_summary")
    assert [page.step for page in pages] == [0, 1]  # anew where there are new figures
    page = pages[-1].tensor_proto.string_val[0].decode()
    assert page.splitlines() == [
        "| figure | what it is |",
        "|---|---|",
        f"| evaluation/knn | {FIGURES['knn'][1]} |",
        f"| loss/loss | {FIGURES['loss'][1]} |",
        f"| method/mine | {UNKNOWN[1]} |",
        f"| negatives/used_percent | {FIGURES['used %'][1]} |",
    ]


def test_a_full_disk_is_a_sentence_for_a_picture_too(tmp_path, monkeypatch):
    log = Log(str(tmp_path))

    def refuse():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log.board, "flush", refuse)
    with pytest.raises(SystemExit, match="a.png cannot be written: No space left on device"):
        log.picture(str(tmp_path / "a.png"), torch.zeros(2, 3, 8, 8), columns=2)
