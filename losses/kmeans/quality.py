"""What clusters are worth: how sure each row's is, and how well they agree with true labels."""

import torch
from torch import Tensor

from .rows import all_reduce_sum, chunk_rows, local_rows


def confidence(
    z: Tensor, centroids: Tensor, labels: Tensor, temperature: float, kind: str
) -> Tensor:
    """Say how sure each row's cluster is. The processes share the rows out.

    Args:
        z: (n, D), unit length.
        centroids: (k, D), unit length.
        labels: (n,) the cluster of each row.
        temperature: of the softmax.
        kind: `similarity` to the centroid of the row's cluster, or `softmax`: the logarithm of the
            softmax over all centroids, at that one.

    Returns:
        (n,), the same on every process. Beyond z a chunk's scores are held, and 4 n bytes.
    """
    confidences = torch.zeros(len(z), device=z.device)
    size = chunk_rows(z, len(centroids))
    first, last = local_rows(len(z), size)
    for i in range(first, last, size):
        chunk = slice(i, min(i + size, last))
        score = z[chunk] @ centroids.T  # (r, k)
        if kind == "softmax":
            score = score.div_(temperature)
        of_cluster = score.gather(1, labels[chunk, None])[:, 0]  # (r,)
        if kind == "softmax":
            of_cluster = of_cluster - score.logsumexp(1)
        confidences[chunk] = of_cluster
    return all_reduce_sum(confidences)


def validity(accepted: Tensor, pseudo: Tensor, labels: Tensor) -> dict[str, float]:
    """Say what the clusters are worth: over all pairs of images, exactly.

    Memory: a few n, whatever the number of clusters.

    Args:
        accepted: (n,) pseudo labels, -1 where not accepted.
        pseudo: (n,) pseudo labels of all images.
        labels: (n,) the true ones.

    Returns:
        "precision %": of the pairs taken for one class, the share that is one; "recall %": of the
        pairs of one class, the share found; "NMI": the mutual information of pseudo and true
        labels over the mean of their entropies.
    """
    figures = {}
    is_accepted = accepted >= 0
    if is_accepted.any():
        accepted_pairs = count_pairs(sizes(accepted[is_accepted]))
        right_pairs = count_pairs(joint_sizes(accepted[is_accepted], labels[is_accepted]))
        true_pairs = count_pairs(sizes(labels))
        if accepted_pairs:
            figures["precision %"] = float(100 * right_pairs / accepted_pairs)
        figures["recall %"] = float(100 * right_pairs / true_pairs.clamp(min=1))
    of_clusters, of_classes = entropy(sizes(pseudo)), entropy(sizes(labels))
    mutual = of_clusters + of_classes - entropy(joint_sizes(pseudo, labels))
    mean = (of_clusters + of_classes) / 2
    return figures | {"NMI": float(mutual / mean.clamp(min=1e-300))}


def sizes(labels: Tensor) -> Tensor:
    """Return how often each label (n,), from 0 on, occurs, in float64."""
    return labels.bincount().double()


def joint_sizes(a: Tensor, b: Tensor) -> Tensor:
    """Return how often each pair of labels (n,) and (n,) occurs that does occur, in float64."""
    return (a * (b.max() + 1) + b).unique(return_counts=True)[1].double()


def count_pairs(counts: Tensor) -> Tensor:
    """Return the ordered pairs of two members of one group, of groups of these sizes."""
    return (counts * (counts - 1)).sum()


def entropy(counts: Tensor) -> Tensor:
    """Return the entropy of a label, in nats, from the sizes of its groups."""
    p = counts / counts.sum()
    return -(p * p.clamp(min=1e-300).log()).sum()
