"""Settings of hosts and encoders that make no sense are refused before anything is trained.

A refusal is a ValueError whose sentence names the setting and the way out. Of a setting that does
less than it says one is warned.
"""

import warnings

import torch
from torch import nn

from engine import distributed


def check_encoder(device: torch.device, precision: str, **sizes: int) -> None:
    """Check the precision on this device, and sizes, which must be above 0."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 is for GPUs; on a CPU use bf16, fp32 or auto")


def check_even_width(width: int) -> None:
    """Check that CMC can halve the width."""
    if width % 2:
        raise ValueError(f"width is {width}; cmc halves it, so it must be even")


def check_bank(n_data: int, momentum: float, exclude_self: bool, candidates: int | None) -> None:
    """Check the settings of a MemoryBank."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum} of the memory bank must lie in [0, 1)")
    if exclude_self and n_data < 2:
        raise ValueError(
            f"a data set of {n_data} image has no negatives once exclude_self takes the image's "
            "own row out; take more images"
        )
    if candidates is not None and not 2 <= candidates <= n_data:
        raise ValueError(
            f"candidates is {candidates}; it must lie between 2 and the {n_data} rows of the bank, "
            "or be null for all of them"
        )


def check_bank_views(n_views: int) -> None:
    """Check the number of views of a host with memory banks."""
    if n_views < 1:
        raise ValueError(f"n_views is {n_views}; it must be above 0")


def check_simclr(n_views: int) -> None:
    """Check the settings of models/simclr.py."""
    if n_views < 2:
        raise ValueError(f"n_views is {n_views}; SimCLR needs at least 2")


def check_key_momentum(m: float) -> None:
    """Check the momentum of a MomentumEncoder."""
    if not 0 <= m <= 1:
        raise ValueError(f"momentum {m} of the key encoder must lie in [0, 1]")


def check_moco(encoder: nn.Module, n_data: int | None, queue_size: int, n_views: int) -> None:
    """Check the settings of models/moco.py; n_data is None where it is not known."""
    if queue_size < 1:
        raise ValueError(f"queue_size is {queue_size}; it must be above 0")
    if n_views < 2:
        raise ValueError(f"n_views is {n_views}; MoCo needs a query and at least one key: 2")
    if n_data is not None and n_data < 2:
        raise ValueError(
            f"a data set of {n_data} image has no negatives: the queue would hold its own keys "
            "alone; take more images"
        )
    if n_data is not None and queue_size > n_data:
        warnings.warn(
            f"queue_size {queue_size} is larger than the data set of {n_data} images, so that a "
            "query's own image is always among its negatives; lower it",
            stacklevel=3,
        )
    warn_if_shuffling_is_idle(encoder)


def warn_if_shuffling_is_idle(encoder: nn.Module) -> None:
    """Warn where the keys have the batch statistics of the very images that the queries have."""
    if distributed.world_size() * encoder.bn_splits > 1:
        return
    if any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in encoder.modules()):
        warnings.warn(
            "MoCo's shuffled BatchNorm does nothing with one process and model.bn_splits 1: the "
            "statistics of a query's batch and of its key's batch are of the same images, which "
            "can tell the two apart from all others; set model.bn_splits=8, which stands for 8 "
            "processes, or start several processes by torchrun",
            stacklevel=4,
        )


def check_batch(
    key: str, batch_size: int, processes: int, bn_splits: int, accumulate: int | None = None
) -> None:
    """Check that each group of images which BatchNorm takes together has two images or more.

    With one image BatchNorm has no statistics of a batch: torch stops where the last feature map
    is one pixel, and where it is larger the network trains on statistics of single images. In a
    batch of one image SimCLR has no negatives, and the log's figures of a batch are not numbers.

    Args:
        key: what the batch size is called in the YAML: optim.batch_size or finetune.batch_size.
        batch_size: images a step, of all processes.
        processes: how many share the batch.
        bn_splits: into how many groups each network's BatchNorm divides its images.
        accumulate: in how many parts, one after the other, a process takes its images; None: it
            takes them at once, and there is no such key.

    Raises:
        ValueError: the groups are not equally large, or have fewer than two images.
    """
    local = batch_size // processes
    n_groups = bn_splits
    divisor = f"model.bn_splits {bn_splits}"
    if accumulate is not None:
        n_groups *= accumulate
        divisor = f"optim.accumulate {accumulate} times {divisor}"
    if local % n_groups:
        raise ValueError(
            f"{key} {batch_size} gives each process {local} images, which {divisor} "
            "does not divide; set another batch_size, or model.bn_splits=1"
        )
    if local // n_groups < 2:
        raise ValueError(
            f"{key} {batch_size} leaves BatchNorm one image at a time, with "
            f"{processes} process{'es' * (processes > 1)} and {divisor}; it needs two, so raise "
            f"{key}"
        )
