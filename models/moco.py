"""MoCo: momentum contrast (He et al., CVPR 2020, arXiv 1911.05722; v2: Chen et al., 2020)."""

import torch
from torch import Tensor, nn

from engine import distributed
from losses import Contrast

from .checks import check_moco
from .memory_queue import Queue
from .momentum import MomentumEncoder


class MoCo(nn.Module):
    """A query meets the keys of its own image and a queue of earlier keys: Algorithm 1.

    The first view of an image is the query, the others are its keys. The order is that of moco's
    code: f_k moves before it makes the keys. The loss is not symmetrised, as in the paper.

    Args:
        encoder: f_q, of which f_k begins as a copy.
        n_data: the number of images, for checks alone.
        queue_size: K, the number of candidates.
        momentum: m, of f_k.
        n_views: 2 in the paper; M + 1 for M keys.
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_data: int | None = None,
        *,
        queue_size: int = 65536,
        momentum: float = 0.999,
        n_views: int = 2,
    ):
        super().__init__()
        check_moco(encoder, n_data, queue_size, n_views)
        self.n_views = n_views
        self.n_keys = n_views - 1
        self.key_encoder = MomentumEncoder(encoder, momentum)
        self.queue = Queue(queue_size, encoder.dim)
        self.pending = []  # this step's keys, which are not in the queue yet

    def forward(self, encoder: nn.Module, views: list[Tensor], index: Tensor) -> list[Contrast]:
        """Contrast each query with its keys and the queue.

        Args:
            encoder: f_q.
            views: M + 1 of (N, 3, S, S), of the same N images.
            index: (N,), which images.

        Returns:
            One Contrast, of N queries.
        """
        # queries
        x_q = views[0]  # (N, 3, S, S)
        q = encoder(x_q)  # (N, D)

        # keys, without gradient
        if not self.pending:  # once a step, in however many parts this is taken
            self.key_encoder.update(encoder)
        x_k = torch.stack(views[1:], 1)  # (N, M, 3, S, S)
        k = self.key_encoder.forward_shuffled(x_k.flatten(0, 1))  # (N M, D)
        k = k.unflatten(0, (-1, self.n_keys))  # (N, M, D)

        # one key an image enters the queue, of all processes, when the step is done
        self.pending.append(distributed.all_gather(k.mean(1), index))

        # positive pairs: q with k; negative pairs: q with the queue
        return [Contrast(q, k, self.queue.keys, index, self.queue.index)]

    def update_memory(self) -> None:
        """Enqueue the step's keys: loss and gradient are of the queue without them."""
        for k, index in self.pending:
            self.queue.enqueue(k, index)
        self.pending.clear()
