"""Contrastive losses, one file each: nce, ring, ifnd, jcl, mochi; and lists of them, together.py.

This folder needs PyTorch (k-means numpy, too) and nothing of this repository, so it can be copied
into another project; docs/own_loop.py trains two networks with it alone.

**To add a loss**, write losses/x.py with a class X (in any capitals), and choose it by
`loss: {name: x}`. The other losses are examples; nce.py is the shortest. A loss is an nn.Module:

    __init__(...)
        Its keyword-only arguments are its YAML keys: their defaults and annotated types count. It
        may also ask for these, by name and without `*`: epochs, the length of the training; n_data,
        the number of images; n_keys, the number of keys of each query; labels, (n_data,) the true
        labels or None, which are for an analysis such as MoCHi's oracle and nothing else.
    forward(contrast: Contrast, epoch: float) -> Output
        Output(loss) is enough. `epoch` is 12.5 half-way through the 13th. Where negatives are
        chosen or drawn, Output(loss, negatives) lets the log say how many are false.

and where it needs to

    select(contrast, s, epoch) -> Negatives
        Chooses or draws negatives, by the similarities s (..., N, K). To stand in a list of losses
        a loss has this or `objective`.
    objective(contrast, s, epoch) -> scalar
        The loss, by the similarities s (..., N, k) of the negatives that others in the list chose.
    before_epoch(epoch, extract)
        Called before each epoch; extract() returns (n_data, D), the embeddings of all images, and
        is None where a run goes on within an epoch.
    diagnostics(contrast, output, labels, epoch) -> {name: scalar}
        Figures for the log, besides those of diagnostics.py; of some queries only, and at some
        steps only. labels is None where there are none.
    chance(K) -> float
        The loss of an encoder that knows nothing, where it is not scale * log(K + 1).

Then write its formula in slow and literal float64, one query at a time, in a test
tests/losses/test_x.py with the help of tests/losses/literal.py, and add it to LITERAL there.
"""

from .base import NEG_INF as NEG_INF
from .base import Contrast as Contrast
from .base import Negatives as Negatives
from .base import Output as Output
from .base import info_nce as info_nce
from .base import positive_similarity as positive_similarity
from .base import similarity as similarity
