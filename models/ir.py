"""IR: instance discrimination with a memory bank (Wu, Xiong, Yu, Lin; CVPR 2018; arXiv 1805.01978).

It is the host of Ring's Table 1.
"""

from torch import Tensor, nn

from engine import distributed
from losses import Contrast

from .checks import check_bank_views
from .memory_bank import MemoryBank
from .views import encode_views


class IR(nn.Module):
    """Each image is a class of its own. A query meets the memory bank, which has a row an image.

        P(i | f) = exp(v_i f / t) / sum_j exp(v_j f / t)

    f is the query, the embedding of a view of image i; its key is v_i, row i of the bank; the other
    rows are candidates for its negatives.

    Args:
        encoder: f_theta.
        n_data: the number of images.
        momentum: of the bank, see MemoryBank.
        exclude_self: the image's own row is no negative of its query; the Ring code leaves it in.
        candidates: so many rows, drawn anew at every step, stand for the whole bank, see
            MemoryBank.sample_rows; None: all of it. This is for data sets of millions.
        n_views: V, views an image, 1 in the paper. Of several each is a query, whose keys are the
            row and the other views, without gradient. JCL wants several keys; this is no paper's
            way to get them.
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_data: int,
        *,
        momentum: float = 0.5,
        exclude_self: bool = True,
        candidates: int | None = None,
        n_views: int = 1,
    ):
        super().__init__()
        check_bank_views(n_views)
        self.n_views = n_views
        self.n_keys = n_views  # the row and the other views
        self.bank = MemoryBank(n_data, encoder.dim, momentum, exclude_self, candidates)
        self.pending = []  # this step's embeddings, which are not in the bank yet

    def forward(self, encoder: nn.Module, views: list[Tensor], index: Tensor) -> list[Contrast]:
        """Contrast each view with the bank.

        Args:
            encoder: f_theta.
            views: V of (N, 3, S, S), of the same N images.
            index: (N,), which images.

        Returns:
            One Contrast, of N V queries.
        """
        # embed the images
        f = encode_views(encoder, views)  # (N, V, D)

        # v_i moves towards the mean of the views when the step is done, of all processes
        f_mean = f.detach().mean(1)  # (N, D)
        self.pending.append(distributed.all_gather(f_mean, index))

        # positive pairs: f with v_i; negative pairs: f with all other rows
        return [self.bank.contrast(f, f.detach(), index)]

    def update_memory(self) -> None:
        """Move the rows of the step's images: the backward pass needed the old ones."""
        for f, index in self.pending:
            self.bank.update(f, index)
        self.pending.clear()
