"""VOC2007's classification: its average precision, and SVMs on features of a known answer."""

import numpy as np
import pytest
import torch

from evaluation.svm import average_precision, svm


def literal(scores, positive):
    """Walk through the right answers in order of score: the mean of the best precision at the
    recall of each or a higher one.
    """
    order = np.argsort(-scores, kind="stable")
    hits = positive[order]
    precision = [hits[: i + 1].sum() / (i + 1) for i in range(len(hits))]
    return np.mean([max(precision[i:]) for i in range(len(hits)) if hits[i]])


def test_it_is_the_area_under_the_monotone_curve():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, positive = rng.permutation(40) / 40, rng.random(40) < 0.3
        positive[0] = True
        assert average_precision(scores, positive) == pytest.approx(literal(scores, positive))


def test_it_equals_scikit_learns_where_precision_only_falls():
    """There the best precision at a recall or higher is the precision itself, and both definitions
    agree; elsewhere ours is above.
    """
    metrics = pytest.importorskip("sklearn.metrics")
    rng, agreed = np.random.default_rng(1), 0
    for right_first in range(1, 12):
        positive = np.array([True] * right_first + [False] * 5 + [False] * 9)
        scores = np.linspace(1, 0, len(positive))
        assert (
            average_precision(scores, positive)
            == pytest.approx(metrics.average_precision_score(positive, scores))
            == 1
        )
    for _ in range(200):
        positive = rng.random(30) < np.linspace(0.9, 0.02, 30)
        scores = np.linspace(1, 0, 30)
        precision = (np.cumsum(positive) / np.arange(1, 31))[positive]
        ours, theirs = (
            average_precision(scores, positive),
            metrics.average_precision_score(positive, scores),
        )
        if (np.diff(precision) <= 0).all():
            assert ours == pytest.approx(theirs)
            agreed += 1
        else:
            assert ours > theirs
    assert agreed > 5


def test_equal_scores_are_one_point_of_the_curve():
    # in any order of the images
    assert average_precision(np.zeros(4), np.array([True, False, False, False])) == 0.25
    assert average_precision(np.zeros(4), np.array([False, False, False, True])) == 0.25


def test_classes_that_a_line_separates_and_images_that_count_neither_way():
    pytest.importorskip("sklearn")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=g)
    y = torch.where(x[:, :3] > 0, 1, -1)
    assert svm(x[:120], y[:120], x[120:], y[120:], 0.5, ["a", "b", "c"]) > 95
    y[::7, 0] = 0  # difficult: neither trained nor asked
    assert svm(x[:120], y[:120], x[120:], y[120:], 0.5, ["a", "b", "c"], "ignore") > 95
    as_negatives = torch.where(y == 0, -1, y)  # PCL's code, the default
    assert (
        svm(x[:120], y[:120], x[120:], y[120:], 0.5, ["a", "b", "c"])
        == svm(
            x[:120], as_negatives[:120], x[120:], as_negatives[120:], 0.5, ["a", "b", "c"], "ignore"
        )
        < 95
    )
    lot = torch.where(torch.rand(200, 3, generator=g) < 0.3, 1, -1)
    assert svm(x[:120], lot[:120], x[120:], lot[120:], 0.5, ["a", "b", "c"]) < 60
    with pytest.raises(SystemExit, match="class b has no images"):
        svm(
            x[:120],
            torch.stack([y[:120, 1], torch.full((120,), -1)], 1),
            x[120:],
            y[120:, :2],
            0.5,
            ["a", "b"],
        )
