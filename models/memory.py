"""Where old embeddings wait to be negatives: a bank with a row an image (IR, CMC), a first-in first-out queue (MoCo). All state is buffers."""
import torch
from torch import nn
from torch.nn import functional as F


class MemoryBank(nn.Module):
    """rows: (n_data, D) unit vectors, row i for image i; random at first.

    momentum m: row i := m row i + (1 - m) z_i, normalised. 0: the newest embedding (the Ring code); 0.5: InstDisc, CMC.
    """

    def __init__(self, n_data, dim, momentum):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} of the memory bank must lie in [0, 1)")
        self.momentum = momentum
        self.register_buffer("rows", F.normalize(torch.randn(n_data, dim), dim=1))
        self.register_buffer("index", torch.arange(n_data), persistent=False)        # (n_data,) the image of each row

    @torch.no_grad()
    def update(self, z, index):
        """z: (n, D) new embeddings of the images `index` (n,), no image twice."""
        self.rows[index] = F.normalize(torch.lerp(z, self.rows[index], self.momentum), dim=1)


class Queue(nn.Module):
    """keys: (K, D), the newest K keys, random unit vectors at first; index: (K,) the image of each, -1 where none yet."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("index", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))           # where the next key goes

    @torch.no_grad()
    def enqueue(self, k, index):
        """k: (n, D), index: (n,); any n: the oldest keys go, past the end it begins again, of more than K keys the last K stay."""
        K = len(self.keys)
        place = (self.pointer + torch.arange(len(k), device=k.device)) % K            # (n,)
        self.keys[place[-K:]], self.index[place[-K:]] = k[-K:], index[-K:]
        self.pointer.copy_((self.pointer + len(k)) % K)
