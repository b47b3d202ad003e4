"""Runs that begin from weights, and runs that are trained on for more epochs."""

import os
import shlex
import signal

import pytest
import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import checkpoint, config, distributed
from models.cmc import CMC, LabEncoder
from models.ir import IR
from models.moco import MoCo
from models.resnet import Encoder
from models.simclr import SimCLR
from reporting.comparing import unfinished
from reporting.runs import read_runs
from reporting.words import effort
from test_faults import (  # noqa: F401
    assert_equal,
    images,
    refused,
    run,
    send_at,
    two,
    undisturbed,
)
from test_scripts import QUICK, same
from training import begin_from, summary
from training.run import Run
from training.train_on import goes_on_longer

MOCO = ["model.queue_size=64", "optim.schedule=constant"]
STEP = [
    "model.queue_size=64",
    "optim.schedule=step",
    "optim.milestones=[1,2]",
    "loss.name=mochi",
    "loss.hardest=16",
    "loss.mixed=20",
    "loss.query_mixed=10",
]
SMALL = {
    "backbone": "resnet10",
    "stem": "cifar",
    "width": 8,
    "dim": 16,
    "bn_splits": 2,
    "precision": "fp32",
}
RING = [*MOCO, "loss.name=ring", "loss.inner=0.1", "loss.outer=0.5"]


class Images:
    """A data set, as begin_from.fill sees it."""

    def __init__(self, n=40, fingerprint="these"):
        self.n, self.print = n, fingerprint

    def __len__(self):
        return self.n

    def fingerprint(self):
        return self.print


def make(host_class, n_data=40, **settings):
    """Make an encoder and a host around it, at random."""
    encoder_class, colours = Encoder, ()
    if host_class is CMC:
        encoder_class, colours = LabEncoder, ((0.5,) * 3, (0.2,) * 3)
    encoder = encoder_class(*colours, **{**SMALL, **settings})
    if host_class is MoCo:
        return encoder, MoCo(encoder, queue_size=24)
    return encoder, SimCLR(encoder) if host_class is SimCLR else host_class(encoder, n_data)


def save_last(path, host_class):
    """Write a last.pt of the images `Images()`. -> the encoder and the host in it."""
    encoder, host = make(host_class)
    if host_class is MoCo:
        # It has moved away from the encoder, and all of the queue's keys have an image.
        host.key_encoder.net.load_state_dict(make(MoCo)[0].state_dict())
        host.queue.index.copy_(torch.arange(24))
    place = {"images": len(Images()), "data": Images().fingerprint()}
    parts = {"encoder": encoder.state_dict(), "host": host.state_dict()}
    checkpoint.write(path, {"settings": {}, "epoch": 2, "place": place, **parts})
    return encoder, host


def fill_from(path, folder, encoder, host, dataset=None):
    """Begin a run in a folder from a file."""
    source = begin_from.read_source(Run(str(folder / "runs"), {}, 1), path)
    begin_from.fill(source, encoder, host, dataset or Images())


# ----------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    ("host_class", "words"),
    [
        (MoCo, "backbone, head, momentum encoder and queue"),
        (IR, "backbone, head and memory bank"),
        (CMC, "backbone, head, memory bank of L and memory bank of ab"),
        (SimCLR, "backbone and head"),
    ],
)
def test_of_a_last_pt_everything_is_taken(host_class, words, tmp_path, capsys):
    path = str(tmp_path / "last.pt")
    old_encoder, old_host = save_last(path, host_class)
    encoder, host = make(host_class)
    fill_from(path, tmp_path, encoder, host)
    assert same(encoder.state_dict(), old_encoder.state_dict())
    assert same(host.state_dict(), old_host.state_dict())
    printed = capsys.readouterr().out
    assert printed == f"began from {path}, one of our last.pt: its {words}\n"


def test_of_other_images_the_queue_is_taken_without_their_index_and_the_bank_is_not(
    tmp_path, capsys
):
    other = Images(fingerprint="others")
    moco_path, ir_path = str(tmp_path / "moco.pt"), str(tmp_path / "ir.pt")
    _, old_host = save_last(moco_path, MoCo)
    encoder, host = make(MoCo)
    fill_from(moco_path, tmp_path, encoder, host, other)
    assert torch.equal(host.queue.keys, old_host.queue.keys)
    assert (host.queue.index == -1).all()

    save_last(ir_path, IR)
    for dataset in (other, Images(41)):
        encoder, host = make(IR, len(dataset))
        rows = host.bank.rows.clone()
        fill_from(ir_path, tmp_path, encoder, host, dataset)
        assert torch.equal(host.bank.rows, rows)
        assert capsys.readouterr().out.endswith("head\nmemory bank begins anew\n")


