"""MoCHi: hard negative mixing (Kalantidis, Sariyildiz, Pion, Weinzaepfel, Larlus; NeurIPS 2020; arXiv 2010.01028).

Plain InfoNCE with synthetic negatives added. Q_N: the N candidates nearest to q. Each query gets, fresh every step,

    s  points  h  = (a n_i + (1 - a) n_j) / |.|,   n_i, n_j in Q_N, i != j, a ~ U(0, 1)
    s' points  h' = (b q   + (1 - b) n_j) / |.|,   n_j in Q_N,               b ~ U(0, 0.5)

    L = mean_i -log( e^{q k / t} / (e^{q k / t} + sum_j e^{q n_j / t} + sum_h e^{q h / t} + sum_h' e^{q h' / t}) )

h and h' are constants: only the outer q carries a gradient. So nothing but their similarities to q is needed, and no point is built:

    q h  = (a s_i + (1 - a) s_j) / |a n_i + (1 - a) n_j|,      s_j = q n_j
    q h' = (b q q + (1 - b) s_j) / |b q + (1 - b) n_j|

Nothing leaves the candidates, nothing synthetic enters the queue. Not settled by the paper: that i and j are uniform and independent of one
another but for i != j. A query with fewer than N candidates mixes those that it has.
"""

import torch
from torch import nn
from torch.nn import functional as F

from engine.distributed import say

from . import NEVER, count, false_negatives, of_one_class, serves, similarity, unchosen
from .partition import log_partition


