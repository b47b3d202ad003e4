"""The rows that are clustered: cut into chunks, shared out among processes, summed exactly."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

# Scores (row times centroid) computed at a time: 8 MB, about a CPU's cache; on a GPU 256 MB, so
# that the products outweigh the launching of kernels.
SCORES = {"cpu": 2**21, "cuda": 2**26}
CHUNK_ROWS = {"cpu": 2**11, "cuda": 2**16}

# float64 holds every whole number up to 2^53.
EXACT_BITS = 53


class Points:
    """The rows of x less their mean, which is the same clustering with fewer digits lost.

    Args:
        x: (n, D) float32, the same on every process.
        k: the number of clusters.

    Attributes:
        first: the first row of this process.
        last: the row after its last.
        mean: (D,) of all rows.
        scale: turns coordinates into whole numbers whose sums over all rows are exact.
        distance_scale: the same for squared distances.
    """

    def __init__(self, x: Tensor, k: int):
        self.x = x
        n, dim = x.shape
        self.chunk_rows = chunk_rows(x, k)
        self.first, self.last = local_rows(n, self.chunk_rows)

        low, high = (edge.item() for edge in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"k-means cannot cluster {n} rows with values that are not finite")
        self.mean = torch.zeros(dim, device=x.device)
        scale = exact_scale(max(-low, high), n)
        total = torch.zeros(dim, dtype=torch.float64, device=x.device)
        for _, rows in self.chunks():
            total += to_whole(rows, scale).sum(0)
        self.mean = (all_reduce_sum(total) / scale / n).float()

        # A mean lies between low and high, so no coordinate less its mean is larger than this.
        largest = high - low
        self.scale = exact_scale(largest, n)
        self.distance_scale = exact_scale(4 * dim * largest**2, n)

    def __len__(self) -> int:
        return self.last - self.first

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield this process's chunks: a slice of its rows, and these rows (r, D), centred."""
        for i in range(self.first, self.last, self.chunk_rows):
            j = min(i + self.chunk_rows, self.last)
            yield slice(i - self.first, j - self.first), self.x[i:j] - self.mean

    def take(self, rows: Tensor | slice) -> Tensor:
        """Return centred rows, by their numbers among all n."""
        return self.x[rows] - self.mean


def chunk_rows(x: Tensor, k: int) -> int:
    """Return how many rows of x meet k centroids at a time."""
    device = x.device.type
    return max(1, min(CHUNK_ROWS.get(device, 2**16), SCORES.get(device, 2**26) // k))


def local_rows(n: int, size: int) -> tuple[int, int]:
    """Return the first of this process's rows and the one after its last: whole chunks of size."""
    chunks = -(-n // size)
    first = chunks * rank() // world_size()
    last = chunks * (rank() + 1) // world_size()
    return min(n, first * size), min(n, last * size)


def exact_scale(largest: float, count: int) -> float:
    """Return the power of two that makes sums of whole numbers exact in float64.

    Args:
        largest: of the numbers, which are multiplied by it and rounded.
        count: how many of them are summed.
    """
    bits = EXACT_BITS - math.frexp(largest)[1] - math.frexp(count)[1]
    return 2.0 ** max(-100, min(100, bits))


def to_whole(x: Tensor, scale: float) -> Tensor:
    """Return x (float32) as whole numbers in float64. A power of two as scale rounds nothing."""
    return (x * scale).round_().double()


def is_parallel() -> bool:
    """Say whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if is_parallel() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_parallel() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum x over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """Return the (n,) of each process as (world * n,), in the order of the ranks."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)
