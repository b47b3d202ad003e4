"""What a host hands to a loss, what a loss hands back, and the formula that every loss ends in."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Similarity of a candidate that may not be used: e^{NEG_INF / t} is 0. It is finite, so that a
# query that is left without negatives has loss 0 and gradient 0, not NaN.
NEG_INF = -1e30

# What a loss says of itself for the log, by name.
Figures = dict[str, Tensor | float]


class Contrast(NamedTuple):
    """N queries, their keys and the candidates for their negatives.

    Vectors are float32 and of unit length (a mean of keys is shorter). Only the query carries a
    gradient, unless a host says otherwise. At most one of mask and self_index is given.
    """

    query: Tensor  # (N, D)
    positive: Tensor  # (N, M, D)  M keys of each query's own image
    negative: Tensor  # (K, D)     candidates, shared by all queries
    index: Tensor  # (N,)       data-set index of each query's image
    negative_index: Tensor  # (K,)       data-set index of each candidate's image, -1 if it has none
    mask: Tensor | None = None  # (N, K)     False where a candidate may not be a negative
    self_index: Tensor | None = None  # (N,)       the one candidate that may not; cheaper than mask


class Negatives(NamedTuple):
    """The negatives of each query, by their similarities to it."""

    similarity: Tensor  # (..., N, k)  NEG_INF where a query has fewer than k
    candidate: Tensor | None = None  # (..., N, k)  rows of Contrast.negative; None: all, in order


class Output(NamedTuple):
    """What a loss returns. All but the loss is for diagnostics.py, and may be left out."""

    loss: Tensor  # scalar
    # The negatives in the denominator. None: what `select` returns (or all candidates, where the
    # loss has no `select`), which the loss has summed over without forming their similarities.
    negatives: Negatives | None = None
    # The candidates that these were drawn from; None: the same.
    chosen: Negatives | None = None
    # Negatives beside them that are no candidates: a NamedTuple of tensors (..., N, k) that has
    # (or computes) their `similarity`.
    synthetic: Any = None


def similarity(contrast: Contrast) -> Tensor:
    """Return s_ij = q_i n_j (N, K), NEG_INF where candidate j may not be a negative of query i."""
    s = contrast.query @ contrast.negative.T  # (N, K)
    if contrast.mask is not None:
        return s.masked_fill(~contrast.mask, NEG_INF)
    if contrast.self_index is not None:
        return s.scatter_(1, contrast.self_index[:, None], NEG_INF)
    return s


def positive_similarity(contrast: Contrast) -> Tensor:
    """Return q_i k_i (N,), with the mean of the keys where a query has several."""
    return (contrast.query * contrast.positive.mean(1)).sum(1)


def info_nce(positive: Tensor, log_z: Tensor, t: float) -> Tensor:
    """InfoNCE (van den Oord et al., 2018), of which each method sums over negatives of its own.

        L = mean_i -log( e^{p_i / t} / (e^{p_i / t} + Z_i) )

    Args:
        positive: (N,) similarities p_i of the queries to their keys.
        log_z: (..., N) log Z_i = log sum_j e^{s_ij / t}, over the negatives.
        t: the temperature.

    Returns:
        L, a scalar.
    """
    # -log( e^a / (e^a + Z) ) = log(1 + e^{log Z - a})
    return F.softplus(log_z - positive / t).mean()


def valid_candidates(contrast: Contrast) -> Tensor:
    """Return (N, K) bool: which candidates may be negatives of which query.

    In a list of losses, after IFND with its L levels, it is (L, N, K).
    """
    if contrast.mask is not None:
        return contrast.mask
    shape = len(contrast.query), len(contrast.negative)
    is_valid = torch.ones(shape, dtype=torch.bool, device=contrast.query.device)
    if contrast.self_index is None:
        return is_valid
    return is_valid.scatter_(1, contrast.self_index[:, None], False)


def same_class(contrast: Contrast, labels: Tensor) -> Tensor:
    """Return (N, K) bool: which candidates are of the query's class, by true labels (n_data,)."""
    query_class = labels[contrast.index]  # (N,)
    candidate_class = labels[contrast.negative_index.clamp(min=0)]  # (K,)
    return (query_class[:, None] == candidate_class) & (contrast.negative_index >= 0)