def test_with_another_head_what_hangs_on_it_begins_anew(tmp_path, capsys):
    path = str(tmp_path / "last.pt")
    old_encoder, _ = save_last(path, MoCo)
    encoder, host = make(MoCo, head="mlp")
    keys = host.queue.keys.clone()
    fill_from(path, tmp_path, encoder, host)
    assert same(encoder.backbone.state_dict(), old_encoder.backbone.state_dict())
    assert same(host.key_encoder.net.state_dict(), encoder.state_dict())
    assert torch.equal(host.queue.keys, keys)
    assert capsys.readouterr().out.splitlines() == [
        f"began from {path}, one of our last.pt: its backbone",
        "head, momentum encoder (equal to the encoder) and queue begin anew",
    ]


def test_a_momentum_encoder_begins_equal_after_another_host(tmp_path):
    path = str(tmp_path / "last.pt")
    old_encoder, _ = save_last(path, IR)
    encoder, host = make(MoCo)
    fill_from(path, tmp_path, encoder, host)
    assert same(encoder.state_dict(), old_encoder.state_dict())
    assert same(host.key_encoder.net.state_dict(), encoder.state_dict())


def test_torchvisions_supervised_weights(tmp_path, capsys):
    path = str(tmp_path / "resnet18.pth")
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), path)
    encoder = Encoder(backbone="resnet18", bn_splits=2, precision="fp32")
    host = MoCo(encoder, queue_size=24)
    fill_from(path, tmp_path, encoder, host)
    backbone = encoder.backbone.state_dict()
    assert all(torch.equal(backbone[name], network.state_dict()[name]) for name in backbone)
    assert same(host.key_encoder.net.state_dict(), encoder.state_dict())
    printed = capsys.readouterr().out
    assert f"began from {path}: a torchvision ResNet; 120 tensors of the ResNet taken" in printed


def test_cmc_takes_two_networks_and_the_others_one(tmp_path):
    ir_path, cmc_path = str(tmp_path / "ir.pt"), str(tmp_path / "cmc.pt")
    save_last(ir_path, IR)
    save_last(cmc_path, CMC)
    with pytest.raises(SystemExit, match=r"\(one network, and model.host: cmc has two\)$"):
        fill_from(ir_path, tmp_path, *make(CMC))
    with pytest.raises(SystemExit, match=r"\(two streams, of model.host: cmc\)$"):
        fill_from(cmc_path, tmp_path, *make(IR))


# ----------------------------------------------------------------------------------------- refusals


def save_nothing(path):
    checkpoint.write(path, {"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.pt", "gone.pt does not exist"),
        ("runs", "runs is a folder; name a file in it, such as runs/last.pt"),
        ("no.pt", "no.pt: expected one ResNet and found none"),
        ("runs/a/last.pt", "runs/a/last.pt lies in the folder of the run that is to begin from it"),
    ],
)
def test_what_no_run_can_begin_from(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs")
    save_nothing("no.pt")
    with pytest.raises(SystemExit, match=message):
        begin_from.read_source(Run("runs/a", {}, 1), path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("weights=none", "weights is 'none'; it names the file that a run begins from"),
        ("weights=''", "weights is ''; it names"),
        ("weights=3", "weights is 3; it must be a word"),
    ],
)
def test_weights_is_the_name_of_a_file(given, message):
    with pytest.raises(SystemExit, match=message):
        config.load(QUICK, [given])


def test_the_setting_stands_where_it_is_given_alone():
    assert "weights" not in config.load(QUICK)
    assert "weights" not in config.load(QUICK, ["weights=null"])
    settings = config.load(QUICK, ["weights=runs/a/last.pt"])
    assert "weights: runs/a/last.pt\n" in config.to_yaml(settings)


class MonitorStub:
    """A monitor that is always due."""

    def due(self, epoch, epochs):
        return True

    def __call__(self, encoder):
        return {"knn": 12.0, "knn voters": 5}


def test_words_of_a_run_that_began_from_weights(capsys, tmp_path):
    new_run = Run(str(tmp_path), {"weights": "w.pt"}, 1)
    new_run.unlogged_figures = dict
    summary.evaluate_at_start(new_run, MonitorStub(), None, None)
    assert capsys.readouterr().out == "begun from weights: kNN 12.0 %\n"
    lines = [{"epoch": 0, "knn": 12.0}, {"epoch": 2, "knn": 43.0}]
    assert summary.knn_summary(lines, summary.before_training({"weights": "w.pt"})) == (
        "\n  kNN   begun from weights  12.0 %\n  after           2 epochs  43.0 %\n\n"
    )


# --------------------------------------------------------------------------------------- whole runs


