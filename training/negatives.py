"""What a method does with the candidates of a query: which it takes, leaves out, or mixes.

For pictures (training/pictures.py). Nothing is chosen anew: every set is read off what the loss
returns, or off the function by which the loss chooses.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses import NEG_INF, Contrast, Negatives, Output, similarity
from losses.base import valid_candidates
from losses.diagnostics import first_of_output
from losses.ifnd import IFND
from losses.jcl import JCL
from losses.mochi import MoCHi
from losses.ring import Ring
from losses.together import Together, narrow

# In place of a row of Contrast.negative: a query has no such candidate, or it is the query itself.
NONE, QUERY = -1, -2


class Band(NamedTuple):
    """Candidates of n queries with which a method does the same, some of them to be shown."""

    title: str  # "": it belongs to the band before
    candidate: Tensor  # (n, m)  rows of Contrast.negative that are shown, or NONE
    similarity: Tensor  # (n, m)  to the query
    members: Tensor | None = None  # (n, K) bool, all with which the method does this
    partner: Tensor | None = None  # (n, m)  what each is mixed with: rows, or QUERY
    place: Tensor | None = None  # (n, m)  among all images by confidence, in percent


def select_queries(contrast: Contrast, rows: Tensor) -> Contrast:
    """Return the contrast of the queries `rows` (n,) alone."""
    mask, self_index = contrast.mask, contrast.self_index
    return contrast._replace(
        query=contrast.query[rows],
        positive=contrast.positive[rows],
        index=contrast.index[rows],
        mask=None if mask is None else mask[rows],
        self_index=None if self_index is None else self_index[rows],
    )


def candidate_bands(loss_fn: nn.Module, contrast: Contrast, epoch: float) -> list[Band]:
    """Say what a loss, or each loss of a list, does with the candidates.

    Args:
        loss_fn: a loss, or a Together.
        contrast: of n queries, at most those of which diagnostics.py takes its figures.
        epoch: what the loss is called with.
    """
    bands = []
    for method, left, output in methods_in_turn(loss_fn, contrast, epoch):
        if isinstance(method, Ring):
            bands += ring_bands(method, left, output, epoch)
        elif isinstance(method, MoCHi):
            bands += mochi_bands(method, left, output)
        elif isinstance(method, JCL):
            bands += jcl_bands(left, output)
        elif isinstance(method, IFND):
            bands += ifnd_bands(method, left, output, epoch)
        else:
            bands += plain_bands(left, output)
    return bands


def methods_in_turn(
    loss_fn: nn.Module, contrast: Contrast, epoch: float
) -> Iterator[tuple[nn.Module, Contrast, Output]]:
    """Yield each method, the contrast that the methods before it left to it, and its output."""
    output = loss_fn(contrast, epoch)
    output = first_of_output(loss_fn, contrast, output, epoch)
    if not isinstance(loss_fn, Together):
        yield loss_fn, contrast, output
        return
    left, s = contrast, similarity(contrast)  # (n, K)
    for name in loss_fn.earlier:
        method = loss_fn.losses[name]
        chosen = method.select(left, s, epoch)  # (..., n, k)
        yield method, left, Output(output.loss, chosen, chosen)
        left, s = narrow(left, chosen)
    yield loss_fn.losses[loss_fn.last], left, output
    if loss_fn.of_positives == "ifnd":  # its mode is attract; JCL asks nothing of candidates
        yield loss_fn.losses["ifnd"], contrast, output


# ------------------------------------------------------------------------------------- the methods


def plain_bands(contrast: Contrast, output: Output) -> list[Band]:
    """InfoNCE, and any loss that is not known here: what it uses, and what it leaves out."""
    s, is_candidate = all_similarities(contrast), has_image(contrast)  # (n, K)
    is_used = members_of(output.negatives, s.shape[1]) & is_candidate
    is_unused = is_candidate & ~members_of(output.chosen, s.shape[1])
    others = spaced_by_rank(s, is_used, 3)[:, 1:]  # the first is the hardest
    bands = [
        hardest_band("The hardest negatives", s, is_used, 5),
        band("Of all negatives the one halfway, and the easiest", others, s, is_used),
    ]
    if is_unused.any():
        nearest_unused = nearest(s, is_unused, 3)
        bands.append(band("Not among the negatives", nearest_unused, s, is_unused))
    return bands


def jcl_bands(contrast: Contrast, output: Output) -> list[Band]:
    """JCL changes the keys, which are no candidates: the hardest negatives, to compare with."""
    s = all_similarities(contrast)  # (n, K)
    is_used = members_of(output.negatives, s.shape[1]) & has_image(contrast)
    return [hardest_band("The hardest negatives", s, is_used, 3)]


def ring_bands(ring: Ring, contrast: Contrast, output: Output, epoch: float) -> list[Band]:
    """Ring: what it cuts out as too near, the ring itself, and what lies beyond."""
    s, is_candidate = all_similarities(contrast), has_image(contrast)  # (n, K)
    nearest_of_ring = finest(output.chosen.similarity).amax(1, keepdim=True)  # (n, 1)
    in_ring = members_of(output.chosen, s.shape[1])  # (n, K)
    is_nearer = is_candidate & ~in_ring & (s >= nearest_of_ring)
    is_beyond = is_candidate & ~in_ring & ~is_nearer
    in_ring = in_ring & is_candidate
    inner, outer = (f"{100 * share:.3g} %" for share in ring.percentiles(epoch))
    drawn = f", of which {ring.n_negatives} are drawn" if ring.n_negatives else ""
    return [
        band(
            f"Left out as too near: the nearest {inner} of the candidates",
            nearest(s, is_nearer, 3),
            s,
            is_nearer,
        ),
        band(
            f"The ring, from {inner} to {outer}: the negatives{drawn}, from near to far",
            spaced_by_rank(s, in_ring, 4),
            s,
            in_ring,
        ),
        band(
            f"Left out as too far: beyond {outer}, the nearest and the farthest",
            spaced_by_rank(s, is_beyond, 2),
            s,
            is_beyond,
        ),
    ]


def mochi_bands(mochi: MoCHi, contrast: Contrast, output: Output) -> list[Band]:
    """MoCHi: the hardest mixed points, and what they are mixed of."""
    mixed = output.synthetic
    if mixed is None:
        first, *others = plain_bands(contrast, output)
        title = f"Nothing is mixed before epoch {mochi.warmup_epochs:g}. {first.title}"
        return [first._replace(title=title), *others]
    s = all_similarities(contrast)  # (n, K)
    is_used = members_of(output.chosen, s.shape[1])  # (n, K)
    is_hardest = members_of_rows(nearest(s, is_used, mochi.hardest), s)
    h, i, j = finest(mixed.h), finest(mixed.i), finest(mixed.j)  # (n, mixed)
    h_query, j_query = finest(mixed.h_query), finest(mixed.j_query)  # (n, query_mixed)
    title = f"Points are mixed of the {mochi.hardest} hardest candidates"
    bands = [Band(title, i[:, :0], h[:, :0], is_hardest)]
    for order, words in zip(range(h.shape[1]), ("hardest", "second hardest")):
        point = h.topk(order + 1).indices[:, order:]  # (n, 1)
        parents = torch.cat([i.gather(1, point), j.gather(1, point)], 1)  # (n, 2)
        title = f"The {words} mix of two, and below them their blend: the point has no image"
        bands.append(band(title, parents, s))
        bands.append(blend(parents[:, :1], parents[:, 1:], h.gather(1, point)))
    if h_query.shape[1]:
        point = h_query.topk(1).indices  # (n, 1)
        parent = j_query.gather(1, point)
        title = "The hardest mix of one with the query itself, and below it their blend"
        bands.append(band(title, parent, s))
        of_query = torch.full_like(parent, QUERY)
        bands.append(blend(parent, of_query, h_query.gather(1, point)))
    return bands


def ifnd_bands(ifnd: IFND, contrast: Contrast, output: Output, epoch: float) -> list[Band]:
    """IFND: of each level the query's cluster-mates, those that are accepted and the others."""
    if (ifnd.pseudo < 0).any():
        first, *others = plain_bands(contrast, output)
        title = f"No clusters before epoch {ifnd.reassign_every}. {first.title}"
        return [first._replace(title=title), *others]
    s, is_candidate = all_similarities(contrast), has_image(contrast)  # (n, K)
    false_negatives = ifnd.false_negatives(contrast, epoch)  # (L, n, K)
    becomes = "left out" if ifnd.mode == "eliminate" else "attracted"
    share = f"{100 * ifnd.accepted(epoch):.3g}"
    title = f"The surest {share} % of all images are accepted as members of their cluster"
    bands = [Band(title, contrast.index[:, None][:, :0], s[:, :0])]
    for k, pseudo, rank, is_false in zip(ifnd.clusters, ifnd.pseudo, ifnd.rank, false_negatives):
        is_mate = pseudo[contrast.index][:, None] == pseudo[contrast.negative_index]  # (n, K)
        is_accepted = is_false & is_candidate
        is_rejected = is_mate & is_candidate & ~is_false
        place = 100 * rank[contrast.negative_index] / rank.shape[0]  # (K,)
        accepted = spaced_by_rank(s, is_accepted, 2)
        rejected = spaced_by_rank(s, is_rejected, 1)
        of_level = (
            f"{k} clusters: the query's cluster, accepted, so {becomes}: nearest and farthest"
        )
        bands.append(band(of_level, accepted, s, is_accepted, place))
        of_level = f"{k} clusters: the query's cluster, but it or the query is unsure, so kept"
        bands.append(band(of_level, rejected, s, is_rejected, place))
    if ifnd.mode == "eliminate":
        is_kept = members_of(output.chosen, s.shape[1]) & is_candidate
        title = f"The hardest negative that is kept, with {ifnd.clusters[-1]} clusters"
        bands.append(hardest_band(title, s, is_kept, 1))
    return bands


