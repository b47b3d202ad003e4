"""The sets of candidates that pictures show are those of the method, read literally."""

import literal
import numpy as np
import pytest
import torch

from losses.mochi import MoCHi
from losses.nce import NCE
from losses.ring import Ring
from losses.together import Together
from training.negatives import NONE, QUERY, candidate_bands, select_queries, spaced_by_rank

MASKS = [False, True, "self"]


def members(band, i):
    """Return the candidates of query i that a band stands for."""
    return set(band.members[i].nonzero().flatten().tolist())


def shown(band, i):
    return [row for row in band.candidate[i].tolist() if row != NONE]


@pytest.mark.parametrize("masked", MASKS)
def test_ring_shows_what_lies_before_in_and_after_the_ring(masked):
    c = literal.contrast(N=5, K=60, masked=masked)
    ring = Ring(9, inner=0.1, outer=0.4, anneal_epochs=0)
    too_near, in_ring, too_far = candidate_bands(ring, c, 3.0)
    for i in range(5):
        ranked = literal.nearest(c, i)
        expected = literal.ring(ranked, 0.1, 0.4)
        first, last = ranked.index(expected[0]), ranked.index(expected[-1])
        assert members(too_near, i) == set(ranked[:first])
        assert members(in_ring, i) == set(expected)
        assert members(too_far, i) == set(ranked[last + 1 :])
        assert shown(too_near, i) == ranked[: min(3, first)]
        assert (shown(in_ring, i)[0], shown(in_ring, i)[-1]) == (expected[0], expected[-1])
        s = (c.query[i] @ c.negative[expected[0]]).item()
        assert in_ring.similarity[i, 0].item() == pytest.approx(s)
    assert "the nearest 10 % of the candidates" in too_near.title
    assert "from 10 % to 40 %" in in_ring.title


