"""The formulas as the papers write them: slow, in float64, one query and one candidate at a time.

Vectors are mixed, covariances formed, lists sorted. A loss has its literal form here, so that
test_every_loss.py finds it: for losses/x.py a function literal_x(c, t), which returns

    a loss X at temperature t, of random settings that test all of it, and
    of_one(i, query): what its formula says of query i alone, a float64 scalar.

    def literal_x(c, t):
        def of_one(i, query):
            negatives = [c.negative[j].double() for j in nearest(c, i)]
            return info_nce(query[i], c.positive[i].double().mean(0), negatives, t)

        return X(temperature=t), of_one

c is a `contrast` with the images 0 to N_DATA - 1, query the (N, D) queries in float64, which carry
a gradient. The loss is called at EPOCH.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from losses import Contrast
from losses.diagnostics import step_diagnostics
from losses.ifnd import IFND
from losses.jcl import JCL
from losses.mochi import MoCHi
from losses.nce import NCE
from losses.ring import Ring

N_DATA = 30
EPOCH = 3.0

SWEEP = [
    (N, K, t, M, masked)
    for N, K in ((3, 7), (12, 200))
    for t in (0.07, 0.5)
    for M in (1, 5)
    for masked in (False, True, "self")
]


def literal_nce(c, t):
    def of_one(i, query):
        negatives = vectors(c, nearest(c, i))
        return info_nce(query[i], mean_key(c, i), negatives, t)

    return NCE(temperature=t), of_one


def literal_ring(c, t, inner=0.1, outer=0.4):
    def of_one(i, query):
        negatives = vectors(c, ring(nearest(c, i), inner, outer))
        return info_nce(query[i], mean_key(c, i), negatives, t)

    return Ring(9, temperature=t, inner=inner, outer=outer, anneal_epochs=0), of_one


def literal_jcl(c, t, lam=1.0):
    def of_one(i, query):
        q, k = query[i], c.positive[i].double()  # (D,), (M, D)
        mu = k.mean(0)
        Sigma = sum(torch.outer(k_m - mu, k_m - mu) for k_m in k) / len(k)  # (D, D)
        positive = torch.exp(q @ mu / t + lam / (2 * t**2) * (q @ Sigma @ q))
        Z = positive + sum(torch.exp(q @ n / t) for n in vectors(c, nearest(c, i)))
        return torch.log(Z) - q @ mu / t

    return JCL(epochs=10, temperature=t, lam=lam, ramp=False), of_one


def literal_mochi(c, t, hardest=3, mixed=9, query_mixed=5, negative=None):
    """negative: the candidates in float64, where their gradient is wanted, too."""
    n = c.negative.double() if negative is None else negative
    loss_fn = MoCHi(
        temperature=t, hardest=hardest, mixed=mixed, query_mixed=query_mixed, warmup_epochs=0
    )
    drawn = fix_draws(loss_fn, len(c.query))

    def of_one(x, query):
        candidates = nearest(c, x)
        hard = [n[j].detach() for j in candidates[:hardest]]
        points = [n[j] for j in candidates] + mix(query[x].detach(), hard, [d[x] for d in drawn])
        return info_nce(query[x], mean_key(c, x), points, t)

    return loss_fn, of_one


def literal_ifnd(c, t, mode="eliminate", loss_fn=None):
    if loss_fn is None:
        loss_fn = clustered(temperature=t, mode=mode)

    def of_one(i, query):
        levels = range(len(loss_fn.pseudo))
        return sum(of_level(i, query, level) for level in levels) / len(levels)

    def of_level(i, query, level):
        q, k, candidates = query[i], mean_key(c, i), nearest(c, i)
        false = [j for j in candidates if j in false_negatives(c, loss_fn, level, i)]
        if loss_fn.mode == "eliminate":
            return info_nce(q, k, vectors(c, [j for j in candidates if j not in false]), t)
        everything = [k, *vectors(c, candidates)]
        Z = sum(torch.exp(q @ v / t) for v in everything)
        friends = [k, *vectors(c, false)]
        return -sum(torch.log(torch.exp(q @ p / t) / Z) for p in friends) / len(friends)

    return loss_fn, of_one


def contrast(N=12, K=200, D=16, M=1, masked=False, seed=0, dtype=torch.float32, n_data=None):
    """Random unit vectors.

    masked: False, True (a mask at random) or "self" (one candidate of each query may not be used).
    n_data: the queries' and candidates' images are drawn from so many; None: all differ.
    """
    g = torch.Generator().manual_seed(seed)

    def unit(*shape):
        x = torch.randn(*shape, generator=g, dtype=torch.float64)
        return F.normalize(x, dim=-1).to(dtype)

    mask = torch.rand(N, K, generator=g) < 0.8 if masked is True else None
    self_index = torch.randint(K, (N,), generator=g) if masked == "self" else None
    q, k, n = unit(N, D).requires_grad_(), unit(N, M, D), unit(K, D)
    index, negative_index = torch.arange(N), torch.arange(K)
    if n_data is not None:
        index, negative_index = (torch.randint(n_data, (m,), generator=g) for m in (N, K))
    return Contrast(q, k, n, index, negative_index, mask, self_index)


def all_equal(N, K, n_data=None):
    """A contrast whose vectors are all the same."""
    c = contrast(N=N, K=K, n_data=n_data)
    q = c.query.detach()[:1]
    return c._replace(
        query=q.expand(N, -1).clone().requires_grad_(),
        positive=q.expand(N, 1, -1),
        negative=q.expand(K, -1),
    )


def figures_of(loss_fn, c, epoch=0.0, labels=None):
    """What is logged of one step."""
    output = loss_fn(c, epoch)
    return step_diagnostics(loss_fn, [c], [output], labels, epoch)


def nearest(c, i, allowed=None):
    """Return the candidates that may be negatives of query i (and are allowed), nearest first."""
    valid = [
        j
        for j in range(len(c.negative))
        if (c.mask is None or c.mask[i, j])
        and (c.self_index is None or c.self_index[i] != j)
        and (allowed is None or j in allowed)
    ]
    similarity = [(c.query[i].double() @ c.negative[j].double()).item() for j in valid]
    return [valid[rank] for rank in np.argsort(-np.array(similarity), kind="stable")]


def vectors(c, candidates):
    return [c.negative[j].double() for j in candidates]


def mean_key(c, i):
    return c.positive[i].double().mean(0)


def ring(ranked, inner, outer):
    first = math.floor(inner * len(ranked) + 1e-9)
    return ranked[first : max(math.floor(outer * len(ranked) + 1e-9), first + 1)]


def fix_draws(loss_fn, *shape):
    """Let a MoCHi use one draw again and again. -> i, j, j of h', a, b."""
    drawn = loss_fn.draw_points(torch.full((*shape, 1), loss_fn.hardest))
    loss_fn.draw_points = lambda size: drawn
    return drawn


