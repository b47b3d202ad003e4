"""MoCHi: points built, normalised and multiplied, against similarities without any point."""

import warnings

import pytest
import torch
from literal import (
    SWEEP,
    all_equal,
    assert_agrees,
    contrast,
    figures_of,
    literal_mochi,
    mean_over_queries,
)
from torch.nn import functional as F

from losses import NEG_INF, similarity
from losses.mochi import MoCHi
from losses.nce import NCE

SIZES = {"hardest": 20, "mixed": 9, "query_mixed": 5}


@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_mochi_is_its_formula(N, K, t, M, masked):
    hardest = 3 if K < 10 else 20  # below what the mask leaves of the candidates
    c = contrast(N, K, M=M, masked=masked)
    for mixed, query_mixed in ((9, 5), (30, 0), (0, 4)):  # more points than hardest are legal
        loss_fn, of_one = literal_mochi(c, t, hardest, mixed, query_mixed)
        assert_agrees(loss_fn(c, 0.0).loss, c, *mean_over_queries(c, of_one))


def test_candidates_that_are_means_of_keys_are_mixed_and_normalised_all_the_same():
    """JCL's queue holds means, shorter than 1."""
    c = contrast()
    c = c._replace(negative=c.negative * torch.linspace(0.3, 1, 200)[:, None])
    loss_fn, of_one = literal_mochi(c, 0.2, **SIZES)
    assert_agrees(loss_fn(c, 0.0).loss, c, *mean_over_queries(c, of_one))


def test_candidates_that_carry_a_gradient_get_none_through_the_points():
    """SimCLR: as negatives they have one, as parents of h they do not."""
    c = contrast()
    leaf = c.negative.double().requires_grad_()
    loss_fn, of_one = literal_mochi(c, 0.2, negative=leaf, **SIZES)
    _, *expected = mean_over_queries(c, of_one, leaf)
    c = c._replace(negative=c.negative.clone().requires_grad_())
    got = torch.autograd.grad(loss_fn(c, 0.0).loss, [c.query, c.negative])
    assert (got[0] - expected[0]).abs().max() < 1e-6
    assert (got[1] - expected[1]).abs().max() < 1e-6


def test_without_points_or_before_the_warmup_ends_it_is_nce():
    for masked in (False, True, "self"):
        c = contrast(M=5, masked=masked)
        expected = NCE(temperature=0.2)(c, 0).loss
        no_points = MoCHi(temperature=0.2, mixed=0, query_mixed=0, warmup_epochs=0)
        late = MoCHi(temperature=0.2, warmup_epochs=10)
        assert torch.equal(no_points(c, 0.0).loss, expected)
        assert torch.equal(late(c, 9.99).loss, expected)
        assert late(c, 10.0).loss > expected + 0.1


