"""Schedule, features and kNN, checkpoints, and the log."""

import json
import math
import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from data.datasets import ArraySet, load
from data.shapes import shapes
from engine import checkpoint
from engine.log import Log, lines
from engine.schedule import Schedule, sgd
from evaluation.features import KNN, extract, knn
from models.resnet import Encoder

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------- schedule


def test_cosine_with_warm_up():
    lr = Schedule(epochs=100, batch_size=1, lr=2.0, warmup_epochs=10)
    assert lr(0) == 0
    assert lr(5) == 1.0
    assert lr(10) == 2.0
    assert abs(lr(55) - 1.0) < 1e-12
    assert lr(100) < 1e-12
    assert abs(lr(32.5) - (1 + math.cos(math.pi / 4))) < 1e-12


def test_steps():
    lr = Schedule(epochs=300, batch_size=1, lr=0.03, schedule="step", milestones=[200, 250])
    assert [round(lr(e), 10) for e in (0, 199.9, 200, 249.9, 250, 299)] == [
        0.03,
        0.03,
        0.003,
        0.003,
        0.0003,
        0.0003,
    ]
    assert Schedule(epochs=3, batch_size=1, lr=0.5, schedule="constant")(2.9) == 0.5


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(lr=0.0), "lr is 0"),
        (dict(epochs=0), "epochs is 0"),
        (dict(batch_size=-1), "batch_size is -1"),
        (dict(warmup_epochs=5), "warmup_epochs 5 leaves nothing"),
        (dict(milestones=[3]), "schedule: step"),
    ],
)
def test_schedules_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{**dict(epochs=5, batch_size=2, lr=1.0), **settings})


# ---------------------------------------------------------------------------------------------- kNN


def test_knn_is_a_weighted_vote():
    """Against the definition, one query and one vote at a time."""
    torch.manual_seed(0)
    bank, labels, queries = torch.randn(60, 8), torch.randint(4, (60,)), torch.randn(25, 8)
    answer = knn(bank, labels, queries, k=7, temperature=0.1)
    for q, a in zip(queries, answer):
        similarity = [float(torch.cosine_similarity(q, b, dim=0)) for b in bank]
        votes = [0.0] * 4
        for i in sorted(range(60), key=lambda i: -similarity[i])[:7]:
            votes[labels[i]] += math.exp(similarity[i] / 0.1)
        assert int(a) == votes.index(max(votes))


def test_extract_keeps_the_order_and_every_image():
    images = torch.from_numpy(shapes(13)[0])
    data = ArraySet(images, None, None, (0.0,) * 3, (1.0,) * 3)
    assert torch.allclose(
        extract(lambda x: x.flatten(1), data, 32, CPU), images.float().flatten(1) / 255
    )


def test_the_monitor_leaves_the_mode_as_it_was_and_says_what_it_does():
    data = load("train", 0, name="shapes", limit=60)
    net = Encoder(backbone="resnet10", stem="cifar", width=8, precision="fp32").train()
    monitor = KNN(data, data, 32, CPU, 0, every=5, k=1, temperature=0.1)
    before = net.backbone.bn1.running_mean.clone()
    assert monitor(net) == 100.0
    assert net.training
    assert torch.equal(before, net.backbone.bn1.running_mean)
    assert str(monitor) == "weighted kNN, k 1, T 0.1, on the output of 60 training images"
    assert not KNN(data, None, 32, CPU, 0).possible


# -------------------------------------------------------------------------------------- checkpoints

SETTINGS = {
    "name": "a",
    "seed": 0,
    "loss": {"name": "nce", "temperature": 0.1},
    "knn": {"k": 3},
    "data": {"name": "shapes", "workers": 2},
}


def parts():
    net = nn.Linear(3, 2)
    return dict(encoder=net, optimizer=sgd(net.parameters(), 0.1))


