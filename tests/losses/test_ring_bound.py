"""The Ring paper's claim: its estimate of mutual information lies below NCE's, which lies below the truth (higher bias), and varies less
with the negatives that were drawn (lower variance). On two correlated Gaussians, whose mutual information is known."""

import math

import pytest
import torch

from losses import Contrast
from losses.nce import NCE
from losses.ring import Ring


def features(x, y, rho):
    """The best critic, log p(y | x) / p(y), is a dot product: of these of x and these of y."""
    c, square = 1 / (1 - rho**2), lambda v: (v * v).sum(1, keepdim=True)
    one = torch.ones(len(x), 1)
    q = torch.cat(
        [
            rho * c * x,
            -(rho**2) * c / 2 * one,
            -(rho**2) * c / 2 * square(x) + math.log(c) * x.shape[1] / 2,
        ],
        1,
    )
    return q, torch.cat([y, square(y), one[:1].expand(len(y), 1)], 1)


def estimates(loss_fn, x, y, rho, draws, pool=1000):
    """I = log(K + 1) - loss for each pair, `draws` times on new candidates: (draws, n)."""
    q, k = features(x, y, rho)
    rows = []
    for _ in range(draws):
        negative = torch.randn(pool, x.shape[1])
        _, n = features(x, negative, rho)
        found = [
            loss_fn(
                Contrast(
                    q[i : i + 1],
                    k[i : i + 1, None],
                    n,
                    torch.zeros(1).long(),
                    torch.zeros(pool).long(),
                ),
                0.0,
            )
            for i in range(len(x))
        ]
        rows.append(
            torch.tensor(
                [math.log(float(figures["K"]) + 1) - loss.item() for loss, figures in found]
            )
        )
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
        I = estimates(loss_fn, x, y, rho, 1)
        mean[name], error[name] = I.mean(), I.std() / 1500**0.5
        over_negatives[name] = estimates(loss_fn, x[:20], y[:20], rho, 60).var(0).mean().sqrt()
    assert (
        mean["nce"] < truth + 3 * error["nce"] and mean["nce"] > 0.8 * truth
    )  # a bound, and here not a loose one
    assert mean["ring"] < mean["nce"] - 5 * error["ring"]
    assert over_negatives["ring"] < 0.8 * over_negatives["nce"]
