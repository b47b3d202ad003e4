"""Lists of losses against the literal of the whole.

False negatives go out, the ring is of the rest, the points are mixed of the ring; then one formula.
"""

import functools

import pytest
import torch
from literal import (
    N_DATA,
    assert_agrees,
    clustered,
    contrast,
    false_negatives,
    figures_of,
    fix_draws,
    info_nce,
    mean_key,
    mean_over_queries,
    mix,
    nearest,
    ring,
    vectors,
)
from torch.nn import functional as F

from losses.ifnd import IFND
from losses.jcl import JCL
from losses.mochi import MoCHi
from losses.nce import NCE
from losses.ring import Ring
from losses.together import Together

T = 0.2


def make_ring(inner=0.1, outer=0.6, **settings):
    return Ring(epochs=10, temperature=T, inner=inner, outer=outer, anneal_epochs=0, **settings)


def not_false(c, ifnd, level, i):
    """The candidates that a level of IFND leaves query i."""
    false = false_negatives(c, ifnd, level, i)
    return [j for j in range(len(c.negative)) if j not in false]


@pytest.mark.parametrize("masked", [False, True, "self"])
def test_ifnd_then_ring_then_mochi(masked):
    c = contrast(M=2, masked=masked, n_data=N_DATA)
    ifnd = clustered(temperature=T)
    mochi = MoCHi(temperature=T, hardest=9, mixed=7, query_mixed=4, warmup_epochs=0)
    drawn = fix_draws(mochi, 2, 12)  # (levels, N, points)

    def of_one(x, query):
        total = 0
        for level in range(2):
            hard = vectors(c, ring(nearest(c, x, not_false(c, ifnd, level, x)), 0.1, 0.6))
            points = hard + mix(query[x].detach(), hard, [d[level, x] for d in drawn])
            total = total + info_nce(query[x], mean_key(c, x), points, T) / 2
        return total

    loss_fn = Together([ifnd, make_ring(), mochi])
    assert_agrees(loss_fn(c, 3.0).loss, c, *mean_over_queries(c, of_one))
    names = {"K", "ifnd: removed %", "ring: outer threshold", "mochi: mixed"}
    assert names <= set(figures_of(loss_fn, c, 3.0))


@pytest.mark.parametrize("masked", [False, True, "self"])
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
    """The mean of the halves, value and gradient. MoCHi, which draws, may differ by as much.

    The queries are more than the log's figures look at (32).
    """
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
    halves = [half(c, slice(i, i + 20)) for i in (0, 20)]
    loss, *of_halves = (loss_fn(part, 3.0).loss for part in (c, *halves))
    expected, close = sum(of_halves) / 2, 0.02 if "mochi" in names else 1e-6
    assert loss.item() == pytest.approx(expected.item(), rel=close)
    assert figures_of(loss_fn, c, 3.0).keys() == figures_of(loss_fn, halves[0], 3.0).keys()
    a, b = (torch.autograd.grad(x, c.query)[0] for x in (loss, expected))
    assert (a - b).norm() < 10 * close * b.norm()


def half(c, queries):
    """The contrast of some of the queries."""
    fields = ("query", "positive", "index", "mask", "self_index")
    given = {name: getattr(c, name) for name in fields if getattr(c, name) is not None}
    return c._replace(**{name: x[queries] for name, x in given.items()})


def test_order_matters_among_those_that_choose():
    """The ring of what IFND leaves is another than what IFND leaves of the ring."""
    c = contrast(n_data=N_DATA)
    a = Together([clustered(temperature=T), make_ring()])(c, 3.0).loss
    b = Together([make_ring(), clustered(temperature=T)])(c, 3.0).loss
    ifnd = clustered(temperature=T)

    def ifnd_first(x, level):
        return ring(nearest(c, x, not_false(c, ifnd, level, x)), 0.1, 0.6)

    def ring_first(x, level):
        rest = not_false(c, ifnd, level, x)
        return [j for j in ring(nearest(c, x), 0.1, 0.6) if j in rest]

    def of_one(choose, x, query):
        k = mean_key(c, x)
        return sum(info_nce(query[x], k, vectors(c, choose(x, level)), T) for level in (0, 1)) / 2

    assert_agrees(a, c, *mean_over_queries(c, functools.partial(of_one, ifnd_first)))
    assert_agrees(b, c, *mean_over_queries(c, functools.partial(of_one, ring_first)))
    assert abs(a - b) > 1e-3


