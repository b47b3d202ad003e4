"""Ring: conditional negative sampling (Wu, Mosse, Zhuang, Yamins, Goodman; ICLR 2021; arXiv 2010.02037).

Plain InfoNCE, whose negatives come from a ring around the query: of the n candidates, ranked by similarity to q, nearest first, those
from rank floor(l n) to rank floor(u n). What lies nearer is too hard and likely of the query's own class; what lies farther is too easy.

    L = mean_i -log( e^{q k / t} / (e^{q k / t} + sum_{j in ring(q)} e^{q n_j / t}) )          n_j carries no gradient

u falls linearly from 100 % to `outer` over `anneal_epochs`. Not settled by the paper: how long (we: the first third of training), and
whether l stays (we: yes) or keeps its proportion to u as in the released code (`inner_relative`). Ball, in the same code: `inner: 0`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from engine.distributed import say

from . import NEVER, count, false_negatives, similarity
from .nce import more_than_there_are


class Ring(nn.Module):
    """temperature: t. inner, outer: l and u, as shares. anneal_epochs: null is a third of training, 0 a constant ring.
    n_negatives: that many uniform draws from the ring, with replacement (IR: 4095); null: all of it (MoCo, Algorithm 1).
    """

    def __init__(
        self,
        epochs,
        labels=None,
        n_data=None,
        *,
        temperature: float = 0.07,
        inner: float = 0.01,
        outer: float = 0.10,
        anneal_epochs: float | None = None,
        inner_relative: bool = False,
        n_negatives: int | None = None,
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        if not 0 <= inner < outer <= 1:
            raise ValueError(
                f"inner {inner} and outer {outer} do not bound a ring; they are shares, 0 <= inner < outer <= 1"
            )
        if n_negatives is not None and n_negatives < 1:
            raise ValueError(
                f"n_negatives is {n_negatives}; it must be above 0, or null for the whole ring"
            )
        more_than_there_are(n_negatives, n_data)
        if anneal_epochs is not None and anneal_epochs < 0:
            raise ValueError(
                f"anneal_epochs is {anneal_epochs}; it must be at least 0, or null for a third of training"
            )
        if anneal_epochs is not None and anneal_epochs > epochs:
            say(
                f"anneal_epochs {anneal_epochs:g} is above epochs {epochs}: the ring does not get down to outer {outer:g}; lower anneal_epochs, or make it null"
            )
        self.t, self.l, self.u, self.n_negatives = temperature, inner, outer, n_negatives
        self.anneal_epochs = epochs / 3 if anneal_epochs is None else anneal_epochs
        self.inner_relative = inner_relative
        self.register_buffer("labels", labels, persistent=False)

    def percentiles(self, epoch):
        """L and u at an epoch."""
        u = (
            self.u + (1 - self.u) * max(0, 1 - epoch / self.anneal_epochs)
            if self.anneal_epochs
            else self.u
        )
        return (self.l * u / self.u if self.inner_relative else self.l), u

    def negatives(self, contrast, s, epoch):
        """The ring. s: (..., N, K) -> the similarities in it (..., N, r), and of which candidates they are."""
        l, u = self.percentiles(epoch)
        if (
            contrast.mask is None
        ):  # equally many candidates for all: first and last are numbers, and nothing is sorted
            first, last = bounds(l, u, s.shape[-1] - (contrast.own is not None))
            s, which = s.topk(last, sorted=False)  # (..., N, last)
            ring, place = s.topk(last - first, largest=False, sorted=False)  # (..., N, r)
            which, first, last = which.gather(-1, place), 0, last - first
            inner, outer = ring.amax(-1), ring.amin(-1)
        else:  # the same with n of each query's own
            first, last = bounds(l, u, contrast.mask.sum(-1, keepdim=True))  # (..., N, 1) each
            s, which = s.topk(
                min(int(u * s.shape[-1] + 1e-9) + 1, s.shape[-1])
            )  # (..., N, r), nearest first; no ring ends farther
            inner, outer = s.gather(-1, first), s.gather(-1, last - 1)
            rank = torch.arange(s.shape[-1], device=s.device)  # (r,)
            ring = s.masked_fill((rank < first) | (rank >= last), NEVER)
        figures = {
            "inner %": 100 * l,
            "outer %": 100 * u,
            "inner threshold": inner.mean(),
            "outer threshold": outer.mean(),
        }
        figures |= false_negatives(contrast, ring, which, self.labels)
        if self.n_negatives is None:
            return ring, which, figures
        draws = (
            first
            + (
                torch.rand(*ring.shape[:-1], self.n_negatives, device=s.device) * (last - first)
            ).long()
        )
        return ring.gather(-1, draws), which.gather(-1, draws), figures  # (..., N, n_negatives)

    def forward(self, contrast, epoch):
        q, k = contrast.query, contrast.positive.mean(1)  # (N, D), (N, D)
        s, _, figures = self.negatives(contrast, similarity(contrast), epoch)  # (N, r)
        positive = (q * k).sum(1)  # (N,)
        loss = F.softplus(torch.logsumexp(s / self.t, 1) - positive / self.t).mean()
        return loss, {"K": count(s), "positive": positive.mean(), **figures}


def bounds(l, u, n):
    """The ranks where the ring of n candidates begins and where it has ended, floor(l n) and floor(u n); it is never empty."""
    if torch.is_tensor(n):
        exact = n.cpu().double() if n.is_mps else n.double()  # MPS has no float64
        last = (u * exact + 1e-9).long().clamp(min=1)  # 1e-9: 0.29 * 100 is 28.999...
        return torch.minimum((l * exact + 1e-9).long(), last - 1).to(n.device), last.to(n.device)
    last = max(int(u * n + 1e-9), 1)
    return min(int(l * n + 1e-9), last - 1), last
