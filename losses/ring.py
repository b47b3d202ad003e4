"""Ring: conditional negative sampling (Wu, Mosse, Zhuang, Yamins, Goodman; ICLR 2021).

arXiv 2010.02037. InfoNCE, whose negatives come from a ring around the query: of the n candidates,
ranked by similarity to q, nearest first, those from rank floor(l n) to rank floor(u n). What lies
nearer is too hard and likely of the query's own class; what lies farther is too easy.

    L = mean_i -log( e^{q k / t} / (e^{q k / t} + sum_{j in ring(q)} e^{q n_j / t}) )

n_j carries no gradient. u falls linearly from 100 % to `outer` over `anneal_epochs`.

Not settled by the paper: how long u falls (here: a third of training), and whether l stays (here)
or keeps its proportion to u, as in the released code (`inner_relative`). Its ball is `inner: 0`.
"""

import torch
from torch import Tensor, nn

from .base import (
    NEG_INF,
    Contrast,
    Figures,
    Negatives,
    Output,
    info_nce,
    positive_similarity,
    similarity,
)
from .checks import check_ring
from .ranks import EPS, bounds_of_each, ring_of_each


class Ring(nn.Module):
    """InfoNCE on the candidates that are neither too near to the query nor too far.

    Args:
        epochs: the length of training.
        n_data: the number of images, for a warning alone.
        temperature: t.
        inner: l, as a share of the candidates.
        outer: u at the end of its fall, as a share.
        anneal_epochs: epochs over which u falls; None: a third of training; 0: a constant ring.
        inner_relative: whether l keeps its proportion to u while this falls.
        n_negatives: that many uniform draws from the ring, with replacement (IR: 4095); None: all
            of it (MoCo, Algorithm 1).
    """

    def __init__(
        self,
        epochs: int,
        n_data: int | None = None,
        *,
        temperature: float = 0.07,
        inner: float = 0.01,
        outer: float = 0.10,
        anneal_epochs: float | None = None,
        inner_relative: bool = False,
        n_negatives: int | None = None,
    ):
        super().__init__()
        check_ring(temperature, inner, outer, anneal_epochs, n_negatives, epochs, n_data)
        self.t = temperature
        self.inner, self.outer = inner, outer
        self.anneal_epochs = epochs / 3 if anneal_epochs is None else anneal_epochs
        self.inner_relative, self.n_negatives = inner_relative, n_negatives

    def percentiles(self, epoch: float) -> tuple[float, float]:
        """Return l and u at an epoch, as shares."""
        remaining = max(0, 1 - epoch / self.anneal_epochs) if self.anneal_epochs else 0
        outer = self.outer + (1 - self.outer) * remaining
        inner = self.inner * outer / self.outer if self.inner_relative else self.inner
        return inner, outer

    def select(self, contrast: Contrast, s: Tensor, epoch: float) -> Negatives:
        """Return the ring of each query (..., N, r). s: (..., N, K), see `similarity`."""
        inner, outer = self.percentiles(epoch)
        if contrast.mask is not None:
            n = contrast.mask.sum(-1, keepdim=True)  # (..., N, 1)
            return ring_of_each(s, *bounds_of_each(inner, outer, n), outer)
        n = s.shape[-1] - (contrast.self_index is not None)
        return ring_of_all(s, *bounds(inner, outer, n))

    def draw(self, ring: Negatives) -> Negatives:
        """Return n_negatives uniform draws from the ring, or all of it."""
        if self.n_negatives is None:
            return ring
        is_valid = ring.similarity > NEG_INF  # (..., N, r)  these stand side by side
        first = is_valid.int().argmax(-1, keepdim=True)  # (..., N, 1)
        size = is_valid.sum(-1, keepdim=True).clamp(min=1)  # (..., N, 1)
        u = torch.rand(*size.shape[:-1], self.n_negatives, device=size.device)
        column = first + (u * size).long()  # (..., N, n_negatives)
        return Negatives(ring.similarity.gather(-1, column), ring.candidate.gather(-1, column))

    def forward(self, contrast: Contrast, epoch: float) -> Output:
        """Return the loss, the negatives in it, and the ring they were drawn from."""
        ring = self.select(contrast, similarity(contrast), epoch)  # (N, r)
        negatives = self.draw(ring)
        log_z = torch.logsumexp(negatives.similarity / self.t, 1)  # (N,)
        loss = info_nce(positive_similarity(contrast), log_z, self.t)
        return Output(loss, negatives, ring)

    def diagnostics(
        self, contrast: Contrast, output: Output, labels: Tensor | None, epoch: float
    ) -> Figures:
        """Return the bounds of the ring, in percent of the candidates and as similarities."""
        inner, outer = self.percentiles(epoch)
        s = output.chosen.similarity  # (..., N, r)
        nearest = s.amax(-1)  # (..., N)
        farthest = torch.where(s > NEG_INF, s, nearest[..., None]).amin(-1)  # (..., N)
        return {
            "inner %": 100 * inner,
            "outer %": 100 * outer,
            "inner threshold": nearest.mean(),
            "outer threshold": farthest.mean(),
        }


def bounds(inner: float, outer: float, n: int) -> tuple[int, int]:
    """Return the ranks where the ring of n candidates begins and has ended; it is never empty."""
    last = max(int(outer * n + EPS), 1)
    return min(int(inner * n + EPS), last - 1), last


def ring_of_all(s: Tensor, first: int, last: int) -> Negatives:
    """Return ranks first to last - 1 of s (..., N, K), in any order: nothing is sorted."""
    nearest, candidate = s.topk(last, sorted=False)  # (..., N, last)
    ring, column = nearest.topk(last - first, largest=False, sorted=False)  # (..., N, r)
    return Negatives(ring, candidate.gather(-1, column))