@pytest.mark.parametrize("draws", [None, 40])
def test_ring_with_jcl_wherever_jcl_stands(draws):
    c = contrast(M=5)
    expected = None
    for order in (0, 1):
        losses = [make_ring(n_negatives=draws), JCL(epochs=10, temperature=T, lam=2.0, ramp=False)]
        torch.manual_seed(0)
        loss = Together(losses[::-1] if order else losses)(c, 3.0).loss
        expected = loss if expected is None else expected
        assert torch.equal(loss, expected)
    if draws is None:

        def of_one(x, query):
            k = c.positive[x].double()
            p = torch.stack([query[x] @ k_m for k_m in k])
            negatives = vectors(c, ring(nearest(c, x), 0.1, 0.6))
            positive = torch.exp(p.mean() / T + p.var(correction=0) / T**2)
            return torch.log(positive + sum(torch.exp(query[x] @ n / T) for n in negatives)) - (
                p.mean() / T
            )

        assert_agrees(loss, c, *mean_over_queries(c, of_one))


def test_attract_within_the_ring():
    c, ifnd = contrast(n_data=N_DATA), clustered(temperature=T, mode="attract")

    def of_one(x, query):
        total, rest = 0, ring(nearest(c, x), 0.1, 0.6)
        k = c.positive[x, 0].double()
        Z = sum(torch.exp(query[x] @ v / T) for v in [k, *vectors(c, rest)])
        for level in range(2):
            false = false_negatives(c, ifnd, level, x)
            friends = [k, *vectors(c, [j for j in rest if j in false])]
            logs = [torch.log(torch.exp(query[x] @ p / T) / Z) for p in friends]
            total = total - sum(logs) / len(friends) / 2
        return total

    loss = Together([ifnd, make_ring()])(c, 3.0).loss
    assert_agrees(loss, c, *mean_over_queries(c, of_one))


def test_what_changes_nothing_leaves_each_as_it_is_alone():
    c = contrast(M=5, masked=True, n_data=N_DATA)
    nothing = clustered(levels=(3,), acceptance=(0, 0), temperature=T)
    everything = Ring(epochs=1, temperature=T, inner=0.0, outer=1.0, anneal_epochs=0)
    no_points = MoCHi(temperature=T, mixed=0, query_mixed=0, warmup_epochs=0)
    jcl = JCL(epochs=1, temperature=T)
    draws = NCE(temperature=T, n_negatives=50)
    for losses, alone in (
        ([nothing, everything, no_points], NCE(temperature=T)),
        ([nothing, make_ring()], make_ring()),
        ([everything, jcl], jcl),
        ([clustered(temperature=T), everything], clustered(temperature=T)),
        ([nothing, draws], draws),
    ):
        torch.manual_seed(0)
        loss = Together(losses)(c, 3.0).loss
        torch.manual_seed(0)
        assert torch.allclose(loss, alone(c, 3.0).loss, atol=1e-6)


def test_before_epoch_reaches_its_members_and_state_is_whole():
    torch.manual_seed(0)

    def make():
        ifnd = IFND(4, N_DATA, temperature=T, clusters=[3], reassign_every=1)
        return Together([ifnd, make_ring()])

    loss_fn = make()
    loss_fn.before_epoch(1, lambda: F.normalize(torch.randn(N_DATA, 8), dim=1))
    other = make()
    other.load_state_dict(loss_fn.state_dict())
    c = contrast(n_data=N_DATA)
    assert torch.equal(loss_fn(c, 3.0).loss, other(c, 3.0).loss)
    assert (other.losses["ifnd"].pseudo >= 0).all()


def test_shares_of_a_method_are_of_what_those_before_it_left():
    """Without labels of clusters IFND leaves all, so the ring's are as if it stood alone."""
    c, labels = contrast(n_data=N_DATA, masked="self"), torch.arange(N_DATA) % 3
    alone = figures_of(make_ring(), c, 3.0, labels)
    together = figures_of(
        Together([clustered(acceptance=(0, 0), temperature=T), make_ring()]), c, 3.0, labels
    )
    for name in ("used %", "false negatives used %", "inner threshold", "outer %"):
        assert together[f"ring: {name}"] == alone[name]
    assert together["used %"] == alone["used %"]
    assert together["ifnd: removed %"] == 0
    left = figures_of(Together([clustered(temperature=T), make_ring()]), c, 3.0, labels)
    removed = left["ifnd: removed %"].item()
    share = left["used %"].item() / left["ring: used %"].item()
    assert removed > 5
    assert share == pytest.approx(1 - removed / 100)


@pytest.mark.parametrize(
    "make,message",
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
            "ring cannot follow mochi, whose mixed points are not the candidates to choose "
            "from; put mochi last",
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
def test_lists_without_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        Together(make())
