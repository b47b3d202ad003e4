"""JCL: Eq. 8 with its covariance matrices formed, and what the bound is a bound of."""

import pytest
import torch
from literal import (
    SWEEP,
    assert_agrees,
    contrast,
    info_nce,
    literal_jcl,
    mean_over_queries,
    nearest,
    vectors,
)
from torch.nn import functional as F

from losses.jcl import JCL
from losses.nce import NCE


@pytest.mark.parametrize("lam", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_jcl_is_its_formula(N, K, t, M, masked, lam):
    c = contrast(N, K, M=M, masked=masked)
    # Keys about their query, as in training.
    c = c._replace(positive=F.normalize(c.query.detach()[:, None] + 0.5 * c.positive, dim=2))
    loss_fn, of_one = literal_jcl(c, t, lam)
    assert_agrees(loss_fn(c, 3.0).loss, c, *mean_over_queries(c, of_one))


@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_the_average_is_the_mean_of_M_infonce_losses(N, K, t, M, masked):
    c = contrast(N, K, M=M, masked=masked)

    def of_one(i, query):
        negatives = vectors(c, nearest(c, i))
        return sum(info_nce(query[i], k.double(), negatives, t) for k in c.positive[i]) / M

    loss_fn = JCL(epochs=10, temperature=t, average=True)
    assert_agrees(loss_fn(c, 0.0).loss, c, *mean_over_queries(c, of_one))


def test_lambda_0_is_nce_on_the_mean_key_and_so_is_one_key():
    for masked in (False, True, "self"):
        c = contrast(M=5, masked=masked)
        assert torch.allclose(
            JCL(epochs=1, lam=0.0)(c, 0.0).loss, NCE(temperature=0.2)(c, 0).loss, atol=1e-6
        )
        c = contrast(M=1, masked=masked)
        assert torch.allclose(
            JCL(epochs=1, lam=4.0)(c, 0.0).loss, NCE(temperature=0.2)(c, 0).loss, atol=1e-6
        )


def test_the_ramp():
    c = contrast(M=5)
    # lam (epoch + 1) / epochs, by whole epochs.
    for epoch, lam in ((0.0, 1.0), (0.9, 1.0), (1.0, 2.0), (3.5, 4.0)):
        assert torch.equal(
            JCL(epochs=4, lam=4.0)(c, epoch).loss, JCL(epochs=4, lam=lam, ramp=False)(c, 0.0).loss
        )


def test_the_bound_lies_above_the_expected_loss_over_infinitely_many_keys():
    """Monte Carlo of E_k [InfoNCE(q, k)], k ~ N(mu, Sigma), against Eq. 8 with lambda 1.

    It lies well above where the keys spread.
    """
    g = torch.Generator().manual_seed(0)
    for spread, t in ((0.1, 0.2), (0.3, 0.2), (0.5, 0.5)):
        c = contrast(N=6, K=50, M=5)
        c = c._replace(
            positive=c.query.detach()[:, None] * 0.8 + spread * torch.randn(6, 5, 16, generator=g)
        )
        bound = JCL(epochs=1, temperature=t, lam=1.0, ramp=False)(c, 0.0).loss.item()
        losses = []
        for i in range(6):
            k = c.positive[i].double()
            deviation = (k - k.mean(0)) / len(k) ** 0.5  # (M, D), Sigma = deviation' deviation
            draws = k.mean(0) + torch.randn(200000, 5, generator=g, dtype=torch.float64) @ deviation
            q = c.query[i].detach().double()
            Z = torch.logsumexp(c.negative.double() @ q / t, 0)
            losses.append(F.softplus(Z - draws @ q / t))
        expected, error = (
            torch.stack(losses).mean(),
            torch.stack(losses).std() / len(losses[0]) ** 0.5,
        )
        assert bound > expected + 3 * error
        assert spread < 0.3 or bound > expected + 0.01
        at_mean = JCL(epochs=1, temperature=t, lam=0.0)(c, 0.0).loss.item()
        # The loss is convex in q k: its mean is above it at the mean.
        assert expected > at_mean - 3 * error


def test_no_gradient_reaches_the_keys_of_a_host_that_gives_constants():
    c = contrast(M=5)
    JCL(epochs=1)(c, 0.0).loss.backward()
    assert c.query.grad.abs().sum() > 0
    assert not c.positive.requires_grad
    assert not c.negative.requires_grad
    q, k = c.query.detach(), c.positive.clone().requires_grad_()
    # But where it gives some (SimCLR), they have theirs.
    loss = JCL(epochs=1)(c._replace(query=q, positive=k), 0.0).loss
    assert torch.autograd.grad(loss, k)[0].abs().sum() > 0


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"temperature": 0.0}, "temperature"),
        ({"lam": -1.0}, "lam"),
        ({"n_keys": 1}, "raise model.n_views"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        JCL(epochs=1, **settings)
