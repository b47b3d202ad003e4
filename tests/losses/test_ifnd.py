"""IFND: labels compared pair by pair, and when they are assigned and accepted."""

import math

import pytest
import torch
from literal import (
    N_DATA,
    SWEEP,
    all_equal,
    assert_agrees,
    clustered,
    contrast,
    figures_of,
    literal_ifnd,
    mean_over_queries,
)
from torch.nn import functional as F

import losses.ifnd
from losses.ifnd import IFND
from losses.kmeans import kmeans
from losses.nce import NCE


@pytest.mark.parametrize("mode", ["eliminate", "attract"])
@pytest.mark.parametrize("N,K,t,M,masked", SWEEP)
def test_ifnd_is_its_formula(N, K, t, M, masked, mode):
    c = contrast(N, K, M=M, masked=masked, n_data=N_DATA)
    c.negative_index[:2] = -1  # the queue's random start
    loss_fn, of_one = literal_ifnd(c, t, mode)
    assert_agrees(loss_fn(c, 3.0).loss, c, *mean_over_queries(c, of_one))
    figures = figures_of(loss_fn, c, 3.0)
    assert figures["removed %" if mode == "eliminate" else "attracted %"] > 0 or K < 10


@pytest.mark.parametrize("mode", ["eliminate", "attract"])
def test_with_nothing_accepted_it_is_nce(mode):
    for masked in (False, True, "self"):
        c = contrast(M=5, masked=masked, n_data=N_DATA)
        expected = NCE(temperature=0.2)(c, 0).loss
        none_accepted = clustered(acceptance=(0, 0), temperature=0.2, mode=mode)
        assert torch.allclose(none_accepted(c, 3.0).loss, expected, atol=1e-6)
        unclustered = IFND(30, N_DATA, temperature=0.2, clusters=[4], acceptance=[1, 1], mode=mode)
        assert torch.allclose(unclustered(c, 3.0).loss, expected, atol=1e-6)


def test_all_equal_gives_log_K_plus_1():
    c = all_equal(N=4, K=50, n_data=N_DATA)
    assert abs(IFND(30, N_DATA, clusters=[4])(c, 0.0).loss - math.log(51)) < 1e-5
    # All in one cluster: every negative is false.
    for mode, expected in (("eliminate", 0), ("attract", math.log(51))):
        loss_fn = clustered(levels=(2,), acceptance=(1, 1), mode=mode)
        loss_fn.pseudo.zero_()
        assert abs(loss_fn(c, 0.0).loss - expected) < 1e-5


def test_acceptance_rises_from_0_to_100_percent_by_epoch():
    loss_fn = IFND(11, N_DATA, clusters=[3], reassign_every=2)
    assert [loss_fn.accepted(e) for e in (0, 0.9, 1, 5.5, 10, 10.9)] == [0, 0, 0.1, 0.5, 1, 1]
    with pytest.warns(UserWarning, match="no clustering before the end, epochs 1"):
        assert IFND(1, N_DATA, clusters=[3]).accepted(0) == 0
    loss_fn = clustered(acceptance=(0, 1))
    for epoch, images in ((0, 0), (3, 10), (9, 30)):  # r n images, the most confident
        labels = loss_fn.accepted_labels(torch.arange(N_DATA), epoch, otherwise=-1)
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
    loss_fn = IFND(5, N_DATA, clusters=[3, 2], reassign_every=2, temperature=0.2)
    c = contrast(n_data=N_DATA)
    asked = []

    def extract():
        asked.append(1)
        return z

    for epoch in range(5):
        loss_fn.before_epoch(epoch, extract)
        assert len(asked) == epoch // 2  # at epochs 2 and 4
        if epoch < 2:
            assert (loss_fn.pseudo == -1).all()
            figures = figures_of(loss_fn, c, epoch, truth)
            assert figures["accepted %"] == 25 * epoch
            assert "NMI, k=3" not in figures
    for label in range(3):
        group = loss_fn.pseudo[0][(truth == label) & (torch.arange(N_DATA) != 7)]
        assert (group == group[0]).all()
    assert loss_fn.pseudo[0].max() == 2
    assert loss_fn.pseudo[1].max() == 1
    assert loss_fn.rank[0, 7] == N_DATA
    assert (loss_fn.rank.sort(1).values == torch.arange(1, N_DATA + 1)).all()
    figures = figures_of(loss_fn, c, 4.5, truth)
    assert figures["accepted %"] == 100
    assert figures["precision %, k=3"] > 85
    assert figures["recall %, k=3"] > 85
    assert figures["NMI, k=3"] > 0.85 > figures["NMI, k=2"]
    again = IFND(5, N_DATA, clusters=[3, 2], reassign_every=2, temperature=0.2)
    again.load_state_dict(loss_fn.state_dict())  # all of it is state
    assert torch.equal(loss_fn(c, 4.5).loss, again(c, 4.5).loss)


def test_labels_are_looked_at_once_an_epoch(monkeypatch):
    """It takes all images, and waits for the device."""
    calls = []

    def record(*args):
        calls.append(args)
        return {"NMI": 0.5}

    monkeypatch.setattr(losses.ifnd, "validity", record)
    c, labels, loss_fn = contrast(n_data=N_DATA), torch.arange(N_DATA) % 3, clustered()
    for epoch in (3, 4):
        loss_fn.before_epoch(epoch, None)
        for step in range(3):
            assert figures_of(loss_fn, c, epoch + step / 3, labels)["NMI, k=2"] == 0.5
        assert len(calls) == 2 * (epoch - 2)  # levels


def test_progress_is_shown_where_it_is_wanted():
    bars = []

    class Bar:
        def __init__(self, total, desc):
            bars.append(self)
            self.total, self.desc, self.n = total, desc, 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            self.n += 1

    loss_fn = IFND(5, N_DATA, clusters=[3, 2], reassign_every=2)
    loss_fn.progress = Bar
    loss_fn.before_epoch(2, lambda: F.normalize(torch.randn(N_DATA, 8), dim=1))
    assert [bar.desc for bar in bars] == ["3 clusters", "2 clusters"]
    assert all(5 <= bar.n <= bar.total == 105 for bar in bars)


@pytest.mark.parametrize("start", ["kmeans++", "random"])
def test_the_start_reaches_k_means_and_a_loaded_state_clusters_alike(start, monkeypatch):
    asked = []

    def record(*args, **options):
        asked.append(options["start"])
        return kmeans(*args, **options)

    monkeypatch.setattr(losses.ifnd, "kmeans", record)
    z = F.normalize(torch.randn(N_DATA, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    first, again = (IFND(5, N_DATA, clusters=[4, 2], reassign_every=2, start=start) for _ in (0, 1))
    first.before_epoch(2, lambda: z)
    again.load_state_dict(first.state_dict())
    for loss_fn in (first, again):
        loss_fn.before_epoch(4, lambda: z)
    assert asked == [start] * 6
    assert torch.equal(first.pseudo, again.pseudo)
    assert torch.equal(first.rank, again.rank)


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
