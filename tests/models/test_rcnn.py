"""The detectors are torchvision's, on our ResNet."""

import pytest
import torch
from torchvision.models import detection as torchvision_detection

from models.rcnn import build_rcnn
from models.resnet import ResNet
from train_detect import Detect

SMALL = {
    "min_size": [96],
    "max_size": 160,
    "proposals": 32,
    "channels": 32,
}
TARGET = {
    "boxes": torch.tensor([[10.0, 10, 60, 60]]),
    "labels": torch.tensor([1]),
    "masks": torch.ones(1, 96, 96, dtype=torch.uint8),
}


def shapes(model):
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize(
    "task,name", [("box", "fasterrcnn"), ("mask", "maskrcnn"), ("keypoint", "keypointrcnn")]
)
def test_the_default_model_is_torchvisions(task, name):
    """Names and shapes of every weight, with our ResNet-50 inside."""
    n_classes = 2 if task == "keypoint" else 91
    build = getattr(torchvision_detection, f"{name}_resnet50_fpn")
    theirs = build(weights=None, weights_backbone=None, num_classes=n_classes)
    ours = build_rcnn(ResNet("resnet50"), n_classes - 1, Detect(task=task, norm="frozen"))
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_frozen_keeps_the_backbones_statistics_and_batch_trains_new_ones(norm):
    backbone = ResNet("resnet10", width=8)
    backbone.bn1.running_mean.fill_(0.3)
    backbone.bn1.weight.data.fill_(0.7)
    model = build_rcnn(backbone, 3, Detect(**SMALL, task="mask", norm=norm))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sum(model([torch.rand(3, 96, 96)], [TARGET]).values()).backward()
    assert all(p.grad is not None for p in model.parameters())  # every layer is fine-tuned
    optimizer.step()
    after = model.state_dict()

    bn1 = "backbone.body.bn1"
    assert before[f"{bn1}.weight"][0] == pytest.approx(0.7)
    for name in ("running_mean", "weight"):
        is_same = torch.equal(before[f"{bn1}.{name}"], after[f"{bn1}.{name}"])
        assert is_same == (norm == "frozen")
    for part in (".fpn.", ".mask_head."):
        has_statistics = any(part in k and k.endswith("running_mean") for k in after)
        assert has_statistics == (norm == "batch")
    assert not any("box_head" in k and k.endswith("running_mean") for k in after)
    conv1 = "backbone.body.conv1.weight"
    assert not torch.equal(before[conv1], after[conv1])
