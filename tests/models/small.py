"""Small encoders, and what tests of hosts share."""

import torch
from torch.nn import functional as F

from models.cmc import LabEncoder
from models.resnet import Encoder

SMALL = {"backbone": "resnet10", "stem": "cifar", "width": 8, "dim": 16, "precision": "fp32"}


def small_encoder(**settings):
    torch.manual_seed(0)
    return Encoder(**{**SMALL, **settings})


def small_lab_encoder(**settings):
    torch.manual_seed(0)
    return LabEncoder((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), **{**SMALL, **settings})


def images(n):
    return torch.randn(n, 3, 32, 32)


def unit_vectors(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def random_step(encoder):
    """Move the weights of an encoder, as an optimizer would."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def valid_mask(contrast):
    """(N, K) bool, which candidates may be negatives of each query."""
    *_, mask, self_index = contrast
    if mask is not None:
        return mask
    valid = torch.ones(len(contrast.query), len(contrast.negative), dtype=torch.bool)
    return valid if self_index is None else valid.scatter(1, self_index[:, None], False)


def moved_rows(rows, index, z, m=0.5):
    """What a bank's rows of the images `index` become: m rows + (1 - m) z, normalised."""
    return F.normalize(m * rows[index] + (1 - m) * z.detach(), dim=1)
