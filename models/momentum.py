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

        "Shuffled BN": a key must not share its BatchNorm statistics with its own query, or these give the answer away. So the images are
        dealt across the parts that have statistics of their own: the processes, and within each the parts of split BN (model.bn_splits); with
        one alone it would do nothing. They are dealt in turn, as cards are (moco's code: by lot), for the batch's order is by lot already, and
        the same whatever share of the parts are processes. They travel in the precision in which the first convolution reads them.
        """
        world, splits, n = distributed.world_size(), self.net.bn_splits, len(x)
        if world * splits == 1:
            return self.net(x)
        i = torch.arange(world * n)
        order = ((i // (n // splits) + i % (n // splits)) % (world * splits)).argsort(
            stable=True
        )  # (world n,)  row j of part p goes to part p + j
        k = self.net(
            distributed.exchange(x.to(self.net.dtype) if world > 1 else x, order)
        )  # (n, D)
        return distributed.exchange(k, order.argsort())
