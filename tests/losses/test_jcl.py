"""JCL: Eq. 8 with its covariance matrices formed, and what the bound is a bound of."""

import pytest
import torch
from literal import SWEEP, agrees, contrast, info_nce, mean_over_queries, nearest
from torch.nn import functional as F

from losses.jcl import JCL
from losses.nce import NCE


def literal(c, t, lam):
    n = c.negative.double()

    def of_one(i, query):
        q, k = query[i], c.positive[i].double()  # (D,), (M, D)
        mu = k.mean(0)
        Sigma = sum(torch.outer(k_m - mu, k_m - mu) for k_m in k) / len(k)  # (D, D)
        Z = torch.exp(q @ mu / t + lam / (2 * t**2) * (q @ Sigma @ q)) + sum(
            torch.exp(q @ n[j] / t) for j in nearest(c, i)
        )
        return torch.log(Z) - q @ mu / t

    return mean_over_queries(c, of_one)


@pytest.mark.parametrize("lam", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_jcl_is_its_formula(N, K, t, M, masked, lam):
    c = contrast(N, K, M=M, masked=masked)
    c = c._replace(
        positive=F.normalize(c.query.detach()[:, None] + 0.5 * c.positive, dim=2)
    )  # keys about their query, as in training
    agrees(JCL(epochs=10, temperature=t, lam=lam, ramp=False)(c, 3.0)[0], c, *literal(c, t, lam))


@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_the_average_is_the_mean_of_M_infonce_losses(N, K, t, M, masked):
    c = contrast(N, K, M=M, masked=masked)
    n = c.negative.double()
    of_one = lambda i, query: (
        sum(info_nce(query[i], k.double(), [n[j] for j in nearest(c, i)], t) for k in c.positive[i])
        / M
    )
    agrees(JCL(epochs=10, temperature=t, average=True)(c, 0.0)[0], c, *mean_over_queries(c, of_one))


def test_lambda_0_is_nce_on_the_mean_key_and_so_is_one_key():
    for masked in (False, True, "own"):
        c = contrast(M=5, masked=masked)
        assert torch.allclose(
            JCL(epochs=1, lam=0.0)(c, 0.0)[0], NCE(temperature=0.2)(c, 0)[0], atol=1e-6
        )
        c = contrast(M=1, masked=masked)
        assert torch.allclose(
            JCL(epochs=1, lam=4.0)(c, 0.0)[0], NCE(temperature=0.2)(c, 0)[0], atol=1e-6
        )


def test_the_ramp():
    c = contrast(M=5)
    for epoch, lam in (
        (0.0, 1.0),
        (0.9, 1.0),
        (1.0, 2.0),
        (3.5, 4.0),
    ):  # lam (epoch + 1) / epochs, by whole epochs
        assert torch.equal(
            JCL(epochs=4, lam=4.0)(c, epoch)[0], JCL(epochs=4, lam=lam, ramp=False)(c, 0.0)[0]
        )


def test_the_bound_lies_above_the_expected_loss_over_infinitely_many_keys():
    """Monte Carlo of E_k [InfoNCE(q, k)], k ~ N(mu, Sigma), against Eq. 8 with lambda 1; and well above where the keys spread."""
    g = torch.Generator().manual_seed(0)
    for spread, t in ((0.1, 0.2), (0.3, 0.2), (0.5, 0.5)):
        c = contrast(N=6, K=50, M=5)
        c = c._replace(
            positive=c.query.detach()[:, None] * 0.8 + spread * torch.randn(6, 5, 16, generator=g)
        )
        bound = JCL(epochs=1, temperature=t, lam=1.0, ramp=False)(c, 0.0)[0].item()
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
        at_mean = JCL(epochs=1, temperature=t, lam=0.0)(c, 0.0)[0].item()
        assert (
            expected > at_mean - 3 * error
        )  # the loss is convex in q k: its mean is above it at the mean


def test_no_gradient_reaches_the_keys_of_a_host_that_gives_constants():
    c = contrast(M=5)
    JCL(epochs=1)(c, 0.0)[0].backward()
    assert (
        c.query.grad.abs().sum() > 0
        and not c.positive.requires_grad
        and not c.negative.requires_grad
    )
    q, k = c.query.detach(), c.positive.clone().requires_grad_()
    loss = JCL(epochs=1)(c._replace(query=q, positive=k), 0.0)[
        0
    ]  # but where it gives some (SimCLR), they have theirs
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
