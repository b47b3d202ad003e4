"""Weights in and out: every layout from a torchvision ResNet gives its features back; what is wrong
is refused, and nothing in a file runs.
"""

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
from engine.weights import (
    detectron2_name,
    export,
    load_backbone,
    preprocessing_of,
    read_backbone,
    save_backbone,
)
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
    printed = capsys.readouterr().out
    assert f"{path}: " in printed
    assert "120 tensors of the ResNet taken" in printed
    assert (", 2 others left out" in printed) == (layout in ("torchvision", "CMC, one stream"))
    assert layout.startswith("ours") or layout.split(",")[0] in printed


def cmcs_network(channels, base):
    """A stream of CMC's models/resnet.py, ResNet-18: its stem has 64 channels whatever `base`."""
    net = torchvision.models.resnet18()
    net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    net.inplanes = 64
    block = type(net.layer1[0])
    for i in range(4):
        stage = net._make_layer(block, base * 2**i, 2, stride=1 if i == 0 else 2)
        setattr(net, f"layer{i + 1}", stage)
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
    """Its released layouts, of half, whole and double width: both streams' features."""
    nets = [cmcs_network(1, base).eval(), cmcs_network(2, base).eval()]
    path = str(tmp_path / "w.pth")
    model = {name + k: v for name, net in zip(names, nets) for k, v in net.state_dict().items()}
    torch.save({"opt": argparse.Namespace(), "model": model}, path)
    settings = {"backbone": "resnet18", "width": 2 * base, "precision": "fp32"}
    ours = LabEncoder((0.0,) * 3, (1.0,) * 3, **settings).eval()
    load_backbone(path, ours.backbone)
    L, ab = ours.backbone.L, ours.backbone.ab
    assert torch.equal(L.conv1.weight, nets[0].conv1.weight)
    assert torch.equal(ab.layer4[1].bn2.bias, nets[1].layer4[1].bn2.bias)
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
    weights, *_ = read_backbone(str(tmp_path / "w.ckpt"))
    assert torch.equal(weights["conv1.weight"], PLAIN["conv1.weight"])


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


@pytest.mark.parametrize(
    "saved, net, message",
    [
        (
            BARE,
            ("resnet18", "cifar"),
            "conv1.weight is .64, 3, 7, 7., the network's is .64, 3, 3, 3.; set model.backbone",
        ),
        (BARE, ("resnet34",), r"has no layer1\.2\.conv1\.weight: it is of another network"),
        (
            BARE,
            ("resnet10",),
            "which the network has not: it is of a larger model.backbone",
        ),
        (
            {"a": 3},
            ("resnet10",),
            "found none, for no key ends with conv1.weight; it holds no tensors by name",
        ),
        (
            {"features.0.weight": torch.ones(3)},
            ("resnet10",),
            "its first is 'features.0.weight'",
        ),
        (
            {"net": {"features.0.weight": torch.ones(3)}},
            ("resnet10",),
            "its first under 'net' is 'features.0.weight'",
        ),
        (
            {**under("a."), **under("b.")},
            ("resnet18",),
            "found more than one: under 'a.', 'b.'",
        ),
        ([1, 2], ("resnet10",), "expected one ResNet"),
        (
            {**BARE, "bn1.weight": torch.ones(64, dtype=torch.int8)},
            ("resnet18",),
            "bn1.weight is of torch.int8, quantised",
        ),
    ],
)
def test_what_is_wrong_is_named(saved, net, message, tmp_path):
    path = str(tmp_path / "w.pt")
    checkpoint.write(path, saved)
    with pytest.raises(SystemExit, match=message):
        load_backbone(path, ResNet(*net))


