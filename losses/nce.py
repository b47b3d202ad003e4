"""InfoNCE (van den Oord et al., 2018), plain: the baseline of all four papers.

    L = mean_i -log( e^{q k / t} / (e^{q k / t} + sum_j e^{q n_j / t}) )
      = mean_i log(1 + e^{logsumexp_j(q n_j / t) - q k / t})

k is the query's positive (of several, their mean), n_j its negatives, t the temperature. log(K + 1) when all similarities are equal.
"""
import torch
from torch import nn
from torch.nn import functional as F

from . import false_negatives


class NCE(nn.Module):
    """temperature: t. n_negatives: that many uniform draws from the candidates, with replacement, anew for each query (instance
    discrimination: 4095); null: every candidate (MoCo)."""

    def __init__(self, labels=None, *, temperature: float = 0.07, n_negatives: int | None = None):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        if n_negatives is not None and n_negatives < 1:
            raise ValueError(f"n_negatives is {n_negatives}; it must be above 0, or null for all")
        self.t, self.n_negatives = temperature, n_negatives
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, contrast, epoch):
        q, k, n = contrast.query, contrast.positive.mean(1), contrast.negative         # (N, D), (N, D), (K, D)
        s = q @ n.T                                                                    # (N, K)
        if contrast.mask is not None:
            s = s.masked_fill(~contrast.mask, -torch.inf)
        used = s[:32].detach() > -torch.inf                                            # (32, K), for the log
        if self.n_negatives is not None:
            draws = draw(contrast.mask, self.n_negatives, s)                           # (N, n_negatives)
            s = s.gather(1, draws)
            used = torch.zeros_like(used).scatter_(1, draws[:32], True)
        positive = (q * k).sum(1)                                                      # (N,)
        loss = F.softplus(torch.logsumexp(s / self.t, 1) - positive / self.t).mean()
        K = self.n_negatives or (s > -torch.inf).sum(1).float().mean()
        return loss, {"K": K, "positive": positive.mean(), **false_negatives(contrast, used, self.labels)}


def draw(mask, n, s):
    """(N, n) uniform draws, with replacement, from the candidates that mask (N, K) allows each query; s: (N, K), for its size."""
    if mask is None:
        return torch.randint(s.shape[1], (len(s), n), device=s.device)
    count = mask.cumsum(1, dtype=torch.int32)                                          # (N, K): candidate j is a query's count[j]-th
    turn = (torch.rand(len(s), n, device=s.device, dtype=torch.float64) * count[:, -1:]).int() + 1
    return torch.searchsorted(count, turn)
