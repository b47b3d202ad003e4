"""IFND: incremental false negative detection (Chen, Hung, Tseng, Chien, Yang; ICLR 2022; arXiv 2106.03719).

k-means on the embeddings of the whole data set, with several numbers of clusters at once (the levels), gives each image a pseudo label a
level. Only the most confident are accepted; the share accepted rises from 0 to 100 % over training. F(q): the candidates whose accepted
label is the query's accepted label. They are false negatives, and (a mean over the levels)

    eliminate (the default, the more stable):   L = -log( e^{q k / t} / (e^{q k / t} + sum_{j not in F(q)} e^{q n_j / t}) )
    attract:     L = -1 / (1 + |F(q)|) sum_{p in {k} and F(q)} log( e^{q p / t} / (e^{q k / t} + sum_j e^{q n_j / t}) )

Labels are looked up by data-set index, so an old key in the queue has its image's newest label. Not settled by what we have of the paper:
the mean over the levels; SupCon's outer form for `attract`; confidence = softmax_c(sim(z_i, c) / t) at the own centroid; the first
clustering after `reassign_every` epochs, not at the start.
"""
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from engine import distributed
from engine.distributed import say
from engine.kmeans import confidence, kmeans, validity

from . import NEVER, count, false_negatives, similarity, unchosen
from .nce import loss_scale
from .partition import log_partition


