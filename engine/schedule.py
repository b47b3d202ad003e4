"""The learning rate over training, and the optimizer that all four papers use."""

import math
from typing import Literal

import torch

from .distributed import print_main


class Schedule:
    """lr = schedule(epoch), with epoch a float: 12.5 is half-way through the 13th.

    `cosine` is lr / 2 (1 + cos(pi t)), with t from 0 after the warm-up to 1 at the end, at every
    step (moco's code: once an epoch).

    Args:
        epochs: to train for.
        batch_size: of all processes together, as the papers print it.
        lr: the largest learning rate, for all processes together.
        schedule: `cosine`, `step` (times gamma at each milestone) or `constant`.
        milestones: epochs after which `step` lowers the learning rate.
        gamma: what it is multiplied with there.
        warmup_epochs: of these it rises linearly from 0.
        accumulate: a batch that does not fit is taken in so many parts, one after the other, their
            gradients summed. BatchNorm sees a part.
    """

    def __init__(
        self,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        schedule: Literal["cosine", "step", "constant"] = "cosine",
        milestones: list[int] = [],  # noqa: B006  it is only read
        gamma: float = 0.1,
        warmup_epochs: int = 0,
        accumulate: int = 1,
    ):
        positive = {
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "gamma": gamma,
            "accumulate": accumulate,
        }
        for name, value in positive.items():
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
                "schedule is step, but there are no milestones; give the epochs after which lr "
                "falls, or write schedule: constant"
            )
        check_milestones(milestones, epochs, "epochs")
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.schedule = schedule
        self.milestones = milestones
        self.gamma = gamma
        self.warmup_epochs = warmup_epochs

    def __call__(self, epoch):
        """The learning rate at an epoch, a float."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.schedule == "cosine":
            t = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
            return self.lr * 0.5 * (1 + math.cos(math.pi * t))
        return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


def check_milestones(milestones, end, key):
    """Refuse milestones before 1, and say which of them lie behind the end of a short run.

    Args:
        milestones: epochs or iterations after which the learning rate falls.
        end: of the run.
        key: the key that sets the end, for sentences.
    """
    if min(milestones, default=1) < 1:
        raise ValueError(f"milestones {milestones} must lie above 0")
    if max(milestones, default=0) >= end:
        times = sum(milestone < end for milestone in milestones)
        print_main(
            f"milestones {milestones}: {key} {end} end before the last of them is reached, and "
            f"the learning rate falls {times} times; lower the milestones too"
        )


def check_optimizer_settings(momentum, weight_decay):
    """Refuse what torch would refuse later, when data are loaded, and with fewer words."""
    if not 0 <= momentum < 1:
        raise ValueError(f"Invalid momentum value: {momentum}; it must lie in [0, 1)")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; it must be at least 0")


def sgd(parameters, lr, *, momentum: float = 0.9, weight_decay: float = 1e-4):
    """SGD on all parameters alike, as in the four papers; the fused kernel."""
    check_optimizer_settings(momentum, weight_decay)
    return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=True)
