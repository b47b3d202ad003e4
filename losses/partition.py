"""The partition function of InfoNCE's negatives, which costs a loss its time and its memory.

    Z_i = sum_j e^{q_i n_j / t}       over the candidates j that may be negatives of query i

`literal_log_partition` is its logarithm as it is written, and forms the N x K similarities.
`log_partition` is the same without them. Its gradient to q_i is sum_j p_ij n_j / t, with p the
softmax of q_i n_j / t. Both sums are taken in one pass over blocks of candidates that stay in a
CPU's caches, so that the backward pass has nothing left to do: on 256 x 65,536 it takes a quarter
of the literal form's time, and a few MiB.

Vectors of unit length (or less) have q n / t <= 1 / t, so that e^{(q n - 1) / t} neither overflows
nor, for t >= 1 / 40, vanishes.
"""

from typing import Any

import torch
from torch import Tensor

from .base import NEG_INF, Contrast, similarity

SMALLEST_TEMPERATURE = 1 / 40

Labels = Tensor | None


def literal_log_partition(
    contrast: Contrast, t: float, query_label: Labels = None, candidate_label: Labels = None
) -> Tensor:
    """Return what log_partition does, as it is written."""
    s = similarity(contrast)  # (N, K)
    if query_label is not None:
        is_equal = query_label[:, :, None] == candidate_label[:, None]  # (L, N, K)
        s = s.masked_fill(is_equal, NEG_INF)  # (L, N, K)
    return torch.logsumexp(s / t, -1)


def log_partition(
    contrast: Contrast, t: float, query_label: Labels = None, candidate_label: Labels = None
) -> Tensor:
    """Return log Z of each query, block by block.

    The query alone gets a gradient. Where candidates want one too (SimCLR), and for a temperature
    below 1 / 40, the literal form is used.

    Args:
        contrast: N queries and K candidates.
        t: the temperature.
        query_label: (L, N) of L levels, or None. A level leaves out the candidates whose label is
            the query's.
        candidate_label: (L, K).

    Returns:
        (N,), or with labels (L, N); NEG_INF / t for a query without negatives.
    """
    if t < SMALLEST_TEMPERATURE or contrast.negative.requires_grad:
        return literal_log_partition(contrast, t, query_label, candidate_label)
    if query_label is not None:
        # Narrow integers are compared faster.
        query_label = query_label.int()[:, :, None]  # (L, N, 1)
        candidate_label = candidate_label.int()[:, None]  # (L, 1, K)
    return LogPartition.apply(
        contrast.query,
        contrast.negative,
        t,
        contrast.mask,
        contrast.self_index,
        query_label,
        candidate_label,
    )


class LogPartition(torch.autograd.Function):
    """Log Z and its gradient, block by block. The labels are (L, N, 1) and (L, 1, K)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        n: Tensor,
        t: float,
        mask: Tensor | None,
        self_index: Tensor | None,
        query_label: Tensor | None,
        candidate_label: Tensor | None,
    ) -> Tensor:
        """Return log Z (N,), or (L, N) with labels."""
        N, D = q.shape
        L = 1 if query_label is None else len(query_label)
        block_size = max(1, (2**26 if q.is_cuda else 2**20) // N)
        total = q.new_zeros(L, N)  # sum_j e_ij
        weighted = q.new_zeros(L * N, D)  # sum_j e_ij n_j
        start = 0
        for block in n.split(block_size):
            end = start + len(block)
            # e^{(q n - 1) / t}
            e = torch.addmm(q.new_full((1, 1), -1 / t), q / t, block.T).exp_()  # (N, block)
            if mask is not None:
                e.masked_fill_(~mask[:, start:end], 0)
            if self_index is not None:
                set_to_zero(e, self_index[:, None] - start)
            if query_label is not None:
                is_equal = query_label == candidate_label[..., start:end]
                e = torch.where(is_equal, 0, e)  # (L, N, block)
            total += e.sum(-1)
            weighted.addmm_(e.flatten(0, -2), block)
            start = end
        smallest = torch.finfo(q.dtype).tiny
        gradient = weighted.view(L, N, D) / total.clamp(min=smallest)[..., None] / t
        ctx.save_for_backward(gradient)
        log_z = torch.where(total > 0, total.log() + 1 / t, NEG_INF / t)  # (L, N)
        return log_z[0] if query_label is None else log_z

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        """Return the gradient of the queries alone."""
        (gradient,) = ctx.saved_tensors  # (L, N, D)
        grad_query = (grad_output.view(gradient.shape[:2])[..., None] * gradient).sum(0)  # (N, D)
        return grad_query, *[None] * 6


def set_to_zero(e: Tensor, column: Tensor) -> None:
    """Set one column of each row of e (N, block) to 0, if column (N, 1) lies within the block."""
    nearest = column.clamp(0, e.shape[1] - 1)
    kept = e.gather(1, nearest).masked_fill(column == nearest, 0)
    e.scatter_(1, nearest, kept)
