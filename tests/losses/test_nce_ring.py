"""NCE and Ring against slow, literal, float64 versions of their formulas, values and gradients."""

import math

import pytest
import torch
from literal import (
    SWEEP,
    all_equal,
    assert_agrees,
    contrast,
    figures_of,
    literal_nce,
    literal_ring,
    mean_over_queries,
    ring,
)

from losses import NEG_INF, Negatives
from losses.base import valid_candidates
from losses.diagnostics import candidate_diagnostics
from losses.nce import NCE, draw_candidates
from losses.ring import Ring


@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_nce_is_its_formula(N, K, t, M, masked):
    c = contrast(N, K, M=M, masked=masked)
    loss_fn, of_one = literal_nce(c, t)
    assert_agrees(loss_fn(c, 0.0).loss, c, *mean_over_queries(c, of_one))


@pytest.mark.parametrize("inner,outer", [(0.01, 0.1), (0.0, 0.1), (0.2, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_ring_is_its_formula(N, K, t, M, masked, inner, outer):
    c = contrast(N, K, M=M, masked=masked)
    loss_fn, of_one = literal_ring(c, t, inner, outer)
    assert_agrees(loss_fn(c, 0.0).loss, c, *mean_over_queries(c, of_one))


def test_ring_of_everything_is_nce():
    for masked in (False, True, "self"):
        c = contrast(masked=masked)
        everything = Ring(epochs=1, temperature=0.2, inner=0.0, outer=1.0, anneal_epochs=0)
        assert abs(NCE(temperature=0.2)(c, 0).loss - everything(c, 0).loss) < 1e-6


def test_all_equal_gives_log_K_plus_1():
    c = all_equal(N=4, K=50)
    constant = {"inner": 0.1, "outer": 0.5, "anneal_epochs": 0}  # ranks 5 to 25
    for loss_fn, points in (
        (NCE(), 51),
        (NCE(n_negatives=99), 100),
        (Ring(epochs=1, **constant), 21),
        (Ring(epochs=1, n_negatives=7, **constant), 8),
    ):
        assert abs(loss_fn(c, 0).loss - math.log(points)) < 1e-5


@pytest.mark.parametrize("masked", [False, True, "self"])
def test_draws_are_uniform_over_what_the_mask_allows(masked):
    torch.manual_seed(0)
    c = contrast(N=3, K=20, masked=masked)
    draws = draw_candidates(c, c.query @ c.negative.T, 40000)
    is_valid = valid_candidates(c)
    for i in range(3):
        counts = draws[i].bincount(minlength=20)
        assert (counts[~is_valid[i]] == 0).all()
        expected = 40000 / is_valid[i].sum()
        differences = (counts[is_valid[i]] - expected).abs()
        assert (differences < 5 * expected.float().sqrt()).all()


@pytest.mark.parametrize("masked", [False, True, "self"])
def test_ring_draws_are_uniform_over_the_ring(masked):
    """The mean of many draws is that of the whole ring; and no draw comes from outside it."""
    torch.manual_seed(0)
    c = contrast(N=4, K=100, masked=masked)
    s = c.query @ c.negative.T
    settings = {"temperature": 0.5, "inner": 0.1, "outer": 0.4, "anneal_epochs": 0}
    whole, drawing = Ring(1, **settings), Ring(1, n_negatives=20000, **settings)
    expected = []
    for i in range(4):
        ranked = s[i][valid_candidates(c)[i]].sort(descending=True).values
        within = ring(ranked, 0.1, 0.4)
        positive = (c.query[i] @ c.positive[i, 0] / 0.5).exp()
        expected.append(-torch.log(positive / (positive + 20000 * (within / 0.5).exp().mean())))
    assert abs(drawing(c, 0).loss - torch.stack(expected).mean()) < 0.02
    threshold = "outer threshold"
    assert figures_of(drawing, c)[threshold] == figures_of(whole, c)[threshold]
    # The draws themselves, beside the ring.
    output = drawing(c, 0)
    for i in range(4):
        of_ring = output.chosen.similarity[i] > NEG_INF
        members = set(output.chosen.candidate[i][of_ring].tolist())
        assert set(output.negatives.candidate[i].tolist()) == members


def test_annealing():
    loss_fn = Ring(epochs=300, inner=0.01, outer=0.1)
    assert loss_fn.percentiles(0) == (0.01, 1.0)
    assert loss_fn.percentiles(100) == (0.01, 0.1) == loss_fn.percentiles(250)
    assert abs(loss_fn.percentiles(50)[1] - 0.55) < 1e-12
    relative = Ring(epochs=300, inner=0.01, outer=0.1, anneal_epochs=10, inner_relative=True)
    assert abs(relative.percentiles(0)[0] - 0.1) < 1e-12  # l: 10 % of u
    assert abs(relative.percentiles(10)[0] - 0.01) < 1e-12
    assert Ring(epochs=300, anneal_epochs=0).percentiles(0) == (0.01, 0.1)


def test_gradient_reaches_the_query_alone():
    c = contrast()
    c = c._replace(positive=c.positive.requires_grad_(), negative=c.negative.requires_grad_())
    # What hosts hand over.
    held = c._replace(positive=c.positive.detach(), negative=c.negative.detach())
    for loss_fn in (NCE(), Ring(epochs=3)):
        loss_fn(held, 1.0).loss.backward()
        assert c.query.grad.abs().sum() > 0
        assert c.positive.grad is None
        assert c.negative.grad is None
        c.query.grad = None


def test_no_overflow_at_the_smallest_temperature():
    c = contrast()
    c = c._replace(
        positive=-c.query.detach()[:, None], negative=c.query.detach()[:1].expand(200, -1)
    )
    for loss_fn in (NCE(temperature=0.01), Ring(epochs=1, temperature=0.01)):
        loss = loss_fn(c, 0).loss
        assert loss.isfinite()
        assert torch.autograd.grad(loss, c.query)[0].isfinite().all()


def test_share_of_false_negatives():
    c = contrast(N=2, K=4)
    c = c._replace(index=torch.tensor([0, 1]), negative_index=torch.tensor([0, 1, 2, -1]))
    labels = torch.tensor([5, 6, 5])
    used = torch.tensor([[True, True, False, True], [False, True, True, False]])
    s = torch.where(used, 0.5, NEG_INF)
    # The candidate without an index counts nowhere.
    figures = candidate_diagnostics(c, Negatives(s), labels)
    assert figures["used %"] == pytest.approx(100 * 4 / 6)
    assert figures["false negatives used %"] == pytest.approx(50)
    assert figures["false negatives left out %"] == pytest.approx(50)
    assert set(candidate_diagnostics(c, Negatives(s), None)) == {"used %"}
    # The same, as draws from the candidates.
    candidate = torch.tensor([[1, 3, 0], [2, 2, 1]])
    drawn = Negatives(s.gather(1, candidate), candidate)
    assert candidate_diagnostics(c, drawn, labels) == figures
    # Two levels, one of which uses nothing.
    levels = Negatives(torch.stack([s, torch.full_like(s, NEG_INF)]))
    assert candidate_diagnostics(c, levels, labels)["used %"] == pytest.approx(100 * 4 / 12)


@pytest.mark.parametrize(
    "loss_fn", [NCE(), NCE(n_negatives=5), Ring(epochs=1), Ring(epochs=1, n_negatives=5)]
)
def test_a_query_left_with_no_negatives_has_loss_0_and_gradient_0(loss_fn):
    c = contrast(N=3, K=20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1] = False
    c = c._replace(mask=mask)
    loss = loss_fn(c, 0.0).loss
    gradient = torch.autograd.grad(loss, c.query)[0]
    assert loss.isfinite()
    assert (gradient[1] == 0).all()
    assert (gradient[[0, 2]] != 0).any(1).all()
    assert all(value.isfinite() for value in figures_of(loss_fn, c).values())


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: NCE(temperature=0.0), "temperature"),
        (lambda: NCE(n_negatives=0), "n_negatives"),
        (lambda: Ring(1, temperature=-1.0), "temperature"),
        (lambda: Ring(1, inner=0.2, outer=0.1), "inner 0.2 and outer 0.1"),
        (lambda: Ring(1, outer=1.5), "shares"),
        (lambda: Ring(1, n_negatives=-3), "n_negatives"),
    ],
)
def test_settings_without_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