class MoCHi(nn.Module):
    """temperature: t. hardest, mixed, query_mixed: the paper's (N, s, s').
    warmup_epochs: so many without mixing; null is a twentieth of training, rounded up (the paper: 10 of
    200 epochs on ImageNet-100, which is that share, and 15 on ImageNet-1K, whatever the epochs).
    oracle: candidates of the query's own class are left out by their TRUE labels, the paper's analysis.
    """

    def __init__(
        self,
        labels=None,
        epochs=None,
        *,
        temperature: float = 0.2,
        hardest: int = 1024,
        mixed: int = 1024,
        query_mixed: int = 128,
        warmup_epochs: float | None = None,
        oracle: bool = False,
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        if hardest < 2 or mixed < 0 or query_mixed < 0:
            raise ValueError(
                f"hardest {hardest} must be at least 2, mixed {mixed} and query_mixed {query_mixed} at least 0"
            )
        if warmup_epochs is None:
            warmup_epochs = default_warmup(epochs)
        if warmup_epochs < 0:
            raise ValueError(
                f"warmup_epochs is {warmup_epochs}; it must be at least 0, or null for a twentieth of training"
            )
        if epochs is not None and warmup_epochs >= epochs:
            say(
                f"warmup_epochs {warmup_epochs:g} of mochi leaves nothing of epochs {epochs}: no negatives are mixed, and it is nce; lower it"
            )
        elif epochs is not None and warmup_epochs > 0 and mixed + query_mixed > 0:
            say(
                f"mochi mixes from epoch {int(warmup_epochs) + 1} of {epochs} on; until then it is nce (loss.warmup_epochs)"
            )
        if oracle and labels is None:
            raise ValueError("oracle wants the true labels, and this data set has none")
        if oracle:
            say(
                "ORACLE: mochi leaves out negatives by their true labels. This is an analysis, not self-supervised learning."
            )
        self.t, self.N, self.s, self.s_q, self.warmup, self.oracle = (
            temperature,
            hardest,
            mixed,
            query_mixed,
            warmup_epochs,
            oracle,
        )
        self.register_buffer("labels", labels, persistent=False)

    def negatives(self, contrast, s, epoch):
        """s: (..., N, K) -> (..., N, K + s + s')."""
        if self.oracle:
            s = s.masked_fill(of_one_class(contrast, self.labels, None), NEVER)
        figures = false_negatives(contrast, s, None, self.labels) | {"oracle": float(self.oracle)}
        if epoch < self.warmup or self.s + self.s_q == 0:
            return s, None, figures
        h, h_q, more = self.mix(contrast, s)
        return torch.cat([s, h, h_q], -1), None, figures | more

    def draw(self, size):
        """size: (..., N, 1), of each query's Q_N. -> which of Q_N: i and other (..., N, s), j (..., N, s'); a and b."""
        pick = lambda points, below: (
            torch.rand(*size.shape[:-1], points, device=size.device) * below
        ).long()
        i, j = pick(self.s, size), pick(self.s_q, size)
        other = (i + 1 + pick(self.s, size - 1)) % size  # any but i
        return (
            i,
            other,
            j,
            torch.rand(i.shape, device=i.device),
            torch.rand(j.shape, device=j.device) / 2,
        )

    def mix(self, contrast, s):
        """-> q h (..., N, s), q h' (..., N, s'), and figures."""
        q, n = contrast.query, contrast.negative.detach()  # (N, D), (K, D)
        if contrast.negative.requires_grad:  # SimCLR's do; in h they do not
            s = torch.where(s > NEVER, q @ n.T, NEVER)
        near, which = s.topk(min(self.N, s.shape[-1]))  # (..., N, N)  Q_N, nearest first
        i, other, j, a, b = self.draw((near > NEVER).sum(-1, keepdim=True).clamp(min=1))
        s_i, s_other, s_j = (
            near.gather(-1, x) for x in (i, other, j)
        )  # (..., N, s) twice, (..., N, s')
        i, other, j = (which.gather(-1, x) for x in (i, other, j))  # now among all K
        own = (q * q.detach()).sum(1)[:, None]  # (N, 1)  q q, one side of it held constant
        with torch.no_grad():
            square = (n * n).sum(1)  # (K,)  |n|^2: 1, unless n is a mean of keys
            length = (
                (
                    a**2 * square[i]
                    + (1 - a) ** 2 * square[other]
                    + 2 * a * (1 - a) * dots(n, i, other)
                )
                .clamp(min=1e-12)
                .sqrt()
            )
            length_q = (
                (b**2 * own + (1 - b) ** 2 * square[j] + 2 * b * (1 - b) * s_j.clamp(min=-1))
                .clamp(min=1e-12)
                .sqrt()
            )
        h = (a * s_i + (1 - a) * s_other) / length
        h_q = (b * own + (1 - b) * s_j) / length_q
        h, h_q = (
            x.masked_fill(near[..., :1] <= NEVER, NEVER) for x in (h, h_q)
        )  # no candidates: nothing to mix
        return h, h_q, self.hardness(contrast, s, near, h, h_q, i, other, j)

    @torch.no_grad()
    def hardness(self, contrast, s, near, h, h_q, i, other, j):
        """For the log, the paper's questions: how hard are the mixed points beside the real ones, and how many are false, that is, made only
        of candidates of the query's class (and of the query)?
        """
        mean = lambda x: x.masked_fill(x <= NEVER, 0).sum() / (x > NEVER).sum().clamp(min=1)
        mass = torch.stack(
            [torch.logsumexp(x[..., :32, :] / self.t, -1) for x in (s, torch.cat([h, h_q], -1))]
        )  # (2, ..., 32)
        figures = {
            "hardest": mean(near[..., 0]),
            "nearest N": mean(near),
            "mixed": mean(h),
            "query mixed": mean(h_q),
            "mixed share of partition %": 100 * mass.softmax(0)[1].mean(),
        }
        if self.labels is not None:
            label = torch.where(
                contrast.negative_index >= 0, self.labels[contrast.negative_index], -1
            )  # (K,)
            own = self.labels[contrast.index][:, None]  # (N, 1)
            share = lambda false: 100 * false.float().mean() if false.numel() else 0.0
            figures |= {
                "false mixed %": share((label[i] == own) & (label[other] == own)),
                "false query mixed %": share(label[j] == own),
            }
        return figures

    def forward(self, contrast, epoch):
        """`negatives` and InfoNCE on them, but that the (N, K + s + s') of them are never side by side."""
        q, k = contrast.query, contrast.positive.mean(1)  # (N, D), (N, D)
        real = (
            contrast
            if not self.oracle
            else contrast._replace(
                mask=serves(contrast) & ~of_one_class(contrast, self.labels, None), own=None
            )
        )
        s, Z = unchosen(real), log_partition(real, self.t)  # (32, K) for the log, (N,)
        figures = false_negatives(contrast, s, None, self.labels) | {"oracle": float(self.oracle)}
        if epoch >= self.warmup and self.s + self.s_q > 0:
            h, h_q, more = self.mix(real, similarity(real))  # (N, s), (N, s')
            mixed = torch.cat([h, h_q], 1)
            s, Z, figures = (
                torch.cat([s, mixed[:32]], 1),
                torch.logaddexp(Z, torch.logsumexp(mixed / self.t, 1)),
                figures | more,
            )
        positive = (q * k).sum(1)  # (N,)
        loss = F.softplus(Z - positive / self.t).mean()
        return loss, {"K": count(s), "positive": positive.mean(), **figures}


def default_warmup(epochs):
    """A twentieth of training in whole epochs, rounded up, but never all of it; 0 if its length is not known."""
    return 0 if epochs is None else min(-(-epochs // 20), epochs - 1)


@torch.no_grad()
def dots(n, i, j):
    """n_i n_j for n: (K, D), i and j: (..., N, s). A few queries at a time: all n_i would be (N, s, D)."""
    shape, i, j = i.shape, i.flatten(0, -2), j.flatten(0, -2)
    return torch.cat(
        [(F.embedding(a, n) * F.embedding(b, n)).sum(-1) for a, b in zip(i.split(4), j.split(4))]
    ).view(shape)
