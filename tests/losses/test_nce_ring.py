"""NCE and Ring against slow, literal, float64 versions of their formulas, values and gradients."""

import math

import pytest
import torch
from literal import SWEEP, agrees, contrast, info_nce, mean_over_queries, nearest, ring

from losses import NEVER, false_negatives, serves
from losses.nce import NCE, draw
from losses.ring import Ring


def literal(c, t, l=None, u=None):
    """-1/N sum_i log( e^{q k/t} / (e^{q k/t} + sum_{j in support(i)} e^{q n_j/t}) )."""
    n = c.negative.double()

    def of_one(i, query):
        support = nearest(c, i) if u is None else ring(nearest(c, i), l, u)
        return info_nce(query[i], c.positive[i].double().mean(0), [n[j] for j in support], t)

    return mean_over_queries(c, of_one)


@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_nce_is_its_formula(N, K, t, M, masked):
    c = contrast(N, K, M=M, masked=masked)
    agrees(NCE(temperature=t)(c, 0.0)[0], c, *literal(c, t))


@pytest.mark.parametrize("inner,outer", [(0.01, 0.1), (0.0, 0.1), (0.2, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_ring_is_its_formula(N, K, t, M, masked, inner, outer):
    c = contrast(N, K, M=M, masked=masked)
    agrees(
        Ring(epochs=9, temperature=t, inner=inner, outer=outer, anneal_epochs=0)(c, 0.0)[0],
        c,
        *literal(c, t, inner, outer),
    )


def test_ring_of_everything_is_nce():
    for masked in (False, True, "own"):
        c = contrast(masked=masked)
        a, b = (
            NCE(temperature=0.2)(c, 0)[0],
            Ring(epochs=1, temperature=0.2, inner=0.0, outer=1.0, anneal_epochs=0)(c, 0)[0],
        )
        assert abs(a - b) < 1e-6


def test_all_equal_gives_log_K_plus_1():
    c = contrast(N=4, K=50)
    same = c.query.detach()[:1]
    c = c._replace(
        query=same.expand(4, -1).clone().requires_grad_(),
        positive=same.expand(4, 1, -1),
        negative=same.expand(50, -1),
    )
    assert abs(NCE()(c, 0)[0] - math.log(51)) < 1e-5
    assert abs(NCE(n_negatives=99)(c, 0)[0] - math.log(100)) < 1e-5
    assert (
        abs(Ring(epochs=1, inner=0.1, outer=0.5, anneal_epochs=0)(c, 0)[0] - math.log(21)) < 1e-5
    )  # ranks 5 to 25
    assert (
        abs(
            Ring(epochs=1, inner=0.1, outer=0.5, anneal_epochs=0, n_negatives=7)(c, 0)[0]
            - math.log(8)
        )
        < 1e-5
    )


@pytest.mark.parametrize("masked", [False, True, "own"])
def test_draws_are_uniform_over_what_the_mask_allows(masked):
    torch.manual_seed(0)
    c = contrast(N=3, K=20, masked=masked)
    draws = draw(c, 40000, c.query @ c.negative.T)
    allowed = serves(c)
    for i in range(3):
        counts = draws[i].bincount(minlength=20)
        assert (counts[~allowed[i]] == 0).all()
        expected = 40000 / allowed[i].sum()
        assert ((counts[allowed[i]] - expected).abs() < 5 * expected.float().sqrt()).all()


@pytest.mark.parametrize("masked", [False, True, "own"])
def test_ring_draws_are_uniform_over_the_ring(masked):
    """The mean over many draws of the partition function is that of the whole ring; and no draw comes from outside it."""
    torch.manual_seed(0)
    c = contrast(N=4, K=100, masked=masked)
    s = c.query @ c.negative.T
    whole = Ring(epochs=1, temperature=0.5, inner=0.1, outer=0.4, anneal_epochs=0)(c, 0)[1]
    drawn = Ring(
        epochs=1, temperature=0.5, inner=0.1, outer=0.4, anneal_epochs=0, n_negatives=20000
    )(c, 0)
    expected = []
    for i in range(4):
        ranked = s[i][serves(c)[i]].sort(descending=True).values
        within = ring(ranked, 0.1, 0.4)
        positive = (c.query[i] @ c.positive[i, 0] / 0.5).exp()
        expected.append(-torch.log(positive / (positive + 20000 * (within / 0.5).exp().mean())))
    assert abs(drawn[0] - torch.stack(expected).mean()) < 0.02
    assert drawn[1]["outer threshold"] == whole["outer threshold"]


def test_annealing():
    loss_fn = Ring(epochs=300, inner=0.01, outer=0.1)
    assert loss_fn.percentiles(0) == (0.01, 1.0) and loss_fn.percentiles(100) == (
        0.01,
        0.1,
    ) == loss_fn.percentiles(250)
    assert abs(loss_fn.percentiles(50)[1] - 0.55) < 1e-12
    relative = Ring(epochs=300, inner=0.01, outer=0.1, anneal_epochs=10, inner_relative=True)
    assert (
        abs(relative.percentiles(0)[0] - 0.1) < 1e-12
        and abs(relative.percentiles(10)[0] - 0.01) < 1e-12
    )  # l: 10 % of u
    assert Ring(epochs=300, anneal_epochs=0).percentiles(0) == (0.01, 0.1)


def test_gradient_reaches_the_query_alone():
    c = contrast()
    c = c._replace(positive=c.positive.requires_grad_(), negative=c.negative.requires_grad_())
    held = c._replace(
        positive=c.positive.detach(), negative=c.negative.detach()
    )  # what hosts hand over
    for loss_fn in (NCE(), Ring(epochs=3)):
        loss_fn(held, 1.0)[0].backward()
        assert c.query.grad.abs().sum() > 0 and c.positive.grad is None and c.negative.grad is None
        c.query.grad = None


def test_no_overflow_at_the_smallest_temperature():
    c = contrast()
    c = c._replace(
        positive=-c.query.detach()[:, None], negative=c.query.detach()[:1].expand(200, -1)
    )
    for loss_fn in (NCE(temperature=0.01), Ring(epochs=1, temperature=0.01)):
        loss = loss_fn(c, 0)[0]
        assert loss.isfinite() and torch.autograd.grad(loss, c.query)[0].isfinite().all()


def test_share_of_false_negatives():
    c = contrast(N=2, K=4)
    c = c._replace(index=torch.tensor([0, 1]), negative_index=torch.tensor([0, 1, 2, -1]))
    labels = torch.tensor([5, 6, 5])
    used = torch.tensor([[True, True, False, True], [False, True, True, False]])
    s = torch.where(used, 0.5, NEVER)
    figures = false_negatives(c, s, None, labels)  # the candidate without an index counts nowhere
    assert figures["used %"] == pytest.approx(100 * 4 / 6)
    assert figures["false negatives used %"] == pytest.approx(50) and figures[
        "false negatives left out %"
    ] == pytest.approx(50)
    assert set(false_negatives(c, s, None, None)) == {"used %"}
    which = torch.tensor([[1, 3, 0], [2, 2, 1]])  # the same, as draws from the candidates
    assert false_negatives(c, s.gather(1, which), which, labels) == figures
    levels = torch.stack([s, torch.full_like(s, NEVER)])  # two levels, one of which uses nothing
    assert false_negatives(c, levels, None, labels)["used %"] == pytest.approx(100 * 4 / 12)


@pytest.mark.parametrize(
    "loss_fn", [NCE(), NCE(n_negatives=5), Ring(epochs=1), Ring(epochs=1, n_negatives=5)]
)
def test_a_query_left_with_no_negatives_has_loss_0_and_gradient_0(loss_fn):
    c = contrast(N=3, K=20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1] = False
    loss, figures = loss_fn(c._replace(mask=mask), 0.0)
    gradient = torch.autograd.grad(loss, c.query)[0]
    assert (
        loss.isfinite()
        and (gradient[1] == 0).all()
        and (gradient[[0, 2]] != 0).any(1).all()
        and all(math.isfinite(v) for v in figures.values())
    )


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
