"""Rings of queries that have each a number of candidates of its own (see ring.py).

So it is on SimCLR, where a mask says who may be a negative of whom, and after IFND in a list.
"""

import torch
from torch import Tensor

from .base import NEG_INF, Negatives

# 0.29 * 100 is 28.999... in floating point.
EPS = 1e-9


def bounds_of_each(inner: float, outer: float, n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for queries that have n (..., N, 1) candidates each."""
    exact = n.cpu().double() if n.is_mps else n.double()  # MPS has no float64
    last = (outer * exact + EPS).long().clamp(min=1)
    first = torch.minimum((inner * exact + EPS).long(), last - 1)
    return first.to(n.device), last.to(n.device)


def ring_of_each(s: Tensor, first: Tensor, last: Tensor, outer: float) -> Negatives:
    """Return ranks first to last - 1 (..., N, 1), of each query its own; NEG_INF around them."""
    K = s.shape[-1]
    farthest_rank = min(int(outer * K + EPS) + 1, K)  # no ring ends farther
    ranked, candidate = s.topk(farthest_rank)  # (..., N, r), nearest first
    rank = torch.arange(farthest_rank, device=s.device)  # (r,)
    is_outside = (rank < first) | (rank >= last)  # (..., N, r)
    return Negatives(ranked.masked_fill(is_outside, NEG_INF), candidate)
