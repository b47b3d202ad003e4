"""MoCHi: hard negative mixing (Kalantidis, Sariyildiz, Pion, Weinzaepfel, Larlus; NeurIPS 2020).

arXiv 2010.01028. InfoNCE with synthetic negatives added. Q is the set of the `hardest` candidates,
those nearest to q. Each query gets, anew at every step,

    `mixed`        points  h  = (a n_i + (1 - a) n_j) / |.|   n_i, n_j in Q, i != j, a ~ U(0, 1)
    `query_mixed`  points  h' = (b q   + (1 - b) n_j) / |.|   n_j in Q,              b ~ U(0, 0.5)

    L = mean_i -log( e^{q k / t} / (e^{q k / t} + sum_j e^{q n_j / t}
                                                + sum_h e^{q h / t} + sum_h' e^{q h' / t}) )

The paper's N, s and s' are `hardest`, `mixed` and `query_mixed`, as N is the number of queries
here, and s a similarity. h and h' are constants: only the outer q carries a gradient. So nothing
but their similarities to q is needed, and no point is built:

    q h  = (a q n_i + (1 - a) q n_j) / |a n_i + (1 - a) n_j|
    q h' = (b q q   + (1 - b) q n_j) / |b q   + (1 - b) n_j|

Nothing leaves the candidates, and nothing synthetic enters the queue.

Not settled by the paper: that i and j are uniform and independent of one another but for i != j.
A query with fewer than `hardest` candidates mixes those that it has.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import (
    NEG_INF,
    Contrast,
    Figures,
    Negatives,
    Output,
    info_nce,
    positive_similarity,
    same_class,
    similarity,
    valid_candidates,
)
from .checks import check_mochi, check_oracle
from .diagnostics import percentage
from .partition import log_partition

# The least squared length of a mixed point, which is divided by its length.
EPS = 1e-12


class Mixed(NamedTuple):
    """Synthetic negatives, and the candidates that they were mixed of."""

    h: Tensor  # (..., N, mixed)        q h
    h_query: Tensor  # (..., N, query_mixed)  q h'
    i: Tensor  # (..., N, mixed)        candidates of h
    j: Tensor  # (..., N, mixed)
    j_query: Tensor  # (..., N, query_mixed)  the candidate of h'

    @property
    def similarity(self) -> Tensor:
        """Their similarities to the queries (..., N, mixed + query_mixed)."""
        return torch.cat([self.h, self.h_query], -1)


class MoCHi(nn.Module):
    """InfoNCE with negatives mixed of the hardest.

    Args:
        labels: (n_data,) true labels, for the oracle alone.
        epochs: the length of training; None if it is not known.
        temperature: t.
        hardest: candidates of which points are mixed, the paper's N.
        mixed: points h, the paper's s.
        query_mixed: points h', the paper's s'.
        warmup_epochs: so many without mixing; None is a twentieth of training, rounded up (the
            paper: 10 of 200 epochs on ImageNet-100, which is that share, and 15 on ImageNet-1K,
            whatever the epochs).
        oracle: the paper's analysis: candidates of the query's own class are left out, by their
            true labels.
    """

    def __init__(
        self,
        labels: Tensor | None = None,
        epochs: int | None = None,
        *,
        temperature: float = 0.2,
        hardest: int = 1024,
        mixed: int = 1024,
        query_mixed: int = 128,
        warmup_epochs: float | None = None,
        oracle: bool = False,
    ):
        super().__init__()
        if warmup_epochs is None:
            warmup_epochs = default_warmup(epochs)
        check_mochi(temperature, hardest, mixed, query_mixed, warmup_epochs, epochs)
        if oracle:
            check_oracle(labels)
        self.t = temperature
        self.hardest = hardest
        self.mixed = mixed
        self.query_mixed = query_mixed
        self.warmup_epochs = warmup_epochs
        self.oracle = oracle
        self.register_buffer("labels", labels if oracle else None, persistent=False)

    def select(self, contrast: Contrast, s: Tensor, epoch: float) -> Negatives:
        """Return all candidates, or with the oracle those of other classes. s: (..., N, K)."""
        if not self.oracle:
            return Negatives(s)
        return Negatives(s.masked_fill(same_class(contrast, self.labels), NEG_INF))

    def synthesize(self, contrast: Contrast, s: Tensor, epoch: float) -> Mixed | None:
        """Return points mixed of the largest s (..., N, K), or None during the warm-up."""
        return self.mix(contrast, s) if self.is_mixing(epoch) else None

    def forward(self, contrast: Contrast, epoch: float) -> Output:
        """Return the loss, and the points that were mixed."""
        if self.oracle:
            contrast = self.without_own_class(contrast)
        log_z = log_partition(contrast, self.t)  # (N,)
        mixed = None
        if self.is_mixing(epoch):
            mixed = self.mix(contrast, similarity(contrast))
            log_z_mixed = torch.logsumexp(mixed.similarity / self.t, 1)  # (N,)
            log_z = torch.logaddexp(log_z, log_z_mixed)  # (N,)
        loss = info_nce(positive_similarity(contrast), log_z, self.t)
        return Output(loss, synthetic=mixed)

    def is_mixing(self, epoch: float) -> bool:
        """Say whether points are mixed at this epoch."""
        return epoch >= self.warmup_epochs and self.mixed + self.query_mixed > 0

    def without_own_class(self, contrast: Contrast) -> Contrast:
        """Return the contrast without the candidates of each query's class."""
        is_other = valid_candidates(contrast) & ~same_class(contrast, self.labels)
        return contrast._replace(mask=is_other, self_index=None)

    def mix(self, contrast: Contrast, s: Tensor) -> Mixed:
        """Mix points of the candidates with the largest s (..., N, K)."""
        q, n = contrast.query, contrast.negative.detach()  # (N, D), (K, D)
        if contrast.negative.requires_grad:
            # SimCLR's candidates have a gradient as negatives, and none as parts of points.
            s = torch.where(s > NEG_INF, q @ n.T, NEG_INF)
        nearest, candidate = s.topk(min(self.hardest, s.shape[-1]))  # (..., N, hardest)
        n_valid = (nearest > NEG_INF).sum(-1, keepdim=True)  # (..., N, 1)
        i, j, j_query, a, b = self.draw_points(n_valid.clamp(min=1))

        q_i, q_j, q_j_query = (nearest.gather(-1, rank) for rank in (i, j, j_query))
        i, j, j_query = (candidate.gather(-1, rank) for rank in (i, j, j_query))
        q_q = (q * q.detach()).sum(1)[:, None]  # (N, 1)  the q of h' is constant
        n_n = (n * n).sum(1)  # (K,)  1, unless n is a mean of keys
        h_length = mixed_length(a, n_n[i], n_n[j], dot_products(n, i, j))
        h_query_length = mixed_length(b, q_q, n_n[j_query], q_j_query.clamp(min=-1))
        h = (a * q_i + (1 - a) * q_j) / h_length  # (..., N, mixed)
        h_query = (b * q_q + (1 - b) * q_j_query) / h_query_length  # (..., N, query_mixed)

        is_empty = nearest[..., :1] <= NEG_INF  # (..., N, 1)  no candidates: nothing to mix
        h, h_query = h.masked_fill(is_empty, NEG_INF), h_query.masked_fill(is_empty, NEG_INF)
        return Mixed(h, h_query, i, j, j_query)

    def draw_points(self, size: Tensor) -> tuple[Tensor, ...]:
        """Draw what is mixed, of the `size` (..., N, 1) members that each query's Q has.

        Returns:
            i and j of h (..., N, mixed) and j of h' (..., N, query_mixed), as ranks within Q, and
            the weights a and b.
        """
        i = draw_below(size, self.mixed)
        j_query = draw_below(size, self.query_mixed)
        j = (i + 1 + draw_below(size - 1, self.mixed)) % size  # any but i
        a = torch.rand(i.shape, device=i.device)
        b = torch.rand(j_query.shape, device=i.device) / 2
        return i, j, j_query, a, b

    def diagnostics(
        self, contrast: Contrast, output: Output, labels: Tensor | None, epoch: float
    ) -> Figures:
        """Answer the paper's questions: how hard are the mixed points, and how many are false?

        A point is false if it is made of candidates of the query's class alone (and the query).
        """
        figures = {"oracle": float(self.oracle)}
        mixed = output.synthetic
        if mixed is None:
            return figures
        s = output.negatives.similarity  # (..., N, K)
        nearest = s.topk(min(self.hardest, s.shape[-1])).values  # (..., N, hardest)
        log_z = torch.logsumexp(s / self.t, -1)  # (..., N)
        log_z_mixed = torch.logsumexp(mixed.similarity / self.t, -1)  # (..., N)
        figures |= {
            "hardest": mean_of_valid(nearest[..., 0]),
            "nearest N": mean_of_valid(nearest),
            "mixed": mean_of_valid(mixed.h),
            "query mixed": mean_of_valid(mixed.h_query),
            "mixed share of partition %": 100 * torch.sigmoid(log_z_mixed - log_z).mean(),
        }
        if labels is not None:
            is_false = same_class(contrast, labels).expand_as(s)  # (..., N, K)
            h_is_false = is_false.gather(-1, mixed.i) & is_false.gather(-1, mixed.j)
            h_query_is_false = is_false.gather(-1, mixed.j_query)
            figures["false mixed %"] = percentage(h_is_false)
            figures["false query mixed %"] = percentage(h_query_is_false)
        return figures