class IFND(nn.Module):
    """temperature: t. clusters: k of each level. reassign_every: epochs between clusterings (CIFAR: 20; ImageNet: 1). confidence: `softmax`,
    as above, or `similarity` to the own centroid. acceptance: the share accepted in the first and in
    the last epoch, linear between. base_temperature: SupContrast's factor, see losses/nce.py."""

    def __init__(self, epochs, n_data, labels=None, *, temperature: float = 0.5, clusters: list[int] = [10, 30, 100], reassign_every: int = 20,
                 mode: Literal["eliminate", "attract"] = "eliminate", confidence: Literal["softmax", "similarity"] = "softmax",
                 acceptance: list[float] = [0.0, 1.0], base_temperature: float | None = None):
        super().__init__()
        if temperature <= 0 or reassign_every < 1:
            raise ValueError(f"temperature {temperature} must be above 0 and reassign_every {reassign_every} at least 1")
        if not clusters or not 1 <= min(clusters) <= max(clusters) <= n_data:
            raise ValueError(f"clusters {clusters} must be one number a level, each from 1 to the {n_data} images there are")
        if len(acceptance) != 2 or not 0 <= acceptance[0] <= acceptance[1] <= 1:
            raise ValueError(f"acceptance {acceptance} must be two shares, of the first epoch and, not below it, of the last")
        if 1 in clusters:
            say(f"clusters {clusters} has a level of 1, whose one cluster leaves no negatives once all labels are accepted; take 2 or more")
        if reassign_every >= epochs:
            say(f"reassign_every {reassign_every} leaves no clustering before the end, epochs {epochs}: no false negative is found, and ifnd is nce; lower it")
        self.epochs, self.t, self.clusters, self.reassign_every = epochs, temperature, clusters, reassign_every
        self.confidence, self.acceptance = confidence, acceptance
        self.scale = loss_scale(temperature, base_temperature)
        if mode == "attract":
            self.objective = self.attract
        else:
            self.negatives = self.eliminate
        self.register_buffer("labels", labels, persistent=False)                       # (n,) the true ones: for the log alone
        self.register_buffer("pseudo", torch.full((len(clusters), n_data), -1))        # (L, n) pseudo labels, -1 before the first clustering
        self.register_buffer("rank", torch.full((len(clusters), n_data), n_data))      # (L, n) from 1, the most confident image, to n
        self.validity = {}

    def accepted(self, epoch):
        """The share r of images whose label is accepted."""
        first, last = self.acceptance
        return first + (last - first) * min(1, int(epoch) / max(1, self.epochs - 1))

    def accepted_labels(self, index, epoch, none):
        """(n,) data-set indices -> (L, n) pseudo labels, `none` where not accepted or no image."""
        known = (self.rank[:, index] <= self.accepted(epoch) * self.rank.shape[1] + 1e-9) & (index >= 0) & (self.pseudo[:, index] >= 0)
        return torch.where(known, self.pseudo[:, index], none)

    @torch.no_grad()
    def before_epoch(self, epoch, extract):
        """extract() -> (n, D): unit embeddings of all images, without augmentation, by the momentum encoder where there is one. extract: None
        where a run goes on within an epoch, whose labels its checkpoint has brought."""
        if extract is not None and epoch and epoch % self.reassign_every == 0:
            z = extract()
            for level, k in enumerate(self.clusters):
                centroids, self.pseudo[level] = kmeans(z, k, seed=(epoch, level))      # (k, D), (n,)
                best = confidence(z, F.normalize(centroids, dim=1), self.pseudo[level], self.t, self.confidence).argsort(descending=True, stable=True)
                self.rank[level, best] = torch.arange(1, len(z) + 1, device=z.device)
            distributed.broadcast(self.rank)               # clusters already are the same everywhere
        self.validity = {"accepted %": 100 * self.accepted(epoch)}
        if self.labels is not None and (self.pseudo >= 0).all():
            everyone = self.accepted_labels(torch.arange(self.rank.shape[1], device=self.rank.device), epoch, -1)         # (L, n)
            for k, mine, all_of_them in zip(self.clusters, everyone, self.pseudo):
                self.validity |= {f"{name}, k={k}": value for name, value in validity(mine, all_of_them, self.labels).items()}

    def labels_of(self, contrast, epoch, queries=None):
        """Accepted labels of the (first so many) queries (L, N) and of the candidates (L, K); two of them are equal only where both are accepted."""
        return self.accepted_labels(contrast.index[:queries], epoch, -1), self.accepted_labels(contrast.negative_index, epoch, -2)

    def false(self, contrast, epoch, queries=None):
        """F(q): (L, N, K) bool."""
        mine, theirs = self.labels_of(contrast, epoch, queries)
        return mine[:, :, None] == theirs[:, None, :]

    def eliminate(self, contrast, s, epoch):
        """s: (N, K) -> (L, N, K)."""
        s = s.masked_fill(self.false(contrast, epoch, len(s)), NEVER)
        figures = false_negatives(contrast, s, None, self.labels)
        return s, None, {**self.validity, "removed %": 100 - figures["used %"], **figures}

    def attract(self, contrast, s, epoch):
        """s: (..., N, K + anything that is no candidate)."""
        q, k = contrast.query, contrast.positive.mean(1)                               # (N, D), (N, D)
        positive = (q * k).sum(1)                                                      # (N,)
        candidates = s[..., :len(contrast.negative)]                                   # (..., N, K)
        friends = self.false(contrast, epoch) & (candidates > NEVER)                   # (L, N, K)
        among = candidates.masked_fill(~friends, 0).sum(-1)                            # (L, N)  sum over F of q n_j
        Z = torch.logaddexp(torch.logsumexp(s / self.t, -1), positive / self.t)        # (..., N)
        loss = (Z - (positive + among) / self.t / (1 + friends.sum(-1))).mean()
        return loss, {"positive": positive.mean(), **self.validity, "attracted %": 100 * friends.float().mean()}

    def forward(self, contrast, epoch):
        if hasattr(self, "objective"):
            s = similarity(contrast)                                                   # (N, K)
            loss, figures = self.attract(contrast, s, epoch)
            return self.scale * loss, {"K": count(s), **figures}
        q, k = contrast.query, contrast.positive.mean(1)                               # (N, D), (N, D)
        positive = (q * k).sum(1)                                                      # (N,)
        Z = log_partition(contrast, self.t, *self.labels_of(contrast, epoch))          # (L, N)  as from eliminate's s, of all queries
        s, _, figures = self.eliminate(contrast, unchosen(contrast), epoch)            # (L, 32, K), for the log
        loss = F.softplus(Z - positive / self.t).mean()
        return self.scale * loss, {"K": count(s), "positive": positive.mean(), **figures}
