"""Several views of each image, side by side."""

import torch
from torch import Tensor, nn


def encode_views(encoder: nn.Module, views: list[Tensor]) -> Tensor:
    """Embed V views of N images in one pass, which DistributedDataParallel wants.

    Args:
        encoder: (n, 3, S, S) -> (n, D).
        views: V of (N, 3, S, S).

    Returns:
        (N, V, D).
    """
    x = torch.stack(views, 1)  # (N, V, 3, S, S)
    z = encoder(x.flatten(0, 1))  # (N V, D)
    return z.unflatten(0, (-1, len(views)))


def other_views(z: Tensor) -> list[Tensor]:
    """Return V - 1 of (N, V, D): beside view v of each image stand its views v + 1, v + 2, ...

    Args:
        z: (N, V, D), V views of N images.
    """
    V = z.shape[1]
    return [z.roll(-shift, 1) for shift in range(1, V)]
