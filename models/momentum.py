"""The momentum encoder f_k of MoCo, and its shuffled BatchNorm (He et al., CVPR 2020)."""

import copy

import torch
from torch import Tensor, nn

from engine import distributed

from .checks import check_key_momentum


class MomentumEncoder(nn.Module):
    """An exponential moving average of f_q, without gradient; its BatchNorm statistics are its own.

        theta_k := m theta_k + (1 - m) theta_q

    Args:
        encoder: f_q, an Encoder, which is copied.
        m: the momentum.
    """

    def __init__(self, encoder: nn.Module, m: float):
        super().__init__()
        check_key_momentum(m)
        self.net = copy.deepcopy(encoder).requires_grad_(False)
        self.m = m

    @torch.no_grad()
    def update(self, encoder: nn.Module) -> None:
        """Move f_k towards f_q, by the equation above."""
        theta_k = list(self.net.parameters())
        theta_q = list(encoder.parameters())
        torch._foreach_lerp_(theta_k, theta_q, 1 - self.m)

    @torch.no_grad()
    def forward(self, x: Tensor, feature: str = "output") -> Tensor:
        """Return what Encoder.forward returns, without gradient."""
        return self.net(x, feature)

    @torch.no_grad()
    def forward_shuffled(self, x: Tensor) -> Tensor:
        """Embed images in other company than that of their queries: "shuffled BN".

        A key must not share its BatchNorm statistics with its own query, or these give the answer
        away. So the images are dealt out anew across the parts that have statistics of their own:
        the processes, and within each the parts of split BN (model.bn_splits). Where there is one
        part alone this would do nothing.

        Args:
            x: (n, 3, S, S), the images of this process.

        Returns:
            (n, D), in the order of x.
        """
        world, splits = distributed.world_size(), self.net.bn_splits
        if world * splits == 1:
            return self.net(x)
        order = deal_rows(world, splits, len(x))  # (world n,)
        if world > 1:  # images travel in the precision in which the first convolution reads them
            x = x.to(self.net.dtype)
        k = self.net(distributed.all_to_all_rows(x, order))  # (n, D)
        return distributed.all_to_all_rows(k, order.argsort())


def deal_rows(world: int, splits: int, n: int) -> Tensor:
    """Deal n rows of each process across all parts, as cards: row j of part p goes to part p + j.

    moco's code deals by lot. Here the order of the batch is by lot already, and the same, whatever
    share of the parts are processes. Returns (world n,), on the CPU: which row stands at each
    place, counted over all processes.
    """
    part_size = n // splits
    i = torch.arange(world * n)  # (world n,)
    part, row = i // part_size, i % part_size  # (world n,)
    return ((part + row) % (world * splits)).argsort(stable=True)