@pytest.mark.parametrize("masked", MASKS)
def test_nce_shows_the_hardest_and_the_easiest(masked):
    c = literal.contrast(N=5, K=60, masked=masked)
    hardest, others = candidate_bands(NCE(), c, 0.0)
    for i in range(5):
        ranked = literal.nearest(c, i)
        assert shown(hardest, i) == ranked[:5]
        assert members(others, i) == set(ranked)
        assert shown(others, i) == [ranked[(len(ranked) - 1) // 2], ranked[-1]]


def test_draws_are_shown_and_candidates_without_an_image_are_not():
    c = literal.contrast(N=5, K=60)
    c = c._replace(negative_index=torch.where(torch.arange(60) < 30, -1, c.negative_index))
    torch.manual_seed(0)
    drawn = NCE(n_negatives=7).select(c, c.query @ c.negative.T, 0.0).candidate
    torch.manual_seed(0)
    _, others, unused = candidate_bands(NCE(n_negatives=7), c, 0.0)
    for i in range(5):
        assert members(others, i) == set(drawn[i].tolist()) - set(range(30))
        assert members(unused, i) == set(range(30, 60)) - set(drawn[i].tolist())


@pytest.mark.parametrize("masked", MASKS)
def test_mochi_shows_its_hardest_points_and_their_parents(masked):
    c = literal.contrast(N=5, K=60, masked=masked)
    mochi = MoCHi(hardest=6, mixed=9, query_mixed=4, warmup_epochs=0)
    i_, j_, j_query, a, b = literal.fix_draws(mochi, 5)
    hardest, parents, point, _, second_point, parent, query_point = candidate_bands(mochi, c, 0.0)
    for x in range(5):
        hard = literal.nearest(c, x)[:6]
        assert members(hardest, x) == set(hard)
        q, n = c.query[x].detach().double(), c.negative.double()
        points = literal.mix(q, [n[j] for j in hard], (i_[x], j_[x], j_query[x], a[x], b[x]))
        h = [(q @ v).item() for v in points]
        order = np.argsort(h[:9])[::-1]
        assert shown(parents, x) == [hard[i_[x, order[0]]], hard[j_[x, order[0]]]]
        assert [point.candidate[x, 0], point.partner[x, 0]] == shown(parents, x)
        assert point.similarity[x, 0].item() == pytest.approx(h[order[0]], abs=1e-5)
        assert second_point.similarity[x, 0].item() == pytest.approx(h[order[1]], abs=1e-5)
        best = int(np.argmax(h[9:]))
        assert shown(parent, x) == [hard[j_query[x, best]]]
        assert query_point.similarity[x, 0].item() == pytest.approx(h[9 + best], abs=1e-5)
        assert query_point.partner[x, 0] == QUERY


@pytest.mark.parametrize("mode", ["eliminate", "attract"])
def test_ifnd_shows_accepted_and_rejected_cluster_mates_of_each_level(mode):
    c = literal.contrast(N=8, K=60, masked="self", n_data=literal.N_DATA)
    ifnd = literal.clustered(mode=mode)
    title, *bands = candidate_bands(ifnd, c, 3.0)
    assert title.title == "The surest 60 % of all images are accepted as members of their cluster"
    assert len(bands) == (5 if mode == "eliminate" else 4)
    for level, pseudo in enumerate(ifnd.pseudo.tolist()):
        accepted, rejected = bands[2 * level : 2 * level + 2]
        for i in range(8):
            valid = literal.nearest(c, i)
            false = set(literal.false_negatives(c, ifnd, level, i)) & set(valid)
            label = pseudo[c.index[i]]
            mates = {j for j in valid if pseudo[c.negative_index[j]] == label}
            assert members(accepted, i) == false
            assert members(rejected, i) == mates - false
            for row, place in zip(accepted.candidate[i].tolist(), accepted.place[i].tolist()):
                rank = ifnd.rank[level, c.negative_index[row]].item()
                assert row == NONE or place == pytest.approx(100 * rank / literal.N_DATA)
        assert f"{ifnd.clusters[level]} clusters" in accepted.title


def test_what_is_shown_of_ring_and_ifnd_is_what_the_loss_sums_over():
    c = literal.contrast(N=6, K=60, masked="self", n_data=literal.N_DATA)
    s, positive = c.query @ c.negative.T, (c.query * c.positive.mean(1)).sum(1)
    ring = Ring(9, inner=0.1, outer=0.4, temperature=0.5)
    _, in_ring, _ = candidate_bands(ring, c, 1.5)
    assert ring(c, 1.5).loss.item() == pytest.approx(info_nce(s, positive, in_ring.members))
    ifnd = literal.clustered(temperature=0.5)
    accepted = [band for band in candidate_bands(ifnd, c, 3.0) if "accepted, so" in band.title]
    valid = torch.ones(6, 60, dtype=torch.bool).scatter(1, c.self_index[:, None], False)
    of_level = [info_nce(s, positive, valid & ~band.members) for band in accepted]
    assert ifnd(c, 3.0).loss.item() == pytest.approx(sum(of_level) / len(of_level))


def info_nce(s, positive, is_negative, t=0.5):
    Z = (is_negative * (s / t).exp()).sum(1)
    return -((positive / t) - ((positive / t).exp() + Z).log()).mean().item()


def test_each_method_of_a_list_is_shown_on_what_the_one_before_it_left():
    c = literal.contrast(N=6, K=60, n_data=literal.N_DATA)
    ifnd = literal.clustered(temperature=0.5)
    ring = Ring(9, inner=0.1, outer=0.4, anneal_epochs=0, temperature=0.5)
    bands = candidate_bands(Together([ifnd, ring]), c, 3.0)
    too_near, in_ring, too_far = bands[-3:]
    for i in range(6):
        false = literal.false_negatives(c, ifnd, 1, i)  # of the finest level
        ranked = [j for j in literal.nearest(c, i) if j not in false]
        assert members(in_ring, i) == set(literal.ring(ranked, 0.1, 0.4))
        assert members(too_near, i) | members(in_ring, i) | members(too_far, i) == set(ranked)


def test_before_a_method_begins_its_picture_says_so():
    c = literal.contrast(N=6, K=60, n_data=literal.N_DATA)
    ifnd = literal.clustered()
    ifnd.pseudo.fill_(-1)
    assert candidate_bands(ifnd, c, 0.0)[0].title.startswith("No clusters before epoch 5.")
    mochi = MoCHi(hardest=6, mixed=9, query_mixed=4, warmup_epochs=2)
    title = candidate_bands(mochi, c, 1.0)[0].title
    assert title.startswith("Nothing is mixed before epoch 2.")


def test_queries_are_selected_with_their_masks():
    for masked in MASKS:
        c = literal.contrast(N=5, K=60, masked=masked)
        of_two = select_queries(c, torch.tensor([3, 1]))
        assert literal.nearest(of_two, 0) == literal.nearest(c, 3)
        assert literal.nearest(of_two, 1) == literal.nearest(c, 1)


def test_few_members_are_all_shown_and_none_twice():
    s = torch.arange(6.0)[None].expand(3, -1)
    is_member = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    spaced = spaced_by_rank(s, is_member, 3)
    assert spaced.tolist() == [[2, 0, NONE], [NONE, NONE, NONE], [5, 3, 0]]