def test_a_run_begins_from_another_and_goes_on_without_the_file(
    undisturbed,  # noqa: F811
    images,  # noqa: F811
    tmp_path,
):
    """It is stopped within its second epoch, and the file is removed then."""
    first, _ = undisturbed(*MOCO, "optim.epochs=2")
    path = str(tmp_path / "w 1.pt")
    os.link(first / "runs" / "whole" / "last.pt", path)
    settings = [images, *MOCO, "optim.epochs=2"]
    begun = run(tmp_path, "whole", *settings, "--weights", path)
    assert f"began from {path}, one of our last.pt: its backbone, head, momentum" in begun

    fault = send_at(signal.SIGTERM, 1, 3)
    run(tmp_path, "a", *settings, "--weights", path, fault=fault, code=75)
    sentence = refused(tmp_path, "a", *settings)
    assert f"runs/a/last.pt is of another run: weights was '{path}' and is now None" in sentence
    os.remove(path)
    printed = run(tmp_path, "a", *settings, f"weights='{path}'")
    assert "began from" not in printed
    assert_equal(tmp_path, "a", tmp_path)


def check_ranks_begin_equal():
    """A fault that is none: every process compares what it begins from with the others'."""
    plain_fill = begin_from.fill

    def fill_and_compare(source, encoder, host, dataset):
        plain_fill(source, encoder, host, dataset)
        tensors = [*encoder.state_dict().values(), *host.state_dict().values()]
        sums = [tensor.double().sum().item() for tensor in tensors]
        first, second = distributed.all_gather_object(sums)
        assert first == second

    begin_from.fill = fill_and_compare


def test_two_processes_begin_equal_or_not_at_all(undisturbed, images, tmp_path):  # noqa: F811
    """The second one's folder is another, so that a path from here is another file there."""
    first, _ = undisturbed(*MOCO, "optim.epochs=2")
    path = first / "runs" / "whole" / "last.pt"
    settings = [images, *MOCO, "optim.epochs=1"]
    faults = (check_ranks_begin_equal, check_ranks_begin_equal)
    codes, printed = two(tmp_path, "a", *settings, f"weights={path}", faults=faults)
    assert codes == [0, 0], printed
    assert printed.count("began from") == 1

    os.link(path, tmp_path / "w.pt")
    os.link(first / "runs" / "whole" / "backbone.pt", tmp_path / "1" / "w.pt")
    codes, printed = two(tmp_path, "b", *settings, "weights=w.pt")
    assert codes == [1, 1]
    assert printed.splitlines() == ["--weights w.pt is not the same file to all processes"]


def test_a_run_that_is_trained_on_is_one_that_was_longer_from_the_start(
    undisturbed,  # noqa: F811
    images,  # noqa: F811
    tmp_path,
):
    longer = [*STEP, "optim.epochs=3"]
    whole, _ = undisturbed(*longer)
    run(tmp_path, "a", images, *STEP, "optim.epochs=2")
    folder = tmp_path / "runs" / "a"
    old_backbone = (folder / "backbone.pt").read_bytes()
    (folder / "linear.jsonl").write_text("{}\n")

    printed = run(tmp_path, "a", images, *longer)
    assert "runs/a is trained on, to epoch 3; a backbone.pt of fewer epochs" in printed
    assert "going on after epoch 2 of 3" in printed
    assert_equal(tmp_path, "a", whole)
    ended, expected = (
        torch.load(path / "backbone.pt", weights_only=True)
        for path in (folder, whole / "runs" / "whole")
    )
    assert same(ended, expected)
    assert (folder / "backbone.pt.before").read_bytes() == old_backbone
    assert (folder / "linear.jsonl.before").exists() and not (folder / "linear.jsonl").exists()
    board = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in board.Scalars("loss/loss")] == [1, 2, 3]

    # The report counts all epochs and their time.
    (trained,), _ = read_runs([str(folder)], [])
    assert trained.done == trained.cfg["optim"]["epochs"] == 3
    assert unfinished(trained) == []
    assert effort([trained]).startswith("3 epochs, ")
    sentence = refused(tmp_path, "a", images, *STEP, "optim.epochs=2")
    assert "optim.epochs was 3 and is now 2; choose another name" in sentence


def test_a_run_that_was_stopped_within_an_epoch_is_trained_on(
    undisturbed,  # noqa: F811
    images,  # noqa: F811
    tmp_path,
):
    """Ring's own default follows the epochs, until it is written out."""
    kept = "loss.anneal_epochs=0.3333333333333333"
    whole, _ = undisturbed(*RING, "optim.epochs=2", kept)
    fault = send_at(signal.SIGTERM, 0, 3)
    run(tmp_path, "a", images, *RING, "optim.epochs=1", fault=fault, code=75)
    sentence = refused(tmp_path, "a", images, *RING, "optim.epochs=2")
    assert sentence.endswith(f"; add {kept} to keep it as it was")
    assert "0.6666666666666666" in sentence
    run(tmp_path, "a", images, *RING, "optim.epochs=2", kept)
    assert_equal(tmp_path, "a", whole)


