"""k-means on the device: Euclidean, in chunks, seeded, the best of several starts, nothing but torch; and what its clusters are worth."""
import numpy as np
import torch

from . import distributed

SCORES = 2 ** 21                                           # at a time: 8 MB of distances


@torch.no_grad()
def kmeans(x, k, seed=0, iterations=20, restarts=5):
    """x: (n, D), n >= k. -> centroids (k, D), cluster of each row (n,), the same on every process.

    k-means++ starts (greedy, as scikit-learn's), then Lloyd's iterations; an empty cluster takes the row farthest from its centroid.
    Of `restarts` the one with the smallest sum of squared distances. seed: a whole number or several.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"{k} clusters of {len(x)} rows")
    g = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))       # on the CPU: the same everywhere
    mean = x.mean(0)
    x = x - mean                                           # the same distances, with fewer digits lost
    square = (x * x).sum(1)                                # (n,)
    best = None
    for _ in range(restarts):
        c = start(x, square, k, g)
        own, distance = assign(x, square, c)
        for _ in range(iterations):
            c = centre(x, own, distance, k)
            before, (own, distance) = own, assign(x, square, c)
            if torch.equal(before, own):
                break
        objective = distance.double().sum()
        if best is None or objective < best[0]:
            best = objective, c, own
    _, c, own = best
    return distributed.broadcast(c + mean), distributed.broadcast(own)                 # sums on a GPU come out in any order


def assign(x, square, c):
    """The nearest centroid of each row: (n,), and the squared distance to it: (n,)."""
    own, distance, half = torch.empty(len(x), dtype=torch.long, device=x.device), torch.empty_like(square), (c * c).sum(1) / -2
    rows = max(1, SCORES // len(c))
    for i in range(0, len(x), rows):
        score, own[i:i + rows] = torch.addmm(half, x[i:i + rows], c.T).max(1)          # x c - |c|^2 / 2
        distance[i:i + rows] = square[i:i + rows] - 2 * score
    return own, distance.clamp_(min=0)


def centre(x, own, distance, k):
    """The mean of each cluster: (k, D)."""
    size = own.bincount(minlength=k)                                                   # (k,)
    c = torch.zeros(k, x.shape[1], device=x.device).index_add_(0, own, x) / size.clamp(min=1)[:, None]
    empty = (size == 0).nonzero()[:, 0]
    if len(empty):
        c[empty] = x[distance.topk(len(empty)).indices]
    return c


def start(x, square, k, g):
    """Greedy k-means++: each new centroid is, of a few rows drawn by squared distance, the one that helps most. -> (k, D)."""
    tries = 2 + int(np.log(k))
    first = int(torch.randint(len(x), (1,), generator=g))
    chosen, distance = [first], (square - 2 * (x @ x[first]) + square[first]).clamp_(min=0)
    for _ in range(k - 1):
        total = distance.cumsum(0, dtype=torch.float64)                                # (n,)
        u = torch.rand(tries, generator=g, dtype=torch.float64).to(x.device) * total[-1]
        some = torch.searchsorted(total, u, right=True).clamp(max=len(x) - 1)          # (tries,)
        closer = torch.minimum(torch.addmm(square[some], x, x[some].T, alpha=-2) + square[:, None], distance[:, None]).clamp_(min=0)     # (n, tries)
        pick = closer.sum(0).argmin()
        chosen.append(some[pick])
        distance = closer[:, pick]
    return x[torch.stack([torch.as_tensor(row, device=x.device) for row in chosen])]


def confidence(z, c, own, t, how):
    """z: (n, D) and c: (k, D), unit; own: (n,) the cluster of each. -> (n,) how sure its cluster is (of a softmax, the logarithm)."""
    parts = []
    for some, mine in zip(z.split(4096), own.split(4096)):
        similar = some @ c.T                                                           # (4096, k)
        score = (similar / t).log_softmax(1) if how == "softmax" else similar
        parts.append(score.gather(1, mine[:, None])[:, 0])
    return torch.cat(parts)


def validity(accepted, pseudo, labels):
    """For the log: over all pairs of images, exactly. accepted: (n,) pseudo labels, -1 where not accepted; pseudo, labels: (n,) of all.

    precision: of the pairs taken for one class, the share that is one; recall: of the pairs of one class, the share found, in %;
    NMI: mutual information of pseudo and true labels over the mean of their entropies."""
    table = lambda a, b: torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64, device=a.device).index_put_(
        (a, b), torch.ones((), dtype=torch.float64, device=a.device), accumulate=True)                # (clusters, classes)
    pairs = lambda counts: (counts * (counts - 1)).sum()
    figures = {}
    some = accepted >= 0
    if some.any():
        both = table(accepted[some], labels[some])
        found, right, real = pairs(both.sum(1)), pairs(both), pairs(labels.bincount().double())
        if found:
            figures["precision %"] = float(100 * right / found)
        figures["recall %"] = float(100 * right / real.clamp(min=1))
    p = table(pseudo, labels) / len(labels)
    entropy = lambda p: -(p * p.clamp(min=1e-300).log()).sum()
    a, b = entropy(p.sum(1)), entropy(p.sum(0))
    return figures | {"NMI": float((a + b - entropy(p)) / ((a + b) / 2).clamp(min=1e-300))}
