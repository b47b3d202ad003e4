"""k-means against scikit-learn's, and what it promises of its own."""
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from engine import kmeans as module
from engine.kmeans import confidence, kmeans, validity

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def objective(x, centroids, own):
    return (x - centroids[own]).double().square().sum().item()


def embeddings(n, seed=0):
    """On the sphere, in 200 loose groups: what k-means meets in training."""
    g = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(200, 128, generator=g), dim=1)
    return F.normalize(centres[torch.randint(200, (n,), generator=g)] + 0.06 * torch.randn(n, 128, generator=g), dim=1)


@pytest.mark.parametrize("k,restarts", [(10, 5), (100, 5), (1000, 1)])
def test_the_objective_is_within_1_percent_of_scikit_learns(k, restarts):
    """n x 128, equal iterations and restarts. n is 10,000, or 50,000 with FULL=1 (a minute)."""
    sklearn = pytest.importorskip("sklearn.cluster")
    x = embeddings(50000 if os.environ.get("FULL") else 10000)
    ours = objective(x, *kmeans(x, k, iterations=20, restarts=restarts))
    theirs = sklearn.KMeans(k, n_init=restarts, max_iter=20, random_state=0).fit(x.numpy()).inertia_
    assert ours < 1.01 * theirs


def test_memory_beyond_the_data_is_under_200_MB():
    """Peak resident memory of a process of its own, before and after."""
    job = ("import resource, torch; from engine.kmeans import kmeans; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
           "x = torch.randn(50000, 128); x @ x[:8].T; kmeans(x[:100].clone(), 2); before = peak(); kmeans(x, 1000, iterations=1, restarts=1); print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", job], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


def test_well_separated_groups_are_found_exactly():
    torch.manual_seed(0)
    truth = torch.arange(300) % 6
    x = 10 * torch.eye(6, 8)[truth] + 0.1 * torch.randn(300, 8)
    centroids, own = kmeans(x, 6)
    assert all(len(own[truth == c].unique()) == 1 for c in range(6)) and len(own.unique()) == 6
    assert torch.allclose(centroids, torch.stack([x[own == c].mean(0) for c in range(6)]), atol=1e-5)


def test_the_same_seed_gives_the_same_and_leaves_the_global_generator_alone(monkeypatch):
    x = embeddings(2000)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = kmeans(x, 20, seed=(3, 1)), kmeans(x, 20, seed=(3, 1)), kmeans(x, 20, seed=(3, 2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(module, "SCORES", 700)             # 35 rows at a time
    assert torch.equal(kmeans(x, 20, seed=(3, 1))[1], a[1])


def test_more_restarts_are_no_worse():
    x = embeddings(3000)
    assert objective(x, *kmeans(x, 30, restarts=6)) <= objective(x, *kmeans(x, 30, restarts=1)) + 1e-3


def test_an_empty_cluster_takes_the_farthest_row():
    x = torch.cat([torch.zeros(5, 2), torch.ones(5, 2), torch.tensor([[9.0, 9.0]])])
    own, distance = module.assign(x, (x * x).sum(1), torch.tensor([[0.0, 0.0], [1.0, 1.0], [-50.0, -50.0]]))
    assert own.tolist() == [0] * 5 + [1] * 6 and distance[-1] == 128
    assert module.centre(x, own, distance, 3)[2].tolist() == [9, 9]


def test_as_many_clusters_as_rows_and_fewer_kinds_than_clusters():
    x = torch.randn(7, 3)
    assert sorted(kmeans(x, 7)[1].tolist()) == list(range(7))
    centroids, own = kmeans(torch.ones(9, 3), 4)           # nothing to tell apart
    assert centroids.isfinite().all() and objective(torch.ones(9, 3), centroids, own) == 0
    with pytest.raises(ValueError, match="8 clusters of 7 rows"):
        kmeans(x, 8)


def test_confidence_is_the_softmax_over_centroids():
    z, c, own = F.normalize(torch.randn(7, 4), dim=1), F.normalize(torch.randn(3, 4), dim=1), torch.randint(3, (7,))
    for i in range(7):
        e = [math.exp(z[i] @ c[j] / 0.3) for j in range(3)]
        assert abs(confidence(z, c, own, 0.3, "softmax")[i] - math.log(e[own[i]] / sum(e))) < 1e-5     # its logarithm ranks alike
        assert abs(confidence(z, c, own, 0.3, "similarity")[i] - z[i] @ c[own[i]]) < 1e-6


def test_validity_is_counted_pair_by_pair():
    normalized_mutual_info_score = pytest.importorskip("sklearn.metrics").normalized_mutual_info_score
    g = torch.Generator().manual_seed(1)
    pseudo, labels, keep = torch.randint(4, (40,), generator=g), torch.randint(3, (40,), generator=g), torch.rand(40, generator=g) < 0.6
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    found = [(i, j) for i, j in pairs if keep[i] and keep[j] and pseudo[i] == pseudo[j]]
    right = sum(bool(labels[i] == labels[j]) for i, j in found)
    real = sum(bool(labels[i] == labels[j]) for i, j in pairs)
    figures = validity(torch.where(keep, pseudo, -1), pseudo, labels)
    assert figures["precision %"] == pytest.approx(100 * right / len(found)) and figures["recall %"] == pytest.approx(100 * right / real)
    assert figures["NMI"] == pytest.approx(normalized_mutual_info_score(labels, pseudo))
    assert set(validity(torch.full((40,), -1), pseudo, labels)) == {"NMI"}
