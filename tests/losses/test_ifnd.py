"""IFND: labels compared pair by pair, and when they are assigned and accepted."""

import math

import pytest
import torch
from engine.kmeans import kmeans
from literal import SWEEP, agrees, contrast, mean_over_queries, nearest
from torch.nn import functional as F

import losses.ifnd
from losses.ifnd import IFND
from losses.nce import NCE

N_DATA = 30


def clustered(levels=(2, 5), acceptance=(0.6, 0.6), seed=0, **settings):
    """An IFND whose labels are as if assigned, by lot."""
    g = torch.Generator().manual_seed(seed)
    loss_fn = IFND(10, N_DATA, clusters=list(levels), acceptance=list(acceptance), **settings)
    loss_fn.pseudo = torch.stack([torch.randint(k, (N_DATA,), generator=g) for k in levels])
    loss_fn.rank = torch.stack([torch.randperm(N_DATA, generator=g) + 1 for _ in levels])
    return loss_fn


def literal(c, t, loss_fn, share, mode):
    n = c.negative.double()

    def of_one(i, query):
        total = 0
        for pseudo, rank in zip(loss_fn.pseudo.tolist(), loss_fn.rank.tolist()):
            accepted = {
                image: label
                for image, (label, r) in enumerate(zip(pseudo, rank))
                if r <= share * N_DATA + 1e-9
            }
            mine = accepted.get(c.index[i].item())
            may = nearest(c, i)
            F_q = [
                j
                for j in may
                if mine is not None and accepted.get(c.negative_index[j].item()) == mine
            ]
            k = c.positive[i].double().mean(0)

            def e(v):
                return torch.exp(query[i] @ v / t)

            if mode == "eliminate":
                total = total - torch.log(e(k) / (e(k) + sum(e(n[j]) for j in may if j not in F_q)))
            else:
                everything = e(k) + sum(e(n[j]) for j in may)
                friends = [k, *(n[j] for j in F_q)]
                total = total - sum(torch.log(e(p) / everything) for p in friends) / len(friends)
        return total / len(loss_fn.pseudo)

    return mean_over_queries(c, of_one)


@pytest.mark.parametrize("mode", ["eliminate", "attract"])
@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_ifnd_is_its_formula(N, K, t, M, masked, mode):
    c = contrast(N, K, M=M, masked=masked, n_data=N_DATA)
    c.negative_index[:2] = -1  # the queue's random start
    loss_fn = clustered(temperature=t, mode=mode)
    loss, figures = loss_fn(c, 3.0)
    agrees(loss, c, *literal(c, t, loss_fn, 0.6, mode))
    assert figures["removed %" if mode == "eliminate" else "attracted %"] > 0 or K < 10


@pytest.mark.parametrize("mode", ["eliminate", "attract"])
def test_with_nothing_accepted_it_is_nce(mode):
    for masked in (False, True, "own"):
        c = contrast(M=5, masked=masked, n_data=N_DATA)
        expected = NCE(temperature=0.2)(c, 0)[0]
        none_accepted = clustered(acceptance=(0, 0), temperature=0.2, mode=mode)
        assert torch.allclose(none_accepted(c, 3.0)[0], expected, atol=1e-6)
        unclustered = IFND(10, N_DATA, temperature=0.2, clusters=[4], acceptance=[1, 1], mode=mode)
        assert torch.allclose(unclustered(c, 3.0)[0], expected, atol=1e-6)


def test_all_equal_gives_log_K_plus_1():
    c = contrast(N=4, K=50, n_data=N_DATA)
    same = c.query.detach()[:1]
    c = c._replace(
        query=same.expand(4, -1).clone().requires_grad_(),
        positive=same.expand(4, 1, -1),
        negative=same.expand(50, -1),
    )
    assert abs(IFND(10, N_DATA, clusters=[4])(c, 0.0)[0] - math.log(51)) < 1e-5
    # All in one cluster: every negative is false.
    for mode, expected in (("eliminate", 0), ("attract", math.log(51))):
        loss_fn = clustered(levels=(2,), acceptance=(1, 1), mode=mode)
        loss_fn.pseudo.zero_()
        assert abs(loss_fn(c, 0.0)[0] - expected) < 1e-5


