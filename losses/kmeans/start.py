"""The rows from which Lloyd's iterations start."""

import math

import torch
from torch import Tensor

from .rows import Points, chunk_rows, exact_scale, to_whole

# k-means++ looks at so many rows a centroid, at this part of all rows, and at no fewer than these,
# whichever is most.
SAMPLE_ROWS = 10
SAMPLE_PART = 16
SAMPLE_LEAST = 4096

# It draws so many candidates a centroid in so many rounds, and drops at most this part of those
# left in a round. So many rounds take care not to drop two that are near to one another.
CANDIDATES = 3
DRAWS = 4
DROP = 1 / 4
CAREFUL_ROUNDS = 32


def random_rows(points: Points, k: int, generator: torch.Generator) -> Tensor:
    """Return k different rows (k,), by lot."""
    return torch.randperm(len(points.x), generator=generator)[:k].to(points.x.device)


def plus_plus_rows(points: Points, k: int, generator: torch.Generator) -> Tensor:
    """Return rows (k,) by k-means++ on a sample, in a few matrix products instead of k passes.

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


def sample_size(n: int, k: int) -> int:
    """Return how many of n rows k-means++ looks at."""
    return min(n, max(SAMPLE_ROWS * k, n // SAMPLE_PART, SAMPLE_LEAST))


def draw_candidates(x: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows of x (m, D) that may become centroids.

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
        u = torch.rand((CANDIDATES - 1) * k // DRAWS, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(mass, u.to(x.device) * mass[-1], right=True)
        drawn = drawn.clamp(max=len(x) - 1).unique()
        if len(drawn) == 0:
            break
        more_scores, more = two_nearest(x, x[drawn])
        scores, order = torch.cat([scores, more_scores], 1).topk(2)  # of (m, 4)
        candidates = torch.cat([candidates, more + len(rows)], 1).gather(1, order)
        rows = torch.cat([rows, drawn])
    return rows, scores, candidates


def drop_candidates(x: Tensor, k: int, rows: Tensor, scores: Tensor, candidates: Tensor) -> Tensor:
    """Drop those of the candidates x[rows] that are missed least, until k are left.

    A candidate is missed as much as the squared distances grow when its rows go to the second
    nearest. Of two candidates that are nearest and second nearest to a row, one round drops one at
    most; if that still holds up the end after many rounds, it is given up.

    Args:
        x: (m, D).
        k: the number of clusters.
        rows: (c,) the candidates, rows of x.
        scores: (m, 2), see `draw_candidates`; it is written to.
        candidates: (m, 2), too.

    Returns:
        which of the candidates are left (k,).
    """
    scale = exact_scale(4 * x.square().sum(1).max().item(), len(x))
    is_left = torch.ones(len(rows), dtype=torch.bool, device=x.device)
    left = torch.arange(len(rows), device=x.device)
    for turn in range(len(rows)):
        if len(left) == k:
            break
        growth = to_whole(scores[:, 0] - scores[:, 1], scale)
        missed = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
        missed.index_add_(0, candidates[:, 0], growth)
        missed[~is_left] = math.inf
        order = missed.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=x.device)

        is_dropped = rank < min(len(left) - k, math.ceil(DROP * len(left)))
        if turn < CAREFUL_ROUNDS:
            pairs = candidates[is_dropped[candidates].all(1)]
            is_dropped[order[rank[pairs].amax(1)]] = False
        is_left &= ~is_dropped
        left = is_left.nonzero()[:, 0]

        changed = is_dropped[candidates].any(1).nonzero()[:, 0]
        scores[changed], nearest = two_nearest(x, x[rows[left]], changed)
        candidates[changed] = left[nearest]
    return left


def two_nearest(x: Tensor, centroids: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the two highest scores x c - |c|^2 / 2 of rows of x, and whose they are.

    Args:
        x: (m, D).
        centroids: (k, D). Where there is one alone, it stands twice, and the second score is -inf.
        rows: (r,) rows of x; None: all.

    Returns:
        scores (r, 2) and centroids (r, 2), the highest first.
    """
    r, k = len(x) if rows is None else len(rows), len(centroids)
    scores = torch.empty(r, 2, device=x.device)
    nearest = torch.empty(r, 2, dtype=torch.long, device=x.device)
    half_square = centroids.square().sum(1) / -2  # (k,)
    size = min(r, chunk_rows(x, k))
    buffer = torch.empty(size, k, device=x.device)
    for i in range(0, r, max(1, size)):
        chunk = slice(i, min(i + size, r))
        points = x[chunk] if rows is None else x[rows[chunk]]
        score = torch.addmm(half_square, points, centroids.T, out=buffer[: len(points)])  # (.., k)
        for column in (0, 1):
            scores[chunk, column], nearest[chunk, column] = score.max(1)
            score.scatter_(1, nearest[chunk, column, None], -math.inf)
    return scores, nearest