# ------------------------------------------------------------------------------- sets of candidates


def all_similarities(contrast: Contrast) -> Tensor:
    """Return q_i n_j (n, K), of candidates that may be no negatives, too."""
    return contrast.query @ contrast.negative.T


def has_image(contrast: Contrast) -> Tensor:
    """Return (n, K) bool: which candidates may be negatives, and are an image's."""
    return finest(valid_candidates(contrast)) & (contrast.negative_index >= 0)


def finest(x: Tensor) -> Tensor:
    """Return x (n, k), or of IFND's levels x (L, n, k) the last, which has the most clusters."""
    return x if x.dim() == 2 else x[-1]


def members_of(negatives: Negatives, K: int) -> Tensor:
    """Return (n, K) bool: which candidates are among the negatives."""
    is_valid = finest(negatives.similarity) > NEG_INF  # (n, k)
    if negatives.candidate is None:
        return is_valid
    # draws come several times
    count = torch.zeros(len(is_valid), K, dtype=torch.int, device=is_valid.device)
    return count.scatter_add_(1, finest(negatives.candidate), is_valid.int()) > 0


def members_of_rows(candidate: Tensor, s: Tensor) -> Tensor:
    """Return (n, K) bool: which candidates are among those (n, m), NONE aside. s: (n, K)."""
    is_there = torch.zeros_like(s, dtype=torch.int)
    return is_there.scatter_add_(1, candidate.clamp(min=0), (candidate >= 0).int()) > 0


