"""IR: instance discrimination with a memory bank (Wu et al., CVPR 2018), the host of Ring's Table 1."""

import torch
from torch import nn

from engine import distributed

from .memory import MemoryBank


class IR(nn.Module):
    """One view of each image is the query; its key is the image's row in the bank, its candidates are the whole bank.

    momentum: of the bank, see MemoryBank. exclude_self: the query's own row is no negative of its own (the Ring code leaves it in).
    candidates: so many rows, drawn anew every step, stand for the whole bank (MemoryBank.some), for data sets of millions; null: all.
    n_views: views an image; with V > 1 each is a query, and its keys are the row and the other views, without gradient (no paper's way;
    JCL wants several keys).
    """

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
        self.bank = MemoryBank(n_data, encoder.dim, momentum, exclude_self, candidates)

    def forward(self, encoder, views, index):
        """views: V of (N, 3, S, S); index: (N,)."""
        q = encoder(torch.stack(views, 1).flatten(0, 1)).unflatten(0, (-1, len(views)))  # (N, V, D)
        self.news.append(distributed.gather(q.detach().mean(1), index))
        return [self.bank.contrast(q, q.detach(), index)]

    def after_step(self):
        for z, index in self.news:  # only now: the backward pass needed the old rows
            self.bank.update(z, index)
        self.news.clear()
