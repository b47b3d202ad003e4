"""Several methods at once: `loss: [{name: ifnd, ...}, {name: ring, ...}, {name: mochi, ...}]`.

Those that choose negatives do so in the order of the list, each from what those before it left:
IFND takes its false negatives out, the ring is that of the rest, MoCHi mixes the hardest of the
ring. Then one formula is applied to their similarities s: that of the method which treats positives
(JCL, IFND's `attract`), or else

    L = mean_i -log( e^{q k / t} / (e^{q k / t} + sum_j e^{s_ij / t}) )

It is multiplied once by temperature / base_temperature, where a method of the list has that key.
IFND's levels are a leading dimension of s, and the mean is over it too. Each method's file is whole
without this one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .base import (
    NEG_INF,
    Contrast,
    Figures,
    Negatives,
    Output,
    info_nce,
    positive_similarity,
    similarity,
)
from .checks import check_list
from .diagnostics import candidate_diagnostics, own_diagnostics


class Together(nn.Module):
    """A list of losses as one.

    Args:
        losses: two or more, with `select`, `objective` or both.

    Raises:
        ValueError: the list makes no sense.
    """

    def __init__(self, losses: Sequence[nn.Module]):
        super().__init__()
        names = [type(loss_fn).__name__.lower() for loss_fn in losses]
        check_list(names, losses)
        self.losses = nn.ModuleDict(zip(names, losses))
        self.t = losses[0].t
        self.scale = next((loss_fn.scale for loss_fn in losses if hasattr(loss_fn, "scale")), 1.0)
        # check_list leaves one method at most that treats positives, so there is one that chooses.
        with_objective = [name for name in names if hasattr(self.losses[name], "objective")]
        self.of_positives = with_objective[0] if with_objective else None
        *self.earlier, self.last = [name for name in names if name not in with_objective]

    def before_epoch(self, epoch: int, extract: Callable[[], Tensor] | None) -> None:
        """Prepare each loss for an epoch."""
        for loss_fn in self.losses.values():
            if hasattr(loss_fn, "before_epoch"):
                loss_fn.before_epoch(epoch, extract)

    def forward(self, contrast: Contrast, epoch: float) -> Output:
        """Return the loss, and the negatives in it as the last method chose or made them."""
        left, s = contrast, similarity(contrast)  # (N, K)
        for name in self.earlier:
            chosen = self.losses[name].select(left, s, epoch)  # (..., N, k)
            left, s = narrow(left, chosen)  # (..., N, K)

        last = self.losses[self.last]
        chosen = last.select(left, s, epoch)  # (..., N, k)
        negatives = last.draw(chosen) if hasattr(last, "draw") else chosen
        if self.of_positives == "ifnd":  # it looks the candidates up, so all are in their places
            negatives = Negatives(in_order(negatives, len(contrast.negative)))  # (..., N, K)
        s, synthetic = negatives.similarity, None
        if hasattr(last, "synthesize"):
            synthetic = last.synthesize(left, s, epoch)
        if synthetic is not None:
            s = torch.cat([s, synthetic.similarity], -1)  # (..., N, K + points)

        loss = self.scale * self.formula(contrast, s, epoch)
        return Output(loss, negatives, chosen, synthetic)

    def formula(self, contrast: Contrast, s: Tensor, epoch: float) -> Tensor:
        """Return the formula of the method that treats positives, or InfoNCE. s: (..., N, k)."""
        if self.of_positives is not None:
            return self.losses[self.of_positives].objective(contrast, s, epoch)
        log_z = torch.logsumexp(s / self.t, -1)  # (..., N)
        return info_nce(positive_similarity(contrast), log_z, self.t)

    def diagnostics(
        self, contrast: Contrast, output: Output, labels: Tensor | None, epoch: float
    ) -> Figures:
        """Return the figures of each method; of those that choose negatives by "name: figure".

        Their shares are of what those before them left.
        """
        figures = {}
        left, s = contrast, similarity(contrast)  # (N, K)
        for name in self.earlier:
            chosen = self.losses[name].select(left, s, epoch)  # (..., N, k)
            of_name = Output(output.loss, chosen, chosen)
            figures |= self.choosing_diagnostics(name, left, of_name, labels, epoch)
            left, s = narrow(left, chosen)
        figures |= self.choosing_diagnostics(self.last, left, output, labels, epoch)
        if self.of_positives is not None:
            loss_fn = self.losses[self.of_positives]
            figures |= own_diagnostics(loss_fn, contrast, output, labels, epoch)
        return figures

    def choosing_diagnostics(
        self, name: str, contrast: Contrast, output: Output, labels: Tensor | None, epoch: float
    ) -> Figures:
        """Return the figures of a method that chooses negatives."""
        figures = candidate_diagnostics(contrast, output.chosen, labels)
        figures |= own_diagnostics(self.losses[name], contrast, output, labels, epoch)
        return {f"{name}: {key}": value for key, value in figures.items()}


def narrow(contrast: Contrast, chosen: Negatives) -> tuple[Contrast, Tensor]:
    """Return the contrast with the chosen candidates alone, and their similarities (..., N, K)."""
    s = in_order(chosen, len(contrast.negative))
    return contrast._replace(mask=s > NEG_INF, self_index=None), s


def in_order(chosen: Negatives, K: int) -> Tensor:
    """Return the similarities (..., N, K) of all candidates, NEG_INF for those not chosen."""
    s = chosen.similarity  # (..., N, k)
    if chosen.candidate is None:
        return s
    return s.new_full((*s.shape[:-1], K), NEG_INF).scatter(-1, chosen.candidate, s)