def nearest(s: Tensor, members: Tensor, m: int) -> Tensor:
    """Return the m members that are most similar to each query: (n, m), NONE where it has fewer."""
    ranked, candidate = s.masked_fill(~members, NEG_INF).topk(min(m, s.shape[1]))
    return candidate.masked_fill(ranked <= NEG_INF, NONE)


def spaced_by_rank(s: Tensor, members: Tensor, m: int) -> Tensor:
    """Return m members by equal steps of rank, from the nearest on to the farthest: (n, m).

    Of one it is the nearest. NONE where a query has fewer.
    """
    count = members.sum(1, keepdim=True)  # (n, 1)
    order = s.masked_fill(~members, NEG_INF).argsort(dim=1, descending=True, stable=True)  # (n, K)
    i = torch.arange(m, device=s.device)[None]  # (1, m)
    spaced = i * (count - 1) // max(1, m - 1)  # (n, m)
    rank = torch.where(count > m, spaced, i)
    candidate = order.gather(1, rank.clamp(max=s.shape[1] - 1))
    return candidate.masked_fill(rank >= count, NONE)


def band(
    title: str,
    candidate: Tensor,
    s: Tensor,
    members: Tensor | None = None,
    place: Tensor | None = None,
) -> Band:
    """Return a Band of candidates (n, m). s and members: (n, K); place: (K,)."""
    row = candidate.clamp(min=0)
    of_shown = None if place is None else place[row]
    return Band(title, candidate, s.gather(1, row), members, place=of_shown)


def hardest_band(title: str, s: Tensor, is_used: Tensor, m: int) -> Band:
    """Return the Band of the m nearest that are used, which stand for themselves alone."""
    hardest = nearest(s, is_used, m)
    return band(title, hardest, s, members_of_rows(hardest, s))


def blend(first: Tensor, second: Tensor, h: Tensor) -> Band:
    """Return the Band of points mixed of `first` and `second`, of similarity h; each is (n, m)."""
    candidate = first.masked_fill(h <= NEG_INF, NONE)
    return Band("", candidate, h, partner=second)
