"""The learning rate over training, and the optimizer that all four papers use."""

import math
from typing import Literal

import torch

from .distributed import say


class Schedule:
    """lr = schedule(epoch), epoch a float: 12.5 is half-way through the 13th.

    lr and batch_size are global, as the papers print them. `cosine`: lr/2 (1 + cos(pi t)), t from 0 after the warm-up to 1 at the end,
    at every step (moco's code: once an epoch). `step`: times gamma at each milestone. `constant`. warmup_epochs: linear from 0.
    accumulate: a batch that does not fit is taken in so many parts, one after the other, their gradients summed; BatchNorm sees a part.
    """

    def __init__(
        self,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        schedule: Literal["cosine", "step", "constant"] = "cosine",
        milestones: list[int] = [],
        gamma: float = 0.1,
        warmup_epochs: int = 0,
        accumulate: int = 1,
    ):
        for name, value in dict(
            epochs=epochs, batch_size=batch_size, lr=lr, gamma=gamma, accumulate=accumulate
        ).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0, and finite")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs is {warmup_epochs}; it must be at least 0")
        if warmup_epochs >= epochs:
            raise ValueError(f"warmup_epochs {warmup_epochs} leaves nothing of epochs {epochs}")
        if milestones and schedule != "step":
            raise ValueError(
                f"milestones are given, but schedule is {schedule!r}; write schedule: step"
            )
        if schedule == "step" and not milestones:
            raise ValueError(
                "schedule is step, but there are no milestones; give the epochs after which lr falls, or write schedule: constant"
            )
        reached(milestones, epochs, "epochs")
        self.epochs, self.batch_size, self.lr, self.warmup = epochs, batch_size, lr, warmup_epochs
        self.schedule, self.milestones, self.gamma = schedule, milestones, gamma

    def __call__(self, epoch):
        if epoch < self.warmup:
            return self.lr * epoch / self.warmup
        if self.schedule == "cosine":
            return (
                self.lr
                * 0.5
                * (1 + math.cos(math.pi * (epoch - self.warmup) / (self.epochs - self.warmup)))
            )
        return self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)


def reached(milestones, end, what):
    """Milestones make sense from 1; that of a run which was cut short lies behind its end."""
    if min(milestones, default=1) < 1:
        raise ValueError(f"milestones {milestones} must lie above 0")
    if max(milestones, default=0) >= end:
        say(
            f"milestones {milestones}: {what} {end} end before the last of them is reached, and the learning rate falls {sum(m < end for m in milestones)} times; lower them too"
        )


def sensible(momentum, weight_decay):
    """Before anything is loaded or trained, and more than torch would say."""
    if not 0 <= momentum < 1:
        raise ValueError(f"Invalid momentum value: {momentum}; it must lie in [0, 1)")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; it must be at least 0")


def sgd(parameters, lr, *, momentum: float = 0.9, weight_decay: float = 1e-4):
    """SGD on all parameters alike, as in the four papers; the fused kernel."""
    sensible(momentum, weight_decay)
    return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=True)
