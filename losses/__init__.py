"""What a host hands to a loss."""
from typing import NamedTuple

from torch import Tensor


class Contrast(NamedTuple):
    """N queries and whom they meet. Vectors are unit length, fp32; unless a host says so, only the query carries a gradient."""

    query: Tensor                    # (N, D)
    positive: Tensor                 # (N, M, D)  M keys of each query's own image
    negative: Tensor                 # (K, D)     candidates, shared by all queries
    index: Tensor                    # (N,)       data-set index of the query's image
    negative_index: Tensor           # (K,)       data-set index of each candidate, -1 where none
    mask: Tensor | None = None       # (N, K)     False where a candidate may not serve as this query's negative


def false_negatives(contrast, used, labels):
    """For the log only: how many of the negatives are false, that is, of the query's own class.

    used: (n, K) bool, the candidates that serve the first n queries as negatives; labels: (n_data,) or None.
    -> the share of candidates used and, with labels, the share of false negatives among the used and among those left out, in %.
    """
    n = len(used)
    there = contrast.negative_index >= 0                                               # (K,) not a queue's random start
    allowed = there.expand(n, -1) if contrast.mask is None else contrast.mask[:n] & there
    used, unused = used & allowed, allowed & ~used
    share = lambda some, whole: 100 * some.sum() / whole.sum().clamp(min=1)
    figures = {"used %": share(used, allowed)}
    if labels is not None:
        false = labels[contrast.index[:n], None] == labels[contrast.negative_index.clamp(min=0)]     # (n, K)
        figures |= {"false negatives used %": share(false & used, used), "false negatives left out %": share(false & unused, unused)}
    return figures
