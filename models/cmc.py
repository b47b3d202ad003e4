"""CMC: contrastive multiview coding (Tian, Krishnan, Isola; 2019; arXiv 1906.05849).

The lightness of an image meets its colour: L meets ab of CIE Lab, or Y meets CbCr.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from engine import distributed
from losses import Contrast

from .checks import check_bank_views, check_even_width
from .memory_bank import MemoryBank
from .resnet import CPU, Encoder, ResNet, make_head
from .views import encode_views

# sRGB (D65) to XYZ, over the white point's XYZ: each row sums to 1
XYZ = (
    (0.412453 / 0.950456, 0.357580 / 0.950456, 0.180423 / 0.950456),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.088754, 0.119193 / 1.088754, 0.950227 / 1.088754),
)

# R, G, B to Y, Cb, Cr of ITU-R BT.601
YCBCR = (
    (65.481, 128.553, 24.966),
    (-37.797, -74.203, 112.0),
    (112.0, -93.786, -18.214),
)
YCBCR_OFFSET = (16.0, 128.0, 128.0)


def rgb_to_lab(x: Tensor) -> Tensor:
    """Convert sRGB in [0, 1] (n, 3, S, S) to L, a, b of CIE Lab (n, 3, S, S).

    L lies in [0, 100], a about in [-86, 98], b about in [-108, 94].
    """
    linear = torch.where(x > 0.04045, ((x.clamp(min=0) + 0.055) / 1.055) ** 2.4, x / 12.92)
    X, Y, Z = (weigh_channels(linear, row) for row in XYZ)  # (n, S, S) each
    f_X, f_Y, f_Z = compress(X), compress(Y), compress(Z)
    return torch.stack([116 * f_Y - 16, 500 * (f_X - f_Y), 200 * (f_Y - f_Z)], 1)


def weigh_channels(x: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum the channels of (n, 3, S, S), each times its weight: (n, S, S)."""
    return sum(weight * channel for weight, channel in zip(weights, x.unbind(1)))


def compress(v: Tensor) -> Tensor:
    """CIE Lab's f: the cube root, and near 0 a line."""
    return torch.where(v > 0.008856, v.clamp(min=1e-6) ** (1 / 3), 7.787 * v + 16 / 116)


def rgb_to_ycbcr(x: Tensor) -> Tensor:
    """Convert RGB in [0, 1] (n, 3, S, S) to Y, Cb, Cr of ITU-R BT.601 (n, 3, S, S).

    Y lies in [16, 235], Cb and Cr in [16, 240].
    """
    red, green, blue = x.unbind(1)  # (n, S, S) each
    channels = [
        r * red + g * green + b * blue + offset for (r, g, b), offset in zip(YCBCR, YCBCR_OFFSET)
    ]
    return torch.stack(channels, 1)


# colour space -> the conversion, and the mean and std of each channel of CMC's train_CMC.py
COLOUR_SPACES = {
    "lab": (rgb_to_lab, (50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)),
    "ycbcr": (rgb_to_ycbcr, (116.151, 121.080, 132.342), (109.500, 111.855, 111.964)),
}


