"""What a host hands to a loss, and what every loss asks of it.

A loss is an nn.Module with forward(contrast, epoch) -> (scalar, {"K": negatives a query, other figures for the log}); epoch is a float:
12.5 is half-way through the 13th. It may have before_epoch(epoch, extract), which the script calls at the start of each.
To stand in a list (losses/together.py) it has one or both of
    negatives(contrast, s, epoch) -> (s, which, figures)      chooses or makes negatives
    objective(contrast, s, epoch) -> (scalar, figures)        treats positives
on s: (..., N, K), the similarities of `similarity`, which some method before it may have narrowed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NEVER = -1e30  # "similarity" of a candidate that may not serve: e^NEVER is 0. Finite, so a query left with none has loss 0, gradient 0


class Contrast(NamedTuple):
    """N queries and whom they meet. Vectors are unit length, fp32 (a mean of keys is shorter); unless a host says so, only the query
    carries a gradient.
    """

    query: Tensor  # (N, D)
    positive: Tensor  # (N, M, D)  M keys of each query's own image
    negative: Tensor  # (K, D)     candidates, shared by all queries
    index: Tensor  # (N,)       data-set index of the query's image
    negative_index: Tensor  # (K,)       data-set index of each candidate, -1 where none
    mask: Tensor | None = (
        None  # (N, K)     False where a candidate may not serve as this query's negative
    )
    own: Tensor | None = (
        None  # (N,)       the one candidate of each query that may not serve: cheaper than a mask, and either or neither is given
    )


def serves(contrast, queries=None):
    """(N, K) bool: which candidates may serve; of the first so many queries. (In a list of losses, after IFND: (L, N, K).)"""
    if contrast.mask is not None:
        return contrast.mask[..., :queries, :]
    every = torch.ones(
        len(contrast.query[:queries]),
        len(contrast.negative),
        dtype=torch.bool,
        device=contrast.query.device,
    )
    return every if contrast.own is None else every.scatter_(1, contrast.own[:queries, None], False)


def similarity(contrast):
    """s_ij = q_i n_j, (N, K); NEVER where a candidate may not serve."""
    s = contrast.query @ contrast.negative.T
    if contrast.mask is not None:
        return s.masked_fill(~contrast.mask, NEVER)
    return s if contrast.own is None else s.scatter_(1, contrast.own[:, None], NEVER)


def count(s):
    """How many negatives a query has, on average over the first 32: a figure for the log, not worth a pass over all of s."""
    return (s[..., :32, :] > NEVER).sum(-1).float().mean()


def false_negatives(contrast, s, which, labels):
    """For the log only, of the first 32 queries: how many of the negatives are false, that is, of the query's own class.

    s: (..., N, k) similarities in use, or of the first queries alone; which: (..., N, k) the candidates they are of, None for all K in order;
    labels: (n_data,) or None.
    -> the share of candidates used and, with labels, the share of false negatives among the used and among those left out, in %.
    """
    used = s[..., :32, :].detach() > NEVER  # (..., 32, k)
    if which is not None:
        used = used.new_zeros(*used.shape[:-1], len(contrast.negative)).scatter_(
            -1, which[..., :32, :], used
        )
    allowed = ((contrast.negative_index >= 0) & serves(contrast, 32)).expand_as(
        used
    )  # (..., 32, K) not a queue's random start
    used, unused = used & allowed, allowed & ~used
    share = lambda some, whole: 100 * some.sum() / whole.sum().clamp(min=1)
    figures = {"used %": share(used, allowed)}
    if labels is not None:
        false = of_one_class(contrast, labels)
        figures |= {
            "false negatives used %": share(false & used, used),
            "false negatives left out %": share(false & unused, unused),
        }
    return figures


def unchosen(contrast):
    """S as `count` and `false_negatives` want it where no candidate is left out and s itself is never formed: (32, K), 0 or NEVER."""
    return torch.where(serves(contrast, 32), 0.0, NEVER)


def of_one_class(contrast, labels, queries=32):
    """(queries, K) bool: candidates with the class of the query, by the true labels (n_data,)."""
    own, theirs = labels[contrast.index[:queries]], labels[contrast.negative_index.clamp(min=0)]
    return (own[:, None] == theirs) & (contrast.negative_index >= 0)
