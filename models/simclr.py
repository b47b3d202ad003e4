"""SimCLR (Chen et al., ICML 2020): no memory; every view meets all views of the global batch."""

import torch
from torch import nn

from engine import distributed
from losses import Contrast


class SimCLR(nn.Module):
    """Each of the V views of an image is a query; its keys are the other V - 1, its candidates the views of all other images, over all
    processes. Keys and candidates carry a gradient: they are the same embeddings.

    n_views: V, 2 in the paper.
    """

    def __init__(self, encoder, *, n_views: int = 2):
        super().__init__()
        if n_views < 2:
            raise ValueError(f"n_views is {n_views}; SimCLR needs at least 2")
        self.n_views, self.n_keys = n_views, n_views - 1

    def forward(self, encoder, views, index):
        """views: V of (n, 3, S, S); index: (n,)."""
        V = len(views)
        z = encoder(torch.stack(views, 1).flatten(0, 1)).unflatten(0, (-1, V))  # (n, V, D)
        positive = torch.stack([z.roll(-w, 1) for w in range(1, V)], 2).flatten(
            0, 1
        )  # (n V, V - 1, D)
        negative = distributed.gather_with_gradient(z.flatten(0, 1))  # (world n V, D)
        index = index.repeat_interleave(V)  # (n V,)
        negative_index = distributed.gather(index)  # (world n V,)
        return [
            Contrast(
                z.flatten(0, 1),
                positive,
                negative,
                index,
                negative_index,
                index[:, None] != negative_index,
            )
        ]

    def after_step(self):
        pass
