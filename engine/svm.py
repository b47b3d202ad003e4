"""VOC2007 classification: a linear SVM a class, and that year's mean average precision."""

import numpy as np
from torch.nn import functional as F
from tqdm import tqdm


def svm(x, y, x_test, y_test, C, classes, difficult="negative"):
    """x: (n, F) features, made unit length here; y: (n, c) of 1 (there), -1 (not there), 0 (there,
    but difficult to see). -> mAP in %.

    The protocol of PCL's released code: squared hinge, positives weigh twice. By scikit-learn
    (liblinear). difficult: what an image with a 0 is for that class, in training and in the test:
    `negative`, as in PCL's code, or `ignore`, VOC's own rule, by which it counts neither way.
    SystemExit names a class that has no images with it, or none without it.
    """
    try:
        from sklearn.svm import LinearSVC
    except ImportError:
        raise SystemExit(
            "linear.classifier svm wants scikit-learn: pip install -r requirements-dev.txt"
        )
    x, x_test = (F.normalize(v, dim=1).cpu().numpy() for v in (x, x_test))
    y, y_test = y.cpu().numpy(), y_test.cpu().numpy()
    if difficult == "negative":
        y, y_test = (np.where(labels == 0, -1, labels) for labels in (y, y_test))
    found = []
    for c, name in enumerate(tqdm(classes, "SVM", leave=False, disable=None)):
        know, ask = y[:, c] != 0, y_test[:, c] != 0
        if len(set(y[know, c])) < 2 or not (y_test[ask, c] > 0).any():
            raise SystemExit(
                f"class {name} has no images with it, or none without it, to train or test a classifier on"
            )
        machine = LinearSVC(
            C=C,
            class_weight={1: 2, -1: 1},
            intercept_scaling=1.0,
            loss="squared_hinge",
            penalty="l2",
            dual=True,
            tol=1e-4,
            max_iter=2000,
            random_state=0,
        ).fit(x[know], y[know, c])
        found.append(average_precision(machine.decision_function(x_test[ask]), y_test[ask, c] > 0))
    return round(100 * float(np.mean(found)), 3)


def average_precision(scores, positive):
    """Area under the precision-recall curve, the precision at each recall being the best at that recall or a higher one (VOC from 2010 on; PCL).

    scores: (m,) higher is surer; positive: (m,) bool, at least one. Equal scores count as one point of the curve.
    """
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    ends = np.append(
        np.nonzero(np.diff(scores))[0], len(scores) - 1
    )  # the last of each run of equal scores
    right = np.cumsum(positive)[ends]
    precision, recall = right / (ends + 1), right / positive.sum()
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * precision))
