"""MoCHi: the points built, normalised and multiplied, against the similarities that the code computes without building any."""

import math

import pytest
import torch
from literal import SWEEP, agrees, contrast, info_nce, mean_over_queries, nearest
from torch.nn import functional as F

from losses import NEVER, similarity
from losses.mochi import MoCHi
from losses.nce import NCE


def fixed(loss_fn, *shape):
    """Let loss_fn use one draw again and again. -> the draw, as lists of each query."""
    drawn = loss_fn.draw(torch.full((*shape, 1), loss_fn.N))
    loss_fn.draw = lambda size: drawn
    return drawn


def literal(c, t, N, drawn, also=None):
    """Eq. of the paper, with h and h' vectors. drawn: which of the N nearest, and with what weight."""
    i_, other, j_, a, b = drawn
    n = c.negative.double() if also is None else also

    def of_one(x, query):
        q, near = query[x], nearest(c, x)
        Q = near[:N]
        points = [n[j] for j in near]
        for m in range(i_.shape[1]):
            h = (
                a[x, m].double() * n[Q[i_[x, m]]].detach()
                + (1 - a[x, m].double()) * n[Q[other[x, m]]].detach()
            )
            points.append(h / h.norm())
        for m in range(j_.shape[1]):
            h = b[x, m].double() * q.detach() + (1 - b[x, m].double()) * n[Q[j_[x, m]]].detach()
            points.append(h / h.norm())
        return info_nce(q, c.positive[x].double().mean(0), points, t)

    return mean_over_queries(c, of_one, *([] if also is None else [also]))


@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_mochi_is_its_formula(N, K, t, M, masked):
    hardest = 3 if K < 10 else 20  # below what the mask leaves of the candidates
    c = contrast(N, K, M=M, masked=masked)
    for mixed, query_mixed in ((9, 5), (30, 0), (0, 4)):  # s > N is legal
        loss_fn = MoCHi(
            temperature=t, hardest=hardest, mixed=mixed, query_mixed=query_mixed, warmup_epochs=0
        )
        drawn = fixed(loss_fn, N)
        agrees(loss_fn(c, 0.0)[0], c, *literal(c, t, hardest, drawn))


def test_candidates_that_are_means_of_keys_are_mixed_and_normalised_all_the_same():
    """JCL's queue holds means, shorter than 1."""
    c = contrast()
    c = c._replace(negative=c.negative * torch.linspace(0.3, 1, 200)[:, None])
    loss_fn = MoCHi(temperature=0.2, hardest=20, mixed=9, query_mixed=5, warmup_epochs=0)
    drawn = fixed(loss_fn, 12)
    agrees(loss_fn(c, 0.0)[0], c, *literal(c, 0.2, 20, drawn))


def test_candidates_that_carry_a_gradient_get_none_through_the_points():
    """SimCLR: as negatives they have one, as parents of h they do not."""
    c = contrast()
    leaf = c.negative.double().requires_grad_()
    loss_fn = MoCHi(temperature=0.2, hardest=20, mixed=9, query_mixed=5, warmup_epochs=0)
    loss, gradient, of_negatives = literal(c, 0.2, 20, fixed(loss_fn, 12), also=leaf)
    ours = c._replace(negative=c.negative.clone().requires_grad_())
    got = torch.autograd.grad(loss_fn(ours, 0.0)[0], [ours.query, ours.negative])
    assert (got[0] - gradient).abs().max() < 1e-6 and (got[1] - of_negatives).abs().max() < 1e-6


def test_without_points_or_before_the_warmup_ends_it_is_nce():
    for masked in (False, True, "own"):
        c = contrast(M=5, masked=masked)
        expected = NCE(temperature=0.2)(c, 0)[0]
        assert torch.equal(
            MoCHi(temperature=0.2, mixed=0, query_mixed=0, warmup_epochs=0)(c, 0.0)[0], expected
        )
        assert torch.equal(MoCHi(temperature=0.2, warmup_epochs=10)(c, 9.99)[0], expected)
        assert MoCHi(temperature=0.2, warmup_epochs=10)(c, 10.0)[0] > expected + 0.1


@pytest.mark.parametrize(
    "epochs, warmup", [(1, 0), (2, 1), (12, 1), (20, 1), (21, 2), (60, 3), (200, 10), (800, 40)]
)
def test_the_default_warmup_is_a_twentieth_of_training(epochs, warmup, capsys):
    """Of quickstart's 12 epochs one, of the paper's 200 on ImageNet-100 its 10; and the screen says when mixing begins."""
    loss_fn = MoCHi(epochs=epochs)
    assert loss_fn.warmup == warmup
    begins = f"mochi mixes from epoch {warmup + 1} of {epochs} on; until then it is nce (loss.warmup_epochs)\n"
    assert capsys.readouterr().out == (begins if warmup else "")
    c = contrast()
    expected = NCE(temperature=0.2)(c, 0)[0]
    assert loss_fn(c, float(warmup))[0] > expected + 0.1
    if warmup:
        assert torch.equal(loss_fn(c, warmup - 0.01)[0], expected)


