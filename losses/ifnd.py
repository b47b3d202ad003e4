"""IFND: incremental false negative detection (Chen, Hung, Tseng, Chien, Yang; ICLR 2022).

arXiv 2106.03719. k-means on the embeddings of the whole data set, with several numbers of clusters
at once (the levels), gives each image a pseudo label a level. Only the most confident are accepted;
the share accepted rises from 0 to 100 % over training. F(q): the candidates whose accepted label is
the query's accepted label. They are false negatives, and (a mean over the levels)

    eliminate (the default, the more stable):
        L = -log( e^{q k / t} / (e^{q k / t} + sum_{j not in F(q)} e^{q n_j / t}) )
    attract:
        L = -1 / (1 + |F(q)|)
            sum_{p in {k} and F(q)} log( e^{q p / t} / (e^{q k / t} + sum_j e^{q n_j / t}) )

Labels are looked up by data-set index, so an old key in the queue has its image's newest label.

Departures. k-means follows PCL's code, which calls faiss: 20 iterations, the best of 5 restarts.
faiss starts from random rows, and PCL has it train on at most 1000 rows a centroid. Ours starts
from k-means++ on a sample (`start: random` is faiss's start) and trains on all rows; see
engine/kmeans.py.

Not settled by what we have of the paper: the mean over the levels; SupCon's outer form for
`attract`; confidence = softmax_c(sim(z_i, c) / t) at the own centroid; the first clustering after
`reassign_every` epochs, not at the start.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from engine.distributed import say
from engine.kmeans import confidence, kmeans, validity

from . import NEVER, count, false_negatives, similarity, unchosen
from .nce import loss_scale
from .partition import log_partition


class IFND(nn.Module):
    """InfoNCE without, or attracted to, the false negatives that clusters find.

    Args:
        epochs, n_data: of the run; the number of images.
        labels: (n_data,) the true ones, for the log alone.
        temperature: t.
        clusters: k of each level.
        reassign_every: epochs between clusterings (CIFAR: 20; ImageNet: 1).
        mode: what becomes of false negatives, as above.
        confidence: `softmax`, as above, or `similarity` to the own centroid.
        acceptance: the share accepted in the first and in the last epoch, linear between.
        start: what k-means starts from: `kmeans++`, on a sample, or `random` rows, as faiss.
        base_temperature: SupContrast's factor of the loss, see losses/nce.py.
    """

    def __init__(
        self,
        epochs,
        n_data,
        labels=None,
        *,
        temperature: float = 0.5,
        clusters: list[int] = [10, 30, 100],
        reassign_every: int = 20,
        mode: Literal["eliminate", "attract"] = "eliminate",
        confidence: Literal["softmax", "similarity"] = "softmax",
        acceptance: list[float] = [0.0, 1.0],
        start: Literal["kmeans++", "random"] = "kmeans++",
        base_temperature: float | None = None,
    ):
        super().__init__()
        check_settings(epochs, n_data, temperature, clusters, reassign_every, acceptance)
        self.epochs = epochs
        self.t = temperature
        self.clusters = clusters
        self.reassign_every = reassign_every
        self.confidence = confidence
        self.acceptance = acceptance
        self.start = start
        self.scale = loss_scale(temperature, base_temperature)
        if mode == "attract":
            self.objective = self.attract
        else:
            self.negatives = self.eliminate

        L = len(clusters)
        self.register_buffer("labels", labels, persistent=False)
        # (L, n) pseudo labels, -1 before the first clustering.
        self.register_buffer("pseudo", torch.full((L, n_data), -1))
        # (L, n) from 1, the most confident image, to n.
        self.register_buffer("rank", torch.full((L, n_data), n_data))
        self.validity = {}

    def accepted(self, epoch):
        """The share r of images whose label is accepted."""
        first, last = self.acceptance
        return first + (last - first) * min(1, int(epoch) / max(1, self.epochs - 1))

    def accepted_labels(self, index, epoch, none):
        """(n,) data-set indices -> (L, n) pseudo labels, `none` where not accepted or no image."""
        n_accepted = self.accepted(epoch) * self.rank.shape[1] + 1e-9
        pseudo = self.pseudo[:, index]  # (L, n)
        is_known = (self.rank[:, index] <= n_accepted) & (index >= 0) & (pseudo >= 0)
        return torch.where(is_known, pseudo, none)

    @torch.no_grad()
    def before_epoch(self, epoch, extract):
        """Cluster anew where it is time to, and say what the clusters are worth.

        extract() -> (n, D): unit embeddings of all images, without augmentation, by the momentum
        encoder where there is one, the same on every process. extract: None where a run goes on
        within an epoch, whose labels its checkpoint has brought.
        """
        if extract is not None and epoch and epoch % self.reassign_every == 0:
            self.cluster(extract(), epoch)
        self.validity = {"accepted %": 100 * self.accepted(epoch)}
        if self.labels is None or (self.pseudo < 0).any():
            return
        everyone = torch.arange(self.rank.shape[1], device=self.rank.device)
        accepted = self.accepted_labels(everyone, epoch, -1)  # (L, n)
        for k, accepted_labels, pseudo in zip(self.clusters, accepted, self.pseudo):
            figures = validity(accepted_labels, pseudo, self.labels)
            self.validity |= {f"{name}, k={k}": value for name, value in figures.items()}

    def cluster(self, z, epoch):
        """Pseudo labels and ranks of all images, from z (n, D), the same on every process."""
        ranks = torch.arange(1, len(z) + 1, device=z.device)
        for level, k in enumerate(self.clusters):
            # (k, D) and (n,)
            centroids, labels = kmeans(z, k, seed=(epoch, level), start=self.start)
            centroids = F.normalize(centroids, dim=1)
            sure = confidence(z, centroids, labels, self.t, self.confidence)  # (n,)
            self.pseudo[level] = labels
            self.rank[level, sure.argsort(descending=True, stable=True)] = ranks

    def labels_of(self, contrast, epoch, queries=None):
        """Accepted labels of the (first so many) queries (L, N) and of the candidates (L, K).

        A query's and a candidate's are equal only where both are accepted.
        """
        of_queries = self.accepted_labels(contrast.index[:queries], epoch, -1)
        return of_queries, self.accepted_labels(contrast.negative_index, epoch, -2)

    def false(self, contrast, epoch, queries=None):
        """F(q): (L, N, K) bool."""
        of_queries, of_candidates = self.labels_of(contrast, epoch, queries)
        return of_queries[:, :, None] == of_candidates[:, None, :]

    def eliminate(self, contrast, s, epoch):
        """s: (N, K) -> (L, N, K)."""
        s = s.masked_fill(self.false(contrast, epoch, len(s)), NEVER)
        figures = false_negatives(contrast, s, None, self.labels)
        return s, None, {**self.validity, "removed %": 100 - figures["used %"], **figures}

    def attract(self, contrast, s, epoch):
        """s: (..., N, K + anything that is no candidate)."""
        q = contrast.query  # (N, D)
        k = contrast.positive.mean(1)  # (N, D)
        positive = (q * k).sum(1)  # (N,)
        candidates = s[..., : len(contrast.negative)]  # (..., N, K)
        friends = self.false(contrast, epoch) & (candidates > NEVER)  # (L, N, K)
        # The sum over F(q) of q n_j.
        among = candidates.masked_fill(~friends, 0).sum(-1)  # (L, N)
        Z = torch.logaddexp(torch.logsumexp(s / self.t, -1), positive / self.t)  # (..., N)
        loss = (Z - (positive + among) / self.t / (1 + friends.sum(-1))).mean()
        figures = {**self.validity, "attracted %": 100 * friends.float().mean()}
        return loss, {"positive": positive.mean(), **figures}

    def forward(self, contrast, epoch):
        if hasattr(self, "objective"):
            s = similarity(contrast)  # (N, K)
            loss, figures = self.attract(contrast, s, epoch)
            return self.scale * loss, {"K": count(s), **figures}
        q = contrast.query  # (N, D)
        k = contrast.positive.mean(1)  # (N, D)
        positive = (q * k).sum(1)  # (N,)
        # As from eliminate's s, of all queries.
        Z = log_partition(contrast, self.t, *self.labels_of(contrast, epoch))  # (L, N)
        # For the log.
        s, _, figures = self.eliminate(contrast, unchosen(contrast), epoch)  # (L, 32, K)
        loss = F.softplus(Z - positive / self.t).mean()
        return self.scale * loss, {"K": count(s), "positive": positive.mean(), **figures}


def check_settings(epochs, n_data, temperature, clusters, reassign_every, acceptance):
    """ValueError where settings have no meaning; a sentence where they do less than they say."""
    if temperature <= 0 or reassign_every < 1:
        raise ValueError(
            f"temperature {temperature} must be above 0 and reassign_every "
            f"{reassign_every} at least 1"
        )
    if not clusters or not 1 <= min(clusters) <= max(clusters) <= n_data:
        raise ValueError(
            f"clusters {clusters} must be one number a level, each from 1 to the "
            f"{n_data} images there are"
        )
    if len(acceptance) != 2 or not 0 <= acceptance[0] <= acceptance[1] <= 1:
        raise ValueError(
            f"acceptance {acceptance} must be two shares, of the first epoch and, "
            "not below it, of the last"
        )
    if 1 in clusters:
        say(
            f"clusters {clusters} has a level of 1, whose one cluster leaves no negatives once all "
            "labels are accepted; take 2 or more"
        )
    if reassign_every >= epochs:
        say(
            f"reassign_every {reassign_every} leaves no clustering before the end, epochs {epochs}"
            ": no false negative is found, and ifnd is nce; lower it"
        )
