"""InfoNCE (van den Oord et al., 2018; arXiv 1807.03748), plain: the baseline of all four papers.

    L = mean_i -log( e^{q k / t} / (e^{q k / t} + sum_j e^{q n_j / t}) )

q is a query, k its key (of several, their mean), n_j its negatives, t the temperature.
"""

import torch
from torch import Tensor, nn

from .base import Contrast, Negatives, Output, info_nce, positive_similarity, similarity
from .checks import check_nce
from .partition import log_partition


class NCE(nn.Module):
    """InfoNCE on all candidates, or on draws from them.

    Args:
        n_data: the number of images, for a warning alone.
        temperature: t.
        n_negatives: that many uniform draws from the candidates, with replacement, anew for each
            query (instance discrimination: 4095); None: every candidate (MoCo).
        base_temperature: SupContrast's factor of the loss, see `loss_scale`.
    """

    def __init__(
        self,
        n_data: int | None = None,
        *,
        temperature: float = 0.07,
        n_negatives: int | None = None,
        base_temperature: float | None = None,
    ):
        super().__init__()
        check_nce(temperature, n_negatives, n_data)
        self.t = temperature
        self.n_negatives = n_negatives
        self.scale = loss_scale(temperature, base_temperature)

    def select(self, contrast: Contrast, s: Tensor, epoch: float) -> Negatives:
        """Return all candidates, or draws from them. s: (..., N, K), see `similarity`."""
        if self.n_negatives is None:
            return Negatives(s)
        candidate = draw_candidates(contrast, s, self.n_negatives)  # (..., N, n_negatives)
        return Negatives(s.gather(-1, candidate), candidate)

    def forward(self, contrast: Contrast, epoch: float) -> Output:
        """Return the loss, and the draws if there are any."""
        positive = positive_similarity(contrast)  # (N,)
        if self.n_negatives is None:
            # log sum_j e^{q n_j / t}, without forming the similarities (N, K)
            log_z = log_partition(contrast, self.t)  # (N,)
            return Output(self.scale * info_nce(positive, log_z, self.t))
        negatives = self.select(contrast, similarity(contrast), epoch)
        log_z = torch.logsumexp(negatives.similarity / self.t, 1)  # (N,)
        return Output(self.scale * info_nce(positive, log_z, self.t), negatives)


def loss_scale(temperature: float, base_temperature: float | None) -> float:
    """Return SupContrast's factor of the loss: temperature / base_temperature, 1 where it is None.

    With SGD it is a factor of the learning rate and, inversely, of the weight decay: 0.5 and 0.07
    turn lr 0.5 into 3.57.

    Raises:
        ValueError: base_temperature is not above 0.
    """
    if base_temperature is None:
        return 1.0
    if base_temperature <= 0:
        raise ValueError(
            f"base_temperature is {base_temperature}; it must be above 0, or null for "
            "the plain loss"
        )
    return temperature / base_temperature


def draw_candidates(contrast: Contrast, s: Tensor, n: int) -> Tensor:
    """Draw candidates of each query uniformly, with replacement, from those that may be negatives.

    Args:
        contrast: its mask or self_index says which may be.
        s: (..., N, K) similarities, for their shape and device.
        n: draws a query.

    Returns:
        (..., N, n) rows of contrast.negative.
    """
    K = s.shape[-1]
    if contrast.mask is None:
        n_valid = K - (contrast.self_index is not None)
        drawn = torch.randint(n_valid, (*s.shape[:-1], n), device=s.device)
        if contrast.self_index is None:
            return drawn
        return drawn + (drawn >= contrast.self_index[:, None])  # step over the query's own

    # Draw a number m and take the m-th valid candidate: where the count of valid ones reaches m.
    # MPS has no float64.
    exact = torch.float32 if s.is_mps else torch.float64
    n_valid_until = contrast.mask.cumsum(-1, dtype=torch.int32)  # (..., N, K)
    u = torch.rand(*s.shape[:-1], n, device=s.device, dtype=exact)
    m = (u * n_valid_until[..., -1:]).int() + 1  # (..., N, n), from 1
    # A query without valid candidates gets the last one, whose similarity is NEG_INF.
    return torch.searchsorted(n_valid_until, m).clamp(max=K - 1)
