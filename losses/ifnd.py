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
losses/kmeans.

Not settled by what we have of the paper: the mean over the levels; SupCon's outer form for
`attract`; confidence = softmax_c(sim(z_i, c) / t) at the centroid of the image's cluster; the first
clustering after `reassign_every` epochs, not at the start.
"""

from collections.abc import Callable
from typing import Literal

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
    similarity,
)
from .checks import check_ifnd
from .diagnostics import candidate_diagnostics
from .kmeans import kmeans, no_progress
from .kmeans.quality import confidence, validity
from .nce import loss_scale
from .partition import log_partition


class IFND(nn.Module):
    """InfoNCE without, or attracted to, the false negatives that clusters find.

    Args:
        epochs: the length of training.
        n_data: the number of images.
        temperature: t.
        clusters: the number of clusters of each level.
        reassign_every: epochs between clusterings (CIFAR: 20; ImageNet: 1).
        mode: what becomes of false negatives, as above.
        confidence: `softmax`, as above, or `similarity` to the centroid.
        acceptance: the share accepted in the first and in the last epoch, linear between.
        start: what k-means starts from: `kmeans++`, on a sample, or `random` rows, as faiss.
        base_temperature: SupContrast's factor of the loss, see losses/nce.py.

    Attributes:
        progress: tqdm, or what is called like it, to show how far k-means is; nothing unless set.
    """

    def __init__(
        self,
        epochs: int,
        n_data: int,
        *,
        temperature: float = 0.5,
        clusters: list[int] = [10, 30, 100],  # noqa: B006  nothing writes to it
        reassign_every: int = 20,
        mode: Literal["eliminate", "attract"] = "eliminate",
        confidence: Literal["softmax", "similarity"] = "softmax",
        acceptance: list[float] = [0.0, 1.0],  # noqa: B006
        start: Literal["kmeans++", "random"] = "kmeans++",
        base_temperature: float | None = None,
    ):
        super().__init__()
        check_ifnd(epochs, n_data, temperature, clusters, reassign_every, acceptance)
        self.epochs = epochs
        self.t = temperature
        self.clusters = clusters
        self.reassign_every = reassign_every
        self.mode = mode
        self.confidence = confidence
        self.acceptance = acceptance
        self.start = start
        self.scale = loss_scale(temperature, base_temperature)
        self.progress = no_progress
        # In a list of losses, one mode chooses negatives and the other treats positives.
        if mode == "eliminate":
            self.select = self.eliminate
        else:
            self.objective = self.attract

        L = len(clusters)
        # (L, n) pseudo labels, -1 before the first clustering.
        self.register_buffer("pseudo", torch.full((L, n_data), -1))
        # (L, n) from 1, the most confident image, to n.
        self.register_buffer("rank", torch.full((L, n_data), n_data))
        # Figures of the labels of this epoch, once somebody asks for them.
        self.validity = None

    def forward(self, contrast: Contrast, epoch: float) -> Output:
        """Return the loss."""
        if self.mode == "attract":
            s = similarity(contrast)  # (N, K)
            return Output(self.scale * self.attract(contrast, s, epoch))
        # log of the sum over e^{s_ij / t}, for s as `eliminate` makes it.
        log_z = log_partition(contrast, self.t, *self.labels_of(contrast, epoch))  # (L, N)
        return Output(self.scale * info_nce(positive_similarity(contrast), log_z, self.t))

    def eliminate(self, contrast: Contrast, s: Tensor, epoch: float) -> Negatives:
        """Return all candidates but F(q). s: (N, K) -> (L, N, K)."""
        return Negatives(s.masked_fill(self.false_negatives(contrast, epoch), NEG_INF))

    def attract(self, contrast: Contrast, s: Tensor, epoch: float) -> Tensor:
        """Return the loss that attracts F(q). s: (..., N, K + anything that is no candidate)."""
        positive = positive_similarity(contrast)  # (N,)
        candidates = s[..., : len(contrast.negative)]  # (..., N, K)
        is_false = self.false_negatives(contrast, epoch) & (candidates > NEG_INF)  # (L, N, K)
        # The sum over F(q) of q n_j.
        of_false = candidates.masked_fill(~is_false, 0).sum(-1)  # (L, N)
        log_z = torch.logsumexp(s / self.t, -1)  # (..., N)
        log_all = torch.logaddexp(log_z, positive / self.t)  # (..., N)
        return (log_all - (positive + of_false) / self.t / (1 + is_false.sum(-1))).mean()

    def false_negatives(self, contrast: Contrast, epoch: float) -> Tensor:
        """Return F(q) as (L, N, K) bool."""
        query_label, candidate_label = self.labels_of(contrast, epoch)
        return query_label[:, :, None] == candidate_label[:, None, :]

    def labels_of(self, contrast: Contrast, epoch: float) -> tuple[Tensor, Tensor]:
        """Return accepted labels of the queries (L, N) and of the candidates (L, K).

        A query's and a candidate's are equal only where both are accepted.
        """
        query_label = self.accepted_labels(contrast.index, epoch, otherwise=-1)
        candidate_label = self.accepted_labels(contrast.negative_index, epoch, otherwise=-2)
        return query_label, candidate_label

    def accepted_labels(self, index: Tensor, epoch: float, otherwise: int) -> Tensor:
        """Return pseudo labels (L, n) of images (n,), `otherwise` where none is accepted."""
        n_accepted = self.accepted(epoch) * self.rank.shape[1] + 1e-9
        pseudo = self.pseudo[:, index]  # (L, n)
        is_known = (self.rank[:, index] <= n_accepted) & (index >= 0) & (pseudo >= 0)
        return torch.where(is_known, pseudo, otherwise)

    def accepted(self, epoch: float) -> float:
        """Return the share of images whose label is accepted."""
        first, last = self.acceptance
        return first + (last - first) * min(1, int(epoch) / max(1, self.epochs - 1))

    def before_epoch(self, epoch: int, extract: Callable[[], Tensor] | None) -> None:
        """Cluster anew where it is time to.

        Args:
            epoch: from 0.
            extract: returns (n, D): unit embeddings of all images, without augmentation, by the
                momentum encoder where there is one, the same on every process. None where a run
                goes on within an epoch, whose labels its checkpoint has brought.
        """
        self.validity = None
        if extract is not None and epoch and epoch % self.reassign_every == 0:
            self.cluster(extract(), epoch)

    @torch.no_grad()
    def cluster(self, z: Tensor, epoch: int) -> None:
        """Give all images pseudo labels and ranks, from z (n, D), the same on every process."""
        ranks = torch.arange(1, len(z) + 1, device=z.device)
        for level, k in enumerate(self.clusters):
            seed = (epoch, level)
            centroids, labels = kmeans(z, k, seed, start=self.start, progress=self.progress)
            centroids = F.normalize(centroids, dim=1)  # (k, D)
            sure = confidence(z, centroids, labels, self.t, self.confidence)  # (n,)
            self.pseudo[level] = labels
            self.rank[level, sure.argsort(descending=True, stable=True)] = ranks

    def diagnostics(
        self, contrast: Contrast, output: Output, labels: Tensor | None, epoch: float
    ) -> Figures:
        """Say how many labels are accepted, what they are worth, and how many candidates go."""
        if self.validity is None:
            self.validity = self.label_validity(labels, epoch)
        figures = {"accepted %": 100 * self.accepted(epoch), **self.validity}
        if self.mode == "eliminate":
            used = candidate_diagnostics(contrast, output.chosen, None)["used %"]
            return figures | {"removed %": 100 - used}
        candidates = output.negatives.similarity[..., : len(contrast.negative)]  # (..., N, K)
        is_false = self.false_negatives(contrast, epoch) & (candidates > NEG_INF)  # (L, N, K)
        return figures | {"attracted %": 100 * is_false.float().mean()}

    def label_validity(self, labels: Tensor | None, epoch: float) -> dict[str, float]:
        """Compare the accepted labels of all images with the true ones (n,).

        It waits for the device, and so it is computed once an epoch.
        """
        if labels is None or (self.pseudo < 0).any():
            return {}
        everyone = torch.arange(self.rank.shape[1], device=self.rank.device)
        accepted = self.accepted_labels(everyone, epoch, otherwise=-1)  # (L, n)
        figures = {}
        for k, of_level, pseudo in zip(self.clusters, accepted, self.pseudo):
            for name, value in validity(of_level, pseudo, labels).items():
                figures[f"{name}, k={k}"] = value
        return figures
