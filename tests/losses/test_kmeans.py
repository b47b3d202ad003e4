"""k-means against scikit-learn's and the start it had before, and what it promises of its own."""

import math
import os
import subprocess
import sys
import textwrap
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

from benchmarks.kmeans import greedy_rows, grouped, smooth
from losses.kmeans import kmeans, lloyd
from losses.kmeans import rows as kmeans_rows
from losses.kmeans.quality import confidence, validity
from losses.kmeans.start import random_rows
from processes import ROOT, run

BOTH_STARTS = pytest.mark.parametrize("start", ["kmeans++", "random"])


def objective(x, centroids, labels):
    return (x - centroids[labels]).double().square().sum().item()


def embeddings(n, seed=0):
    """On the sphere, in 200 loose groups: what k-means meets in training."""
    return grouped(n, 200, seed)


@pytest.mark.parametrize("k,restarts", [(10, 5), (100, 5), (1000, 1)])
def test_the_objective_is_within_1_percent_of_scikit_learns(k, restarts):
    """n x 128, equal iterations and restarts. n is 5,000, or 50,000 with FULL=1 (a minute)."""
    sklearn = pytest.importorskip("sklearn.cluster")
    x = embeddings(50000 if os.environ.get("FULL") else 5000)
    ours = objective(x, *kmeans(x, k, iterations=20, restarts=restarts))
    model = sklearn.KMeans(k, n_init=restarts, max_iter=20, random_state=0)
    assert ours < 1.01 * model.fit(x.numpy()).inertia_


@pytest.mark.parametrize(
    "make",
    [smooth, embeddings, lambda n: grouped(n, 40)],
    ids=["no groups", "200 groups", "40 groups"],
)
def test_the_objective_is_within_1_percent_of_greedy_kmeans_plus_plus(make, monkeypatch):
    """At equal iterations and restarts: with as many groups as clusters, with more, with none."""
    x = make(4000)
    ours = objective(x, *kmeans(x, 40, iterations=10, restarts=3))
    monkeypatch.setitem(lloyd.STARTS, "greedy", greedy_rows)
    greedy = objective(x, *kmeans(x, 40, iterations=10, restarts=3, start="greedy"))
    assert ours < 1.01 * greedy


def test_the_start_finds_groups_that_random_rows_miss():
    x = grouped(3000, 60)
    ours = objective(x, *kmeans(x, 60, restarts=1))
    assert ours < 0.95 * objective(x, *kmeans(x, 60, restarts=1, start="random"))


