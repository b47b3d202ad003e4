"""The formulas as the papers write them: float64, one query and one candidate at a time, vectors mixed, covariances formed, lists sorted."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from losses import Contrast


def contrast(N=12, K=200, D=16, M=1, masked=False, seed=0, dtype=torch.float32, n_data=None):
    """Random unit vectors. masked: False, True (a mask at random) or "own" (one candidate of each query may not serve). n_data: the queries' and
    candidates' images are drawn from so many; else all differ."""
    g = torch.Generator().manual_seed(seed)
    unit = lambda *shape: F.normalize(
        torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1
    ).to(dtype)
    mask = torch.rand(N, K, generator=g) < 0.8 if masked is True else None
    own = torch.randint(K, (N,), generator=g) if masked == "own" else None
    q, k, n = unit(N, D).requires_grad_(), unit(N, M, D), unit(K, D)
    index, negative_index = (
        (torch.arange(N), torch.arange(K))
        if n_data is None
        else (torch.randint(n_data, (m,), generator=g) for m in (N, K))
    )
    return Contrast(q, k, n, index, negative_index, mask, own)


def nearest(c, i, allowed=None):
    """The candidates that may serve query i, nearest first."""
    allowed = [
        j
        for j in range(len(c.negative))
        if (c.mask is None or c.mask[i, j])
        and (c.own is None or c.own[i] != j)
        and (allowed is None or j in allowed)
    ]
    similarity = [(c.query[i].double() @ c.negative[j].double()).item() for j in allowed]
    return [allowed[a] for a in np.argsort(-np.array(similarity), kind="stable")]


def ring(ranked, inner, outer):
    first = math.floor(inner * len(ranked) + 1e-9)
    return ranked[first : max(math.floor(outer * len(ranked) + 1e-9), first + 1)]


def info_nce(q, k, negatives, t):
    """-log( e^{q k / t} / (e^{q k / t} + sum e^{q n / t}) ) of one query."""
    positive = torch.exp(q @ k / t)
    return -torch.log(positive / (positive + sum(torch.exp(q @ n / t) for n in negatives)))


def mean_over_queries(c, of_one, *also):
    """of_one(i, query (N, D)) -> its loss. -> the mean, float64, and its gradient to the query (and to what else is asked for)."""
    query = c.query.detach().double().requires_grad_()
    loss = sum(of_one(i, query) for i in range(len(query))) / len(query)
    gradients = torch.autograd.grad(loss, [query, *also])
    return (loss, gradients[0]) if not also else (loss, *gradients)


def agrees(ours, c, expected, gradient, tolerance=1e-6):
    """A fp32 loss and its gradient to the query are these, to 1e-6 of their size."""
    assert abs(ours.item() - expected.item()) < tolerance * max(1, abs(expected.item()))
    got = torch.autograd.grad(ours, c.query)[0]
    assert (got - gradient).abs().max() < tolerance * max(1, gradient.abs().max().item())


SWEEP = [
    (N, K, t, M, masked)
    for N, K in ((3, 7), (12, 200))
    for t in (0.07, 0.5)
    for M in (1, 5)
    for masked in (False, True, "own")
]