def test_acceptance_rises_from_0_to_100_percent_by_epoch():
    loss_fn = IFND(11, N_DATA, clusters=[3])
    assert [loss_fn.accepted(e) for e in (0, 0.9, 1, 5.5, 10, 10.9)] == [0, 0, 0.1, 0.5, 1, 1]
    assert IFND(1, N_DATA, clusters=[3]).accepted(0) == 0
    loss_fn = clustered(acceptance=(0, 1))
    for epoch, images in ((0, 0), (3, 10), (9, 30)):  # r n images, the most confident
        labels = loss_fn.accepted_labels(torch.arange(N_DATA), epoch, -1)
        assert ((labels >= 0).sum(1) == images).all()
        assert (loss_fn.rank[labels >= 0] <= images).all()


def test_clusters_are_found_assigned_and_ranked_at_their_time():
    """Three tight groups and one stray image: before epoch 2 nothing; then the groups, with the
    stray the least confident."""
    torch.manual_seed(0)
    centres = F.normalize(torch.eye(3, 8) + 0.01, dim=1)
    truth = torch.arange(N_DATA) % 3
    z = F.normalize(centres[truth] + 0.01 * torch.randn(N_DATA, 8), dim=1)
    z[7] = F.normalize(centres[0] + centres[1] + 0.01, dim=0)
    loss_fn = IFND(5, N_DATA, truth, clusters=[3, 2], reassign_every=2, temperature=0.2)
    asked = []

    def extract():
        asked.append(1)
        return z

    for epoch in range(5):
        loss_fn.before_epoch(epoch, extract)
        assert len(asked) == epoch // 2  # at epochs 2 and 4
        if epoch < 2:
            assert (loss_fn.pseudo == -1).all() and loss_fn.validity == {"accepted %": 25.0 * epoch}
    for c in range(3):
        group = loss_fn.pseudo[0][(truth == c) & (torch.arange(N_DATA) != 7)]
        assert (group == group[0]).all()
    assert loss_fn.pseudo[0].max() == 2 and loss_fn.pseudo[1].max() == 1
    assert loss_fn.rank[0, 7] == N_DATA
    assert (loss_fn.rank.sort(1).values == torch.arange(1, N_DATA + 1)).all()
    figures = loss_fn.validity
    assert figures["precision %, k=3"] > 85 and figures["recall %, k=3"] > 85
    assert figures["NMI, k=3"] > 0.85 > figures["NMI, k=2"]
    again = IFND(5, N_DATA, truth, clusters=[3, 2], reassign_every=2, temperature=0.2)
    again.load_state_dict(loss_fn.state_dict())  # all of it is state
    c = contrast(n_data=N_DATA)
    assert torch.equal(loss_fn(c, 4.5)[0], again(c, 4.5)[0])


@pytest.mark.parametrize("start", ["kmeans++", "random"])
def test_the_start_reaches_k_means_and_a_loaded_state_clusters_alike(start, monkeypatch):
    asked = []

    def record(*args, **how):
        asked.append(how["start"])
        return kmeans(*args, **how)

    monkeypatch.setattr(losses.ifnd, "kmeans", record)
    z = F.normalize(torch.randn(N_DATA, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    first, again = (IFND(5, N_DATA, clusters=[4, 2], reassign_every=2, start=start) for _ in (0, 1))
    first.before_epoch(2, lambda: z)
    again.load_state_dict(first.state_dict())
    for loss_fn in (first, again):
        loss_fn.before_epoch(4, lambda: z)
    assert asked == [start] * 6
    assert torch.equal(first.pseudo, again.pseudo) and torch.equal(first.rank, again.rank)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"temperature": 0.0}, "temperature"),
        ({"clusters": []}, r"clusters \[\]"),
        ({"clusters": [3, 31]}, "30 images"),
        ({"reassign_every": 0}, "reassign_every"),
        ({"acceptance": [0.5]}, "acceptance"),
        ({"acceptance": [1.0, 0.0]}, "acceptance"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        IFND(10, N_DATA, **{"clusters": [3], **settings})
