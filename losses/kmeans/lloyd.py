"""Lloyd's iterations, from several starts. See the package's docstring."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .rows import Points, all_gather, all_reduce_sum, rank, to_whole, world_size
from .start import plus_plus_rows, random_rows

STARTS = {"kmeans++": plus_plus_rows, "random": random_rows}


@contextlib.contextmanager
def no_progress(total: int, desc: str) -> Iterator[None]:
    """Stand where tqdm may stand, and show nothing."""
    yield None


@torch.no_grad()
def kmeans(
    x: Tensor,
    k: int,
    seed: int | tuple[int, ...] = 0,
    iterations: int = 20,
    restarts: int = 5,
    start: str = "kmeans++",
    progress: Callable[..., Any] = no_progress,
) -> tuple[Tensor, Tensor]:
    """Find the clusters with the smallest sum of squared distances among several runs.

    faiss trains on at most 256 (PCL: 1000) rows a centroid, drawn once, and then assigns all rows.
    Here every iteration sees all rows.

    Args:
        x: (n, D) float32, n >= k, the same on every process.
        k: the number of clusters.
        seed: a whole number, or several. The global generator is left alone.
        iterations: Lloyd's, at most; a run ends sooner when its centroids stand still.
        restarts: the number of runs.
        start: `kmeans++`, on a sample (see `plus_plus_rows`), or `random`: k different rows, as
            faiss starts, and so PCL's code.
        progress: tqdm, or what is called and used like it.

    Returns:
        centroids (k, D) and the cluster of each row (n,), the same on every process.

    Raises:
        ValueError: x has fewer rows than k, or values that are not finite, or start is unknown.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"{k} clusters of {len(x)} rows")
    if start not in STARTS:
        raise ValueError(f"start {start!r} of k-means is not one of {', '.join(STARTS)}")
    points = Points(x, k)
    best = None
    with progress(total=restarts * (iterations + 1), desc=f"{k} clusters") as bar:
        for rows in choose_starts(points, k, seed, restarts, start):
            run = lloyd(points, points.take(rows), iterations, bar)
            if best is None or run[0] < best[0]:
                best = run
    _, centroids, local_labels = best
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    labels[points.first : points.last] = local_labels
    return centroids + points.mean, all_reduce_sum(labels)


def lloyd(
    points: Points, centroids: Tensor, iterations: int, bar: Any = None
) -> tuple[float, Tensor, Tensor]:
    """Run Lloyd's iterations.

    Args:
        points: n rows.
        centroids: (k, D) to begin with.
        iterations: at most so many.
        bar: a progress bar, or None.

    Returns:
        the sum of squared distances times points.distance_scale, the centroids (k, D), and the
        clusters of this process's rows.
    """
    for iteration in range(iterations + 1):
        labels, distance, sums, counts, objective = assign(points, centroids)
        if bar is not None:
            bar.update()
        if iteration == iterations:
            break
        moved = centre(points, distance, sums, counts)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return objective.item(), centroids, labels


def assign(points: Points, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Give each row to its nearest centroid (k, D).

    Returns:
        of this process's rows the clusters (r,) and squared distances (r,); of all rows the sums
        of coordinates (k, D) and the counts (k,) of each cluster, and the sum of squared distances.
        Sums are whole numbers, times points.scale and points.distance_scale.
    """
    k, dim = centroids.shape
    device = centroids.device
    labels = torch.empty(len(points), dtype=torch.long, device=device)
    distance = torch.empty(len(points), device=device)
    sums = torch.zeros(k, dim, dtype=torch.float64, device=device)
    half_square = centroids.square().sum(1) / -2  # (k,)
    buffer = torch.empty(min(len(points), points.chunk_rows), k, device=device)
    for chunk, rows in points.chunks():
        # The nearest centroid has the largest x c - |c|^2 / 2.
        score = torch.addmm(half_square, rows, centroids.T, out=buffer[: len(rows)])  # (r, k)
        highest, nearest = score.max(1)
        labels[chunk] = nearest
        distance[chunk] = rows.square().sum(1) - 2 * highest
        sums.index_add_(0, nearest, to_whole(rows, points.scale))
    distance.clamp_(min=0)
    objective = to_whole(distance, points.distance_scale).sum()
    counts = labels.bincount(minlength=k)
    return labels, distance, *map(all_reduce_sum, (sums, counts, objective))


def centre(points: Points, distance: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of each cluster (k, D). An empty one takes a row far from its centroid."""
    means = sums / points.scale / counts.clamp(min=1)[:, None]
    centroids = means.float()
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        centroids[empty] = points.take(farthest(points, distance, len(empty)))
    return centroids


def farthest(points: Points, distance: Tensor, count: int) -> Tensor:
    """Return the numbers (count,) of the rows, of all processes, farthest from their centroids.

    Of equal distances the smaller row number goes first: otherwise the choice would depend on how
    the rows are shared out.
    """
    # Floats that are not negative sort as their bits do; below them stands the row, from its end.
    last = 2**32 - 1
    row = torch.arange(points.first, points.last, device=distance.device)
    key = (distance.view(torch.int32).long() << 32) | (last - row)
    highest = torch.full((count,), -1, device=key.device)
    n_local = min(count, len(key))
    highest[:n_local] = key.topk(n_local).values
    key = all_gather(highest).topk(count).values
    return last - (key & last)


def choose_starts(
    points: Points, k: int, seed: int | tuple[int, ...], restarts: int, start: str
) -> Tensor:
    """Return the rows (restarts, k) that each run begins from. The processes take turns at them."""
    starts = torch.zeros(restarts, k, dtype=torch.long, device=points.x.device)
    seeds = np.random.SeedSequence(seed).generate_state(restarts)
    for restart in range(rank(), restarts, world_size()):
        # The generator lives on the CPU, which draws the same for every device.
        generator = torch.Generator().manual_seed(int(seeds[restart]))
        starts[restart] = STARTS[start](points, k, generator)
    return all_reduce_sum(starts)
