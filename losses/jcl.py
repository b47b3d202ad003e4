"""JCL: joint contrastive learning with infinitely many positives (Cai, Wang, Pan, Yao, Mei; NeurIPS 2020; arXiv 2009.14776).

A query's M keys are taken as draws from a Gaussian N(mu, Sigma), and the expected InfoNCE over all its keys is bounded in closed form (Eq. 8):

    L = mean_i [ log( e^{q mu / t + l / (2 t^2) q' Sigma q} + sum_j e^{q n_j / t} ) - q mu / t ]

    mu = mean_m k_m (not made unit length),   Sigma = 1/M sum_m (k_m - mu)(k_m - mu)',   so   q' Sigma q = Var_m(q k_m)

and no D x D matrix is needed. q carries the gradient in both places, keys none (but where a host lets keys carry one: SimCLR). l = 1 is
the bound; l = 0 is InfoNCE on the mean key. The paper takes M = 5, l = 4; its script 4 keys and l = 2. The script ramps l up linearly,
l (epoch + 1) / epochs, of which the paper says nothing: `ramp`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from . import count, false_negatives, unchosen
from .partition import log_partition


class JCL(nn.Module):
    """temperature: t. lam: l. ramp: l grows from l / epochs to l. average: the control, the mean of M InfoNCE losses at equal forward passes.

    M is the host's to give: model.n_views.
    """

    def __init__(
        self,
        epochs,
        n_keys=None,
        labels=None,
        *,
        temperature: float = 0.2,
        lam: float = 4.0,
        ramp: bool = True,
        average: bool = False,
    ):
        super().__init__()
        if temperature <= 0 or lam < 0:
            raise ValueError(f"temperature {temperature} must be above 0 and lam {lam} at least 0")
        if n_keys == 1:
            raise ValueError(
                "jcl wants several keys of each image, and this host with its model.n_views gives one, which has no variance; raise model.n_views"
            )
        self.epochs, self.t, self.lam, self.ramp, self.average = (
            epochs,
            temperature,
            lam,
            ramp,
            average,
        )
        self.register_buffer("labels", labels, persistent=False)

    def objective(self, contrast, s, epoch):
        """s: (..., N, K)."""
        return self.bound(contrast, torch.logsumexp(s / self.t, -1), epoch)

    def bound(self, contrast, Z, epoch):
        """Z: (..., N), the log of the sum over the negatives."""
        q, k = contrast.query, contrast.positive  # (N, D), (N, M, D)
        mu = k.mean(1)  # (N, D)
        mean = (q * mu).sum(1)  # (N,)  q mu
        variance = ((q[:, None] * (k - mu[:, None])).sum(2) ** 2).mean(
            1
        )  # (N,)  q' Sigma q = Var_m(q k_m)
        lam = self.lam * (int(epoch) + 1) / self.epochs if self.ramp else self.lam
        if self.average:
            p = (q[:, None] * k).sum(2)  # (N, M)  q k_m
            loss = F.softplus(Z[..., None] - p / self.t).mean()
        else:
            bonus = lam / (2 * self.t**2) * variance  # (N,)
            loss = (bonus + F.softplus(Z - mean / self.t - bonus)).mean()
        return loss, {"positive": mean.mean(), "Var(q k)": variance.mean(), "lambda": lam}

    def forward(self, contrast, epoch):
        s = unchosen(contrast)  # (32, K), for the log
        loss, figures = self.bound(contrast, log_partition(contrast, self.t), epoch)
        return loss, {"K": count(s), **figures, **false_negatives(contrast, s, None, self.labels)}
