"""The streamed partition function against the literal one: values and gradients, every way of leaving candidates out, every block boundary."""
import pytest
import torch
from literal import contrast

from losses import partition


def labels(N, K, levels):
    g = torch.Generator().manual_seed(1)
    return [torch.stack([torch.randint(-1, k, (m,), generator=g) for k in levels]) for m in (N, K)]


@pytest.mark.parametrize("t", [0.03, 0.07, 0.2, 1.0])
@pytest.mark.parametrize("levels", [None, (2,), (3, 7, 50)])
@pytest.mark.parametrize("masked", [False, True, "own"])
def test_it_is_the_literal_form_in_both_precisions(masked, levels, t, monkeypatch):
    c = contrast(N=12, K=200, masked=masked)
    exact = c._replace(query=c.query.detach().double().requires_grad_(), negative=c.negative.double())
    more = [] if levels is None else labels(12, 200, levels)
    expected = partition.literal(exact, t, *more)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradient = torch.autograd.grad((expected * weight).sum(), exact.query)[0]
    for case, tolerance in ((exact, 1e-12), (c, 2e-6)):
        Z = partition.log_partition(case, t, *more)
        assert Z.shape == expected.shape and Z.dtype == case.query.dtype
        assert (Z - expected).abs().max() < tolerance * expected.abs().max()
        got = torch.autograd.grad((Z * weight).sum(), case.query)[0]
        assert (got - gradient).abs().max() < tolerance * gradient.abs().max()


@pytest.mark.parametrize("K", [1, 2 ** 20 // 600 - 1, 2 ** 20 // 600, 2 ** 20 // 600 + 1, 4000])
def test_blocks_meet_without_gap_or_overlap(K):
    """600 queries, so that a block is 1,747 candidates; the own one of some query is the first or last of a block."""
    c = contrast(N=600, K=K, D=4, masked="own")
    c.own[:2] = torch.tensor([0, K - 1])
    c.own[2:4] = torch.tensor([min(1746, K - 1), min(1747, K - 1)])
    for case in (c, c._replace(own=None)):
        Z, expected = partition.log_partition(case, 0.1), partition.literal(case, 0.1)
        assert torch.allclose(Z, expected, atol=1e-5)
        assert torch.allclose(*(torch.autograd.grad(x[x > -100].sum(), c.query, allow_unused=K == 1)[0] for x in (Z, expected)), atol=1e-4)


def test_it_takes_the_stream_just_where_it_may(monkeypatch):
    c, calls = contrast(), []
    monkeypatch.setattr(partition, "literal", lambda *a: calls.append(a) or torch.zeros(12))
    partition.log_partition(c, 0.025)
    assert not calls
    partition.log_partition(c, 0.0249), partition.log_partition(c._replace(negative=c.negative.requires_grad_()), 0.1)
    assert len(calls) == 2


def test_the_farthest_candidates_at_the_smallest_temperature_still_count():
    """All candidates opposite to the query: e^(-2 / t) each."""
    c = contrast(N=1, K=50)
    c = c._replace(negative=-c.query.detach().expand(50, -1))
    assert torch.allclose(partition.log_partition(c, 1 / 40), partition.literal(c, 1 / 40), rtol=1e-5)


def test_one_left_with_none_is_never():
    c = contrast(N=3, K=20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1] = False
    Z = partition.log_partition(c._replace(mask=mask), 0.1)
    assert Z[1] < -1e29 and torch.autograd.grad(Z.sum(), c.query)[0][1].eq(0).all() and (Z[[0, 2]] > 0).all()
