"""The momentum encoder f_k of MoCo: an exponential moving average of f_q."""
import copy

import torch
from torch import nn

from engine import distributed


class MomentumEncoder(nn.Module):
    """theta_k := m theta_k + (1 - m) theta_q. Its BatchNorm statistics are its own."""

    def __init__(self, encoder, m):
        super().__init__()
        if not 0 <= m <= 1:
            raise ValueError(f"momentum {m} of the key encoder must lie in [0, 1]")
        self.net, self.m = copy.deepcopy(encoder).requires_grad_(False), m

    @torch.no_grad()
    def update(self, encoder):
        torch._foreach_lerp_(list(self.net.parameters()), list(encoder.parameters()), 1 - self.m)

    @torch.no_grad()
    def forward(self, x, feature="output"):
        return self.net(x, feature)

    @torch.no_grad()
    def shuffled(self, x):
        """f_k on images dealt out anew, (n, 3, S, S) -> (n, D) in the order that came in.

        "Shuffled BN": a key must not share its BatchNorm statistics with its own query, or these give the answer away. With many
        processes the images are dealt across these; in one, across the parts of split BN (model.bn_splits); with neither it would do nothing.
        """
        world, rank, n = distributed.world_size(), distributed.rank(), len(x)
        if world == 1 and self.net.bn_splits == 1:
            return self.net(x)
        deal = distributed.broadcast(torch.randperm(world * n).to(x.device))           # (world n,), the same everywhere
        k = distributed.gather(self.net(distributed.gather(x)[deal[rank * n:(rank + 1) * n]]))
        return k[deal.argsort()[rank * n:(rank + 1) * n]]
