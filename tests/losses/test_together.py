"""Lists of losses against the literal of the whole: false negatives out, the ring of the rest, mixing of the ring, one formula."""

import pytest
import torch
from literal import contrast, info_nce, mean_over_queries, nearest, ring
from test_ifnd import N_DATA, clustered
from test_mochi import fixed

from losses.ifnd import IFND
from losses.jcl import JCL
from losses.mochi import MoCHi
from losses.nce import NCE
from losses.ring import Ring
from losses.together import Together

T = 0.2


def make_ring(inner=0.1, outer=0.6, **settings):
    return Ring(epochs=10, temperature=T, inner=inner, outer=outer, anneal_epochs=0, **settings)


def not_false(c, loss_fn, level, i):
    """The candidates that a level of IFND leaves query i."""
    label = {
        image: l
        for image, (l, r) in enumerate(
            zip(loss_fn.pseudo[level].tolist(), loss_fn.rank[level].tolist())
        )
        if r <= 0.6 * N_DATA
    }
    mine = label.get(c.index[i].item())
    return [
        j
        for j in range(len(c.negative))
        if mine is None or label.get(c.negative_index[j].item()) != mine
    ]


def agrees(loss, c, expected, gradient):
    assert abs(loss.item() - expected.item()) < 1e-6 * max(1, abs(expected.item()))
    assert (torch.autograd.grad(loss, c.query)[0] - gradient).abs().max() < 1e-6 * max(
        1, gradient.abs().max().item()
    )


@pytest.mark.parametrize("masked", [False, True, "own"])
def test_ifnd_then_ring_then_mochi(masked):
    c = contrast(M=2, masked=masked, n_data=N_DATA)
    n, ifnd, mochi = (
        c.negative.double(),
        clustered(temperature=T),
        MoCHi(temperature=T, hardest=9, mixed=7, query_mixed=4, warmup_epochs=0),
    )
    i_, other, j_, a, b = fixed(mochi, 2, 12)  # (levels, N, points)

    def of_one(x, query):
        total = 0
        for level in range(2):
            rest = ring(nearest(c, x, not_false(c, ifnd, level, x)), 0.1, 0.6)
            points = [n[j] for j in rest]
            for m in range(7):
                h = (
                    a[level, x, m].double() * n[rest[i_[level, x, m]]]
                    + (1 - a[level, x, m].double()) * n[rest[other[level, x, m]]]
                )
                points.append(h / h.norm())
            for m in range(4):
                h = (
                    b[level, x, m].double() * query[x].detach()
                    + (1 - b[level, x, m].double()) * n[rest[j_[level, x, m]]]
                )
                points.append(h / h.norm())
            total = total + info_nce(query[x], c.positive[x].double().mean(0), points, T) / 2
        return total

    loss, figures = Together([ifnd, make_ring(), mochi])(c, 3.0)
    agrees(loss, c, *mean_over_queries(c, of_one))
    assert {"K", "ifnd: removed %", "ring: outer threshold", "mochi: mixed"} <= set(figures)


@pytest.mark.parametrize("masked", [False, True, "own"])
@pytest.mark.parametrize(
    "names",
    [
        "nce",
        "ring",
        "mochi",
        "jcl",
        "ifnd",
        "attract",
        "ifnd+ring",
        "ifnd+ring+mochi",
        "ifnd+jcl",
        "ring+attract",
        "ring+jcl",
        "ifnd+ring+jcl",
    ],
)
def test_a_batch_is_its_parts(names, masked):
    """Of more queries than the log's figures look at (32): the mean of the halves, value and gradient. MoCHi, which draws, may differ by as much."""
    c = contrast(N=40, M=3, masked=masked, n_data=N_DATA)
    parts = {
        "nce": NCE(temperature=T),
        "ring": make_ring(),
        "jcl": JCL(epochs=10, temperature=T, lam=1.0),
        "ifnd": clustered(temperature=T),
        "attract": clustered(temperature=T, mode="attract"),
        "mochi": MoCHi(temperature=T, hardest=9, mixed=700, query_mixed=400, warmup_epochs=0),
    }
    loss_fn = Together([parts[name] for name in names.split("+")]) if "+" in names else parts[names]
    of_queries = ("query", "positive", "index", "mask", "own")
    halves = [
        loss_fn(
            c._replace(
                **{k: getattr(c, k)[i : i + 20] for k in of_queries if getattr(c, k) is not None}
            ),
            3.0,
        )
        for i in (0, 20)
    ]
    loss, figures = loss_fn(c, 3.0)
    expected, close = (halves[0][0] + halves[1][0]) / 2, 0.02 if "mochi" in names else 1e-6
    assert (
        loss.item() == pytest.approx(expected.item(), rel=close)
        and figures.keys() == halves[0][1].keys()
    )
    a, b = (torch.autograd.grad(x, c.query)[0] for x in (loss, expected))
    assert (a - b).norm() < 10 * close * b.norm()


def test_order_matters_among_those_that_choose():
    """The ring of what IFND leaves is another than what IFND leaves of the ring."""
    c = contrast(n_data=N_DATA)
    a, b = (
        Together(losses)(c, 3.0)[0]
        for losses in (
            [clustered(temperature=T), make_ring()],
            [make_ring(), clustered(temperature=T)],
        )
    )
    n, ifnd = c.negative.double(), clustered(temperature=T)
    first = lambda x, query: (
        sum(
            info_nce(
                query[x],
                c.positive[x, 0].double(),
                [n[j] for j in ring(nearest(c, x, not_false(c, ifnd, level, x)), 0.1, 0.6)],
                T,
            )
            for level in range(2)
        )
        / 2
    )
    second = lambda x, query: (
        sum(
            info_nce(
                query[x],
                c.positive[x, 0].double(),
                [n[j] for j in ring(nearest(c, x), 0.1, 0.6) if j in not_false(c, ifnd, level, x)],
                T,
            )
            for level in range(2)
        )
        / 2
    )
    agrees(a, c, *mean_over_queries(c, first))
    agrees(b, c, *mean_over_queries(c, second))
    assert abs(a - b) > 1e-3


