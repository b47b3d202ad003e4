"""SimCLR (Chen, Kornblith, Norouzi, Hinton; ICML 2020; arXiv 2002.05709): no memory."""

import torch
from torch import Tensor, nn

from engine import distributed
from losses import Contrast

from .checks import check_simclr
from .views import encode_views, other_views


class SimCLR(nn.Module):
    """Every view meets all views of the global batch: Algorithm 1.

        l(i, j) = -log exp(z_i z_j / t) / sum_{k != i} exp(z_i z_k / t)

    Each of the V views of an image is a query z_i; its keys are the image's other V - 1 views z_j;
    its candidates are the views of all other images, over all processes. Keys and candidates carry
    a gradient: they are the same embeddings.

    Args:
        encoder: g(f(.)), which is not kept.
        n_views: V, 2 in the paper.
    """

    def __init__(self, encoder: nn.Module, *, n_views: int = 2):
        super().__init__()
        check_simclr(n_views)
        self.n_views = n_views
        self.n_keys = n_views - 1

    def forward(self, encoder: nn.Module, views: list[Tensor], index: Tensor) -> list[Contrast]:
        """Contrast each view with all others.

        Args:
            encoder: g(f(.)).
            views: V of (n, 3, S, S), of the same n images.
            index: (n,), which images.

        Returns:
            One Contrast, of n V queries and W n V candidates, with W processes.
        """
        # embed the augmented images
        z = encode_views(encoder, views)  # (n, V, D)

        # positive pairs: z_i with the other views of its image
        z_j = torch.stack(other_views(z), 2)  # (n, V, V - 1, D)

        # all pairs: z_i with every view of the global batch
        z_k = distributed.all_gather_with_gradient(z.flatten(0, 1))  # (W n V, D)

        # negative pairs: those of different images
        index_i = index.repeat_interleave(self.n_views)  # (n V,)
        index_k = distributed.all_gather(index_i)  # (W n V,)
        mask = index_i[:, None] != index_k  # (n V, W n V)

        return [Contrast(z.flatten(0, 1), z_j.flatten(0, 1), z_k, index_i, index_k, mask)]

    def update_memory(self) -> None:
        """Do nothing: there is no memory."""
