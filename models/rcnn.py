"""Faster, Mask and Keypoint R-CNN with FPN: torchvision's, on a ResNet of models/resnet.py."""

from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

N_KEYPOINTS = 17  # of a person
ROI_SIDE = 7  # of the box head's input
CONVOLUTIONS = 4  # of the mask head; the keypoint head has twice as many


def build_rcnn(backbone: nn.Module, n_classes: int, settings: Any) -> nn.Module:
    """Build a detector.

    Args:
        backbone: a ResNet, whose pooling is dropped.
        n_classes: the background not counted.
        settings: train_detect.Detect's: task, norm, channels, min_size, max_size, detections,
            proposals; and is_synchronized, whether BatchNorm's statistics are of all processes.

    Returns:
        torchvision's FasterRCNN, MaskRCNN or KeypointRCNN.
    """
    channels = settings.channels
    norm = nn.BatchNorm2d
    if settings.norm == "frozen":
        norm = None
        freeze_batch_norm(backbone)
    fpn = BackboneWithFPN(
        backbone,
        return_layers={"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"},
        in_channels_list=[backbone.features // 2**i for i in (3, 2, 1, 0)],
        out_channels=channels,
        norm_layer=norm,
    )
    common = {
        "box_head": TwoMLPHead(channels * ROI_SIDE**2, 4 * channels),
        "box_predictor": FastRCNNPredictor(4 * channels, n_classes + 1),
        "min_size": settings.min_size,
        "max_size": settings.max_size,
        "box_detections_per_img": settings.detections,
        "box_batch_size_per_image": settings.proposals,
    }
    if settings.task == "mask":
        model = MaskRCNN(
            fpn,
            mask_head=MaskRCNNHeads(channels, [channels] * CONVOLUTIONS, 1, norm_layer=norm),
            mask_predictor=MaskRCNNPredictor(channels, channels, n_classes + 1),
            **common,
        )
    elif settings.task == "keypoint":
        model = KeypointRCNN(
            fpn,
            keypoint_head=KeypointRCNNHeads(channels, [2 * channels] * 2 * CONVOLUTIONS),
            keypoint_predictor=KeypointRCNNPredictor(2 * channels, N_KEYPOINTS),
            **common,
        )
    else:
        model = FasterRCNN(fpn, **common)
    if settings.is_synchronized:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace each BatchNorm2d by torchvision's frozen one, with its values, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)
