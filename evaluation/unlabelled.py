"""What a run can watch without labels: RankMe, alignment and uniformity of a sample of its images.

None of them is an accuracy. An encoder that tells images by a shortcut, such as their colours or
the noise of a camera, may have a high rank and embeddings that are aligned and spread evenly.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from data.augment import select_rows
from data.loader import Loader, batches, generator
from engine.distributed import print_main
from engine.progress import progress

from .features import eval_mode, gather_features, local_rows

MOST_IMAGES = 10_000
# Of the generator of the sample and its views. The loader's own have at most three words.
GENERATOR_KEY = 0, 0, 0, 1
# Rows of embeddings that are compared with all others at once.
ROWS = 256


class Unlabelled:
    """RankMe, alignment and uniformity on a fixed sample of the training images.

    Each image has two views by the run's own augmentation. The sample and its views are the same
    each time, on every process and for every seed, so that the figures move by the encoder alone.
    They are computed from the encoder's output, as unit vectors: alignment from both views, RankMe
    and uniformity from the first view of each image.

    Args:
        loader: of the training images' views.
        sample: how many images, each time that kNN is due (knn.every); 10,000 at most, 0 for none.
            RankMe wants many more images than the output has dimensions: 1,024 are eight times the
            usual 128. They cost quickstart 1.7 % of its time, 2,048 cost 3.4 %. (RankMe's paper
            takes 25,600.) Fewer images have a lower rank: compare figures of equal samples alone.
    """

    def __init__(self, loader: Loader, *, sample: int = 1024):
        if sample != 0 and not 2 <= sample <= MOST_IMAGES:
            raise ValueError(
                f"sample is {sample}; it must be from 2 to {MOST_IMAGES}, or 0 for no figures "
                "without labels"
            )
        self.loader = loader
        n = len(loader.dataset)
        own_generator = generator(*GENERATOR_KEY)
        self.rows = torch.randperm(n, generator=own_generator)[:sample].sort().values
        self.parameters = loader.sample_parameters(2 * len(self.rows), own_generator)
        self.possible = len(self.rows) > 1

    def __call__(self, encoder: torch.nn.Module) -> dict[str, float]:
        """Return the figures for the log; none where there is no sample. All processes call it."""
        if not self.possible:
            return {}
        z = self.embed(encoder)  # (n_sample, 2, D)
        if not z.isfinite().all():
            print_main("no RankMe, alignment and uniformity: some embeddings are not finite")
            return {}
        first, second = z.unbind(1)  # (n_sample, D) each
        return {
            "RankMe": rankme(first),
            "alignment": alignment(first, second),
            "uniformity": uniformity(first),
        }

    def embed(self, encoder: torch.nn.Module) -> Tensor:
        """Return unit vectors (n_sample, 2, D) of both views, on every process."""

        def encode(views):  # (2 b, 3, S, S), the first view of each of b images, then the second
            z = F.normalize(encoder(views), dim=1)  # CMC's outputs are two unit vectors
            return z.unflatten(0, (2, -1)).transpose(0, 1)

        plan = self.plan()
        loader = self.loader
        given = loader.device, loader.running, loader.backend, 2, None, loader.in_flight
        steps = batches(loader.dataset, loader.augment, plan, *given)
        steps = progress(steps, "RankMe", total=len(plan))
        with eval_mode(encoder):
            return gather_features(encode, steps, len(self.rows))

    def plan(self) -> list[tuple[Tensor, dict]]:
        """Return what `batches` wants: images (b,), and what was drawn for their 2 b views."""
        n, loader = len(self.rows), self.loader
        # For as many views as in a step of training there is memory, in the workers as well.
        size = max(1, loader.local * loader.n_views // 2)
        plan = []
        for images in local_rows(n).split(size):
            views = torch.cat([images, n + images])
            plan.append((self.rows[images], select_rows(self.parameters, views)))
        return plan

    def __str__(self):
        return (
            f"without labels: RankMe, alignment and uniformity of {len(self.rows)} training "
            "images, two views each (knn.sample)"
        )


def rankme(z: Tensor, epsilon: float = 1e-7) -> float:
    """Compute the effective rank of embeddings, from 1 (collapsed) to D.

        RankMe(Z) = exp(- sum_k p_k log p_k),   p_k = sigma_k(Z) / ||sigma(Z)||_1 + epsilon

    Equation 1 of Garrido, Balestriero, Najman, LeCun, ICML 2023 (arXiv 2210.02885).

    Args:
        z: (n, D) embeddings, not centred.
        epsilon: the paper's.
    """
    sigma = torch.linalg.svdvals(z.cpu().double())  # (min(n, D),)
    p = F.normalize(sigma, p=1, dim=0) + epsilon
    return torch.exp(-(p * p.log()).sum()).item()


def alignment(x: Tensor, y: Tensor) -> float:
    """Compute E ||f(x) - f(x')||^2 over pairs of views: 0 where all pairs agree, at most 4.

    Wang, Isola, ICML 2020 (arXiv 2005.10242), alpha = 2.

    Args:
        x: (n, D) unit vectors.
        y: (n, D), of another view of each image.
    """
    return (x - y).square().sum(1).mean().item()


def uniformity(z: Tensor, t: float = 2.0) -> float:
    """Compute log E exp(-t ||f(x) - f(y)||^2) over pairs of different images.

    It is 0 where all embeddings are one point, and about -2 t where they cover a sphere of many
    dimensions evenly. Wang, Isola, ICML 2020 (arXiv 2005.10242), t = 2.

    Args:
        z: (n, D) unit vectors, n at least 2.
        t: as above.
    """
    n, total = len(z), z.new_zeros(())
    for start in range(0, n, ROWS):
        cosine = z[start : start + ROWS] @ z[start:].T  # (ROWS, n - start)
        distance = (2 - 2 * cosine).clamp(min=0)  # squared
        # Above the diagonal stands each pair of different images once.
        total += (-t * distance).exp().triu(1).sum()
    return (total / (n * (n - 1) / 2)).log().item()
