"""VOC2007 classification: a linear SVM a class, and that year's mean average precision."""

import numpy as np
from torch.nn import functional as F

from engine.progress import progress


def svm(x, y, x_test, y_test, C, classes, difficult="negative"):
    """Train a linear SVM a class and average its precision, by PCL's released code.

    Squared hinge, positives weigh twice; by scikit-learn (liblinear).

    Args:
        x: (n, F) features, made unit length here.
        y: (n, c) of 1 (there), -1 (not there), 0 (there, but difficult to see).
        x_test: (m, F), as x.
        y_test: (m, c), as y.
        C: of the SVM.
        classes: their c names.
        difficult: what an image with a 0 is for that class, in training and in the test:
            `negative`, as in PCL's code, or `ignore`, VOC's own rule, by which it counts neither
            way.

    Returns:
        the mean average precision in %.

    Raises:
        SystemExit: names a class that has no images with it, or none without it.
    """
    try:
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise SystemExit(
            "linear.classifier svm wants scikit-learn: pip install -r requirements-dev.txt"
        ) from error
    x, x_test = (F.normalize(v, dim=1).cpu().numpy() for v in (x, x_test))
    y, y_test = y.cpu().numpy(), y_test.cpu().numpy()
    if difficult == "negative":
        y, y_test = (np.where(labels == 0, -1, labels) for labels in (y, y_test))
    precisions = []
    for c, name in enumerate(progress(classes, "SVM")):
        rows, test_rows = y[:, c] != 0, y_test[:, c] != 0
        positive = y_test[test_rows, c] > 0
        if len(set(y[rows, c])) < 2 or not positive.any():
            raise SystemExit(
                f"class {name} has no images with it, or none without it, to train or test a "
                "classifier on"
            )
        classifier = LinearSVC(
            C=C,
            class_weight={1: 2, -1: 1},
            intercept_scaling=1.0,
            loss="squared_hinge",
            penalty="l2",
            dual=True,
            tol=1e-4,
            max_iter=2000,
            random_state=0,
        ).fit(x[rows], y[rows, c])
        scores = classifier.decision_function(x_test[test_rows])
        precisions.append(average_precision(scores, positive))
    return round(100 * float(np.mean(precisions)), 3)


def average_precision(scores, positive):
    """The area under the precision-recall curve, as VOC from 2010 on and PCL.

    The precision at each recall is the best at that recall or a higher one. Equal scores count as
    one point of the curve.

    Args:
        scores: (m,), higher is surer.
        positive: (m,) bool, at least one True.
    """
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    # The last of each run of equal scores.
    ends = np.append(np.nonzero(np.diff(scores))[0], len(scores) - 1)
    right = np.cumsum(positive)[ends]
    precision, recall = right / (ends + 1), right / positive.sum()
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * precision))