@pytest.mark.parametrize(
    "epochs, warmup", [(1, 0), (2, 1), (12, 1), (20, 1), (21, 2), (60, 3), (200, 10), (800, 40)]
)
def test_the_default_warmup_is_a_twentieth_of_training(epochs, warmup):
    """Of quickstart's 12 epochs one, of the paper's 200 on ImageNet-100 its 10.

    A warning says when mixing begins.
    """
    begins = (
        f"mochi mixes from epoch {warmup + 1} of {epochs} on; until then it is nce "
        "(loss.warmup_epochs)"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_fn = MoCHi(epochs=epochs)
    assert loss_fn.warmup_epochs == warmup
    assert [str(warning.message) for warning in caught] == ([begins] if warmup else [])
    c = contrast()
    expected = NCE(temperature=0.2)(c, 0).loss
    assert loss_fn(c, float(warmup)).loss > expected + 0.1
    if warmup:
        assert torch.equal(loss_fn(c, warmup - 0.01).loss, expected)


def test_a_warmup_that_is_given_is_said_too(recwarn):
    assert MoCHi(epochs=12, warmup_epochs=2.5).warmup_epochs == 2.5
    assert "from epoch 3 of 12 on" in str(recwarn.pop().message)
    MoCHi(epochs=12, warmup_epochs=0.0)
    MoCHi(epochs=12, warmup_epochs=3.0, mixed=0, query_mixed=0)
    assert not recwarn.list


def test_all_equal_gives_log_of_all_points_plus_1():
    c = all_equal(N=4, K=50)
    loss_fn = MoCHi(hardest=8, mixed=30, query_mixed=19, warmup_epochs=0)
    assert loss_fn(c, 0.0).loss.item() == pytest.approx(4.60517, abs=1e-5)  # log(100)
    assert figures_of(loss_fn, c)["K"] == 99


def test_what_is_drawn():
    """I != j, both uniform over the query's own Q, a over (0, 1), b over (0, 0.5)."""
    torch.manual_seed(0)
    size = torch.tensor([[5], [1], [2]])
    i, j, j_query, a, b = MoCHi(mixed=20000, query_mixed=20000).draw_points(size)
    for x, n in enumerate((5, 1, 2)):
        for drawn in (i, j, j_query):
            counts = drawn[x].bincount(minlength=n)
            assert len(counts) == n
            assert ((counts - 20000 / n).abs() < 5 * (20000 / n) ** 0.5).all()
    assert (i != j)[[0, 2]].all()
    assert a.min() >= 0
    assert 0.99 < a.max() < 1
    assert 0.49 < b.max() < 0.5
    assert abs(b.mean() - 0.25) < 0.01


def test_oracle_leaves_out_the_own_class_and_says_so():
    c, labels = contrast(N=6, K=40, n_data=30), torch.arange(30) % 3
    with pytest.warns(UserWarning, match="ORACLE"):
        loss_fn = MoCHi(labels, temperature=0.2, oracle=True, mixed=0, query_mixed=0)
    is_other = labels[c.index][:, None] != labels[c.negative_index]
    expected = NCE(temperature=0.2)(c._replace(mask=is_other), 0).loss
    assert torch.equal(loss_fn(c, 0.0).loss, expected)
    figures = figures_of(loss_fn, c, labels=labels)
    assert figures["oracle"] == 1
    assert figures["false negatives used %"] == 0
    with pytest.raises(ValueError, match="has none"):
        MoCHi(oracle=True)


def test_labels_are_kept_by_an_oracle_alone():
    labels = torch.arange(30) % 3
    assert MoCHi(labels).labels is None
    with pytest.warns(UserWarning, match="ORACLE"):
        assert torch.equal(MoCHi(labels, oracle=True).labels, labels)


def test_figures_of_hardness_and_false_points():
    """Of two classes on two axes the nearest are of the query's, so all points are false."""
    q = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0]]), dim=1)
    c = contrast(N=2, K=8, D=2)._replace(
        query=q.clone().requires_grad_(),
        negative=F.normalize(q.repeat(4, 1) + 0.01 * torch.randn(8, 2), dim=1),
    )
    labels = torch.tensor([0, 1] * 4)
    loss_fn = MoCHi(temperature=0.2, hardest=4, mixed=6, query_mixed=3, warmup_epochs=0)
    figures = figures_of(loss_fn, c, labels=labels)
    assert figures["false mixed %"] == 100
    assert figures["false query mixed %"] == 100
    assert figures["nearest N"] - 1e-3 < figures["mixed"] <= figures["query mixed"] <= 1.0001
    assert 0 < figures["mixed share of partition %"] < 100
    nobodys = c._replace(negative_index=torch.full((8,), -1))
    # A queue's random start has no class.
    assert figures_of(loss_fn, nobodys, labels=labels)["false mixed %"] == 0


def test_a_query_left_with_no_negatives_and_one_left_with_one():
    c = contrast(N=3, K=20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1], mask[2] = False, torch.arange(20) == 4
    c = c._replace(mask=mask)
    loss_fn = MoCHi(temperature=0.2, hardest=8, mixed=6, query_mixed=3, warmup_epochs=0)
    mixed = loss_fn.mix(c, similarity(c))
    assert (mixed.h[1] <= NEG_INF).all()
    assert (mixed.h_query[1] <= NEG_INF).all()
    assert torch.allclose(mixed.h[2], c.query[2] @ c.negative[4], atol=1e-5)
    loss = loss_fn(c, 0.0).loss
    gradient = torch.autograd.grad(loss, c.query)[0]
    assert loss.isfinite()
    assert (gradient[1] == 0).all()
    assert all(value.isfinite() for value in figures_of(loss_fn, c).values())


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
