"""Frozen features: extract them, and ask the neighbours."""

from typing import Literal

import torch
from torch.nn import functional as F
from tqdm import tqdm

from data.datasets import find_obstacle
from data.loader import ordered_batches
from data.memory import available_bytes

from . import device as devices
from . import distributed

QUERIES = 256  # that are compared with a block of the bank at once
BLOCK_BYTES = 2**26  # of a block of the bank, and of its similarities to QUERIES queries
KNN_BYTES = 4 * BLOCK_BYTES  # what kNN needs beside features and answer; see `nearest`
DEVICE_SHARE = 0.75  # of an accelerator's free memory; the encoder needs some, too


# ---------------------------------------------------------------------------- extraction


@torch.no_grad()
def extract(
    encode, dataset, image_size, device, workers=None, recipe="eval", what="features", keep_on=None
):
    """The features (n, F) of all n images of a data set, in its order, on every process.

    encode: (b, 3, S, S) -> (b, F).
    keep_on: the device that gets the features, None for the one that `encode` leaves them on.

    The processes share the images out; none is lost or repeated, whatever n. Beside the features
    no more than a batch of each process is in memory.
    """
    n, world, rank = len(dataset), distributed.world_size(), distributed.rank()
    each = -(-n // world)
    # The last process repeats the last image, which is dropped at the end.
    rows = torch.arange(rank * each, (rank + 1) * each).clamp(max=n - 1)
    steps = ordered_batches(dataset, rows, recipe, image_size, device, workers=workers)
    hidden = None if distributed.is_main() else True
    whole, start = None, 0
    for images, _ in tqdm(steps, what, total=-(-each // 512), leave=False, disable=hidden):
        features = encode(images)  # (b, F), b the same on all processes
        if whole is None:
            shape = world, each, *features.shape[1:]
            whole = torch.empty(shape, dtype=features.dtype, device=keep_on or features.device)
        stop = start + len(features)
        whole[:, start:stop] = distributed.gather(features).unflatten(0, (world, -1))
        start = stop
    return whole.flatten(0, 1)[:n]


def embeddings(encoder, dataset, image_size, device, workers, feature="output", what="embeddings"):
    """extract, from an Encoder in eval mode."""
    training = encoder.training
    encoder.eval()
    # What training compiled, for its batches, is not compiled anew for these.
    with torch.compiler.set_stance("force_eager"):
        z = extract(lambda x: encoder(x, feature), dataset, image_size, device, workers, what=what)
    encoder.train(training)
    return z


def where_features_fit(needed, device):
    """Where features of that many bytes can be kept. -> (a device, None), or (None, why nowhere).

    It is `device`, or the CPU where an accelerator has too little memory free.
    """
    free = devices.free_memory(device)
    if device.type != "cpu" and (free == 0 or needed <= DEVICE_SHARE * free):  # 0: torch can't say
        return device, None
    free_here, whose = available_bytes()
    if free_here is None or needed <= free_here:
        return torch.device("cpu"), None
    lacking = f"{free_here / 1e9:.3g} GB are free {whose}"
    if device.type != "cpu":
        lacking += f", and {free / 1e9:.3g} GB on {device}"
    return None, lacking


# ---------------------------------------------------------------------------- neighbours


@torch.no_grad()
def knn(bank, labels, queries, k, temperature):
    """Weighted kNN, as InstDisc and MoCo: the k most similar of bank (n, F) vote for their labels
    (n,), with weight e^{similarity / T}.

    Both sets are made unit length. -> predicted classes (m,) of queries (m, F).

    Computed on the labels' device, wherever bank and queries are kept. All processes call it, with
    the same arguments, and share the queries out. The memory it needs: see `nearest`.
    """
    m, world, rank = len(queries), distributed.world_size(), distributed.rank()
    each = -(-m // world)
    rows = slice(rank * each, (rank + 1) * each)
    own = queries[rows]
    if len(own) < each:  # the last process repeats the last query; that is dropped at the end
        own = torch.cat([own, queries[-1:].expand(each - len(own), -1)])
    classes = int(labels.max()) + 1
    answer = []
    for similarity, neighbours in nearest(bank, own, min(k, len(bank)), labels.device):
        votes = torch.zeros(len(similarity), classes, device=labels.device)
        # The nearest has weight 1: e^{1 / T} itself is infinite from T = 0.011 on down.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        answer.append(votes.scatter_add_(1, labels[neighbours], weight).argmax(1))
    return distributed.gather(torch.cat(answer))[:m]


def nearest(bank, queries, k, device):
    """The k rows of bank (n, F) most similar to each of queries (m, F), by their cosine.

    -> for each QUERIES queries: cosines (QUERIES, k), the highest first, and rows (QUERIES, k).

    The bank is gone through once, by blocks. On `device` this needs at most KNN_BYTES = 256 MiB
    (for k up to 1,000) and 12 k bytes a query, wherever bank and queries are kept, whatever n.
    """
    width = bank.shape[1]
    size = max(1, BLOCK_BYTES // 4 // max(width, QUERIES))
    chunks = queries.split(QUERIES)
    best = [None] * len(chunks)
    for start in range(0, len(bank), size):
        block = F.normalize(bank[start : start + size].to(device), dim=1)  # (size, F)
        for i, chunk in enumerate(chunks):
            q = F.normalize(chunk.to(device), dim=1)
            similarity, rows = (q @ block.T).topk(min(k, len(block)))
            if start:
                similarity = torch.cat([best[i][0], similarity], 1)
                rows = torch.cat([best[i][1], rows + start], 1)
                similarity, order = similarity.topk(min(k, similarity.shape[1]))
                rows = rows.gather(1, order)
            best[i] = similarity, rows
    return best


def voters(k, n):
    """How many of n labelled images vote, of k that were asked for: a tenth at most, at least 1.

    Where all voted, as k = 200 would have it of 100 images, the most frequent class would win.
    """
    return min(k, max(1, n // 10))


def percent(right):
    """The share of True in a tensor of bool, in %."""
    return round(100 * right.float().mean().item(), 3)


class KNN:
    """Top-1 of weighted kNN on the test set, the training set as its bank, both without
    augmentation.

    every: how many epochs apart in pre-training (and at the start and the end); 0 is never.
    k: how many neighbours vote; of fewer than 10 k training images a tenth do, at least 1.
    temperature: see `knn`.
    feature: `output`, the unit vectors, as moco's CIFAR notebook; or `backbone`, the pooled
        features.
    """

    def __init__(
        self,
        train,
        test,
        image_size,
        device,
        workers,
        *,
        every: int = 10,
        k: int = 200,
        temperature: float = 0.1,
        feature: Literal["output", "backbone"] = "output",
    ):
        if every < 0 or k < 1 or temperature <= 0:
            raise ValueError(
                f"knn: every {every} must be at least 0, k {k} at least 1, "
                f"temperature {temperature} above 0"
            )
        self.train, self.test, self.how = train, test, (image_size, device, workers)
        self.every, self.k, self.temperature, self.feature = every, k, temperature, feature
        self.voters = voters(k, len(train))
        self.obstacle = find_obstacle(train, test)
        self.possible = self.obstacle is None

    def due(self, epoch, epochs):
        """After `epoch` epochs of `epochs`?"""
        return self.possible and self.every > 0 and (epoch % self.every == 0 or epoch == epochs)

    def __call__(self, encoder):
        """-> percent."""
        bank, queries = (
            embeddings(encoder, part, *self.how, self.feature, "kNN")
            for part in (self.train, self.test)
        )
        labels, truth = self.train.labels.to(bank.device), self.test.labels.to(bank.device)
        right = knn(bank, labels, queries, self.voters, self.temperature) == truth
        return 100 * right.float().mean().item()

    def neighbours(self):
        """How many vote, in words."""
        if self.voters == self.k:
            return f"k {self.k}"
        return (
            f"k {self.voters} (knn.k is {self.k}, but of {len(self.train)} training images a "
            "tenth at most vote)"
        )

    def __str__(self):
        return (
            f"weighted kNN, {self.neighbours()}, T {self.temperature}, on the {self.feature} "
            f"of {len(self.train)} training images"
        )
