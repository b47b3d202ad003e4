"""Contrastive losses, one file each: nce, ring, ifnd, jcl, mochi; and lists of them, together.py.

This folder needs PyTorch (k-means numpy, too) and nothing of this repository, so it can be copied
into another project; docs/use-a-loss.md has whole programs that use it alone.

**To add a loss**, write losses/x.py with a class X (in any capitals), and choose it by
`loss: {name: x}`. nce.py is the shortest example. A loss is an nn.Module with

    __init__(...)
        Its keyword-only arguments are its YAML keys; their defaults and annotations count. It may
        also ask for these, by name and before the `*`: epochs, the length of training; n_data, the
        number of images; n_keys, the number of keys of each query; labels, the true ones (n_data,)
        or None, which are for an analysis such as MoCHi's oracle and for nothing else.
    forward(contrast: Contrast, epoch: float) -> Output
        Output(loss) is enough; Output(loss, negatives) where negatives are chosen or drawn, so that
        the log can say how many of them are false. epoch is 12.5 half-way through the 13th.

and, where it needs them,

    select(contrast, s, epoch) -> Negatives
        Chooses or draws negatives, by the similarities s (..., N, K) of all candidates. To stand in
        a list of losses (together.py) a loss has this or `objective`, and its temperature as `t`.
    objective(contrast, s, epoch) -> scalar
        The loss, by the similarities s (..., N, k) of the negatives that others in a list chose.
    draw(chosen) -> Negatives, and synthesize(contrast, s, epoch) -> Synthetic negatives
        What the last in a list makes of its choice at random, as ring.py and mochi.py do.
    before_epoch(epoch, extract)
        Is called before each epoch; extract() returns the embeddings (n_data, D) of all images, and
        is None where a run goes on within an epoch.
    diagnostics(contrast, output, labels, epoch) -> {name: scalar}
        Figures for the log besides those of diagnostics.py: of the first queries, at some steps.
        labels is None where there are none. report.py --own draws them.
    chance(K) -> float
        The loss of an encoder that knows nothing, where it is not scale * log(K + 1).

Then write its formula, slowly and literally, in tests/losses/literal.py, whose first lines say how;
a test that finds losses by their files asks for it.
"""

from .base import NEG_INF as NEG_INF
from .base import Contrast as Contrast
from .base import Negatives as Negatives
from .base import Output as Output
from .base import info_nce as info_nce
from .base import positive_similarity as positive_similarity
from .base import similarity as similarity
