"""Frozen features: extract them, and ask the neighbours."""
from typing import Literal

import torch
from tqdm import tqdm

from data.datasets import find_obstacle
from data.loader import in_order

from . import distributed


@torch.no_grad()
def extract(encode, dataset, image_size, device, workers=None, recipe="eval", what="features"):
    """encode: (b, 3, S, S) -> (b, F). The features (n, F) of all n images of a data set, in its order, on every process.

    The processes share the images out; none is lost or repeated, whatever n.
    """
    n, world, rank = len(dataset), distributed.world_size(), distributed.rank()
    each = -(-n // world)
    rows = torch.arange(rank * each, (rank + 1) * each).clamp(max=n - 1)               # the last process repeats the last image ...
    steps = in_order(dataset, rows, recipe, image_size, device, workers=workers)
    bar = tqdm(steps, what, total=-(-each // 512), leave=False, disable=None if distributed.is_main() else True)
    return distributed.gather(torch.cat([encode(x) for x, _ in bar]))[:n]              # ... which is dropped here


def embeddings(encoder, dataset, image_size, device, workers, feature="output", what="embeddings"):
    """extract, from an Encoder in eval mode."""
    training = encoder.training
    encoder.eval()
    with torch.compiler.set_stance("force_eager"):         # what training compiled, for its batches, is not compiled anew for these
        z = extract(lambda x: encoder(x, feature), dataset, image_size, device, workers, what=what)
    encoder.train(training)
    return z


@torch.no_grad()
def knn(bank, labels, queries, k, temperature):
    """Weighted kNN, as InstDisc and MoCo: the k most similar of bank (n, F) vote for their labels (n,), with weight e^{similarity / T}.

    Both sets are made unit length. -> predicted classes (m,) of queries (m, F).
    """
    bank, k = torch.nn.functional.normalize(bank, dim=1), min(k, len(bank))
    answer = []
    for q in torch.nn.functional.normalize(queries, dim=1).split(1024):
        similarity, who = (q @ bank.T).topk(k)                                         # (1024, k)
        votes = torch.zeros(len(q), int(labels.max()) + 1, device=q.device)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()                # the nearest has 1: e^{1 / T} itself is infinite from T = 0.011 on down
        answer.append(votes.scatter_add_(1, labels[who], weight).argmax(1))
    return torch.cat(answer)


def percent(right):
    """The share of True in a tensor of bool, in %."""
    return round(100 * right.float().mean().item(), 3)


class KNN:
    """Top-1 of weighted kNN on the test set, the training set as its bank, both without augmentation.

    every: how many epochs apart in pre-training (and at the start and the end); 0 is never. k, temperature: see `knn`.
    feature: `output`, the unit vectors, as moco's CIFAR notebook; or `backbone`, the pooled features.
    """

    def __init__(self, train, test, image_size, device, workers, *, every: int = 10, k: int = 200, temperature: float = 0.1,
                 feature: Literal["output", "backbone"] = "output"):
        if every < 0 or k < 1 or temperature <= 0:
            raise ValueError(f"knn: every {every} must be at least 0, k {k} at least 1, temperature {temperature} above 0")
        self.train, self.test, self.how = train, test, (image_size, device, workers)
        self.every, self.k, self.temperature, self.feature = every, k, temperature, feature
        self.obstacle = find_obstacle(train, test)
        self.possible = self.obstacle is None

    def due(self, epoch, epochs):
        """After `epoch` epochs of `epochs`?"""
        return self.possible and self.every > 0 and (epoch % self.every == 0 or epoch == epochs)

    def __call__(self, encoder):
        """-> percent."""
        bank, queries = (embeddings(encoder, part, *self.how, self.feature, "kNN") for part in (self.train, self.test))
        labels, truth = self.train.labels.to(bank.device), self.test.labels.to(bank.device)
        return 100 * (knn(bank, labels, queries, self.k, self.temperature) == truth).float().mean().item()

    def __str__(self):
        return f"weighted kNN, k {min(self.k, len(self.train))}, T {self.temperature}, on the {self.feature} of {len(self.train)} training images"