def test_a_checkpoint_brings_everything_back(tmp_path):
    path, before = str(tmp_path / "last.pt"), parts()
    before["encoder"](torch.randn(4, 3)).sum().backward()
    before["optimizer"].step()
    checkpoint.save(path, SETTINGS, 7, **before)
    expected, after = torch.rand(5), parts()
    assert checkpoint.resume(path, {**SETTINGS, "knn": {"k": 9}}, **after) == 7
    assert torch.equal(torch.rand(5), expected)  # the random state came back
    assert torch.equal(before["encoder"].weight, after["encoder"].weight)
    momentum = [o["optimizer"].state_dict()["state"][0]["momentum_buffer"] for o in (before, after)]
    assert torch.equal(*momentum)
    assert os.listdir(tmp_path) == ["last.pt"]
    # the one before is kept, and both are what torch.load reads
    checkpoint.save(path, SETTINGS, 8, **before)
    assert [
        torch.load(tmp_path / name, weights_only=True)["epoch"]
        for name in ("last.pt", "previous.pt")
    ] == [8, 7]


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "last.pt")
    checkpoint.write(path, {"a": torch.ones(2)})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.write(path, {"a": lambda: None})  # a lambda cannot be pickled
    assert torch.equal(checkpoint.read_checkpoint(path)["a"], torch.ones(2))
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_file_with_a_checksum_is_a_zip_like_others(tmp_path):
    """And others' files, without one, are read as ever."""
    checkpoint.write(str(tmp_path / "ours.pt"), {"a": torch.ones(2)})
    with zipfile.ZipFile(tmp_path / "ours.pt") as z:
        assert z.testzip() is None
        assert z.comment.startswith(b"crc32 ")
    torch.save({"a": torch.ones(2)}, tmp_path / "theirs.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert all(
        torch.equal(checkpoint.read_checkpoint(str(tmp_path / f"{name}.pt"))["a"], torch.ones(2))
        for name in ("ours", "theirs", "old")
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (
            dict(loss={"name": "ring", "temperature": 0.1}),
            "loss.name was 'nce' and is now 'ring'; "
            "choose another name=..., or start this one over with --fresh",
        ),
        (dict(seed=1), "seed was 0 and is now 1"),
        (dict(data={"name": "cifar10", "workers": 2}), "data.name was 'shapes'"),
    ],
)
def test_another_runs_checkpoint_is_refused(tmp_path, change, message):
    path = str(tmp_path / "last.pt")
    checkpoint.save(path, SETTINGS, 1, **parts())
    with pytest.raises(SystemExit, match=message):
        checkpoint.resume(path, {**SETTINGS, **change}, **parts())


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = str(tmp_path / "last.pt")
    checkpoint.save(path, SETTINGS, 1, **parts())
    with pytest.raises(SystemExit, match="does not fit: .*size mismatch"):
        checkpoint.resume(path, SETTINGS, encoder=nn.Linear(4, 2), optimizer=parts()["optimizer"])
    with pytest.raises(SystemExit, match="it has no host"):
        checkpoint.resume(path, SETTINGS, host=nn.Linear(4, 2))
    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) // 2)
    with pytest.raises(
        SystemExit,
        match="not a checkpoint that can be read safely.*"
        "previous.pt does not exist: start over with --fresh",
    ):
        checkpoint.resume(path, SETTINGS, **parts())


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_loading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder": Malicious()}, "last.pt")
    with pytest.raises(SystemExit, match="read safely"):
        checkpoint.resume("last.pt", SETTINGS, **parts())
    assert not os.path.exists("owned")


# ---------------------------------------------------------------------------------------------- log


def test_a_resumed_log_drops_what_was_never_saved(tmp_path):
    log = Log(str(tmp_path))
    for epoch in (0, 1, 2, 3):
        log.write(epoch, {"loss": 1.5 * epoch})
    with open(log.path, "a") as f:
        f.write('{"epoch": 4, "lo')  # killed in mid-line
    Log(str(tmp_path), 2).write(3, {"loss": 0.0})
    assert [(line["epoch"], line["loss"]) for line in lines(log.path)] == [
        (0, 0.0),
        (1, 1.5),
        (2, 3.0),
        (3, 0.0),
    ]
    with open(log.path) as f:
        assert all(json.loads(line) for line in f)
    # a run that goes on within its first epoch has a line of before it
    Log(str(tmp_path), 0, within=True)
    assert [line["epoch"] for line in lines(log.path)] == [0]
    Log(str(tmp_path), 0)
    assert lines(log.path) == []
