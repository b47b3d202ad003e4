"""MoCo (He et al., CVPR 2020; v2: Chen et al., 2020): a momentum encoder for the keys and a queue of old keys."""

import torch
from torch import nn

from engine import distributed
from engine.distributed import say
from losses import Contrast

from .memory import Queue
from .momentum import MomentumEncoder


class MoCo(nn.Module):
    """The first view is the query, the others its keys; the candidates are the queue. In the order of moco's code:
    q = f_q(x); move f_k; k = f_k(x'), shuffled; the loss on the queue as it is; then enqueue (one key an image, the mean of its keys).

    queue_size: K. momentum: m of f_k. n_views: 2, or M + 1 for M keys. Loss not symmetrised, as in the paper.
    """

    def __init__(
        self,
        encoder,
        n_data=None,
        *,
        queue_size: int = 65536,
        momentum: float = 0.999,
        n_views: int = 2,
    ):
        super().__init__()
        if queue_size < 1:
            raise ValueError(f"queue_size is {queue_size}; it must be above 0")
        if n_views < 2:
            raise ValueError(f"n_views is {n_views}; MoCo needs a query and at least one key: 2")
        if n_data is not None and n_data < 2:
            raise ValueError(
                f"a data set of {n_data} image has no negatives: the queue would hold its own keys alone; take more images"
            )
        if n_data is not None and queue_size > n_data:
            say(
                f"queue_size {queue_size} is larger than the data set of {n_data} images, so that a query's own image is always among its negatives; lower it"
            )
        self.n_views, self.n_keys, self.news = n_views, n_views - 1, []
        self.key_encoder = MomentumEncoder(encoder, momentum)
        self.queue = Queue(queue_size, encoder.dim)

    def forward(self, encoder, views, index):
        """views: M + 1 of (N, 3, S, S); index: (N,)."""
        q = encoder(views[0])  # (N, D)
        if not self.news:  # once a step, in however many parts this is taken
            self.key_encoder.update(encoder)
        k = self.key_encoder.shuffled(torch.stack(views[1:], 1).flatten(0, 1))  # (N M, D)
        k = k.view(len(q), -1, q.shape[1])  # (N, M, D)
        self.news.append(distributed.gather(k.mean(1), index))
        return [Contrast(q, k, self.queue.keys, index, self.queue.index)]

    def after_step(self):
        for k, index in self.news:  # only now: the loss was on the queue before this batch
            self.queue.enqueue(k, index)
        self.news.clear()
