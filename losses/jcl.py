"""JCL: joint contrastive learning with infinitely many positives (Cai, Wang, Pan, Yao, Mei).

NeurIPS 2020, arXiv 2009.14776. A query's M keys are taken as draws from a Gaussian N(mu, Sigma),
and the expected InfoNCE over all its keys is bounded in closed form (Eq. 8):

    L = mean_i [ log( e^{q mu / t + lambda / (2 t^2) q' Sigma q} + sum_j e^{q n_j / t} )
                 - q mu / t ]

    mu = 1/M sum_m k_m   (not made unit length)
    Sigma = 1/M sum_m (k_m - mu)(k_m - mu)'

q carries the gradient in both places, keys none (but where a host lets keys carry one: SimCLR).
lambda = 1 is the bound; lambda = 0 is InfoNCE on the mean key. The paper takes M = 5, lambda = 4;
its script 4 keys and lambda = 2. The script ramps lambda up linearly, lambda (epoch + 1) / epochs,
of which the paper says nothing: `ramp`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Contrast, Figures, Output, info_nce
from .checks import check_jcl
from .partition import log_partition


class JCL(nn.Module):
    """The bound of InfoNCE over infinitely many keys. Their number M is the host's: model.n_views.

    Args:
        epochs: the length of training.
        n_keys: M, to be checked; None if it is not known.
        temperature: t.
        lam: lambda.
        ramp: whether lambda grows linearly, from lam / epochs in the first epoch to lam.
        average: a control of ours: the mean of M InfoNCE losses, at equally many forward passes.
    """

    def __init__(
        self,
        epochs: int,
        n_keys: int | None = None,
        *,
        temperature: float = 0.2,
        lam: float = 4.0,
        ramp: bool = True,
        average: bool = False,
    ):
        super().__init__()
        check_jcl(temperature, lam, n_keys)
        self.epochs = epochs
        self.t = temperature
        self.lam = lam
        self.ramp = ramp
        self.average = average

    def lam_at(self, epoch: float) -> float:
        """Return lambda at an epoch."""
        return self.lam * (int(epoch) + 1) / self.epochs if self.ramp else self.lam

    def bound(self, contrast: Contrast, log_z: Tensor, epoch: float) -> Tensor:
        """Return the loss, for log_z (..., N), the logarithm of the sum over the negatives."""
        q = contrast.query  # (N, D)
        k = contrast.positive  # (N, M, D)
        if self.average:
            q_k = (q[:, None] * k).sum(2)  # (N, M)
            return info_nce(q_k, log_z[..., None], self.t)
        mu = k.mean(1)  # (N, D)
        q_mu = (q * mu).sum(1)  # (N,)
        spread = self.lam_at(epoch) / (2 * self.t**2) * key_variance(q, k, mu)  # (N,)
        # log(e^{a + b} + Z) - a = b + log(1 + Z e^{-a - b})
        return (spread + F.softplus(log_z - q_mu / self.t - spread)).mean()

    def objective(self, contrast: Contrast, s: Tensor, epoch: float) -> Tensor:
        """Return the loss, for the similarities s (..., N, k) of the negatives of a list."""
        return self.bound(contrast, torch.logsumexp(s / self.t, -1), epoch)

    def forward(self, contrast: Contrast, epoch: float) -> Output:
        """Return the loss on all candidates."""
        log_z = log_partition(contrast, self.t)  # (N,)
        return Output(self.bound(contrast, log_z, epoch))

    def diagnostics(
        self, contrast: Contrast, output: Output, labels: Tensor | None, epoch: float
    ) -> Figures:
        """Return the variance of the keys along their query, and lambda."""
        q, k = contrast.query, contrast.positive
        variance = key_variance(q, k, k.mean(1))  # (N,)
        return {"Var(q k)": variance.mean(), "lambda": self.lam_at(epoch)}


def key_variance(q: Tensor, k: Tensor, mu: Tensor) -> Tensor:
    """Return q' Sigma q = Var_m(q k_m) (N,), without forming Sigma (D, D).

    Args:
        q: (N, D).
        k: (N, M, D).
        mu: (N, D) its mean over M.
    """
    return ((q[:, None] * (k - mu[:, None])).sum(2) ** 2).mean(1)