def mix(q, hard, drawn):
    """MoCHi's points of one query: `drawn` of `fix_draws`, of the vectors `hard`."""
    i_, j_, j_query, a, b = drawn
    points = [a_.double() * hard[i] + (1 - a_.double()) * hard[j] for i, j, a_ in zip(i_, j_, a)]
    points += [b_.double() * q + (1 - b_.double()) * hard[j] for j, b_ in zip(j_query, b)]
    return [h / h.norm() for h in points]


def clustered(levels=(2, 5), acceptance=(0.6, 0.6), seed=0, **settings):
    """An IFND whose labels are as if assigned, by lot."""
    g = torch.Generator().manual_seed(seed)
    given = {"reassign_every": 5, "clusters": list(levels), "acceptance": list(acceptance)}
    loss_fn = IFND(10, N_DATA, **given, **settings)
    loss_fn.pseudo = torch.stack([torch.randint(k, (N_DATA,), generator=g) for k in levels])
    loss_fn.rank = torch.stack([torch.randperm(N_DATA, generator=g) + 1 for _ in levels])
    return loss_fn


def false_negatives(c, loss_fn, level, i):
    """F(q) of query i on a level of an IFND, label by label. Its acceptance is constant."""
    accepted = {
        image: label
        for image, (label, rank) in enumerate(
            zip(loss_fn.pseudo[level].tolist(), loss_fn.rank[level].tolist())
        )
        if rank <= loss_fn.acceptance[0] * N_DATA + 1e-9
    }
    query_label = accepted.get(c.index[i].item())
    if query_label is None:
        return []
    images = c.negative_index.tolist()
    return [j for j, image in enumerate(images) if accepted.get(image) == query_label]


def info_nce(q, k, negatives, t):
    """-log( e^{q k / t} / (e^{q k / t} + sum e^{q n / t}) ) of one query."""
    positive = torch.exp(q @ k / t)
    return -torch.log(positive / (positive + sum(torch.exp(q @ n / t) for n in negatives)))


def mean_over_queries(c, of_one, *also):
    """of_one(i, query (N, D)) -> its loss. -> their mean and its gradient to the query.

    Both are float64. also: tensors to which a gradient is wanted, too.
    """
    query = c.query.detach().double().requires_grad_()
    loss = sum(of_one(i, query) for i in range(len(query))) / len(query)
    return loss, *torch.autograd.grad(loss, [query, *also])


def assert_agrees(loss, c, expected, gradient, tolerance=1e-6):
    """Compare a float32 loss and its gradient to the query with the literal ones."""
    difference = abs(loss.item() - expected.item())
    assert difference < tolerance * max(1, abs(expected.item())), (
        f"the loss is {loss.item():.9g}, and its literal form says {expected.item():.9g}"
    )
    got = torch.autograd.grad(loss, c.query)[0]
    worst = (got - gradient).abs().argmax()
    difference = (got - gradient).abs().max()
    assert difference < tolerance * max(1, gradient.abs().max().item()), (
        f"the gradient to a coordinate of the query is {got.flatten()[worst].item():.9g}, and "
        f"that of the literal form {gradient.flatten()[worst].item():.9g}"
    )
