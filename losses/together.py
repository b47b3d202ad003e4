"""Several methods at once: `loss: [{name: ifnd, ...}, {name: ring, ...}, {name: mochi, ...}]`.

All of them speak of s, the similarities of the queries to their negatives. Those that choose or make negatives act on it in the order of the
list: IFND takes its false negatives out, the ring is that of what is left, MoCHi mixes the hardest of the ring. Then one formula is applied:
that of the method which treats positives (JCL, IFND's `attract`), or else

    L = mean_i -log( e^{q k / t} / (e^{q k / t} + sum_j e^{s_ij / t}) )

The formula is multiplied once by temperature / base_temperature, where a method of the list has
that key. IFND's levels are a leading dimension of s, and the mean is over it too. Each file is
whole without this one; here is only their order.
"""

import torch
from torch import nn
from torch.nn import functional as F

from . import NEVER, count, similarity


class Together(nn.Module):
    """losses: two or more, already built. ValueError says what in the list makes no sense."""

    def __init__(self, losses):
        super().__init__()
        names = [type(loss).__name__.lower() for loss in losses]
        for name, loss in zip(names, losses):
            if not hasattr(loss, "negatives") and not hasattr(loss, "objective"):
                raise ValueError(
                    f"{name} has neither negatives() nor objective(), so it cannot stand in a list of losses"
                )
            if names.count(name) > 1:
                raise ValueError(f"{name} stands in the list twice")
            if name == "nce" and loss.n_negatives is None:
                raise ValueError(
                    "nce in a list changes nothing unless it draws n_negatives; leave it out"
                )
            if loss.t != losses[0].t:
                raise ValueError(
                    f"{names[0]} has temperature {losses[0].t} and {name} {loss.t}; there is one partition function, so give both the same"
                )
        scales = {name: loss.scale for name, loss in zip(names, losses) if hasattr(loss, "scale")}
        if len(set(scales.values())) > 1:
            raise ValueError(
                f"the base_temperature of {' and '.join(scales)} differ; the list has "
                "one loss, so give them the same"
            )
        self.scale = next(iter(scales.values()), 1.0)  # those without the key have no say
        of_positives = [name for name, loss in zip(names, losses) if hasattr(loss, "objective")]
        if len(of_positives) > 1:
            raise ValueError(
                f"{' and '.join(of_positives)} both say what the positives are; keep one"
                + (", or set ifnd's mode to eliminate" if "ifnd" in of_positives else "")
            )
        self.of_negatives = [name for name in names if name not in of_positives]
        self.of_positives = of_positives[0] if of_positives else None
        self.losses, self.t = nn.ModuleDict(zip(names, losses)), losses[0].t
        draws = [
            name for name in self.of_negatives if getattr(self.losses[name], "n_negatives", None)
        ]
        for name, follower in zip(self.of_negatives, self.of_negatives[1:]):
            if name in draws or name == "mochi":
                raise ValueError(
                    f"{follower} cannot follow {name}, whose {'draws' if name in draws else 'mixed points'} are not the candidates to choose "
                    f"from; put {name} last"
                    + (" or set its n_negatives: null" if name in draws else "")
                )
        if draws and self.of_positives == "ifnd":
            raise ValueError(
                f"ifnd's attract cannot look for its false negatives among the draws of {draws[0]}; set its n_negatives: null"
            )

    def before_epoch(self, epoch, extract):
        for loss in self.losses.values():
            if hasattr(loss, "before_epoch"):
                loss.before_epoch(epoch, extract)

    def forward(self, contrast, epoch):
        s, figures, narrowed = similarity(contrast), {}, contrast  # (N, K)
        for name in self.of_negatives:
            chosen, which, more = self.losses[name].negatives(narrowed, s, epoch)  # (..., N, k)
            figures |= {f"{name}: {key}": value for key, value in more.items()}
            if which is not None and (name != self.of_negatives[-1] or self.of_positives == "ifnd"):
                chosen = torch.full_like(s, NEVER).scatter(
                    -1, which, chosen
                )  # (..., N, K) back in their places, to be looked up
            s, narrowed = chosen, contrast._replace(mask=chosen > NEVER, own=None)
        if self.of_positives is not None:
            loss, more = self.losses[self.of_positives].objective(contrast, s, epoch)
            return self.scale * loss, {"K": count(s), **more, **figures}
        q, k = contrast.query, contrast.positive.mean(1)  # (N, D), (N, D)
        positive = (q * k).sum(1)  # (N,)
        loss = F.softplus(torch.logsumexp(s / self.t, -1) - positive / self.t).mean()
        return self.scale * loss, {"K": count(s), "positive": positive.mean(), **figures}
