"""Weights in and out: every layout from a torchvision ResNet gives its features back; what is wrong is refused, and nothing in a file runs."""

import argparse
import os
import pickle
import sys
import types

import pytest
import torch
import torchvision
from torch import nn

from engine import checkpoint, config
from engine.weights import backbone_of, detectron2_name, export, load_backbone, save_backbone
from models.cmc import LabEncoder
from models.resnet import ResNet

torch.manual_seed(0)
SOURCE = torchvision.models.resnet18().eval()
PLAIN = SOURCE.state_dict()
BARE = {k: v for k, v in PLAIN.items() if not k.startswith("fc.")}
HEAD = {"fc.0.weight": torch.randn(4, 4), "fc.2.bias": torch.randn(4)}


def under(prefix, tensors=BARE, more=None):
    return {prefix + k: v for k, v in {**tensors, **(more or {})}.items()}


def other():
    """The weights of an average: another network, which must not be taken."""
    return {k: v + 1 for k, v in BARE.items()}


def lightly(prefix):
    return under(prefix, nn.Sequential(*list(SOURCE.children())[:-1]).state_dict())


LAYOUTS = {
    "torchvision": lambda: PLAIN,
    "ours, backbone.pt": lambda: BARE,
    "ours, last.pt": lambda: {
        "encoder": {**under("backbone."), "head.weight": torch.ones(1)},
        "settings": {"seed": 0},
        "host": {"key_encoder.net.backbone.conv1.weight": torch.ones(1)},
    },
    "moco, JCL, PCL": lambda: {
        "epoch": 200,
        "arch": "resnet50",
        "optimizer": {},
        "state_dict": {
            **under("module.encoder_q.", more=HEAD),
            **under("module.encoder_k.", other(), HEAD),
            "module.queue": torch.randn(4, 8),
            "module.queue_ptr": torch.zeros(1),
        },
    },
    "PyContrast": lambda: {
        "opt": argparse.Namespace(lr=0.03, arch="resnet18"),
        "epoch": 3,
        "model": {**under("module.encoder."), "module.head.0.weight": torch.ones(2, 2)},
        "model_ema": under("module.encoder.", other()),
    },
    "CMC, one stream": lambda: {
        "opt": argparse.Namespace(lr=0.03),
        "model": under("encoder.module.", more=HEAD),
        "contrast": {},
        "epoch": 2,
    },
    "SimSiam": lambda: {
        "epoch": 99,
        "state_dict": {
            **under("module.encoder.", more=HEAD),
            "module.predictor.0.weight": torch.ones(2, 2),
        },
    },
    "solo-learn": lambda: {
        "state_dict": {
            **under("backbone."),
            **under("momentum_backbone.", other()),
            "projector.0.weight": torch.ones(2, 2),
            "classifier.weight": torch.ones(2, 2),
        },
        "hyper_parameters": argparse.Namespace(method="mocov2plus"),
    },
    "solo-learn, older": lambda: {
        "state_dict": {
            **under("encoder."),
            **under("momentum_encoder.", other()),
            "queue": torch.ones(2, 2, 2),
        }
    },
    "lightly": lambda: {
        "state_dict": {
            **lightly("backbone."),
            **under("backbone_momentum.", other()),
            "projection_head.layers.0.weight": torch.ones(2, 2),
        }
    },
    "lightly, bare": lambda: lightly(""),
    "SupContrast": lambda: {
        "opt": argparse.Namespace(lr=0.5),
        "model": {
            k.replace("downsample", "shortcut"): v for k, v in under("encoder.module.").items()
        },
    },
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_features_are_those_of_the_source(layout, legacy, tmp_path, capsys):
    path = str(tmp_path / "w.pth")
    torch.save(LAYOUTS[layout](), path, _use_new_zipfile_serialization=not legacy)
    net = ResNet("resnet18").eval()
    load_backbone(path, net)
    x = torch.randn(2, 3, 64, 64)
    features = nn.Sequential(*list(SOURCE.children())[:-1])
    with torch.no_grad():
        assert (net(x) - features(x).flatten(1)).abs().max() < 1e-6
    said = capsys.readouterr().out
    assert (
        f"{path}: " in said
        and "120 tensors of the ResNet taken" in said
        and (", 2 others left out" in said) == (layout in ("torchvision", "CMC, one stream"))
    )
    assert layout.startswith("ours") or layout.split(",")[0] in said


def cmcs_network(channels, base):
    """A stream of CMC's models/resnet.py, ResNet-18: a stem of 64 channels, stages of base, 2 base, 4 base and 8 base."""
    net = torchvision.models.resnet18()
    net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    net.inplanes = 64
    block = type(net.layer1[0])
    for i in range(4):
        setattr(
            net, f"layer{i + 1}", net._make_layer(block, base * 2**i, 2, stride=1 if i == 0 else 2)
        )
    net.fc = nn.Linear(8 * base, 128)
    return net


@pytest.mark.parametrize("base", [32, 64, 128], ids=["v1", "v2", "v3"])
@pytest.mark.parametrize(
    "names",
    [
        ("encoder.module.l_to_ab.", "encoder.module.ab_to_l."),
        ("module.encoder1.", "module.encoder2."),
    ],
    ids=["CMC", "PyContrast"],
)
def test_cmcs_two_streams(names, base, tmp_path):
    """Its released layouts, of half, whole and double width: the features are those of both streams, side by side."""
    nets = [cmcs_network(1, base).eval(), cmcs_network(2, base).eval()]
    path = str(tmp_path / "w.pth")
    torch.save(
        {
            "opt": argparse.Namespace(),
            "model": {
                **under(names[0], nets[0].state_dict()),
                **under(names[1], nets[1].state_dict()),
            },
        },
        path,
    )
    ours = LabEncoder(
        (0.0,) * 3, (1.0,) * 3, backbone="resnet18", width=2 * base, precision="fp32"
    ).eval()
    load_backbone(path, ours.backbone)
    assert torch.equal(ours.backbone.L.conv1.weight, nets[0].conv1.weight) and torch.equal(
        ours.backbone.ab.layer4[1].bn2.bias, nets[1].layer4[1].bn2.bias
    )
    if base == 32:
        x = torch.randn(1, 3, 32, 32)
        for net in nets:
            net.fc = nn.Identity()
        with torch.no_grad():
            expected = torch.cat([nets[0](x[:, :1]), nets[1](x[:, 1:])], 1)
            assert (ours.backbone(x) - expected).abs().max() < 1e-5
    with pytest.raises(SystemExit, match="two streams, of model.host: cmc"):
        load_backbone(path, ResNet("resnet18"))


def test_settings_of_packages_that_are_not_here_come_out_inert(tmp_path, monkeypatch):
    """A Lightning checkpoint with OmegaConf's settings, read where neither is installed."""

    class DictConfig:
        def __setstate__(self, state):
            raise AssertionError("ran")

    class AttributeDict(dict):
        pass

    for cls, home in (
        (DictConfig, "omegaconf.dictconfig"),
        (AttributeDict, "pytorch_lightning.utilities.parsing"),
    ):
        cls.__module__, cls.__qualname__ = home, cls.__name__
        for name in (home.split(".")[0], home):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        setattr(sys.modules[home], cls.__name__, cls)
    settings = DictConfig()
    settings.hidden = 3
    torch.save(
        {
            "state_dict": under("backbone."),
            "hyper_parameters": settings,
            "more": AttributeDict(a=1, b=settings),
        },
        tmp_path / "w.ckpt",
    )
    monkeypatch.undo()
    found, _ = backbone_of(str(tmp_path / "w.ckpt"))
    assert torch.equal(found["conv1.weight"], PLAIN["conv1.weight"])


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_file_is_refused_and_runs_nothing(legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for saved in (
        {"state_dict": under("backbone."), "hyper_parameters": Malicious()},
        {"encoder": Malicious(), "settings": {}},
        Malicious(),
    ):
        torch.save(saved, "w.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(SystemExit, match="read safely"):
            load_backbone("w.pt", ResNet("resnet18"))
        with open("w.pt", "wb") as f:
            pickle.dump(saved, f)  # a bare pickle, not torch's
        with pytest.raises(SystemExit, match="read safely"):
            load_backbone("w.pt", ResNet("resnet18"))
    assert not os.path.exists("owned")


def test_what_is_wrong_is_named(tmp_path):
    path = str(tmp_path / "w.pt")

    def refused(saved, net, message):
        if saved is not None:
            checkpoint.write(path, saved)
        with pytest.raises(SystemExit, match=message):
            load_backbone(path, net)

    refused(
        BARE,
        ResNet("resnet18", "cifar"),
        "conv1.weight is .64, 3, 7, 7., the network's is .64, 3, 3, 3.; set model.backbone",
    )
    refused(BARE, ResNet("resnet34"), r"has no layer1\.2\.conv1\.weight: it is of another network")
    refused(BARE, ResNet("resnet10"), "which the network has not: it is of a larger model.backbone")
    refused(
        {"a": 3},
        ResNet("resnet10"),
        "found none, for no key ends with conv1.weight; it holds no tensors by name",
    )
    refused(
        {"features.0.weight": torch.ones(3)}, ResNet("resnet10"), "its first is 'features.0.weight'"
    )
    refused(
        {**under("a."), **under("b.")}, ResNet("resnet18"), "found more than one: under 'a.', 'b.'"
    )
    refused([1, 2], ResNet("resnet10"), "expected one ResNet")
    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) // 2)
    refused(None, ResNet("resnet18"), "read safely")
    with pytest.raises(SystemExit, match="does not exist"):
        load_backbone(str(tmp_path / "none.pt"), ResNet("resnet10"))


def settings_of_a_run(folder, **loss):
    """config.yaml in a folder, and the settings that it holds."""
    settings = {
        "name": "a",
        "seed": 0,
        "loss": {"name": "nce", "temperature": 0.07, **loss},
        "optim": {"lr": 1e-05},
    }
    (folder / "config.yaml").write_text(config.text(settings))
    return settings


def test_weights_of_other_settings_than_the_runs_are_refused(tmp_path):
    """backbone.pt and last.pt say with which they were trained; those of before they did, and other people's, are taken."""
    net, path = ResNet("resnet18"), str(tmp_path / "backbone.pt")
    old = settings_of_a_run(tmp_path)
    save_backbone(path, net, old)
    load_backbone(path, ResNet("resnet18"))
    load_backbone(path, net)
    save_backbone(
        path, net, {**old, "name": "moved", "knn": {"every": 3}}
    )  # what a resumed run may change
    load_backbone(path, net)
    last = str(tmp_path / "last.pt")
    checkpoint.write(last, {"settings": old, "epoch": 1, "host": {}, "encoder": under("backbone.")})
    load_backbone(last, net)

    save_backbone(path, net, old)
    settings_of_a_run(tmp_path, temperature=0.3)
    for file in (path, last):
        with pytest.raises(SystemExit) as refusal:
            load_backbone(file, net)
        assert refusal.value.code == (
            f"{file} was not trained with the settings of {tmp_path}/config.yaml: loss.temperature was 0.07 and is now 0.3; "
            "finish that run, or move the file to another folder and name it with --weights"
        )
    os.makedirs(tmp_path / "elsewhere")  # the way out
    os.rename(path, tmp_path / "elsewhere" / "backbone.pt")
    load_backbone(str(tmp_path / "elsewhere" / "backbone.pt"), net)
    checkpoint.write(path, net.state_dict())  # as it was written before
    load_backbone(path, net)


def test_the_settings_are_in_nobodys_way(tmp_path):
    """torchvision, and torch itself, read a backbone.pt that carries them as one that does not."""
    path, source = str(tmp_path / "backbone.pt"), ResNet("resnet18")
    save_backbone(path, source, {"loss": {"name": "nce"}, "list": [1, 2.5, None, True]})
    saved = torch.load(path, weights_only=True)
    assert list(saved) == list(source.state_dict()) and all(
        torch.is_tensor(v) for v in saved.values()
    )
    assert saved.settings == {"loss": {"name": "nce"}, "list": [1, 2.5, None, True]}
    net = torchvision.models.resnet18()
    problems = net.load_state_dict(saved, strict=False)
    assert problems.missing_keys == ["fc.weight", "fc.bias"] and not problems.unexpected_keys
    assert torch.equal(net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_files_without_num_batches_tracked_load(tmp_path):
    path = str(tmp_path / "w.pt")
    checkpoint.write(path, {k: v for k, v in BARE.items() if not k.endswith("num_batches_tracked")})
    load_backbone(path, ResNet("resnet18"))


def test_detectron2s_names():
    """As moco's convert-pretrain-to-detectron2.py turns them out."""
    for ours, theirs in {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer4.2.bn3.bias": "res5.2.conv3.norm.bias",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer3.0.downsample.1.running_var": "res4.0.shortcut.norm.running_var",
    }.items():
        assert detectron2_name(ours) == theirs


def test_export(tmp_path):
    net = ResNet("resnet18")
    export("detectron2", str(tmp_path / "d.pkl"), net, "source")
    with open(tmp_path / "d.pkl", "rb") as f:
        saved = pickle.load(f)
    assert (
        set(saved) == {"model", "__author__", "matching_heuristics"}
        and saved["matching_heuristics"] is True
        and len(saved["model"]) == len(net.state_dict())
    )
    assert (
        saved["model"]["res2.0.conv2.norm.weight"] == net.layer1[0].bn2.weight.detach().numpy()
    ).all()
    export("torchvision", str(tmp_path / "t.pt"), net, "source")
    assert (
        not torchvision.models.resnet18()
        .load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True), strict=False)
        .unexpected_keys
    )
    with pytest.raises(SystemExit, match="CIFAR stem"):
        export("detectron2", str(tmp_path / "d.pkl"), ResNet("resnet18", "cifar"), "source")
