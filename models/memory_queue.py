"""The queue of MoCo: old keys wait to be negatives, first in, first out (He et al., CVPR 2020)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Queue(nn.Module):
    """The newest K keys, random unit vectors at first.

    Args:
        size: K.
        dim: D.

    Attributes:
        keys: (K, D).
        index: (K,), the image of each key, -1 where there is none yet.
        pointer: (), where the next key goes.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("index", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, k: Tensor, index: Tensor) -> None:
        """Put keys in the place of the oldest ones; of more than K keys the last K stay.

        Args:
            k: (n, D), for any n.
            index: (n,), their images.
        """
        K, n = self.keys.shape[0], k.shape[0]
        slot = (self.pointer + torch.arange(n, device=k.device)) % K  # (n,)
        self.keys[slot[-K:]] = k[-K:]
        self.index[slot[-K:]] = index[-K:]
        self.pointer.copy_((self.pointer + n) % K)