def test_a_warmup_that_is_given_is_said_too(capsys):
    assert (
        MoCHi(epochs=12, warmup_epochs=2.5).warmup == 2.5
        and "from epoch 3 of 12 on" in capsys.readouterr().out
    )
    MoCHi(epochs=12, warmup_epochs=0.0), MoCHi(epochs=12, warmup_epochs=3.0, mixed=0, query_mixed=0)
    assert capsys.readouterr().out == ""


def test_all_equal_gives_log_of_all_points_plus_1():
    c = contrast(N=4, K=50)
    same = c.query.detach()[:1]
    c = c._replace(
        query=same.expand(4, -1).clone().requires_grad_(),
        positive=same.expand(4, 1, -1),
        negative=same.expand(50, -1),
    )
    loss, figures = MoCHi(hardest=8, mixed=30, query_mixed=19, warmup_epochs=0)(c, 0.0)
    assert abs(loss - math.log(100)) < 1e-5 and figures["K"] == 99


def test_what_is_drawn():
    """i != j, both uniform over the query's own Q_N, a over (0, 1), b over (0, 0.5)."""
    torch.manual_seed(0)
    size = torch.tensor([[5], [1], [2]])
    i, other, j, a, b = MoCHi(mixed=20000, query_mixed=20000).draw(size)
    for x, n in enumerate((5, 1, 2)):
        for drawn in (i, other, j):
            counts = drawn[x].bincount(minlength=n)
            assert len(counts) == n and ((counts - 20000 / n).abs() < 5 * (20000 / n) ** 0.5).all()
    assert (
        (i != other)[[0, 2]].all()
        and a.min() >= 0
        and 0.99 < a.max() < 1
        and 0.49 < b.max() < 0.5
        and abs(b.mean() - 0.25) < 0.01
    )


def test_oracle_leaves_out_the_own_class_and_says_so(capsys):
    c, labels = contrast(N=6, K=40, n_data=30), torch.arange(30) % 3
    loss_fn = MoCHi(labels, temperature=0.2, oracle=True, mixed=0, query_mixed=0)
    assert "ORACLE" in capsys.readouterr().out
    other = labels[c.index][:, None] != labels[c.negative_index]
    assert torch.equal(loss_fn(c, 0.0)[0], NCE(temperature=0.2)(c._replace(mask=other), 0)[0])
    loss, figures = loss_fn(c, 0.0)
    assert figures["oracle"] == 1 and figures["false negatives used %"] == 0
    with pytest.raises(ValueError, match="has none"):
        MoCHi(oracle=True)


def test_figures_of_hardness_and_false_points():
    """Two classes on two axes: the nearest of a query are its own class, so every mixed point is false."""
    q = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0]]), dim=1)
    c = contrast(N=2, K=8, D=2)._replace(
        query=q.clone().requires_grad_(),
        negative=F.normalize(q.repeat(4, 1) + 0.01 * torch.randn(8, 2), dim=1),
    )
    labels = torch.tensor([0, 1] * 4)
    loss_fn = MoCHi(labels, temperature=0.2, hardest=4, mixed=6, query_mixed=3, warmup_epochs=0)
    figures = loss_fn(c, 0.0)[1]
    assert figures["false mixed %"] == 100 and figures["false query mixed %"] == 100
    assert (
        figures["nearest N"] - 1e-3 < figures["mixed"] <= figures["query mixed"] <= 1.0001
        and 0 < figures["mixed share of partition %"] < 100
    )
    figures = MoCHi(labels, temperature=0.2, hardest=4, mixed=6, query_mixed=3, warmup_epochs=0)(
        c._replace(negative_index=torch.full((8,), -1)), 0.0
    )[1]
    assert figures["false mixed %"] == 0  # a queue's random start has no class


def test_a_query_left_with_no_negatives_and_one_left_with_one():
    c = contrast(N=3, K=20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1], mask[2] = False, torch.arange(20) == 4
    loss_fn = MoCHi(temperature=0.2, hardest=8, mixed=6, query_mixed=3, warmup_epochs=0)
    h, h_q, _ = loss_fn.mix(c._replace(mask=mask), similarity(c._replace(mask=mask)))
    assert (
        (h[1] <= NEVER).all()
        and (h_q[1] <= NEVER).all()
        and torch.allclose(h[2], c.query[2] @ c.negative[4], atol=1e-5)
    )
    loss, figures = loss_fn(c._replace(mask=mask), 0.0)
    gradient = torch.autograd.grad(loss, c.query)[0]
    assert (
        loss.isfinite()
        and (gradient[1] == 0).all()
        and all(math.isfinite(v) for v in figures.values())
    )


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"temperature": 0.0}, "temperature"),
        ({"hardest": 1}, "hardest 1"),
        ({"mixed": -1}, "mixed -1"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoCHi(**settings)
