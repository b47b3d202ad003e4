"""Encoders: torchvision's ResNets with a choice of stem, width and projection head; unit-length fp32 outputs."""

from collections import OrderedDict
from typing import Literal

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

LAYERS = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}

# A convolution of 1 x 1 with a stride and fewer input channels than this is not computed as one:
# see `subsample_first`. It is the number of fp32 values in an AVX-512 register.
NARROW = 16


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet without `fc`, under torchvision's own keys; `width` is the channels of the first stage (torchvision: 64).

    stem `imagenet`: 7x7 stride 2 and max-pool. stem `cifar`: 3x3, stride 1, padding 1, no max-pool, for images of 32 to 64 pixels.
    stem_width: the channels of the stem, where these are others than `width` (CMC's networks).
    """

    def __init__(self, name, stem="imagenet", width=64, channels=3, stem_width=None):
        stem_width = width if stem_width is None else stem_width
        # _make_layer reads them inside super().__init__
        self.width, self.stem_width = width, stem_width
        block, layers = LAYERS[name]
        super().__init__(block, layers)
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(
            channels, stem_width, kernel, stride, padding=kernel // 2, bias=False
        )
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(stem_width)
        if stem == "cifar":
            self.maxpool = nn.Identity()
        self.fc = nn.Identity()
        self.features = 8 * width * block.expansion  # F, of the pooled output
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            if stage[0].downsample is not None:
                stage[0].downsample = subsample_first(stage[0].downsample)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:  # the first stage follows the stem
            self.inplanes = self.stem_width
        return super()._make_layer(block, planes * self.width // 64, blocks, stride, dilate)


def subsample_first(shortcut):
    """Take the stride out of a narrow shortcut's 1 x 1 convolution: it gets chosen pixels.

    shortcut: torchvision's Sequential of a convolution and a norm. It is returned as it is, or as a
    Sequential with the same parameters under the same keys, which computes the same function.

    Why: in channels_last, oneDNN 3.12 (torch 2.14) writes past the end of its workspace in the
    gradient of the weights of a 1 x 1 convolution with a stride, where the input channels do not
    fill a vector: 2 to 7 of them with AVX2, 2 to 15 with AVX-512 (there for some batches and image
    sizes alone, in fp32 and, with several threads, bf16). The process dies of "double free or
    corruption", or hangs, or may go on unseen. github.com/uxlfoundation/oneDNN/issues/6035. With
    ONEDNN_MAX_CPU_ISA=AVX2 set these lines crash; when they do not for the oldest torch that we
    allow, this function can go:

        import torch; last = torch.channels_last
        c = torch.nn.Conv2d(4, 8, 1, 2).to(memory_format=last)
        for _ in range(200): c(torch.randn(16, 4, 32, 32).to(memory_format=last)).sum().backward()

    The choice of the pixels, and not the contiguous layout, is the remedy because torch.compile
    chooses channels_last on a CPU whatever the layout of its input, and because it leaves every bit
    of a bf16 network as it was.
    """
    conv, norm = shortcut
    if conv.stride == (1, 1) or conv.in_channels >= NARROW:
        return shortcut
    pixels = nn.AvgPool2d(1, conv.stride)  # a mean over one pixel is that pixel
    conv.stride = (1, 1)
    return nn.Sequential(OrderedDict([("pixels", pixels), ("0", conv), ("1", norm)]))


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose batch statistics come from each of `splits` equal consecutive parts of the batch: one process acts as that many.

    The running statistics move by the mean over the parts, which is what engine.distributed.average_buffers makes of many processes.
    """

    def __init__(self, features, splits):
        super().__init__(features)
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(
                f"a batch of {len(x)} does not divide into model.bn_splits {self.splits} equal parts"
            )
        means, variances = (
            b.repeat(self.splits, 1) for b in (self.running_mean, self.running_var)
        )  # (splits, C)
        y = torch.cat(
            [
                F.batch_norm(part, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
                for part, mean, var in zip(x.chunk(self.splits), means, variances)
            ]
        )
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked += 1
        return y


def split_batch_norm(module, splits):
    """Replace every BatchNorm2d in module by a SplitBatchNorm, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SplitBatchNorm(child.num_features, splits))
        else:
            split_batch_norm(child, splits)


def projection(head, features, dim):
    """The head on the pooled features: `linear`, one layer; `mlp`, MoCo v2's F -> F -> dim."""
    return (
        nn.Linear(features, dim)
        if head == "linear"
        else nn.Sequential(
            nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim)
        )
    )


def fastest(device):
    """The precision that `auto` means on a device: bf16 where the hardware has it, fp16 on older GPUs (V100), fp32 on older CPUs,
    and on MPS and XPU, where nothing was measured.
    """
    if device.type == "cuda":  # is_bf16_supported() is true on V100 too, where bf16 is emulated
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if device.type != "cpu":
        return "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"


class Encoder(nn.Module):
    """Images (N, 3, S, S) -> unit vectors (N, dim) in fp32. Mixed precision lives in here: no loss meets it.

    backbone: resnet10/18/34/50. stem: see ResNet. head: see projection.
    width: 64 is torchvision's. bn_splits: BatchNorm over that many parts of the batch (moco's CIFAR notebook: 8), for one process.
    precision: `auto` is the fastest that the device has. fp16 needs gradient scaling, so it is refused on a CPU.
    """

    def __init__(
        self,
        device=torch.device("cpu"),
        *,
        backbone: Literal["resnet10", "resnet18", "resnet34", "resnet50"] = "resnet18",
        stem: Literal["imagenet", "cifar"] = "imagenet",
        head: Literal["linear", "mlp"] = "linear",
        dim: int = 128,
        width: int = 64,
        bn_splits: int = 1,
        precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    ):
        super().__init__()
        for name, value in dict(dim=dim, width=width, bn_splits=bn_splits).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be above 0")
        self.backbone, self.head = self.parts(backbone, stem, width, head, dim)
        self.dim, self.bn_splits, self.precision = (
            dim,
            bn_splits,
            fastest(device) if precision == "auto" else precision,
        )
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
            self.precision
        ]
        if self.precision == "fp16" and device.type == "cpu":
            raise ValueError("precision fp16 is for GPUs; on a CPU use bf16, fp32 or auto")
        if bn_splits > 1:
            split_batch_norm(self, bn_splits)
        self.to(device, memory_format=torch.channels_last)

    def parts(self, backbone, stem, width, head, dim):
        """-> images to pooled features (N, F), and these to (N, dim). CMC's encoder has other ones (models/cmc.py)."""
        net = ResNet(backbone, stem, width)
        return net, projection(head, net.features, dim)

    def forward(self, x, feature="output"):
        """feature: `output`, the unit vectors (N, dim), or `backbone`, the pooled features (N, F)."""
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            h = self.backbone(x.contiguous(memory_format=torch.channels_last))  # (N, F)
            if feature == "backbone":
                return h.float()
            z = self.head(h)  # (N, D)
        return F.normalize(z.float().unflatten(1, (-1, self.dim)), dim=2).flatten(
            1
        )  # CMC: two vectors side by side