class LabEncoder(Encoder):
    """Two ResNets of half the width: one sees the lightness (L, or Y), one the colour.

    They are one module, so that one call of DistributedDataParallel has both. As in CMC's code the
    stages are halved and the stem is not (5,686,336 parameters with ResNet-18 and linear heads).
    The unit vectors of both lie side by side: (n, 2 dim). The pooled features, which are probed,
    are those of both: (n, F), as of one ResNet of full width.

    Args:
        mean: of each channel of the images' normalisation, which is undone here.
        std: the same.
        device: see Encoder.
        colour_space: `lab`, or `ycbcr`, which CMC's README finds 0.5 to 1 better.
        **settings: see Encoder.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device = CPU,
        *,
        colour_space: Literal["lab", "ycbcr"] = "lab",
        **settings,
    ):
        super().__init__(device, **settings)
        self.colour_space = colour_space
        self.convert, colour_mean, colour_std = COLOUR_SPACES[colour_space]
        constants = {
            "mean": mean,
            "std": std,
            "colour_mean": colour_mean,
            "colour_std": colour_std,
        }
        for name, values in constants.items():
            value = torch.tensor(values, device=device).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def make_networks(
        self, backbone: str, stem: str, width: int, head: str, dim: int
    ) -> tuple[nn.Module, nn.Module]:
        """Return the two backbones as one module, and the two heads as one."""
        check_even_width(width)
        # CMC's code has 64 channels in the stem whatever the stages have: 32 (its v1), 64, or 128.
        stem_width = min(width, 64)
        L = ResNet(backbone, stem, width // 2, 1, stem_width)
        ab = ResNet(backbone, stem, width // 2, 2, stem_width)
        L_head = make_head(head, L.features, dim)
        ab_head = make_head(head, ab.features, dim)
        return TwoStreams(L, ab), TwoStreams(L_head, ab_head)

    def forward(self, x: Tensor, feature: str = "output") -> Tensor:
        """Convert the colours of images (n, 3, S, S), and embed them: see Encoder.forward."""
        rgb = x.float() * self.std + self.mean  # (n, 3, S, S), in [0, 1]
        colours = self.convert(rgb)  # (n, 3, S, S)
        return super().forward((colours - self.colour_mean) / self.colour_std, feature)


class TwoStreams(nn.Module):
    """Two modules side by side, each on its part of the channels."""

    def __init__(self, L: nn.Module, ab: nn.Module):
        super().__init__()
        self.L = L
        self.ab = ab

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 3, S, S), channel L first, or features (n, F), the half of L first."""
        is_image = x.dim() == 4
        n_L = 1 if is_image else x.shape[1] // 2
        return torch.cat([self.L(x[:, :n_L]), self.ab(x[:, n_L:])], 1)


class CMC(nn.Module):
    """A query in one view meets the other view's memory bank, which has a row an image.

        L = L_contrast(V1, V2) + L_contrast(V2, V1)

    V1 is the lightness of the image, V2 its colour: L and ab, or with colour_space `ycbcr`, a key
    of the encoder, Y and CbCr. z_L = f_1(V1) meets the bank of z_ab, and z_ab = f_2(V2) that of
    z_L: two contrasts, whose losses are summed.

    Args:
        encoder: a LabEncoder, f_1 and f_2.
        n_data: the number of images.
        momentum: of the banks, see MemoryBank.
        exclude_self: the image's own row is no negative of its query.
        candidates: so many rows, drawn anew at every step, stand for the whole bank, see
            MemoryBank.sample_rows; None: all of it.
        n_views: V, augmentations of an image, 1 in the paper. Of several each is a query, whose
            keys are the bank's row and the other stream's embeddings of the other augmentations.
            JCL wants several keys; this is no paper's way to get them.
    """

    Encoder = LabEncoder

    def __init__(
        self,
        encoder: nn.Module,
        n_data: int,
        *,
        momentum: float = 0.5,
        exclude_self: bool = True,
        candidates: int | None = None,
        n_views: int = 1,
    ):
        super().__init__()
        check_bank_views(n_views)
        self.n_views = n_views
        self.n_keys = n_views  # the row and the other views
        self.L = MemoryBank(n_data, encoder.dim, momentum, exclude_self, candidates)
        self.ab = MemoryBank(n_data, encoder.dim, momentum, exclude_self, candidates)
        self.pending = []  # this step's embeddings, which are not in the banks yet

    def forward(self, encoder: nn.Module, views: list[Tensor], index: Tensor) -> list[Contrast]:
        """Contrast each stream with the other stream's bank.

        Args:
            encoder: f_1 and f_2.
            views: V of (N, 3, S, S), of the same N images.
            index: (N,), which images.

        Returns:
            Two Contrasts, of N V queries each.
        """
        # embed lightness and colour
        z = encode_views(encoder, views)  # (N, V, 2 D)
        z_L, z_ab = z.chunk(2, 2)  # (N, V, D), (N, V, D)
        L, ab = z_L.detach(), z_ab.detach()

        # the rows move towards the mean of the views when the step is done, of all processes
        self.pending.append(distributed.all_gather(L.mean(1), ab.mean(1), index))

        # contrast each with the other's bank
        return [self.ab.contrast(z_L, ab, index), self.L.contrast(z_ab, L, index)]

    def update_memory(self) -> None:
        """Move the rows of the step's images: the backward pass needed the old ones."""
        for L, ab, index in self.pending:
            self.L.update(L, index)
            self.ab.update(ab, index)
        self.pending.clear()