@pytest.mark.slow
def test_two_processes_train_on(undisturbed, images, tmp_path):  # noqa: F811
    longer = [*MOCO, "optim.epochs=2"]
    whole, _ = undisturbed(*longer, processes=2)
    for settings in ([*MOCO, "optim.epochs=1"], longer):
        codes, printed = two(tmp_path, "a", images, *settings)
        assert codes == [0, 0], printed
    assert_equal(tmp_path, "a", whole)


def test_a_cosine_is_not_trained_on_and_the_line_that_is_given_instead_works(
    undisturbed,  # noqa: F811
    images,  # noqa: F811
    tmp_path,
):
    cosine = [images, "model.queue_size=64", "optim.epochs=1"]
    run(tmp_path, "a", *cosine)
    sentence = refused(tmp_path, "a", *cosine, "optim.epochs=2")
    reason, line = sentence.split("; begin another run from it: ")
    assert reason == (
        "runs/a/last.pt cannot be trained on from optim.epochs 1 to 2: its learning rate follows "
        "a cosine that ends at epoch 1"
    )
    _, script, *words = shlex.split(line)
    assert os.path.basename(script) == "train_pretrain.py"
    assert words[-3:] == ["--weights", "runs/a/last.pt", "name=a_on"]
    printed = run(tmp_path, "a_on", *words[:-1])
    assert "began from runs/a/last.pt, one of our last.pt: its backbone, head, " in printed
    assert config.read_yaml(str(tmp_path / "runs/a_on/config.yaml"))["weights"] == "runs/a/last.pt"


# --------------------------------------------------------------------- what the length would change


def settings_of(epochs, *overrides):
    return config.load(QUICK, ["optim.schedule=constant", f"optim.epochs={epochs}", *overrides])


MOCHI = "{name: mochi, temperature: 0.2}"
LIST = f"loss=[{{name: ring, temperature: 0.2}}, {MOCHI}]"


@pytest.mark.parametrize(
    ("before", "after", "overrides", "words"),
    [
        (20, 40, ["loss.name=mochi"], "add loss.warmup_epochs=1.0 to keep it as it was"),
        (30, 60, [LIST], "add loss.ring.anneal_epochs=10.0 to keep it as it was"),
        (2, 4, ["loss.name=jcl", "model.n_views=3"], "loss.ramp follows optim.epochs, was spread"),
        (
            2,
            4,
            ["loss.name=ifnd"],
            "loss.acceptance follows optim.epochs, was spread over 2 epochs",
        ),
        (2, 4, ["optim.schedule=cosine"], "its learning rate follows a cosine"),
    ],
)
def test_what_would_become_other_training_is_refused(before, after, overrides, words):
    old, new = (settings_of(epochs, *overrides) for epochs in (before, after))
    with pytest.raises(SystemExit) as refusal:
        goes_on_longer("last.pt", old, new)
    assert words in refusal.value.code
    if "add " not in words:
        assert refusal.value.code.endswith("--weights last.pt name=quickstart_on")


@pytest.mark.parametrize(
    ("before", "after", "old", "new", "is_longer"),
    [
        (2, 4, [], [], True),
        (2, 4, ["loss.name=mochi"], ["loss.name=mochi"], True),  # one epoch both ways
        (2, 4, ["loss.name=mochi"], ["loss.name=mochi", "loss.warmup_epochs=1"], True),
        (2, 4, ["loss.name=ring"], ["loss.name=ring", "loss.anneal_epochs=1"], False),
        (2, 4, ["loss.name=jcl", "loss.ramp=false"], ["loss.name=jcl", "loss.ramp=false"], True),
        (2, 4, ["loss.name=ifnd", "loss.acceptance=[1,1]"], ["loss.name=nce"], False),
        (2, 4, [], ["knn.every=2", "name=moved"], True),
        (2, 4, [], ["seed=1"], False),
        (2, 4, [], ["weights=w.pt"], False),
        (2, 4, [], ["optim.schedule=cosine"], False),
        (2, 4, ["loss.name=ring"], [LIST], False),
        (4, 4, [], [], False),
        (4, 2, [], [], False),
    ],
)
def test_a_longer_run_differs_in_nothing_else(before, after, old, new, is_longer):
    settings = settings_of(before, *old), settings_of(after, *new)
    assert goes_on_longer("last.pt", *settings) == is_longer