def test_a_damaged_file_and_none(tmp_path):
    path = str(tmp_path / "w.pt")
    checkpoint.write(path, BARE)
    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) // 2)
    with pytest.raises(SystemExit, match="read safely"):
        load_backbone(path, ResNet("resnet18"))
    with pytest.raises(SystemExit, match="does not exist"):
        load_backbone(str(tmp_path / "none.pt"), ResNet("resnet10"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_that_is_not_finite_is_named(value, dtype, tmp_path):
    """It was taken in silence, and a learning rate was blamed later."""
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in BARE.items()}
    weights["layer3.0.conv2.weight"] = weights["layer3.0.conv2.weight"].clone()
    weights["layer3.0.conv2.weight"][0, 0, 0, 0] = value
    path = str(tmp_path / "w.pt")
    torch.save({"state_dict": under("module.encoder_q.", weights)}, path)
    message = r"w\.pt: layer3\.0\.conv2\.weight of its ResNet holds a NaN or an infinite number"
    with pytest.raises(SystemExit, match=message):
        load_backbone(path, ResNet("resnet18"))


def test_a_head_that_is_not_finite_is_no_matter(tmp_path):
    path = str(tmp_path / "w.pt")
    torch.save({**BARE, "fc.weight": torch.tensor(float("nan"))}, path)
    load_backbone(path, ResNet("resnet18"))


# ---------------------------------------------------------------------------- what it is instead


class Small(nn.Module):
    """A network of a class that nobody else has."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)


def save_legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_torchscript(_, path):
    torch.jit.trace(nn.Conv2d(3, 4, 3), torch.ones(1, 3, 4, 4)).save(path)


def save_bytes(content, path):
    with open(path, "wb") as f:
        f.write(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "save, value, message",
    [
        (torch.save, SOURCE, r"a whole pickled network \('torchvision.models.resnet.ResNet'\)"),
        (save_legacy, SOURCE, r"a whole pickled network \('torchvision.models.resnet.ResNet'\)"),
        (torch.save, Small(), r"a whole pickled network \('test_weights.Small'\)"),
        (
            torch.save,
            {"opt": argparse.Namespace(), "model": nn.Linear(2, 2)},
            r"a whole pickled network \('torch.nn.modules.linear.Linear'\)",
        ),
        (save_torchscript, None, "is a TorchScript file.*torch.jit.load"),
        (
            save_bytes,
            b"\n<!DOCTYPE html>\n<html><head></head></html>",
            "is a web page, not weights",
        ),
        (save_bytes, b"version https://git-lfs.github.com/spec/v1\noid ...", "git lfs pull"),
        (save_bytes, (20).to_bytes(8, "little") + b'{"a": 0}' + bytes(40), "is of safetensors"),
        (save_bytes, b"", "is empty"),
        (save_bytes, b"neither", "read safely: torch.save did not write it"),
        (save_bytes, b"PK\3\4 neither", "read safely"),
    ],
)
def test_other_files_are_named_for_what_they_are(save, value, message, tmp_path):
    """In one sentence of ours, and not in torch's advice on how to run what they hold."""
    path = str(tmp_path / "w.pth")
    save(value, path)
    with pytest.raises(SystemExit, match=message) as refusal:
        load_backbone(path, ResNet("resnet10"))
    assert refusal.value.code.startswith(path)
    assert not {"\n", "\x1b"} & set(refusal.value.code)
    assert "weights_only" not in refusal.value.code
    if "network" in message:
        assert "torch.save(model.state_dict(), FILE)" in refusal.value.code


# ---------------------------------------------------------------------------- wherever it lies


def student():
    return under("module.backbone.", other(), {"module.head.mlp.0.weight": torch.ones(2)})


@pytest.mark.parametrize(
    "saved, key, left",
    [
        ({"model_state_dict": BARE, "epoch": 3}, "model_state_dict", None),
        ({"net": under("module."), "acc": 90.0}, "net", None),
        ({"weights": BARE}, "weights", None),
        ({"state": BARE, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "state", None),
        ({"a": {"b": under("encoder_q.")}}, "a.b", None),
        ({"student": student(), "teacher": under("backbone.")}, "teacher", "student"),
        (
            {"student": {"net": student()}, "teacher": {"net": BARE}},
            "teacher.net",
            "student.net",
        ),
        ({"model_ema": under("", other()), "net": BARE}, "net", "model_ema"),
        ({"momentum": {"x": under("", other())}, "net": BARE}, "net", "momentum.x"),
        ({"small": {"conv1.weight": torch.ones(2)}, "large": BARE}, "large", "small"),
        ({"other": other(), "state_dict": BARE}, "state_dict", "other"),
        ({"state_dict": {"unlike": torch.ones(1)}, "net": BARE}, "net", None),
    ],
)
def test_a_state_dict_is_found_under_any_key(saved, key, left, tmp_path):
    path = str(tmp_path / "w.pth")
    torch.save(saved, path)
    weights, sentence, _ = read_backbone(path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in BARE.items())
    assert f"under the key {key!r}; 120 tensors of the ResNet taken" in sentence
    assert (f"; {left!r} holds a ResNet too, left out" in sentence) == (left is not None)
    assert sentence.count("too, left out") == (left is not None)


def test_a_dictionary_that_holds_itself(tmp_path):
    saved = {"net": BARE}
    saved["again"] = saved
    torch.save(saved, tmp_path / "w.pth")
    assert "under the key 'net'" in read_backbone(str(tmp_path / "w.pth"))[1]


def settings_of_a_run(folder, **loss):
    """config.yaml in a folder, and the settings that it holds."""
    settings = {
        "name": "a",
        "seed": 0,
        "loss": {"name": "nce", "temperature": 0.07, **loss},
        "optim": {"lr": 1e-05},
    }
    (folder / "config.yaml").write_text(config.to_yaml(settings))
    return settings


def test_weights_of_other_settings_than_the_runs_are_refused(tmp_path):
    """backbone.pt and last.pt say with which they were trained; older ones, and other people's, are
    taken.
    """
    net, path = ResNet("resnet18"), str(tmp_path / "backbone.pt")
    old = settings_of_a_run(tmp_path)
    save_backbone(path, net, old)
    load_backbone(path, ResNet("resnet18"))
    load_backbone(path, net)
    # what a resumed run may change
    save_backbone(path, net, {**old, "name": "moved", "knn": {"every": 3}})
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
            f"{file} was not trained with the settings of {tmp_path}/config.yaml: "
            "loss.temperature was 0.07 and is now 0.3; finish that run, or move the file to "
            "another folder and name it with --weights"
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
    assert list(saved) == list(source.state_dict())
    assert all(torch.is_tensor(v) for v in saved.values())
    assert saved.settings == {"loss": {"name": "nce"}, "list": [1, 2.5, None, True]}
    net = torchvision.models.resnet18()
    problems = net.load_state_dict(saved, strict=False)
    assert problems.missing_keys == ["fc.weight", "fc.bias"]
    assert not problems.unexpected_keys
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
    assert set(saved) == {"model", "__author__", "matching_heuristics"}
    assert saved["matching_heuristics"] is True
    assert len(saved["model"]) == len(net.state_dict())
    norm = net.layer1[0].bn2.weight.detach().numpy()
    assert (saved["model"]["res2.0.conv2.norm.weight"] == norm).all()
    printed = export("torchvision", str(tmp_path / "t.pt"), net, "source")
    assert "torchvision.models.resnet18() takes it by load_state_dict" in printed
    assert "source does not say how its images were resized and normalised" in printed
    weights = torch.load(tmp_path / "t.pt", weights_only=True)
    network = torchvision.models.resnet18()
    assert not network.load_state_dict(weights, strict=False).unexpected_keys
    with pytest.raises(SystemExit, match="CIFAR stem"):
        export("detectron2", str(tmp_path / "d.pkl"), ResNet("resnet18", "cifar"), "source")


def test_what_goes_into_no_torchvision_network_says_so(tmp_path):
    """It was called "for torchvision", where none loads it."""
    path = str(tmp_path / "t.pt")
    printed = export("torchvision", path, ResNet("resnet18", "cifar"), "source")
    assert "no network there has its shapes (a 3x3 stem): build models.resnet.ResNet(" in printed
    assert "conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False) and maxpool" in printed
    network = torchvision.models.resnet18()  # as it says
    network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = torch.nn.Identity()
    network.load_state_dict(torch.load(path, weights_only=True), strict=False)

    narrow = ResNet("resnet18", "imagenet", 16)
    printed = export("torchvision", path, narrow, "source")
    assert (
        "(16 channels and not 64): build models.resnet.ResNet(BACKBONE, 'imagenet', 16)" in printed
    )
    assert "maxpool" not in printed
    saved = torch.load(path, weights_only=True)
    ResNet("resnet18", "imagenet", 16).load_state_dict(saved)
    printed = export("torchvision", path, ResNet("resnet10"), "source")
    assert "(its number of layers): build" in printed


class Dataset:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.mark.parametrize("kind", ["torchvision", "detectron2"])
def test_what_is_known_of_the_images_goes_with_the_weights(kind, tmp_path):
    path, out = str(tmp_path / "backbone.pt"), str(tmp_path / "out.pkl")
    expected = {"resize": 256, "image_size": 224, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    preprocessing = preprocessing_of(224, Dataset.mean, Dataset.std)
    assert preprocessing == expected
    save_backbone(path, ResNet("resnet10"), {"seed": 0}, preprocessing)
    assert torch.load(path, weights_only=True).preprocessing == expected
    assert config.read_yaml(str(tmp_path / "backbone.preprocessing.yaml")) == expected

    net = ResNet("resnet10")
    carried = load_backbone(path, net)
    assert carried == expected
    assert "does not say" not in export(kind, out, net, path, carried)
    assert config.read_yaml(str(tmp_path / "out.preprocessing.yaml")) == expected
    if kind == "torchvision":
        assert torch.load(out, weights_only=True).preprocessing == expected
