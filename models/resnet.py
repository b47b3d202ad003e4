"""Encoders: torchvision's ResNets with a choice of stem, width and projection head."""

from collections import OrderedDict
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from .checks import check_encoder

# The kind of block, and how many of them the four stages have.
LAYERS = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CPU = torch.device("cpu")

# A convolution of 1 x 1 with a stride and fewer input channels than this is not computed as one:
# see `subsample_first`. It is the number of fp32 values in an AVX-512 register.
NARROW = 16


class Encoder(nn.Module):
    """A ResNet and a projection head: images (N, 3, S, S) to unit vectors (N, dim) in fp32.

    Mixed precision lives in here: no loss meets it.

    Args:
        device: where the network lives.
        backbone: which ResNet.
        stem: see ResNet.
        head: see make_head.
        dim: D, of the unit vectors.
        width: the channels of the first stage; 64 is torchvision's.
        bn_splits: into how many parts of the batch BatchNorm looks, each for itself, so that one
            process acts as that many (moco's CIFAR notebook: 8).
        precision: `auto` is the fastest that the device has; fp16, which needs gradient scaling,
            is for GPUs.
    """

    def __init__(
        self,
        device: torch.device = CPU,
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
        check_encoder(device, precision, dim=dim, width=width, bn_splits=bn_splits)
        self.backbone, self.head = self.make_networks(backbone, stem, width, head, dim)
        self.dim = dim
        self.bn_splits = bn_splits
        self.precision = choose_precision(device) if precision == "auto" else precision
        self.dtype = DTYPES[self.precision]
        if bn_splits > 1:
            split_batch_norm(self, bn_splits)
        self.to(device, memory_format=torch.channels_last)

    def make_networks(
        self, backbone: str, stem: str, width: int, head: str, dim: int
    ) -> tuple[nn.Module, nn.Module]:
        """Return what makes features (N, F) of images, and what makes (N, dim) of these.

        CMC's encoder has others: see models/cmc.py.
        """
        net = ResNet(backbone, stem, width)
        return net, make_head(head, net.features, dim)

    def forward(self, x: Tensor, feature: str = "output") -> Tensor:
        """Embed images.

        Args:
            x: (N, 3, S, S), normalised.
            feature: `output`, or `backbone`.

        Returns:
            The unit vectors (N, dim), CMC's two side by side (N, 2 dim); or the pooled features
            (N, F). In fp32.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            h = self.backbone(x)  # (N, F)
            if feature == "backbone":
                return h.float()
            z = self.head(h)  # (N, dim)
        z = z.float().unflatten(1, (-1, self.dim))  # (N, 1, dim); CMC: (N, 2, dim)
        return F.normalize(z, dim=2).flatten(1)


def choose_precision(device: torch.device) -> str:
    """Return the precision that `auto` means on a device.

    That is bf16 where the hardware has it, fp16 on older GPUs (V100), fp32 on older CPUs, and on
    MPS and XPU, where nothing was measured.
    """
    if device.type == "cuda":
        # is_bf16_supported() is true on V100 too, where bf16 is emulated.
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        return "bf16" if has_bf16 else "fp16"
    if device.type != "cpu":
        return "fp32"
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return "bf16" if has_bf16 else "fp32"


def make_head(head: str, features: int, dim: int) -> nn.Module:
    """Return the head on pooled features: `linear`, one layer; `mlp`, MoCo v2's F -> F -> dim."""
    if head == "linear":
        return nn.Linear(features, dim)
    return nn.Sequential(
        nn.Linear(features, features),
        nn.ReLU(inplace=True),
        nn.Linear(features, dim),
    )


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet without `fc`, under torchvision's own keys: (N, C, S, S) to (N, F).

    Args:
        name: a key of LAYERS.
        stem: `imagenet`, 7 x 7 with stride 2 and max-pool; or `cifar`, 3 x 3 with stride 1 and no
            max-pool, for images of 32 to 64 pixels.
        width: the channels of the first stage; torchvision has 64.
        channels: C, of the images.
        stem_width: the channels of the stem; None: `width`. CMC's networks have others.

    Attributes:
        features: F, of the pooled output.
    """

    def __init__(
        self,
        name: str,
        stem: str = "imagenet",
        width: int = 64,
        channels: int = 3,
        stem_width: int | None = None,
    ):
        stem_width = width if stem_width is None else stem_width
        # _make_layer reads them inside super().__init__
        self.width, self.stem_width = width, stem_width
        block, layers = LAYERS[name]
        super().__init__(block, layers)

        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        padding = kernel // 2
        self.conv1 = nn.Conv2d(channels, stem_width, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(stem_width)
        if stem == "cifar":
            self.maxpool = nn.Identity()
        self.fc = nn.Identity()
        self.features = 8 * width * block.expansion
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            if stage[0].downsample is not None:
                stage[0].downsample = subsample_first(stage[0].downsample)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:  # the first stage follows the stem
            self.inplanes = self.stem_width
        return super()._make_layer(block, planes * self.width // 64, blocks, stride, dilate)


def subsample_first(shortcut: nn.Sequential) -> nn.Sequential:
    """Take the stride out of a narrow shortcut's 1 x 1 convolution: it gets chosen pixels.

    In channels_last, oneDNN 3.12 (torch 2.14) writes past the end of its workspace in the gradient
    of the weights of a 1 x 1 convolution with a stride, where the input channels do not fill a
    vector: 2 to 7 of them with AVX2, 2 to 15 with AVX-512 (there for some batches and image sizes
    alone, in fp32 and, with several threads, bf16). The process dies of "double free or
    corruption", or hangs, or may go on unseen. github.com/uxlfoundation/oneDNN/issues/6035. With
    ONEDNN_MAX_CPU_ISA=AVX2 set these lines crash; when they do not for the oldest torch that we
    allow, this function can go:

        import torch; last = torch.channels_last
        c = torch.nn.Conv2d(4, 8, 1, 2).to(memory_format=last)
        for _ in range(200): c(torch.randn(16, 4, 32, 32).to(memory_format=last)).sum().backward()

    The choice of the pixels, and not the contiguous layout, is the remedy because torch.compile
    chooses channels_last on a CPU whatever the layout of its input, and because it leaves every bit
    of a bf16 network as it was.

    Args:
        shortcut: torchvision's Sequential of a convolution and a norm.

    Returns:
        The same, or a Sequential with the same parameters under the same keys, which computes the
        same function.
    """
    conv, norm = shortcut
    if conv.stride == (1, 1) or conv.in_channels >= NARROW:
        return shortcut
    pixels = nn.AvgPool2d(1, conv.stride)  # a mean over one pixel is that pixel
    conv.stride = (1, 1)
    return nn.Sequential(OrderedDict([("pixels", pixels), ("0", conv), ("1", norm)]))


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm in parts of the batch, each for itself, so that one process acts as several.

    The parts are equal and consecutive. The running statistics move by the mean over the parts,
    which is what engine.distributed.average_buffers makes of many processes.

    Args:
        features: C, channels.
        splits: how many parts.
    """

    def __init__(self, features: int, splits: int):
        super().__init__(features)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, C, S, S), where in training n must divide by the number of parts."""
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(
                f"a batch of {len(x)} does not divide into model.bn_splits {self.splits} equal "
                "parts"
            )
        # Every part has channels of its own, in one call: a GPU starts few kernels.
        mean = self.running_mean.repeat(self.splits)  # (splits C,)
        variance = self.running_var.repeat(self.splits)
        weight, bias = self.weight.repeat(self.splits), self.bias.repeat(self.splits)
        beside = parts_as_channels(x, self.splits)
        # It moves mean and variance.
        y = F.batch_norm(beside, mean, variance, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(self.splits, -1).mean(0))
        self.running_var.copy_(variance.view(self.splits, -1).mean(0))
        self.num_batches_tracked += 1
        return channels_as_parts(y, self.splits)


def parts_as_channels(x: Tensor, splits: int) -> Tensor:
    """Put equal parts of a batch beside each other: (splits n, C, S, S) -> (n, splits C, S, S)."""
    parts = x.unflatten(0, (splits, -1))  # (splits, n, C, S, S)
    pixels = parts.permute(1, 3, 4, 0, 2)  # (n, S, S, splits, C), as channels_last lies in memory
    return pixels.flatten(3).permute(0, 3, 1, 2)


def channels_as_parts(y: Tensor, splits: int) -> Tensor:
    """Undo parts_as_channels: (n, splits C, S, S) -> (splits n, C, S, S)."""
    pixels = y.permute(0, 2, 3, 1).unflatten(3, (splits, -1))  # (n, S, S, splits, C)
    parts = pixels.permute(3, 0, 1, 2, 4)  # (splits, n, S, S, C)
    return parts.flatten(0, 1).permute(0, 3, 1, 2)


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Replace every BatchNorm2d in a module by a SplitBatchNorm, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SplitBatchNorm(child.num_features, splits))
        else:
            split_batch_norm(child, splits)
