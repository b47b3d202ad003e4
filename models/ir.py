"""IR: instance discrimination with a memory bank (Wu et al., CVPR 2018), the host of Ring's Table 1."""
import torch
from torch import nn

from engine import distributed
from losses import Contrast

from .memory import MemoryBank


class IR(nn.Module):
    """One view of each image; its key is the image's row in the bank, its candidates are the whole bank.

    momentum: of the bank, see MemoryBank. exclude_self: the query's own row is no negative of its own (the Ring code leaves it in).
    """

    n_views = 1

    def __init__(self, encoder, n_data, *, momentum: float = 0.5, exclude_self: bool = True):
        super().__init__()
        self.bank, self.exclude_self = MemoryBank(n_data, encoder.dim, momentum), exclude_self

    def forward(self, encoder, views, index):
        """views: one (N, 3, S, S); index: (N,)."""
        q = encoder(views[0])                                                          # (N, D)
        k = self.bank.rows[index]                                                      # (N, D)
        mask = None
        if self.exclude_self:
            mask = torch.ones(len(q), len(self.bank.rows), dtype=torch.bool, device=q.device)
            mask.scatter_(1, index[:, None], False)                                    # (N, n_data)
        self.news = distributed.gather(q.detach()), distributed.gather(index)
        return [Contrast(q, k[:, None], self.bank.rows, index, self.bank.index, mask)]

    def after_step(self):
        self.bank.update(*self.news)                       # only now: the backward pass needed the old rows
