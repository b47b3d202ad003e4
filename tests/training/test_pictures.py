"""Pictures of what a method does: they change no run, and fail none."""

import os
import types

import numpy as np
import pytest
import torch
from PIL import Image

import report
from data.shapes import shapes
from processes import run
from test_pairs import PAIRS
from test_scripts import QUICK, TINY, state
from test_scripts import same as equal_states
from training import pictures
from training.run import Run

RED = (255, 0, 0)


def pretrain(folder, name, *settings, processes=1):
    """Train on shapes. -> what it printed."""
    small = *TINY, "data.limit=64", "optim.epochs=2"
    arguments = "--cfg", QUICK, *small, *settings, f"name={name}"
    return run(folder, "train_pretrain.py", *arguments, processes=processes).stdout


def picture(folder, name):
    return np.asarray(Image.open(folder / "runs" / name / "negatives.png"))


def count_of(colour, page):
    return (page == colour).all(2).sum()


def assert_same_training(folder, name, other):
    """The checkpoints of two runs are equal, but for the setting that draws pictures."""
    a, b = state(folder, name), state(folder, other)
    del a["settings"]["log"], b["settings"]["log"]
    assert equal_states(a, b)


@pytest.mark.parametrize(
    "pair",
    [
        "moco-ifnd+ring+mochi",
        pytest.param("ir-ring", marks=pytest.mark.slow),
        pytest.param("ir-ring+jcl", marks=pytest.mark.slow),
        pytest.param("cmc-mochi", marks=pytest.mark.slow),
        pytest.param("simclr-jcl", marks=pytest.mark.slow),
        pytest.param("simclr-ring+attract", marks=pytest.mark.slow),
    ],
)
def test_a_picture_in_every_epoch_changes_no_bit_and_is_that_of_report(pair, tmp_path, monkeypatch):
    printed = pretrain(tmp_path, "drawn", *PAIRS[pair], "log.pictures=1")
    assert "WARNING: no picture" not in printed
    pretrain(tmp_path, "plain", *PAIRS[pair], "log.pictures=0")
    assert not os.path.exists(tmp_path / "runs" / "plain" / "negatives.png")
    assert_same_training(tmp_path, "drawn", "plain")

    monkeypatch.chdir(tmp_path)
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir("runs/drawn")}
    report.draw_negatives("runs/drawn", "again.png")
    after = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir("runs/drawn")}
    assert before == after
    with open("runs/drawn/negatives.png", "rb") as f, open("again.png", "rb") as g:
        assert f.read() == g.read()
    assert count_of(RED, picture(tmp_path, "drawn")) > 0


def test_two_processes_draw_one_picture_and_train_as_without_it(tmp_path):
    for name, every in (("drawn", 1), ("plain", 0)):
        settings = *PAIRS["moco-ring"], f"log.pictures={every}"
        printed = pretrain(tmp_path, name, *settings, processes=2)
        assert "WARNING: no picture" not in printed
    assert_same_training(tmp_path, "drawn", "plain")
    assert count_of(RED, picture(tmp_path, "drawn")) > 0


@pytest.mark.parametrize(("every", "epochs"), [(None, [10]), (0, []), (4, [4, 8, 10]), (20, [10])])
def test_a_picture_is_due_every_so_many_epochs_and_at_the_end(every, epochs, tmp_path):
    training = Run(str(tmp_path), {}, epochs=10, pictures=every)
    assert [epoch for epoch in range(1, 11) if training.is_picture_due(epoch)] == epochs


def test_pictures_must_not_be_negative(tmp_path):
    with pytest.raises(ValueError, match="pictures is -1; it must be at least 0, or null"):
        Run(str(tmp_path), {}, 1, pictures=-1)


def test_what_fails_costs_a_warning_and_draws_no_number(tmp_path, capsys):
    """This loader has nothing of a loader but its seed."""
    training = Run(str(tmp_path), {}, epochs=1)
    loader = types.SimpleNamespace(seed=0)
    encoder = types.SimpleNamespace(bn_splits=1)
    before = torch.get_rng_state()
    pictures.draw_if_due(training, 1, encoder, None, None, loader)
    assert "WARNING: no picture of the negatives: AttributeError" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)


def test_images_without_labels_have_no_red_frames_and_none_once_they_have_gone(
    tmp_path, monkeypatch
):
    """The drawn shapes have no pure red."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("images")
    for i, image in enumerate(shapes(64)[0]):
        Image.fromarray(image.transpose(1, 2, 0)).save(f"images/{i:02d}.png")
    of_folder = "data.name=folder", "data.root=images", "data.limit=null", "data.workers=0"
    printed = pretrain(tmp_path, "plain", *of_folder, *PAIRS["moco-ring"])
    assert "WARNING: no picture" not in printed
    assert count_of(RED, picture(tmp_path, "plain")) == 0
    assert "Without labels" in pictures.legend(None)
    os.rename("images", "moved")
    with pytest.raises(SystemExit, match="folder: there is no folder images"):
        report.draw_negatives("runs/plain")


def test_report_refuses_what_is_no_trained_run_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="nothing is no run: it has no config.yaml; name a"):
        report.draw_negatives("nothing")
    with pytest.raises(SystemExit, match="takes a run and one file, so c is too much"):
        report.draw_negatives("a", "b", "c")

    pretrain(tmp_path, "a", *PAIRS["ir-ring"], "log.pictures=0")
    with pytest.raises(SystemExit, match="cannot be written: .*; name another file"):
        report.draw_negatives("runs/a", "nowhere/a.png")
    last = tmp_path / "runs" / "a" / "last.pt"
    saved = torch.load(last, weights_only=True)

    torch.save({**saved, "epoch": 0}, last)
    with pytest.raises(SystemExit, match="last.pt is of an untrained run; train it first"):
        report.draw_negatives("runs/a")
    torch.save({"epoch": 1, "model": {}}, last)
    with pytest.raises(SystemExit, match="not a checkpoint of train_pretrain.py: it has no enc"):
        report.draw_negatives("runs/a")
    last.unlink()
    with pytest.raises(SystemExit, match="runs/a has no last.pt, the state of which the pict"):
        report.draw_negatives("runs/a")
