"""NCE and Ring against slow, literal, float64 versions of their formulas, values and gradients."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from losses import Contrast, false_negatives
from losses.nce import NCE, draw
from losses.ring import Ring


def contrast(N=12, K=200, D=16, M=1, masked=False, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)
    mask = torch.rand(N, K, generator=g) < 0.8 if masked else None
    return Contrast(unit(N, D).requires_grad_(), unit(N, M, D), unit(K, D), torch.arange(N), torch.arange(K), mask)


def literal(c, t, ring=None):
    """-1/N sum_i log( e^{q k/t} / (e^{q k/t} + sum_{j in support(i)} e^{q n_j/t}) ), one query and one candidate at a time, float64."""
    query = c.query.detach().double().requires_grad_()
    total = 0
    for i in range(len(query)):
        k = c.positive[i].double().mean(0)
        allowed = [j for j in range(len(c.negative)) if c.mask is None or c.mask[i, j]]
        similarity = [(query[i] @ c.negative[j].double()).item() for j in allowed]
        allowed = [allowed[a] for a in np.argsort(-np.array(similarity), kind="stable")]                 # nearest first
        if ring:
            l, u = ring
            outer = allowed[:max(math.floor(u * len(allowed) + 1e-9), math.floor(l * len(allowed) + 1e-9) + 1)]
            allowed = outer[math.floor(l * len(allowed) + 1e-9):]
        positive = torch.exp(query[i] @ k / t)
        partition = positive + sum(torch.exp(query[i] @ c.negative[j].double() / t) for j in allowed)
        total = total - torch.log(positive / partition)
    loss = total / len(query)
    return loss, torch.autograd.grad(loss, query)[0]


SWEEP = [(N, K, t, M, masked) for N, K in ((3, 7), (12, 200)) for t in (0.07, 0.5) for M in (1, 5) for masked in (False, True)]


def agrees(loss_fn, c, epoch, t, ring=None):
    loss, _ = loss_fn(c, epoch)
    expected, gradient = literal(c, t, ring)
    assert abs(loss.item() - expected.item()) < 1e-6 * max(1, abs(expected.item()))
    ours = torch.autograd.grad(loss, c.query)[0]
    assert (ours - gradient).abs().max() < 1e-6 * max(1, gradient.abs().max().item())


@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_nce_is_its_formula(N, K, t, M, masked):
    agrees(NCE(temperature=t), contrast(N, K, M=M, masked=masked), 0.0, t)


@pytest.mark.parametrize("inner,outer", [(0.01, 0.1), (0.0, 0.1), (0.2, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_ring_is_its_formula(N, K, t, M, masked, inner, outer):
    agrees(Ring(epochs=9, temperature=t, inner=inner, outer=outer, anneal_epochs=0), contrast(N, K, M=M, masked=masked), 0.0, t, (inner, outer))


def test_ring_of_everything_is_nce():
    for masked in (False, True):
        c = contrast(masked=masked)
        a, b = NCE(temperature=0.2)(c, 0)[0], Ring(epochs=1, temperature=0.2, inner=0.0, outer=1.0, anneal_epochs=0)(c, 0)[0]
        assert abs(a - b) < 1e-6


def test_all_equal_gives_log_K_plus_1():
    c = contrast(N=4, K=50)
    same = c.query.detach()[:1]
    c = c._replace(query=same.expand(4, -1).clone().requires_grad_(), positive=same.expand(4, 1, -1), negative=same.expand(50, -1))
    assert abs(NCE()(c, 0)[0] - math.log(51)) < 1e-5
    assert abs(NCE(n_negatives=99)(c, 0)[0] - math.log(100)) < 1e-5
    assert abs(Ring(epochs=1, inner=0.1, outer=0.5, anneal_epochs=0)(c, 0)[0] - math.log(21)) < 1e-5      # ranks 5 to 25
    assert abs(Ring(epochs=1, inner=0.1, outer=0.5, anneal_epochs=0, n_negatives=7)(c, 0)[0] - math.log(8)) < 1e-5


@pytest.mark.parametrize("masked", [False, True])
def test_draws_are_uniform_over_what_the_mask_allows(masked):
    torch.manual_seed(0)
    c = contrast(N=3, K=20, masked=masked)
    draws = draw(c.mask, 40000, c.query @ c.negative.T)
    allowed = torch.ones(3, 20, dtype=torch.bool) if c.mask is None else c.mask
    for i in range(3):
        counts = draws[i].bincount(minlength=20)
        assert (counts[~allowed[i]] == 0).all()
        expected = 40000 / allowed[i].sum()
        assert ((counts[allowed[i]] - expected).abs() < 5 * expected.float().sqrt()).all()


@pytest.mark.parametrize("masked", [False, True])
def test_ring_draws_are_uniform_over_the_ring(masked):
    """The mean over many draws of the partition function is that of the whole ring; and no draw comes from outside it."""
    torch.manual_seed(0)
    c = contrast(N=4, K=100, masked=masked)
    s = c.query @ c.negative.T
    whole = Ring(epochs=1, temperature=0.5, inner=0.1, outer=0.4, anneal_epochs=0)(c, 0)[1]
    drawn = Ring(epochs=1, temperature=0.5, inner=0.1, outer=0.4, anneal_epochs=0, n_negatives=20000)(c, 0)
    expected = []
    for i in range(4):
        ranked = s[i][c.mask[i]].sort(descending=True).values if masked else s[i].sort(descending=True).values
        ring = ranked[int(0.1 * len(ranked)):int(0.4 * len(ranked) + 1e-9)]
        positive = (c.query[i] @ c.positive[i, 0] / 0.5).exp()
        expected.append(-torch.log(positive / (positive + 20000 * (ring / 0.5).exp().mean())))
    assert abs(drawn[0] - torch.stack(expected).mean()) < 0.02
    assert drawn[1]["outer threshold"] == whole["outer threshold"]


def test_annealing():
    ring = Ring(epochs=300, inner=0.01, outer=0.1)
    assert ring.percentiles(0) == (0.01, 1.0) and ring.percentiles(100) == (0.01, 0.1) == ring.percentiles(250)
    assert abs(ring.percentiles(50)[1] - 0.55) < 1e-12
    relative = Ring(epochs=300, inner=0.01, outer=0.1, anneal_epochs=10, inner_relative=True)
    assert abs(relative.percentiles(0)[0] - 0.1) < 1e-12 and abs(relative.percentiles(10)[0] - 0.01) < 1e-12   # l: 10 % of u
    assert Ring(epochs=300, anneal_epochs=0).percentiles(0) == (0.01, 0.1)


def test_gradient_reaches_the_query_alone():
    c = contrast()
    c = c._replace(positive=c.positive.requires_grad_(), negative=c.negative.requires_grad_())
    held = c._replace(positive=c.positive.detach(), negative=c.negative.detach())      # what hosts hand over
    for loss_fn in (NCE(), Ring(epochs=3)):
        loss_fn(held, 1.0)[0].backward()
        assert c.query.grad.abs().sum() > 0 and c.positive.grad is None and c.negative.grad is None
        c.query.grad = None


def test_no_overflow_at_the_smallest_temperature():
    c = contrast()
    c = c._replace(positive=-c.query.detach()[:, None], negative=c.query.detach()[:1].expand(200, -1))
    for loss_fn in (NCE(temperature=0.01), Ring(epochs=1, temperature=0.01)):
        loss = loss_fn(c, 0)[0]
        assert loss.isfinite() and torch.autograd.grad(loss, c.query)[0].isfinite().all()


def test_share_of_false_negatives():
    c = contrast(N=2, K=4)
    c = c._replace(index=torch.tensor([0, 1]), negative_index=torch.tensor([0, 1, 2, -1]))
    labels = torch.tensor([5, 6, 5])
    used = torch.tensor([[True, True, False, True], [False, True, True, False]])
    figures = false_negatives(c, used, labels)                                         # the candidate without an index counts nowhere
    assert figures["used %"] == pytest.approx(100 * 4 / 6)
    assert figures["false negatives used %"] == pytest.approx(50) and figures["false negatives left out %"] == pytest.approx(50)
    assert set(false_negatives(c, used, None)) == {"used %"}


@pytest.mark.parametrize("make,message", [
    (lambda: NCE(temperature=0.0), "temperature"), (lambda: NCE(n_negatives=0), "n_negatives"), (lambda: Ring(1, temperature=-1.0), "temperature"),
    (lambda: Ring(1, inner=0.2, outer=0.1), "inner 0.2 and outer 0.1"), (lambda: Ring(1, outer=1.5), "shares"), (lambda: Ring(1, n_negatives=-3), "n_negatives"),
])
def test_settings_without_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
