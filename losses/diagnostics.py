"""The figures of the log: what the negatives of a step are, and what each method says of itself.

They are computed beside the loss, on the first queries of a batch and without gradients, as often
as the caller likes. No random number is drawn. Labels are met here alone (but in MoCHi's oracle).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import (
    NEG_INF,
    Contrast,
    Figures,
    Negatives,
    Output,
    positive_similarity,
    same_class,
    similarity,
    valid_candidates,
)

# Figures are of so many queries of a batch: all of them would cost as much as the loss.
QUERIES = 32


@torch.no_grad()
def step_diagnostics(
    loss_fn: nn.Module,
    contrasts: Sequence[Contrast],
    outputs: Sequence[Output],
    labels: Tensor | None,
    epoch: float,
) -> dict[str, Tensor]:
    """Compute all figures of one step (or of one micro-batch).

    Args:
        loss_fn: the loss that was called.
        contrasts: what the host returned: one contrast, or several (CMC: two).
        outputs: what loss_fn returned for each of them.
        labels: (n_data,) true labels, on the device of the loss; None if there are none.
        epoch: what loss_fn was called with.

    Returns:
        Scalars on the device, by name; of several contrasts the means. "spread" is 1 where the
        queries cover the sphere evenly and 0 where they have collapsed into one point; "contrasts"
        is how many losses are summed. The others are those of `contrast_diagnostics`.
    """
    query = contrasts[0].query  # (N, D)
    spread = query.std(0).mean() * query.shape[1] ** 0.5
    figures = {"spread": spread, "contrasts": len(contrasts)}
    each = [
        contrast_diagnostics(loss_fn, contrast, output, labels, epoch)
        for contrast, output in zip(contrasts, outputs)
    ]
    for name in each[0]:
        figures[name] = sum(of_contrast[name] for of_contrast in each) / len(each)
    return {name: as_scalar(value, query.device) for name, value in figures.items()}


def contrast_diagnostics(
    loss_fn: nn.Module, contrast: Contrast, output: Output, labels: Tensor | None, epoch: float
) -> Figures:
    """Compute the figures that all losses have, and those of the loss's own `diagnostics`.

    Returns:
        "K": negatives a query; "positive": the mean similarity of queries and keys; those of
        `candidate_diagnostics`; and the loss's own, which replace these where names are equal.
    """
    contrast = first_queries(contrast)
    output = first_of_output(loss_fn, contrast, output, epoch)
    return {
        "K": negatives_per_query(output),
        "positive": positive_similarity(contrast).mean(),
        **candidate_diagnostics(contrast, output.chosen, labels),
        **own_diagnostics(loss_fn, contrast, output, labels, epoch),
    }


def own_diagnostics(
    loss_fn: nn.Module, contrast: Contrast, output: Output, labels: Tensor | None, epoch: float
) -> Figures:
    """Return what the loss's own `diagnostics` says, if it has one."""
    if not hasattr(loss_fn, "diagnostics"):
        return {}
    return loss_fn.diagnostics(contrast, output, labels, epoch)


def negatives_per_query(output: Output) -> Tensor:
    """Count the negatives in the denominator of a query, on average."""
    K = (output.negatives.similarity > NEG_INF).sum(-1).float().mean()
    if output.synthetic is None:
        return K
    return K + (output.synthetic.similarity > NEG_INF).sum(-1).float().mean()


def candidate_diagnostics(
    contrast: Contrast, chosen: Negatives, labels: Tensor | None
) -> dict[str, Tensor]:
    """Say which share of the candidates is used, and how many of them are false negatives.

    A false negative is of the query's own class. Candidates that are no image's (the random rows
    with which a queue begins) count nowhere.

    Args:
        contrast: of the first queries.
        chosen: (..., N, k) of them.
        labels: (n_data,) true labels, or None.

    Returns:
        In percent, "used %": of the candidates; and with labels "false negatives used %": of those
        used, "false negatives left out %": of the others.
    """
    is_used = chosen.similarity > NEG_INF  # (..., N, k)
    if chosen.candidate is not None:
        shape = *is_used.shape[:-1], len(contrast.negative)
        is_used = is_used.new_zeros(shape).scatter_(-1, chosen.candidate, is_used)
    is_valid = valid_candidates(contrast) & (contrast.negative_index >= 0)
    is_valid = is_valid.expand_as(is_used)  # (..., N, K)
    is_used, is_unused = is_used & is_valid, is_valid & ~is_used
    figures = {"used %": percentage(is_used, is_valid)}
    if labels is not None:
        is_false = same_class(contrast, labels)  # (N, K)
        figures["false negatives used %"] = percentage(is_false & is_used, is_used)
        figures["false negatives left out %"] = percentage(is_false & is_unused, is_unused)
    return figures


def percentage(part: Tensor, whole: Tensor | None = None) -> Tensor:
    """Return how many are true in part, in percent of those in whole (None: of all)."""
    n_whole = whole.sum().clamp(min=1) if whole is not None else max(1, part.numel())
    return 100 * part.sum() / n_whole


def chance(loss_fn: nn.Module, K: float) -> float:
    """Return the loss of an encoder that knows nothing, which has all similarities equal.

    It is scale * log(K + 1) for K negatives a query, or what the loss's own `chance(K)` says.
    """
    if hasattr(loss_fn, "chance"):
        return loss_fn.chance(K)
    return getattr(loss_fn, "scale", 1.0) * math.log(K + 1)


def first_queries(contrast: Contrast) -> Contrast:
    """Return the contrast of the first queries alone."""
    mask, self_index = contrast.mask, contrast.self_index
    return contrast._replace(
        query=contrast.query[:QUERIES],
        positive=contrast.positive[:QUERIES],
        index=contrast.index[:QUERIES],
        mask=None if mask is None else mask[..., :QUERIES, :],
        self_index=None if self_index is None else self_index[:QUERIES],
    )


def first_of_output(loss_fn: nn.Module, contrast: Contrast, output: Output, epoch: float) -> Output:
    """Return the output of the first queries alone, with the negatives that it left out."""
    negatives, chosen = first_rows(output.negatives), first_rows(output.chosen)
    if negatives is None:
        negatives = Negatives(similarity(contrast))
        if hasattr(loss_fn, "select"):
            negatives = loss_fn.select(contrast, negatives.similarity, epoch)
    return Output(output.loss, negatives, chosen or negatives, first_rows(output.synthetic))


def first_rows(record: tuple | None) -> tuple | None:
    """Cut each tensor (..., N, k) of a NamedTuple to the first queries."""
    if record is None:
        return None
    return type(record)(*(x if x is None else x[..., :QUERIES, :] for x in record))


def as_scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """Return a figure as a scalar on the device, without waiting for it."""
    if torch.is_tensor(value):
        return value.float()
    return torch.full((), float(value), device=device)