@pytest.mark.parametrize("draws", [None, 40])
def test_ring_with_jcl_wherever_jcl_stands(draws):
    c = contrast(M=5)
    expected = None
    for order in (0, 1):
        losses = [make_ring(n_negatives=draws), JCL(epochs=10, temperature=T, lam=2.0, ramp=False)]
        torch.manual_seed(0)
        loss = Together(losses[::-1] if order else losses)(c, 3.0)[0]
        expected = loss if expected is None else expected
        assert torch.equal(loss, expected)
    if draws is None:
        n = c.negative.double()

        def of_one(x, query):
            k = c.positive[x].double()
            p = torch.stack([query[x] @ k_m for k_m in k])
            Z = torch.exp(p.mean() / T + p.var(correction=0) / T**2) + sum(
                torch.exp(query[x] @ n[j] / T) for j in ring(nearest(c, x), 0.1, 0.6)
            )
            return torch.log(Z) - p.mean() / T

        agrees(loss, c, *mean_over_queries(c, of_one))


def test_attract_within_the_ring():
    c = contrast(n_data=N_DATA)
    n, ifnd = c.negative.double(), clustered(temperature=T, mode="attract")

    def of_one(x, query):
        total, rest = 0, ring(nearest(c, x), 0.1, 0.6)
        k = c.positive[x, 0].double()
        e = lambda v: torch.exp(query[x] @ v / T)
        for level in range(2):
            friends = [j for j in rest if j not in not_false(c, ifnd, level, x)]
            Z = e(k) + sum(e(n[j]) for j in rest)
            total = (
                total
                - sum(torch.log(e(p) / Z) for p in [k, *(n[j] for j in friends)])
                / (1 + len(friends))
                / 2
            )
        return total

    agrees(Together([ifnd, make_ring()])(c, 3.0)[0], c, *mean_over_queries(c, of_one))


def test_what_changes_nothing_leaves_each_as_it_is_alone():
    c = contrast(M=5, masked=True, n_data=N_DATA)
    nothing = clustered(levels=(3,), acceptance=(0, 0), temperature=T)
    everything = Ring(epochs=1, temperature=T, inner=0.0, outer=1.0, anneal_epochs=0)
    no_points = MoCHi(temperature=T, mixed=0, query_mixed=0, warmup_epochs=0)
    close = lambda a, b: torch.allclose(a(c, 3.0)[0], b(c, 3.0)[0], atol=1e-6)
    assert close(Together([nothing, everything, no_points]), NCE(temperature=T))
    assert close(Together([nothing, make_ring()]), make_ring()) and close(
        Together([everything, JCL(epochs=1, temperature=T)]), JCL(epochs=1, temperature=T)
    )
    assert close(Together([clustered(temperature=T), everything]), clustered(temperature=T))
    loss_fn = Together([nothing, NCE(temperature=T, n_negatives=50)])
    torch.manual_seed(0)
    a = loss_fn(c, 3.0)[0]
    torch.manual_seed(0)
    b = NCE(temperature=T, n_negatives=50)(c, 3.0)[0]
    assert torch.allclose(a, b, atol=1e-6)


def test_before_epoch_reaches_its_members_and_state_is_whole():
    torch.manual_seed(0)
    make = lambda: Together(
        [IFND(4, N_DATA, temperature=T, clusters=[3], reassign_every=1), make_ring()]
    )
    loss_fn = make()
    loss_fn.before_epoch(1, lambda: torch.nn.functional.normalize(torch.randn(N_DATA, 8), dim=1))
    other = make()
    other.load_state_dict(loss_fn.state_dict())
    c = contrast(n_data=N_DATA)
    assert (
        torch.equal(loss_fn(c, 3.0)[0], other(c, 3.0)[0])
        and (other.losses["ifnd"].pseudo >= 0).all()
    )


@pytest.mark.parametrize(
    "losses,message",
    [
        (lambda: [make_ring(), make_ring()], "ring stands in the list twice"),
        (
            lambda: [make_ring(), JCL(epochs=1, temperature=0.3)],
            "ring has temperature 0.2 and jcl 0.3",
        ),
        (
            lambda: [clustered(temperature=T, mode="attract"), JCL(epochs=1, temperature=T)],
            "ifnd and jcl both say what the positives are",
        ),
        (
            lambda: [MoCHi(temperature=T), make_ring()],
            "ring cannot follow mochi, whose mixed points are not the candidates to choose from; put mochi last",
        ),
        (
            lambda: [make_ring(n_negatives=9), MoCHi(temperature=T)],
            "mochi cannot follow ring, whose draws are .* set its n_negatives: null",
        ),
        (
            lambda: [make_ring(n_negatives=9), clustered(temperature=T, mode="attract")],
            "attract cannot look for its false negatives among the draws of ring",
        ),
        (
            lambda: [NCE(temperature=T), make_ring()],
            "nce in a list changes nothing unless it draws",
        ),
        (lambda: [make_ring(), torch.nn.Identity()], "identity has neither"),
    ],
)
def test_lists_without_meaning_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        Together(losses())