@pytest.mark.slow
def test_memory_beyond_the_data_is_under_200_MB():
    """Peak resident memory of a process of its own, before and after."""
    job = textwrap.dedent("""
        import resource

        import torch

        from losses.kmeans import kmeans

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        x = torch.randn(50000, 128)
        x @ x[:8].T
        kmeans(x[:100].clone(), 2)
        before = peak()
        kmeans(x, 1000, iterations=1, restarts=1)
        print(peak() - before)
    """)
    done = subprocess.run(
        [sys.executable, "-c", job], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 200


@BOTH_STARTS
def test_well_separated_groups_are_found_exactly(start):
    torch.manual_seed(0)
    truth = torch.arange(300) % 6
    x = 10 * torch.eye(6, 8)[truth] + 0.1 * torch.randn(300, 8)
    centroids, labels = kmeans(x, 6, restarts=20, start=start)
    assert all(len(labels[truth == c].unique()) == 1 for c in range(6))
    assert len(labels.unique()) == 6
    means = torch.stack([x[labels == c].mean(0) for c in range(6)])
    assert torch.allclose(centroids, means, atol=1e-5)


@BOTH_STARTS
def test_the_same_seed_gives_the_same_and_leaves_the_global_generator_alone(start, monkeypatch):
    x = embeddings(2000)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (kmeans(x, 20, seed=(3, last), start=start) for last in (1, 1, 2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setitem(kmeans_rows.CHUNK_ROWS, "cpu", 35)
    assert torch.equal(kmeans(x, 20, seed=(3, 1), start=start)[1], a[1])


def test_a_random_start_is_different_rows_by_lot():
    points = kmeans_rows.Points(embeddings(500), 40)
    first = random_rows(points, 40, torch.Generator().manual_seed(0))
    second = random_rows(points, 40, torch.Generator().manual_seed(1))
    assert len(first.unique()) == 40
    assert not torch.equal(first, second)


def test_the_two_starts_differ_and_no_other_is_known():
    x = embeddings(500)
    assert not torch.equal(kmeans(x, 20)[1], kmeans(x, 20, start="random")[1])
    with pytest.raises(ValueError, match="start 'faiss' of k-means is not one of kmeans.., random"):
        kmeans(x, 20, start="faiss")


def test_more_restarts_are_no_worse():
    x = embeddings(3000)
    several = objective(x, *kmeans(x, 30, restarts=6))
    assert several <= objective(x, *kmeans(x, 30, restarts=1)) + 1e-3


def run_lloyd(x, centroids, iterations=0):
    points = kmeans_rows.Points(x, len(centroids))
    objective, moved, labels = lloyd.lloyd(points, centroids - points.mean, iterations)
    return objective, moved + points.mean, labels


def test_lloyds_iterations_are_the_literal_ones():
    x = embeddings(600)
    centroids = x[:12]
    for _ in range(4):
        labels = torch.cdist(x, centroids).argmin(1)
        centroids = torch.stack([x[labels == c].mean(0) for c in range(12)])
    scaled_objective, moved, labels = run_lloyd(x, x[:12], 4)
    assert torch.allclose(moved, centroids, atol=1e-6)
    assert torch.equal(labels, torch.cdist(x, centroids).argmin(1))
    ours = scaled_objective / kmeans_rows.Points(x, 12).distance_scale
    assert ours == pytest.approx(objective(x, centroids, labels), rel=1e-5)


def test_lloyd_stops_where_centroids_stand_still():
    x = torch.cat([torch.zeros(5, 2), torch.ones(5, 2)])
    points = kmeans_rows.Points(x, 2)
    bar = Mock()
    lloyd.lloyd(points, points.take(torch.tensor([0, 5])), 20, bar)
    assert bar.update.call_count == 1


def test_empty_clusters_take_the_farthest_rows_and_of_equal_ones_the_first():
    x = torch.cat([torch.zeros(5, 2), torch.ones(5, 2), torch.tensor([[9.0, 9], [7, 7], [9, 9]])])
    points = kmeans_rows.Points(x, 4)
    centroids = torch.tensor([[0.0, 0], [1, 1], [-50, -50], [-60, -60]]) - points.mean
    labels, distance, sums, counts, _ = lloyd.assign(points, centroids)
    assert labels.tolist() == [0] * 5 + [1] * 8
    assert counts.tolist() == [5, 8, 0, 0]
    assert distance[-3:].tolist() == pytest.approx([128, 72, 128])
    assert lloyd.farthest(points, distance, 3).tolist() == [10, 12, 11]
    moved = lloyd.centre(points, distance, sums, counts) + points.mean
    assert torch.allclose(moved[2:], torch.tensor([[9.0, 9], [9, 9]]))


@BOTH_STARTS
def test_as_many_clusters_as_rows_and_fewer_kinds_than_clusters(start):
    x = torch.randn(7, 3)
    assert sorted(kmeans(x, 7, start=start)[1].tolist()) == list(range(7))
    same = torch.ones(9, 3)
    centroids, labels = kmeans(same, 4, start=start)
    assert centroids.isfinite().all()
    assert objective(same, centroids, labels) == 0
    twice = torch.randn(12, 3).repeat_interleave(2, 0)
    centroids, labels = kmeans(twice, 12, restarts=20, start=start)
    assert objective(twice, centroids, labels) < 1e-9
    assert kmeans(x, 1, start=start)[1].tolist() == [0] * 7
    with pytest.raises(ValueError, match="8 clusters of 7 rows"):
        kmeans(x, 8, start=start)


def test_a_chain_of_ever_farther_points_does_not_hold_up_the_drops():
    """Each is second nearest to the one before, so a careful round drops few."""
    x = torch.zeros(200, 2)
    x[:, 0] = 1.2 ** torch.arange(200.0)
    centroids, labels = kmeans(x, 50, restarts=1)
    assert len(labels.unique()) == 50


def test_large_offsets_and_scales_lose_no_digits():
    x = embeddings(1000)
    base = kmeans(x, 20)[1]
    assert torch.equal(kmeans(1024 * x, 20)[1], base)
    assert torch.equal(kmeans(x / 2**20, 20)[1], base)
    # Multiples of 2^-10 stay what they are when 100 is added.
    grid = (x * 2**10).round() / 2**10
    near, far = kmeans(grid, 20), kmeans(grid + 100, 20)
    assert objective(grid + 100, *far) == pytest.approx(objective(grid, *near), rel=0.01)
    assert torch.allclose(
        far[0] - 100, torch.stack([grid[far[1] == c].mean(0) for c in range(20)]), atol=1e-5
    )


def test_rows_that_are_not_finite_are_refused():
    x = embeddings(100)
    for value in (math.nan, math.inf):
        x[3, 3] = value
        with pytest.raises(ValueError, match="100 rows with values that are not finite"):
            kmeans(x, 5)


JOB = """
    import torch
    from benchmarks.kmeans import grouped
    from engine import distributed
    from losses.kmeans import kmeans, lloyd
    from losses.kmeans.quality import confidence
    from losses.kmeans.rows import CHUNK_ROWS, Points
    distributed.init_distributed()
    x = grouped(500, 20)
    found = {}
    for rows in (64, 30, 7):                     # 8, 17 and 72 chunks, shared out unevenly
        CHUNK_ROWS["cpu"] = rows
        for start in lloyd.STARTS:
            found[rows, start] = kmeans(x, 20, seed=(2, 1), start=start)
        found[rows, "confidence"] = confidence(x, *found[rows, "random"], 0.2, "softmax")
    # Few kinds of rows, twice each, and fewer than clusters: some clusters are always empty.
    few = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    for start in lloyd.STARTS:
        found["few", start] = kmeans(few, 12, start=start)
    # All begin far away, so that 19 of 20 are empty.
    far = 50 + torch.zeros(20, 128)
    found["empty"] = lloyd.lloyd(Points(x, 20), far, 6)[:2]
    CHUNK_ROWS["cpu"] = 2048                     # one chunk: one process has all rows
    found["one chunk"] = kmeans(x, 20)
    torch.save(found, f"found{distributed.world_size()}{distributed.rank()}.pt")
    distributed.cleanup()
"""


def run_job(folder, processes):
    """-> what each process found."""
    (folder / "job.py").write_text(textwrap.dedent(JOB))
    run(folder, folder / "job.py", processes=processes)
    return [torch.load(file) for file in folder.glob("found*.pt")]


@pytest.fixture(scope="module")
def found_by_one(tmp_path_factory):
    return run_job(tmp_path_factory.mktemp("one"), 1)[0]


def same_bits(a, b):
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_find_the_clusters_of_one_bit_for_bit(world, found_by_one, tmp_path):
    """gloo, with both starts, with empty clusters, and however many chunks each process has."""
    assert len(found_by_one) == 13
    assert len(found_by_one[7, "random"][1].unique()) == 20
    every = run_job(tmp_path, world)
    assert len(every) == world
    for found in every:
        assert found.keys() == found_by_one.keys()
        assert [key for key in found if not same_bits(found[key], found_by_one[key])] == []


def test_the_benchmark_prints_its_tables():
    done = subprocess.run(
        [sys.executable, "benchmarks/kmeans.py", "--small", "--rounds", "1", "--seeds", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for words in (
        "start / Lloyd",
        "a Lloyd iteration grows as",
        "greedy k-means++, all rows",
        "random rows",
        "faiss",
        "all levels:",
    ):
        assert words in done.stdout


def test_confidence_is_the_softmax_over_centroids():
    z, c = F.normalize(torch.randn(7, 4), dim=1), F.normalize(torch.randn(3, 4), dim=1)
    labels = torch.randint(3, (7,))
    softmax, similarity = (
        confidence(z, c, labels, 0.3, kind) for kind in ("softmax", "similarity")
    )
    for i in range(7):
        e = [math.exp(z[i] @ c[j] / 0.3) for j in range(3)]
        # Its logarithm ranks alike.
        assert abs(softmax[i] - math.log(e[labels[i]] / sum(e))) < 1e-5
        assert abs(similarity[i] - z[i] @ c[labels[i]]) < 1e-6


def test_validity_is_counted_pair_by_pair():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(1)
    pseudo, labels = torch.randint(4, (40,), generator=g), torch.randint(3, (40,), generator=g)
    keep = torch.rand(40, generator=g) < 0.6
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    found = [(i, j) for i, j in pairs if keep[i] and keep[j] and pseudo[i] == pseudo[j]]
    right = sum(bool(labels[i] == labels[j]) for i, j in found)
    real = sum(bool(labels[i] == labels[j]) for i, j in pairs)
    figures = validity(torch.where(keep, pseudo, -1), pseudo, labels)
    assert figures["precision %"] == pytest.approx(100 * right / len(found))
    assert figures["recall %"] == pytest.approx(100 * right / real)
    assert figures["NMI"] == pytest.approx(metrics.normalized_mutual_info_score(labels, pseudo))
    assert set(validity(torch.full((40,), -1), pseudo, labels)) == {"NMI"}
