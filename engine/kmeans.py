"""k-means on the device: seeded, shared out among the processes, nothing but torch.

Lloyd's iterations start from k-means++ on a sample or from random rows; of several restarts the
best is kept. This file also says what the clusters are worth (`confidence`, `validity`).

**The same bits for any number of processes.** Every process holds all rows. The rows are cut into
chunks whose boundaries depend on n and k alone, so that each matrix product has the same shape
wherever it is computed, and each process takes its share of the chunks. What is summed over rows is
first rounded to whole numbers below 2^53, which float64 adds exactly in any order: over the
chunks, over a GPU's atomics, over the processes. (Whole numbers in int64 are as exact; float64's
index_add_ was measured to be 6 times faster on a CPU.) Equal devices are assumed: a CPU and a GPU,
or two kinds of GPU, round a matrix product differently.

**Memory beyond x**, in bytes on each process, for x of (n, D) in float32:

    8 n                   a start's lot over all rows; later the clusters of the best restart
    20 n / processes      clusters of this and the best restart, squared distances
    4 m D + 100 m         a start's sample of m rows (see `sample_size`), its two nearest candidates
    32 k D                candidates; centroids and their sums
    8 x 2^21              a chunk's scores and rows on a CPU; 8 x 2^26 on a GPU

With 1,281,167 x 128 (656 MB) and k = 10,000 that is 0.16 GB on a CPU, of which a start and an
iteration were measured to need 0.13. No second copy of x is made.
"""

import math

import numpy as np
import torch
from tqdm import tqdm

from . import distributed

# Scores (row times centroid) computed at a time: 8 MB, about a CPU's cache; on a GPU 256 MB, so
# that the products outweigh the launching of kernels.
SCORES = {"cpu": 2**21, "cuda": 2**26}
CHUNK_ROWS = {"cpu": 2**11, "cuda": 2**16}

# float64 holds every whole number up to 2^53.
EXACT_BITS = 53

# k-means++ looks at so many rows a centroid, at this part of all rows, and at no fewer than these,
# whichever is most.
SAMPLE_ROWS = 10
SAMPLE_PART = 16
SAMPLE_LEAST = 4096

# It draws so many candidates a centroid, and in a round drops at most this part of those left.
CANDIDATES = 3
DRAWS = 4
DROP = 1 / 4
CAREFUL_ROUNDS = 32


@torch.no_grad()
def kmeans(x, k, seed=0, iterations=20, restarts=5, start="kmeans++"):
    """The clusters with the smallest sum of squared distances among `restarts` runs.

    Args:
        x: (n, D) float32, n >= k, the same on every process.
        seed: a whole number, or several. The global generator is left alone.
        iterations: Lloyd's, at most; a run ends sooner when its centroids stand still.
        start: `kmeans++`, on a sample (see `plus_plus_rows`), or `random`: k different rows, as
            faiss starts, and so PCL's code.

    faiss also trains on at most 256 (PCL: 1000) rows a centroid, drawn once, and then assigns all
    rows. Here every iteration sees all rows.

    Returns:
        centroids (k, D) and the cluster of each row (n,), the same on every process.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"{k} clusters of {len(x)} rows")
    if start not in STARTS:
        raise ValueError(f"start {start!r} of k-means is not one of {', '.join(STARTS)}")
    points = Points(x, k)
    bar = tqdm(
        total=restarts * (iterations + 1),
        desc=f"{k} clusters",
        leave=False,
        disable=None if distributed.is_main() else True,
    )
    best = None
    with bar:
        for rows in choose_starts(points, k, seed, restarts, start):
            run = lloyd(points, points.take(rows), iterations, bar)
            if best is None or run[0] < best[0]:
                best = run
    _, centroids, labels = best
    everywhere = torch.zeros(len(x), dtype=torch.long, device=x.device)
    everywhere[points.first : points.last] = labels
    return centroids + points.mean, distributed.all_reduce_sum(everywhere)


class Points:
    """The rows of x less their mean, which is the same clustering with fewer digits lost.

    first, last: the rows of this process. scale: turns coordinates into whole numbers whose sums
    over all rows are exact; distance_scale: the same for squared distances.
    """

    def __init__(self, x, k):
        self.x = x
        n, dim = x.shape
        self.chunk_rows = chunk_rows(x, k)
        self.first, self.last = share(n, self.chunk_rows)

        low, high = (edge.item() for edge in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"k-means cannot cluster {n} rows with values that are not finite")
        self.mean = torch.zeros(dim, device=x.device)
        scale = exact_scale(max(-low, high), n)
        total = torch.zeros(dim, dtype=torch.float64, device=x.device)
        for _, rows in self.chunks():
            total += to_whole(rows, scale).sum(0)
        self.mean = (distributed.all_reduce_sum(total) / scale / n).float()

        # A mean lies between low and high, so no coordinate less its mean is larger than this.
        spread = high - low
        self.scale = exact_scale(spread, n)
        self.distance_scale = exact_scale(4 * dim * spread**2, n)

    def __len__(self):
        return self.last - self.first

    def chunks(self):
        """This process's chunks: the place (a slice) in its share, and the centred rows (r, D)."""
        for i in range(self.first, self.last, self.chunk_rows):
            j = min(i + self.chunk_rows, self.last)
            yield slice(i - self.first, j - self.first), self.x[i:j] - self.mean

    def take(self, rows):
        """Centred rows, by their numbers among all n."""
        return self.x[rows] - self.mean


