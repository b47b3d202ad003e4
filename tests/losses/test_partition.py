"""The streamed partition function against the literal one: values and gradients, every way of leaving candidates out, every block boundary; and each
loss that uses it against its own literal form."""

import pytest
import torch
from literal import contrast
from test_ifnd import clustered
from torch.nn import functional as F

from losses import NEVER, partition, similarity
from losses.jcl import JCL
from losses.mochi import MoCHi
from losses.nce import NCE
from losses.ring import Ring


def labels(N, K, levels):
    g = torch.Generator().manual_seed(1)
    return [torch.stack([torch.randint(-1, k, (m,), generator=g) for k in levels]) for m in (N, K)]


@pytest.mark.parametrize("t", [0.03, 0.07, 0.2, 1.0])
@pytest.mark.parametrize("levels", [None, (2,), (3, 7, 50)])
@pytest.mark.parametrize("masked", [False, True, "own"])
def test_it_is_the_literal_form_in_both_precisions(masked, levels, t, monkeypatch):
    c = contrast(N=12, K=200, masked=masked)
    exact = c._replace(
        query=c.query.detach().double().requires_grad_(), negative=c.negative.double()
    )
    more = [] if levels is None else labels(12, 200, levels)
    expected = partition.literal(exact, t, *more)
    weight = torch.randn(
        expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    gradient = torch.autograd.grad((expected * weight).sum(), exact.query)[0]
    for case, tolerance in ((exact, 1e-12), (c, 2e-6)):
        Z = partition.log_partition(case, t, *more)
        assert Z.shape == expected.shape and Z.dtype == case.query.dtype
        assert (Z - expected).abs().max() < tolerance * expected.abs().max()
        got = torch.autograd.grad((Z * weight).sum(), case.query)[0]
        assert (got - gradient).abs().max() < tolerance * gradient.abs().max()


@pytest.mark.parametrize("K", [1, 2**20 // 600 - 1, 2**20 // 600, 2**20 // 600 + 1, 4000])
def test_blocks_meet_without_gap_or_overlap(K):
    """600 queries, so that a block is 1,747 candidates; the own one of some query is the first or last of a block."""
    c = contrast(N=600, K=K, D=4, masked="own")
    c.own[:2] = torch.tensor([0, K - 1])
    c.own[2:4] = torch.tensor([min(1746, K - 1), min(1747, K - 1)])
    for case in (c, c._replace(own=None)):
        Z, expected = partition.log_partition(case, 0.1), partition.literal(case, 0.1)
        assert torch.allclose(Z, expected, atol=1e-5)
        assert torch.allclose(
            *(
                torch.autograd.grad(x[x > -100].sum(), c.query, allow_unused=K == 1)[0]
                for x in (Z, expected)
            ),
            atol=1e-4,
        )


def test_it_takes_the_stream_just_where_it_may(monkeypatch):
    c, calls = contrast(), []
    monkeypatch.setattr(partition, "literal", lambda *a: calls.append(a) or torch.zeros(12))
    partition.log_partition(c, 0.025)
    assert not calls
    (
        partition.log_partition(c, 0.0249),
        partition.log_partition(c._replace(negative=c.negative.requires_grad_()), 0.1),
    )
    assert len(calls) == 2


def test_the_farthest_candidates_at_the_smallest_temperature_still_count():
    """All candidates opposite to the query: e^(-2 / t) each."""
    c = contrast(N=1, K=50)
    c = c._replace(negative=-c.query.detach().expand(50, -1))
    assert torch.allclose(
        partition.log_partition(c, 1 / 40), partition.literal(c, 1 / 40), rtol=1e-5
    )


def test_one_left_with_none_is_never():
    c = contrast(N=3, K=20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1] = False
    Z = partition.log_partition(c._replace(mask=mask), 0.1)
    assert (
        Z[1] < -1e29
        and torch.autograd.grad(Z.sum(), c.query)[0][1].eq(0).all()
        and (Z[[0, 2]] > 0).all()
    )


@pytest.mark.parametrize("masked", [False, True, "own"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: NCE(temperature=0.2),
        lambda: Ring(1, temperature=0.2, inner=0.1, outer=0.4, anneal_epochs=0),
        lambda: JCL(10, temperature=0.2),
        lambda: JCL(10, temperature=0.2, average=True),
        lambda: MoCHi(temperature=0.2, hardest=20, mixed=30, query_mixed=7, warmup_epochs=0),
        lambda: clustered(temperature=0.2),
        lambda: clustered(temperature=0.2, mode="attract"),
    ],
    ids=["nce", "ring", "jcl", "jcl average", "mochi", "ifnd", "ifnd attract"],
)
def test_each_losses_forward_is_its_own_literal_form(make, masked):
    """The literal form: all similarities, what the method makes of them, one logsumexp. MoCHi draws the same from the same seed."""
    loss_fn, c = make(), contrast(N=40, K=200, M=5, masked=masked, n_data=30)
    torch.manual_seed(3)
    ours, figures = loss_fn(c, 3.0)
    torch.manual_seed(3)
    s, named = similarity(c), {}
    if hasattr(loss_fn, "negatives"):
        s, _, named = loss_fn.negatives(c, s, 3.0)
    if hasattr(loss_fn, "objective"):
        theirs = loss_fn.objective(c, s, 3.0)[0]
    else:
        theirs = F.softplus(
            torch.logsumexp(s / 0.2, -1) - (c.query * c.positive.mean(1)).sum(1) / 0.2
        ).mean()
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(
        *(torch.autograd.grad(loss, c.query)[0] for loss in (ours, theirs)), atol=1e-6
    )
    for name, value in named.items():  # and what is logged, from 32 queries, is the same
        assert torch.as_tensor(figures[name]).item() == pytest.approx(
            torch.as_tensor(value).item(), abs=1e-4
        ), name
    assert figures["K"] == pytest.approx((s[..., :32, :] > NEVER).sum(-1).float().mean().item())
