"""InfoNCE (van den Oord et al., 2018), plain: the baseline of all four papers.

    L = mean_i -log( e^{q k / t} / (e^{q k / t} + sum_j e^{q n_j / t}) )
      = mean_i log(1 + e^{logsumexp_j(q n_j / t) - q k / t})

k is the query's positive (of several, their mean), n_j its negatives, t the temperature. log(K + 1) when all similarities are equal.

SupContrast's code trains on t / base_temperature times this loss; `base_temperature` does so too.
"""

import torch
from torch import nn
from torch.nn import functional as F

from engine.distributed import say

from . import count, false_negatives, similarity, unchosen
from .partition import log_partition


class NCE(nn.Module):
    """temperature: t. n_negatives: that many uniform draws from the candidates, with replacement, anew for each query (instance
    discrimination: 4095); null: every candidate (MoCo). base_temperature: see loss_scale.
    """

    def __init__(
        self,
        labels=None,
        n_data=None,
        *,
        temperature: float = 0.07,
        n_negatives: int | None = None,
        base_temperature: float | None = None,
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        if n_negatives is not None and n_negatives < 1:
            raise ValueError(f"n_negatives is {n_negatives}; it must be above 0, or null for all")
        more_than_there_are(n_negatives, n_data)
        self.t, self.n_negatives = temperature, n_negatives
        self.scale = loss_scale(temperature, base_temperature)
        self.register_buffer("labels", labels, persistent=False)

    def negatives(self, contrast, s, epoch):
        """All that may serve, or draws from them."""
        which = (
            None if self.n_negatives is None else draw(contrast, self.n_negatives, s)
        )  # (..., N, n_negatives)
        s = s if which is None else s.gather(-1, which)
        return s, which, false_negatives(contrast, s, which, self.labels)

    def forward(self, contrast, epoch):
        q, k = contrast.query, contrast.positive.mean(1)  # (N, D), (N, D)
        positive = (q * k).sum(1)  # (N,)
        if self.n_negatives is None:
            s, Z = (
                unchosen(contrast),
                log_partition(contrast, self.t),
            )  # as below, without forming s: (32, K), (N,)
            figures = false_negatives(contrast, s, None, self.labels)
        else:
            s, _, figures = self.negatives(
                contrast, similarity(contrast), epoch
            )  # (N, n_negatives)
            Z = torch.logsumexp(s / self.t, 1)  # (N,)
        loss = self.scale * F.softplus(Z - positive / self.t).mean()
        return loss, {"K": count(s), "positive": positive.mean(), **figures}


def loss_scale(temperature, base_temperature):
    """SupContrast's factor of the loss: temperature / base_temperature. 1 where that is None.

    With SGD it is a factor of the learning rate and, inversely, of the weight decay: 0.5 and 0.07
    turn lr 0.5 into 3.57. ValueError if base_temperature is not above 0.
    """
    if base_temperature is None:
        return 1.0
    if base_temperature <= 0:
        raise ValueError(
            f"base_temperature is {base_temperature}; it must be above 0, or null for "
            "the plain loss"
        )
    return temperature / base_temperature


def more_than_there_are(n_negatives, n_data):
    if n_negatives and n_data and n_negatives > n_data:
        say(
            f"n_negatives {n_negatives} is larger than the data set of {n_data} images, so that each is drawn several times; lower it, or make it null for all"
        )


def draw(contrast, n, s):
    """(..., N, n) uniform draws, with replacement, from the candidates that may serve each query; s: (..., N, K), which says so too."""
    K = s.shape[-1]
    if contrast.mask is None:
        draws = torch.randint(K - (contrast.own is not None), (*s.shape[:-1], n), device=s.device)
        return (
            draws if contrast.own is None else draws + (draws >= contrast.own[:, None])
        )  # step over the own one
    place = contrast.mask.cumsum(
        -1, dtype=torch.int32
    )  # (..., N, K): candidate j is a query's place[j]-th
    exact = torch.float32 if s.is_mps else torch.float64  # MPS has no float64
    turn = (torch.rand(*s.shape[:-1], n, device=s.device, dtype=exact) * place[..., -1:]).int() + 1
    return torch.searchsorted(place, turn).clamp(max=K - 1)  # none allowed: any, and all are NEVER