def default_warmup(epochs: int | None) -> int:
    """Return a twentieth of training in whole epochs, rounded up, but never all of it.

    It is 0 if the length of training is not known.
    """
    return 0 if epochs is None else min(-(-epochs // 20), epochs - 1)


def draw_below(size: Tensor, n: int) -> Tensor:
    """Draw n whole numbers from 0 to size - 1, uniformly: size (..., N, 1) -> (..., N, n)."""
    return (torch.rand(*size.shape[:-1], n, device=size.device) * size).long()


@torch.no_grad()
def mixed_length(a: Tensor, u_u: Tensor, v_v: Tensor, u_v: Tensor) -> Tensor:
    """Return |a u + (1 - a) v| by the dot products of u and v, without building the point."""
    square = a**2 * u_u + (1 - a) ** 2 * v_v + 2 * a * (1 - a) * u_v
    return square.clamp(min=EPS).sqrt()


@torch.no_grad()
def dot_products(n: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return n_i n_j for n (K, D), i and j (..., N, m).

    A few queries are taken at a time: all n_i would be (N, m, D).
    """
    parts = zip(i.flatten(0, -2).split(4), j.flatten(0, -2).split(4))
    products = [(F.embedding(a, n) * F.embedding(b, n)).sum(-1) for a, b in parts]
    return torch.cat(products).view(i.shape)


def mean_of_valid(s: Tensor) -> Tensor:
    """Return the mean of the similarities that are not NEG_INF."""
    is_valid = s > NEG_INF
    return s.masked_fill(~is_valid, 0).sum() / is_valid.sum().clamp(min=1)
