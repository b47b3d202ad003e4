"""The Ring paper's claim: a higher bias, and a lower variance.

Its estimate of mutual information lies below NCE's, which lies below the truth, and varies less
with the negatives that were drawn. On two correlated Gaussians, whose mutual information is known.
"""

import math

import pytest
import torch

from losses import Contrast
from losses.nce import NCE
from losses.ring import Ring


def features(x, y, rho):
    """The best critic, log p(y | x) / p(y), is a dot product: of these of x and these of y."""
    c = 1 / (1 - rho**2)
    one = torch.ones(len(x), 1)
    constant = math.log(c) * x.shape[1] / 2
    of_x = -(rho**2) * c / 2 * x.square().sum(1, keepdim=True) + constant
    q = torch.cat([rho * c * x, -(rho**2) * c / 2 * one, of_x], 1)
    return q, torch.cat([y, y.square().sum(1, keepdim=True), one[:1].expand(len(y), 1)], 1)


def estimate(loss_fn, q, k, n):
    """log(K + 1) - loss of one pair, on candidates n (K, D)."""
    K = len(n)
    c = Contrast(q[None], k[None, None], n, torch.zeros(1).long(), torch.zeros(K).long())
    output = loss_fn(c, 0.0)
    n_negatives = output.negatives.similarity.shape[-1]
    return math.log(n_negatives + 1) - output.loss.item()


def estimates(loss_fn, x, y, rho, draws, pool=1000):
    """`estimate` of each pair, `draws` times on new candidates: (draws, n)."""
    q, k = features(x, y, rho)
    rows = []
    for _ in range(draws):
        _, n = features(x, torch.randn(pool, x.shape[1]), rho)
        rows.append(torch.tensor([estimate(loss_fn, q[i], k[i], n) for i in range(len(x))]))
    return torch.stack(rows)


@pytest.mark.parametrize("d,rho", [(2, 0.7), (4, 0.8)])
@pytest.mark.parametrize("inner", [0.01, 0.0], ids=["ring", "ball"])
def test_higher_bias_lower_variance(d, rho, inner):
    torch.manual_seed(0)
    truth = -d / 2 * math.log(1 - rho**2)
    losses = {
        "nce": NCE(temperature=1.0, n_negatives=100),
        "ring": Ring(
            epochs=1, temperature=1.0, inner=inner, outer=0.1, anneal_epochs=0, n_negatives=100
        ),
    }
    x = torch.randn(1500, d)
    y = rho * x + (1 - rho**2) ** 0.5 * torch.randn(1500, d)
    mean, error, over_negatives = {}, {}, {}
    for name, loss_fn in losses.items():
        information = estimates(loss_fn, x, y, rho, 1)
        mean[name], error[name] = information.mean(), information.std() / 1500**0.5
        over_negatives[name] = estimates(loss_fn, x[:20], y[:20], rho, 60).var(0).mean().sqrt()
    # A bound, and here not a loose one.
    assert 0.8 * truth < mean["nce"] < truth + 3 * error["nce"]
    assert mean["ring"] < mean["nce"] - 5 * error["ring"]
    assert over_negatives["ring"] < 0.8 * over_negatives["nce"]
