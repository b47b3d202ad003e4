"""Frozen features: extract them, ask the neighbours, and say how often these are right."""

import contextlib
from typing import Literal

import torch
from torch.nn import functional as F

from data.datasets import FOLDERS, NAMES, find_obstacle, load
from data.loader import ordered_batches
from data.memory import available_bytes
from engine import config, distributed
from engine import device as devices
from engine.progress import progress

# Images that are encoded at once.
BATCH = 512
# Queries that are compared with a block of the bank at once.
QUERIES = 256
# A block of the bank has so many bytes, and so have its similarities to QUERIES queries.
BLOCK_BYTES = 2**26
# What kNN needs beside features and predictions; see `nearest`.
KNN_BYTES = 4 * BLOCK_BYTES
# Of an accelerator's free memory so much is taken for features: the encoder needs some, too.
DEVICE_SHARE = 0.75


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
    rows = local_rows(len(dataset))
    steps = ordered_batches(dataset, rows, recipe, image_size, device, BATCH, workers)
    steps = progress(steps, what, total=-(-len(rows) // BATCH))
    return gather_features(encode, steps, len(dataset), keep_on)


def local_rows(n):
    """Which of n images are this process's to encode: as many rows on every process.

    The last process repeats the last image, which `gather_features` drops.
    """
    each = -(-n // distributed.world_size())
    start = distributed.rank() * each
    return torch.arange(start, start + each).clamp(max=n - 1)


@torch.no_grad()
def gather_features(encode, steps, n, keep_on=None):
    """Encode this process's `local_rows` of n images, and gather those of all processes.

    Args:
        encode: what a step holds of b images -> (b, ...).
        steps: (what is encoded, which images these are), for one batch after the other.
        n: how many images there are.
        keep_on: see `extract`.

    Returns:
        (n, ...), on every process.
    """
    world = distributed.world_size()
    each = -(-n // world)
    whole, start = None, 0
    for images, _ in steps:
        features = encode(images)  # (b, ...), b the same on all processes
        if whole is None:
            shape = world, each, *features.shape[1:]
            whole = torch.empty(shape, dtype=features.dtype, device=keep_on or features.device)
        stop = start + len(features)
        whole[:, start:stop] = distributed.all_gather(features).unflatten(0, (world, -1))
        start = stop
    return whole.flatten(0, 1)[:n]


@contextlib.contextmanager
def eval_mode(encoder):
    """Put an encoder in eval mode meanwhile; nothing is compiled anew for other batches."""
    training = encoder.training
    encoder.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        encoder.train(training)


def embeddings(
    encoder,
    dataset,
    image_size,
    device,
    workers,
    feature="output",
    what="embeddings",
    keep_on=None,
):
    """`extract`, from a models.resnet.Encoder in eval mode. feature: `output` or `backbone`."""

    def encode(images):
        return encoder(images, feature)

    with eval_mode(encoder):
        return extract(encode, dataset, image_size, device, workers, what=what, keep_on=keep_on)


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
    """Predict the classes (m,) of queries (m, F) by weighted kNN, as InstDisc and MoCo.

    The k most similar of bank (n, F) vote for their labels (n,), with weight e^{similarity / T}.
    Both sets are made unit length.

    Computed on the labels' device, wherever bank and queries are kept. All processes call it, with
    the same arguments, and share the queries out. The memory it needs: see `nearest`.
    """
    m, world, rank = len(queries), distributed.world_size(), distributed.rank()
    each = -(-m // world)
    rows = slice(rank * each, (rank + 1) * each)
    local_queries = queries[rows]
    missing = each - len(local_queries)
    if missing:  # the last process repeats the last query; that is dropped at the end
        local_queries = torch.cat([local_queries, queries[-1:].expand(missing, -1)])
    classes = int(labels.max()) + 1
    predictions = []
    for similarity, neighbours in nearest(bank, local_queries, min(k, len(bank)), labels.device):
        votes = torch.zeros(len(similarity), classes, device=labels.device)
        # The nearest has weight 1: e^{1 / T} itself is infinite from T = 0.011 on down.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        predictions.append(votes.scatter_add_(1, labels[neighbours], weight).argmax(1))
    return distributed.all_gather(torch.cat(predictions))[:m]


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


def accuracy_percent(right):
    """The share of True in a tensor of bool, in %."""
    return round(100 * right.float().mean().item(), 3)


def mean_per_class_accuracy(predictions, labels):
    """The accuracy of each class, averaged over the classes, in %.

    The protocol of aircraft, caltech101, flowers and pets in the papers on transfer (Kornblith,
    Shlens, Le; CVPR 2019; arXiv 1805.08974), whose test sets have classes of unlike sizes.

    Args:
        predictions: (m,) predicted classes.
        labels: (m,) true classes. A class that none of them is of does not count.
    """
    images = labels.bincount()  # (classes,)
    right = labels[predictions == labels].bincount(minlength=len(images))
    there = images > 0
    return round(100 * (right[there].double() / images[there]).mean().item(), 3)


# ---------------------------------------------------------------------------- during training


def labelled_parts(
    own,
    settings,
    seed,
    *,
    data: str | None = None,
    root: str | None = None,
):
    """The labelled images that kNN takes while an encoder is trained.

    Another set's images are normalised as those that the encoder is trained on. They are its input
    here; CMC's encoder even undoes that very normalisation. (A probe by linear.data takes the other
    set's own.)

    Args:
        own: the parts of the run's own data, with `pretrain`, `train` and `test`.
        settings: of section data, for what else `load` wants to know.
        seed: see `load`.
        data: another set than the run's own: a name that `load` knows, such as cifar10 or folder;
            null: the run's own. That one may have no labels, and then there is no kNN; another one
            must have them.
        root: where that set lies, as data.root; null: `datasets`. Of `folder`, the folder itself.

    Returns:
        The training part, the test part or None, and the set in words; "" for the run's own.

    Raises:
        ValueError, SystemExit: where kNN cannot be asked of the other set.
    """
    check_labelled_set(data, root)
    if data is None:
        return own.train, own.test, ""
    other = {
        "name": data,
        "root": root or "datasets",
        "split": "train",
        "limit": None,
        "classes": None,
        "on_error": "stop",
        "mean": list(own.pretrain.mean),
        "std": list(own.pretrain.std),
    }
    train, test = (
        config.build(load, settings | other, f"knn.data {data}", part=part, seed=seed)
        for part in ("train", "test")
    )
    source = f"{data} at {other['root']}"
    obstacle = find_obstacle(train, test)
    if obstacle:
        raise ValueError(f"there is no kNN on data {source}: {obstacle}")
    return train, test, source


def check_labelled_set(data, root):
    """ValueError where knn.data and knn.root name no set for kNN."""
    if data is None and root is not None:
        raise ValueError(f"root is {root}, but data is null; name the set, such as knn.data=folder")
    names = [name for name in NAMES if name != "voc2007"]  # of several classes an image
    if data not in (None, *names):
        raise ValueError(
            f"data is {data!r}{config.did_you_mean(data, names)}; there are {', '.join(names)}, "
            "or null for the run's own"
        )
    if data in FOLDERS and root is None:
        raise ValueError(f"data is {data}, but root is null; say where it is: knn.root=PATH")


class KNN:
    """Top-1 of weighted kNN on the test set, its bank the training set, neither augmented.

    every: how many epochs apart in pre-training (and at the start and the end); 0 is never.
    k: how many neighbours vote; of fewer than 10 k training images a tenth do, at least 1.
    temperature: see `knn`.
    feature: `output`, the unit vectors, as moco's CIFAR notebook; or `backbone`, the pooled
        features.
    limit: at most so many test images in pre-training, evenly spaced over the classes; null: all.
    source: what the set is called, where it is another than the encoder's own.
    """

    def __init__(
        self,
        train,
        test,
        image_size,
        device,
        workers,
        source="",
        *,
        every: int = 10,
        k: int = 200,
        temperature: float = 0.1,
        feature: Literal["output", "backbone"] = "output",
        limit: int | None = None,
    ):
        if every < 0 or k < 1 or temperature <= 0:
            raise ValueError(
                f"knn: every {every} must be at least 0, k {k} at least 1, "
                f"temperature {temperature} above 0"
            )
        if limit is not None and limit < 1:
            raise ValueError(
                f"knn: limit is {limit}; it must be above 0, or null for all test images"
            )
        self.train, self.test = train, test
        self.image_size, self.device, self.workers = image_size, device, workers
        self.source = source
        self.every, self.k, self.temperature, self.feature = every, k, temperature, feature
        self.voters = voters(k, len(train))
        self.obstacle = find_obstacle(train, test)
        self.possible = self.obstacle is None
        self.keep_on = None  # where the features are kept, once that was asked
        self.n_test = len(test) if self.possible else 0
        if self.possible and limit is not None and limit < self.n_test:
            self.test = test.select(evenly_spaced(test.labels, limit))

    def __call__(self, encoder):
        """Ask the neighbours. -> top-1 in %. All processes call it."""
        if self.keep_on is None:
            self.keep_on = self.choose_memory(encoder)
        how = self.image_size, self.device, self.workers, self.feature, "kNN", self.keep_on
        bank = embeddings(encoder, self.train, *how)
        queries = embeddings(encoder, self.test, *how)
        labels, truth = self.train.labels.to(self.device), self.test.labels.to(self.device)
        right = knn(bank, labels, queries, self.voters, self.temperature) == truth
        return 100 * right.float().mean().item()

    @torch.no_grad()
    def choose_memory(self, encoder):
        """The device that the features are kept on. All processes call it.

        Raises:
            SystemExit: before anything is extracted, where the features fit nowhere.
        """
        image = torch.zeros(1, 3, self.image_size, self.image_size, device=self.device)
        with eval_mode(encoder):
            width = encoder(image, self.feature).shape[1]
        needed = 4 * width * (len(self.train) + len(self.test)) + KNN_BYTES
        keep_on, lacking = where_features_fit(needed, self.device)
        problem = None
        if lacking is not None:
            problem = (
                f"kNN: the features of {len(self.train)} training and {len(self.test)} test "
                f"images, {width} numbers an image, need {needed / 1e9:.3g} GB of memory, but "
                f"{lacking}; take fewer training images with data.limit or test images with "
                "knn.limit, train without kNN (knn.every=0), or allow more memory"
            )
        distributed.exit_all_ranks(problem)
        return keep_on

    def neighbours(self):
        """How many vote, in words."""
        if self.voters == self.k:
            return f"k {self.k}"
        return (
            f"k {self.voters} (knn.k is {self.k}, but of {len(self.train)} training images a "
            "tenth at most vote)"
        )

    def __str__(self):
        words = (
            f"weighted kNN, {self.neighbours()}, T {self.temperature}, on the {self.feature} "
            f"of {len(self.train)} training images"
        )
        if self.source:
            words += f" of {self.source}"
        if self.possible and len(self.test) < self.n_test:
            words += f", asked of {len(self.test)} of {self.n_test} test images (knn.limit)"
        return words


def evenly_spaced(labels, limit):
    """Choose `limit` of n images, each class by its share of them, the same on every process.

    Args:
        labels: (n,) classes.
        limit: at most n.

    Returns:
        (limit,) sorted rows.
    """
    by_class = labels.cpu().argsort(stable=True)  # a data set may list its classes in turn
    return by_class[torch.arange(limit) * len(labels) // limit].sort().values
