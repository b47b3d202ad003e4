"""The streamed partition function against the literal one, and each loss against its own.

Values and gradients, every way of leaving candidates out, every block boundary.
"""

import pytest
import torch
from literal import clustered, contrast

from losses import Negatives, info_nce, partition, positive_similarity, similarity
from losses.diagnostics import step_diagnostics
from losses.jcl import JCL
from losses.mochi import MoCHi
from losses.nce import NCE
from losses.ring import Ring


def labels(N, K, levels):
    g = torch.Generator().manual_seed(1)
    return [torch.stack([torch.randint(-1, k, (m,), generator=g) for k in levels]) for m in (N, K)]


@pytest.mark.parametrize("t", [0.03, 0.07, 0.2, 1.0])
@pytest.mark.parametrize("levels", [None, (2,), (3, 7, 50)])
@pytest.mark.parametrize("masked", [False, True, "self"])
def test_it_is_the_literal_form_in_both_precisions(masked, levels, t, monkeypatch):
    c = contrast(N=12, K=200, masked=masked)
    exact = c._replace(
        query=c.query.detach().double().requires_grad_(), negative=c.negative.double()
    )
    given = [] if levels is None else labels(12, 200, levels)
    expected = partition.literal_log_partition(exact, t, *given)
    weight = torch.randn(
        expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    gradient = torch.autograd.grad((expected * weight).sum(), exact.query)[0]
    for case, tolerance in ((exact, 1e-12), (c, 2e-6)):
        Z = partition.log_partition(case, t, *given)
        assert Z.shape == expected.shape
        assert Z.dtype == case.query.dtype
        assert (Z - expected).abs().max() < tolerance * expected.abs().max()
        got = torch.autograd.grad((Z * weight).sum(), case.query)[0]
        assert (got - gradient).abs().max() < tolerance * gradient.abs().max()


@pytest.mark.parametrize("K", [1, 2**20 // 600 - 1, 2**20 // 600, 2**20 // 600 + 1, 4000])
def test_blocks_meet_without_gap_or_overlap(K):
    """600 queries, so that a block is 1,747 candidates.

    The one that some query may not use is the first or last of a block.
    """
    c = contrast(N=600, K=K, D=4, masked="self")
    c.self_index[:2] = torch.tensor([0, K - 1])
    c.self_index[2:4] = torch.tensor([min(1746, K - 1), min(1747, K - 1)])
    for case in (c, c._replace(self_index=None)):
        Z = partition.log_partition(case, 0.1)
        expected = partition.literal_log_partition(case, 0.1)
        assert torch.allclose(Z, expected, atol=1e-5)
        gradients = [
            torch.autograd.grad(x[x > -100].sum(), c.query, allow_unused=K == 1)[0]
            for x in (Z, expected)
        ]
        assert torch.allclose(*gradients, atol=1e-4)


def test_it_takes_the_stream_just_where_it_may(monkeypatch):
    calls = []

    def record(*args):
        calls.append(args)
        return torch.zeros(12)

    monkeypatch.setattr(partition, "literal_log_partition", record)
    c = contrast()
    partition.log_partition(c, 0.025)
    assert not calls
    partition.log_partition(c, 0.0249)
    partition.log_partition(c._replace(negative=c.negative.requires_grad_()), 0.1)
    assert len(calls) == 2


def test_the_farthest_candidates_at_the_smallest_temperature_still_count():
    """All candidates opposite to the query: e^(-2 / t) each."""
    c = contrast(N=1, K=50)
    c = c._replace(negative=-c.query.detach().expand(50, -1))
    expected = partition.literal_log_partition(c, 1 / 40)
    assert torch.allclose(partition.log_partition(c, 1 / 40), expected, rtol=1e-5)


def test_one_left_with_none_is_never():
    c = contrast(N=3, K=20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1] = False
    Z = partition.log_partition(c._replace(mask=mask), 0.1)
    assert Z[1] < -1e29
    assert (Z[[0, 2]] > 0).all()
    assert torch.autograd.grad(Z.sum(), c.query)[0][1].eq(0).all()


@pytest.mark.parametrize("masked", [False, True, "self"])
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
    """All similarities, what the method makes of them, one logsumexp.

    MoCHi draws the same from the same seed. What is logged is the same, too.
    """
    loss_fn, c = make(), contrast(N=40, K=200, M=5, masked=masked, n_data=30)
    torch.manual_seed(3)
    output = loss_fn(c, 3.0)
    torch.manual_seed(3)
    s, synthetic = similarity(c), None
    negatives = Negatives(s)
    if hasattr(loss_fn, "select"):
        negatives = loss_fn.select(c, s, 3.0)
        s = negatives.similarity
    if hasattr(loss_fn, "synthesize"):
        synthetic = loss_fn.synthesize(c, s, 3.0)
        s = torch.cat([s, synthetic.similarity], -1)
    if hasattr(loss_fn, "objective"):
        expected = loss_fn.objective(c, s, 3.0)
    else:
        expected = info_nce(positive_similarity(c), torch.logsumexp(s / 0.2, -1), 0.2)
    assert torch.allclose(output.loss, expected, atol=1e-6)
    gradients = [torch.autograd.grad(loss, c.query)[0] for loss in (output.loss, expected)]
    assert torch.allclose(*gradients, atol=1e-6)

    literal = output._replace(negatives=negatives, chosen=None, synthetic=synthetic)
    labels = torch.arange(30) % 3
    figures, named = (
        step_diagnostics(loss_fn, [c], [out], labels, 3.0) for out in (output, literal)
    )
    assert figures.keys() == named.keys()
    for name, value in named.items():
        assert figures[name].item() == pytest.approx(value.item(), abs=1e-4), name