def chunk_rows(x, k):
    """Rows of x to meet k centroids at a time."""
    kind = x.device.type
    return max(1, min(CHUNK_ROWS.get(kind, 2**16), SCORES.get(kind, 2**26) // k))


def share(n, rows):
    """The first row, and the one after the last, of this process: whole chunks of `rows` rows."""
    rank, world = distributed.rank(), distributed.world_size()
    chunks = -(-n // rows)
    first, last = chunks * rank // world, chunks * (rank + 1) // world
    return min(n, first * rows), min(n, last * rows)


def exact_scale(largest, count):
    """The power of two by which to scale numbers up to `largest`, so that `count` of them, rounded
    to whole numbers, sum exactly in float64.
    """
    bits = EXACT_BITS - math.frexp(largest)[1] - math.frexp(count)[1]
    return 2.0 ** max(-100, min(100, bits))


def to_whole(x, scale):
    """float32 -> whole numbers, in float64. The scale is a power of two, so only round_ rounds."""
    return (x * scale).round_().double()


def lloyd(points, centroids, iterations, bar):
    """Lloyd's iterations. -> the sum of squared distances, centroids (k, D), clusters of this
    process's rows.
    """
    for iteration in range(iterations + 1):
        labels, distance, sums, counts, objective = assign(points, centroids)
        bar.update()
        if iteration == iterations:
            break
        moved = centre(points, distance, sums, counts)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return objective.item(), centroids, labels


def assign(points, centroids):
    """Give each row to its nearest centroid (k, D).

    Returns:
        of this process's rows: clusters (r,) and squared distances (r,);
        of all rows: the sums of the coordinates (k, D) and the counts (k,) of each cluster, and the
        sum of squared distances, the sums being whole numbers times points.scale, .distance_scale.
    """
    k, dim = centroids.shape
    device = centroids.device
    labels = torch.empty(len(points), dtype=torch.long, device=device)
    distance = torch.empty(len(points), device=device)
    sums = torch.zeros(k, dim, dtype=torch.float64, device=device)
    half = centroids.square().sum(1) / -2
    buffer = torch.empty(min(len(points), points.chunk_rows), k, device=device)
    for part, rows in points.chunks():
        # The nearest centroid has the largest x c - |c|^2 / 2.
        score = torch.addmm(half, rows, centroids.T, out=buffer[: len(rows)])  # (r, k)
        highest, nearest = score.max(1)
        labels[part] = nearest
        distance[part] = rows.square().sum(1) - 2 * highest
        sums.index_add_(0, nearest, to_whole(rows, points.scale))
    distance.clamp_(min=0)
    objective = to_whole(distance, points.distance_scale).sum()
    counts = labels.bincount(minlength=k)
    return labels, distance, *map(distributed.all_reduce_sum, (sums, counts, objective))


def centre(points, distance, sums, counts):
    """The mean of each cluster (k, D). An empty cluster takes a row far from its centroid."""
    means = sums / points.scale / counts.clamp(min=1)[:, None]
    centroids = means.float()
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        centroids[empty] = points.take(farthest(points, distance, len(empty)))
    return centroids


def farthest(points, distance, count):
    """The numbers (count,) of the rows farthest from their centroids, among all processes' rows.

    Of equal distances the smaller row number goes first: otherwise the choice would depend on how
    the rows are shared out.
    """
    # Floats that are not negative sort as their bits do; below them stands the row, from its end.
    last = 2**32 - 1
    row = torch.arange(points.first, points.last, device=distance.device)
    key = (distance.view(torch.int32).long() << 32) | (last - row)
    highest = torch.full((count,), -1, device=key.device)
    local = min(count, len(key))
    highest[:local] = key.topk(local).values
    key = distributed.gather(highest).topk(count).values
    return last - (key & last)


def choose_starts(points, k, seed, restarts, start):
    """The rows (restarts, k) that each restart begins from. The processes take turns at them."""
    starts = torch.zeros(restarts, k, dtype=torch.long, device=points.x.device)
    seeds = np.random.SeedSequence(seed).generate_state(restarts)
    for restart in range(distributed.rank(), restarts, distributed.world_size()):
        # The generator lives on the CPU, which draws the same for every device.
        generator = torch.Generator().manual_seed(int(seeds[restart]))
        starts[restart] = STARTS[start](points, k, generator)
    return distributed.all_reduce_sum(starts)


def random_rows(points, k, generator):
    """K different rows (k,), by lot."""
    return torch.randperm(len(points.x), generator=generator)[:k].to(points.x.device)


def plus_plus_rows(points, k, generator):
    """k-means++ on a sample, by a few large matrix products instead of k passes. -> rows (k,)

    k-means++ (Arthur & Vassilvitskii, 2007) draws one centroid after the other by squared distance
    to those before; greedy k-means++, scikit-learn's, takes the best of some draws each time. Here,
    as in k-means|| (Bahmani et al., 2012), many are drawn at once, three times as many as wanted:
    k by lot, the others in four rounds by squared distance. Then those are dropped without which
    the sum of squared distances grows least, until k are left. All of it costs what about six
    products of the sample with k centroids cost.

    Measured beside greedy k-means++ on all rows (benchmarks/kmeans.py), after equal iterations the
    objective is some % smaller where there are as many groups as clusters, and within 1 % where
    there are far fewer or none. At 1.5 to 2 groups a cluster, its worst, it was 1.1 to 1.2 %
    larger.
    """
    sample = random_rows(points, sample_size(len(points.x), k), generator)
    x = points.take(sample)  # (m, D)
    rows, scores, candidates = draw_candidates(x, k, generator)
    return sample[rows[drop_candidates(x, k, rows, scores, candidates)]]


def sample_size(n, k):
    return min(n, max(SAMPLE_ROWS * k, n // SAMPLE_PART, SAMPLE_LEAST))


def draw_candidates(x, k, generator):
    """Rows of x (m, D) that may become centroids.

    Returns:
        the rows (c,), k <= c <= 3 k, and the two highest scores (m, 2) of each row of x, with the
        candidates (m, 2), counted from 0 to c - 1, that have them.
    """
    square = x.square().sum(1)
    scale = exact_scale(4 * square.max().item(), len(x))
    rows = torch.randperm(len(x), generator=generator)[:k].to(x.device)
    scores, candidates = two_nearest(x, x[rows])
    for _ in range(DRAWS):
        distance = (square - 2 * scores[:, 0]).clamp_(min=0)
        distance[rows] = 0
        mass = to_whole(distance, scale).cumsum(0)
        if mass[-1] == 0:
            break
        chance = torch.rand((CANDIDATES - 1) * k // DRAWS, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(mass, chance.to(x.device) * mass[-1], right=True)
        drawn = drawn.clamp(max=len(x) - 1).unique()
        if len(drawn) == 0:
            break
        more_scores, more = two_nearest(x, x[drawn])
        scores, order = torch.cat([scores, more_scores], 1).topk(2)  # of (m, 4)
        candidates = torch.cat([candidates, more + len(rows)], 1).gather(1, order)
        rows = torch.cat([rows, drawn])
    return rows, scores, candidates


def drop_candidates(x, k, rows, scores, candidates):
    """Drop those of the candidates x[rows] that are missed least, until k are left. -> which (k,)

    A candidate is missed as much as the squared distances grow when its rows go to the second
    nearest. Of two candidates that are nearest and second nearest to a row, one round drops one at
    most; if that still holds up the end after many rounds, it is given up.
    """
    scale = exact_scale(4 * x.square().sum(1).max().item(), len(x))
    is_left = torch.ones(len(rows), dtype=torch.bool, device=x.device)
    left = len(rows)
    for turn in range(len(rows)):
        if left == k:
            break
        growth = to_whole(scores[:, 0] - scores[:, 1], scale)
        missed = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
        missed.index_add_(0, candidates[:, 0], growth)
        missed[~is_left] = math.inf
        order = missed.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=x.device)

        wanted = min(left - k, math.ceil(DROP * left))
        is_dropped = rank < wanted
        if turn < CAREFUL_ROUNDS:
            pairs = candidates[is_dropped[candidates].all(1)]
            is_dropped[order[rank[pairs].amax(1)]] = False
        is_left &= ~is_dropped
        places = is_left.nonzero()[:, 0]
        left = len(places)

        changed = is_dropped[candidates].any(1).nonzero()[:, 0]
        scores[changed], nearest = two_nearest(x, x[rows[places]], changed)
        candidates[changed] = places[nearest]
    return places if left < len(rows) else torch.arange(k, device=x.device)


def two_nearest(x, centroids, rows=None):
    """The two highest scores x c - |c|^2 / 2 of (some) rows of x, and whose they are: (r, 2) twice.

    Where there is one centroid alone, it stands twice, and the second score is -inf.
    """
    r, k = len(x) if rows is None else len(rows), len(centroids)
    scores = torch.empty(r, 2, device=x.device)
    nearest = torch.empty(r, 2, dtype=torch.long, device=x.device)
    half = centroids.square().sum(1) / -2
    size = min(r, chunk_rows(x, k))
    buffer = torch.empty(size, k, device=x.device)
    for i in range(0, r, max(1, size)):
        part = slice(i, min(i + size, r))
        some = x[part] if rows is None else x[rows[part]]
        score = torch.addmm(half, some, centroids.T, out=buffer[: len(some)])  # (.., k)
        for place in (0, 1):
            scores[part, place], nearest[part, place] = score.max(1)
            score.scatter_(1, nearest[part, place, None], -math.inf)
    return scores, nearest


STARTS = {"kmeans++": plus_plus_rows, "random": random_rows}


def confidence(z, centroids, labels, temperature, kind):
    """How sure each row's cluster is. The processes share the rows out.

    Args:
        z: (n, D), unit. centroids: (k, D), unit. labels: (n,) the cluster of each row.
        kind: `similarity` to the own centroid, or `softmax`: the logarithm of the softmax over all
            centroids, at the own one.

    Returns:
        (n,), the same on every process. Beyond z a chunk's scores are held, and 4 n bytes.
    """
    confidences = torch.zeros(len(z), device=z.device)
    size = chunk_rows(z, len(centroids))
    first, last = share(len(z), size)
    for i in range(first, last, size):
        part = slice(i, min(i + size, last))
        similarity = z[part] @ centroids.T  # (r, k)
        if kind == "softmax":
            similarity = similarity.div_(temperature)
        own = similarity.gather(1, labels[part, None])[:, 0]
        confidences[part] = own - similarity.logsumexp(1) if kind == "softmax" else own
    return distributed.all_reduce_sum(confidences)


def validity(accepted, pseudo, labels):
    """What the clusters are worth, for the log: over all pairs of images, exactly.

    Args:
        accepted: (n,) pseudo labels, -1 where not accepted. pseudo: (n,) of all images.
        labels: (n,) the true ones.

    Returns:
        precision: of the pairs taken for one class, the share that is one, in %; recall: of the
        pairs of one class, the share found, in %; NMI: the mutual information of pseudo and true
        labels over the mean of their entropies. Memory: a few n, whatever the number of clusters.
    """
    figures = {}
    is_accepted = accepted >= 0
    if is_accepted.any():
        found = count_pairs(sizes(accepted[is_accepted]))
        right = count_pairs(joint_sizes(accepted[is_accepted], labels[is_accepted]))
        real = count_pairs(sizes(labels))
        if found:
            figures["precision %"] = float(100 * right / found)
        figures["recall %"] = float(100 * right / real.clamp(min=1))
    of_clusters, of_classes = entropy(sizes(pseudo)), entropy(sizes(labels))
    mutual = of_clusters + of_classes - entropy(joint_sizes(pseudo, labels))
    mean = (of_clusters + of_classes) / 2
    return figures | {"NMI": float(mutual / mean.clamp(min=1e-300))}


def sizes(labels):
    """(n,) labels from 0 -> how often each occurs, in float64."""
    return labels.bincount().double()


def joint_sizes(a, b):
    """(n,) and (n,) -> how often each pair of labels occurs that does occur, in float64."""
    return (a * (b.max() + 1) + b).unique(return_counts=True)[1].double()


def count_pairs(counts):
    """Ordered pairs of two members of one group, of groups of these sizes."""
    return (counts * (counts - 1)).sum()


def entropy(counts):
    """Of a label, in nats, from the sizes of its groups."""
    share_of_all = counts / counts.sum()
    return -(share_of_all * share_of_all.clamp(min=1e-300).log()).sum()
