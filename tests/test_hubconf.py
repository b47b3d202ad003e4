"""torch.hub.load of this repository: in this process, and in a program with packages like ours."""

import os
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

from engine import checkpoint
from engine.weights import save_backbone
from models.cmc import LabEncoder
from models.resnet import Encoder, ResNet
from processes import ROOT

PREPROCESSING = {
    "mean": [0.5, 0.4, 0.3],
    "std": [0.25, 0.2, 0.3],
    "resize": 37,
    "image_size": 32,
}


def load(weights):
    return torch.hub.load(ROOT, "resnet", weights=str(weights), source="local")


def moved(network):
    """The network with statistics in its norms, as training leaves them."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


@pytest.mark.parametrize(
    "name, stem, width",
    [("resnet10", "cifar", 16), ("resnet18", "imagenet", 8), ("resnet50", "cifar", 4)],
)
def test_a_runs_network_with_what_is_known_of_its_images(name, stem, width, tmp_path):
    source = moved(ResNet(name, stem, width))
    save_backbone(str(tmp_path / "backbone.pt"), source, {}, PREPROCESSING)
    network = load(tmp_path / "backbone.pt")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(images), source(images), rtol=0, atol=0)
    assert network(images).shape == (2, network.features)
    assert not network.training
    assert not network(images).requires_grad
    for key, value in PREPROCESSING.items():
        assert getattr(network, key) == value
    assert sys.modules["models.resnet"].ResNet is ResNet


@pytest.mark.parametrize("std", [[0.25, 0.2, 0.3], None])
def test_of_a_last_pt_what_its_settings_say_in_numbers(std, tmp_path):
    encoder = Encoder(backbone="resnet10", width=8)
    data = {"image_size": 32, "mean": PREPROCESSING["mean"], "std": std}
    saved = {"encoder": encoder.state_dict(), "host": {}, "settings": {"data": data}}
    checkpoint.write(str(tmp_path / "last.pt"), saved)
    network = load(tmp_path / "last.pt")
    for key, value in PREPROCESSING.items():
        assert getattr(network, key) == (value if std else None)


def test_another_codes_network(tmp_path):
    source = moved(torchvision.models.resnet18(num_classes=7))
    keys = {f"module.encoder_q.{key}": value for key, value in source.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": keys}, tmp_path / "moco.pth.tar")
    source.fc = nn.Identity()
    network, images = load(tmp_path / "moco.pth.tar"), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(images), source(images))
    assert network.mean is network.std is network.resize is network.image_size is None


def cmc():
    encoder = LabEncoder([0.5] * 3, [0.2] * 3, backbone="resnet10", width=8)
    return encoder.backbone.state_dict()


def deep():
    tensors = ResNet("resnet18", width=4).state_dict()
    return tensors | {"layer4.2.conv1.weight": tensors["layer4.1.conv1.weight"]}


@pytest.mark.parametrize(
    "tensors, sentence",
    [
        (cmc, "is of CMC, two networks"),
        (deep, r"a ResNet of \[2, 2, 2, 3\] blocks, and this repository has resnet10"),
        (lambda: nn.Linear(2, 2).state_dict(), "expected one ResNet and found none"),
        (lambda: ResNet("resnet10", channels=1, width=8).state_dict(), r"conv1.weight is \(8, 1"),
    ],
)
def test_other_files_are_refused_by_an_error_that_ends_no_notebook(tensors, sentence, tmp_path):
    torch.save(tensors(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "weights.pt")


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match="nothing.pt does not exist"):
        load("nothing.pt")
    with pytest.raises(ValueError, match="is a folder; name a file in it, such as .*last.pt"):
        load(os.path.dirname(__file__))


STRANGER = """
import sys, torch
import engine, models.resnet
network = torch.hub.load(sys.argv[1], "resnet", weights="backbone.pt", source="local")
assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 64)
import engine.weights
assert engine.NAME == models.resnet.NAME == engine.weights.NAME == "the stranger's"
assert sys.argv[1] not in sys.path
"""


@pytest.mark.slow
def test_a_program_elsewhere_keeps_its_packages_of_our_names(tmp_path):
    save_backbone(str(tmp_path / "backbone.pt"), ResNet("resnet10", "cifar", 8), {})
    for file in ("engine/__init__", "engine/weights", "models/__init__", "models/resnet"):
        os.makedirs(tmp_path / os.path.dirname(file), exist_ok=True)
        (tmp_path / f"{file}.py").write_text('NAME = "the stranger\'s"\n')
    (tmp_path / "program.py").write_text(STRANGER)
    done = subprocess.run(
        [sys.executable, "program.py", ROOT], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
