"""CMC: contrastive multiview coding (Tian, Krishnan, Isola; 2019), with two memory banks.

The lightness of an image meets its colour: L meets ab of CIE Lab, or Y meets CbCr.
"""

from typing import Literal

import torch
from torch import nn

from engine import distributed

from .memory import MemoryBank
from .resnet import Encoder, ResNet, projection

# sRGB (D65) to XYZ, over the white point's XYZ: each row sums to 1
XYZ = (
    (0.412453 / 0.950456, 0.357580 / 0.950456, 0.180423 / 0.950456),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.088754, 0.119193 / 1.088754, 0.950227 / 1.088754),
)


def lab(x):
    """(n, 3, S, S) sRGB in [0, 1] -> L, a, b of CIE Lab: L in [0, 100], a about [-86, 98], b about [-108, 94]."""
    x = torch.where(x > 0.04045, ((x.clamp(min=0) + 0.055) / 1.055) ** 2.4, x / 12.92)
    X, Y, Z = (
        sum(w * channel for w, channel in zip(row, x.unbind(1))) for row in XYZ
    )  # 3 of (n, S, S)
    f = lambda v: torch.where(v > 0.008856, v.clamp(min=1e-6) ** (1 / 3), 7.787 * v + 16 / 116)
    return torch.stack([116 * f(Y) - 16, 500 * (f(X) - f(Y)), 200 * (f(Y) - f(Z))], 1)


# R, G, B to Y, Cb, Cr of ITU-R BT.601, for images in [0, 1]: Y in [16, 235], Cb and Cr in [16, 240]
YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
YCBCR_OFFSET = (16.0, 128.0, 128.0)


def ycbcr(x):
    """(n, 3, S, S) RGB in [0, 1] -> Y, Cb, Cr."""
    red, green, blue = x.unbind(1)
    channels = [
        r * red + g * green + b * blue + offset for (r, g, b), offset in zip(YCBCR, YCBCR_OFFSET)
    ]
    return torch.stack(channels, 1)


# colour space -> the conversion, and the mean and std a channel of CMC's train_CMC.py
COLOUR_SPACES = {
    "lab": (lab, (50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)),
    "ycbcr": (ycbcr, (116.151, 121.080, 132.342), (109.500, 111.855, 111.964)),
}


class LabEncoder(Encoder):
    """Two ResNets of half the width, in one module, so that one DDP call has both: one sees the
    lightness (L, or Y), one the colour (ab, or CbCr).

    As in CMC's code the stages are halved and the stem is not (5,686,336 parameters with ResNet-18
    and linear heads). mean, std: the normalisation of the images that come in. colour_space: `lab`,
    or `ycbcr`, which CMC's README finds 0.5 to 1 better. The unit vectors of both lie side by side:
    (n, 2 dim). The pooled features, which are probed, are those of both, (n, F) as of one ResNet of
    full width.
    """

    def __init__(
        self,
        mean,
        std,
        device=torch.device("cpu"),
        *,
        colour_space: Literal["lab", "ycbcr"] = "lab",
        **settings,
    ):
        super().__init__(device, **settings)
        self.colour_space = colour_space
        self.convert, *statistics = COLOUR_SPACES[colour_space]
        names = "mean", "std", "colour_mean", "colour_std"
        for name, values in zip(names, (mean, std, *statistics)):
            constant = torch.tensor(values, device=device).view(1, 3, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    def parts(self, backbone, stem, width, head, dim):
        if width % 2:
            raise ValueError(f"width is {width}; cmc halves it, so it must be even")
        # CMC's code has 64 channels in the stem whatever the stages have: 32 (its v1), 64, or 128
        nets = {
            name: ResNet(backbone, stem, width // 2, channels, stem_width=min(width, 64))
            for name, channels in (("L", 1), ("ab", 2))
        }
        return TwoStreams(**nets), TwoStreams(
            **{name: projection(head, net.features, dim) for name, net in nets.items()}
        )

    def forward(self, x, feature="output"):
        x = self.convert(x.float() * self.std + self.mean)
        return super().forward((x - self.colour_mean) / self.colour_std, feature)


class TwoStreams(nn.Module):
    """L and ab: two modules side by side, each on its part of the channels."""

    def __init__(self, L, ab):
        super().__init__()
        self.L, self.ab = L, ab

    def forward(self, x):
        first = (
            1 if x.dim() == 4 else x.shape[1] // 2
        )  # of an image, the channel L; of features, the half
        return torch.cat([self.L(x[:, :first]), self.ab(x[:, first:])], 1)


class CMC(nn.Module):
    """The query L meets the ab bank, the query ab the L bank: two contrasts, whose losses are summed.
    (With colour_space `ycbcr`, a key of the encoder, read Y and CbCr.)

    momentum: of the banks. exclude_self: the image's own row is no negative. candidates: see models/ir.py. n_views: views an image; with
    V > 1 each is a query, and its keys are the bank's row and the other stream's embeddings of the other views (no paper's way; JCL wants
    several keys).
    """

    Encoder = LabEncoder

    def __init__(
        self,
        encoder,
        n_data,
        *,
        momentum: float = 0.5,
        exclude_self: bool = True,
        candidates: int | None = None,
        n_views: int = 1,
    ):
        super().__init__()
        if n_views < 1:
            raise ValueError(f"n_views is {n_views}; it must be above 0")
        self.n_views, self.n_keys, self.news = n_views, n_views, []
        self.L, self.ab = (
            MemoryBank(n_data, encoder.dim, momentum, exclude_self, candidates) for _ in range(2)
        )

    def forward(self, encoder, views, index):
        """views: V of (N, 3, S, S); index: (N,)."""
        z = encoder(torch.stack(views, 1).flatten(0, 1)).unflatten(
            0, (-1, len(views))
        )  # (N, V, 2 D)
        L, ab = z.chunk(2, 2)  # (N, V, D), (N, V, D)
        self.news.append(distributed.gather(L.detach().mean(1), ab.detach().mean(1), index))
        return [self.ab.contrast(L, ab.detach(), index), self.L.contrast(ab, L.detach(), index)]

    def after_step(self):
        for L, ab, index in self.news:  # only now: the backward pass needed the old rows
            self.L.update(L, index), self.ab.update(ab, index)
        self.news.clear()
