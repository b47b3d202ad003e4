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
        processes the images are dealt across these; in one, across the parts of split BN (model.bn_splits); with neither it would do
        nothing. They are dealt in turn, as cards are (moco's code: by lot), for the batch's order is by lot already: so each process gives
        as many to each, and no other rows travel. They do so in the precision in which the first convolution reads them.
        """
        world, splits, n, i = distributed.world_size(), self.net.bn_splits, len(x), torch.arange(len(x), device=x.device)
        if world > 1:
            out = ((distributed.rank() + i) % world).argsort(stable=True)              # (n,)  row j of process r goes to process r + j
            x = distributed.exchange(x[out].to(self.net.dtype))
        deal = ((i * splits // n + i % (n // splits)) % splits).argsort(stable=True) if splits > 1 else i         # row j of part r to part r + j
        k = self.net(x[deal])[deal.argsort()]                                          # (n, D)
        return k if world == 1 else distributed.exchange(k, back=True)[out.argsort()]
