"""What is measured on the images: `auto` of data.mean and data.std, and whether they are grey."""

import contextlib
import copy
from functools import partial

import numpy as np
import torch

from engine import distributed
from engine.progress import progress

from .augment import get_recipe
from .image_files import SAMPLED_FILES, evenly_spaced
from .loader import check_image_size, generator, ordered_batches

SAMPLED_IMAGES = 1000  # that are measured
BATCH = 50  # of them: at 224 pixels 60 MB
DIGITS = 4  # of what is measured, as people write it into a file
ONE_COLOUR = 1e-4  # a std below it divides by nothing
AUTO = "auto"


def is_auto(settings):
    """Whether a data section asks for a mean or a std that is measured."""
    return AUTO in (settings["mean"], settings["std"])


def replace_auto(settings, mean, std):
    """Write numbers into a data section where it says `auto`, for whatever is loaded after it.

    Checkpoints and config.yaml hold these numbers then, so that nothing is measured a second time.

    Args:
        settings: the section, which is changed.
        mean: of each channel; None leaves `auto`.
        std: likewise.
    """
    for key, values in (("mean", mean), ("std", std)):
        if settings[key] == AUTO and values is not None:
            settings[key] = list(values)


def measure(dataset, given, image_size, workers, skip):
    """The mean and std of each channel, in the place of `auto`, and print them.

    Every process calls it; the first one looks, at SAMPLED_IMAGES images at most, which are the
    same in every run.

    Args:
        dataset: an ArraySet or a FolderSet.
        given: {"mean": three numbers, None or "auto", "std": likewise}.
        image_size: the images are brought to such squares, as evaluation does it.
        workers: that decode; None for the cores there are.
        skip: whether another image takes the place of one that cannot be read.

    Returns:
        `given`, with three numbers instead of "auto".

    Raises:
        SystemExit: where the images have one colour, and where one of them cannot be read.
    """
    check_image_size(image_size)
    # The numbers of images in [0, 1] are wanted.
    plain = copy.copy(dataset)
    plain.mean, plain.std, plain.skip = (0.0,) * 3, (1.0,) * 3, skip
    count = min(len(dataset), SAMPLED_IMAGES)
    look = partial(channel_statistics, plain, count, image_size, workers)
    mean, std = distributed.run_on_first(look)
    if given["std"] == AUTO and min(std) < ONE_COLOUR:
        raise SystemExit(
            f"data.std is auto, but a channel has one value in all {count} images that were looked "
            "at; set data.std to three numbers above 0"
        )
    measured = {key: values for key, values in (("mean", mean), ("std", std)) if given[key] == AUTO}
    words = " ".join(f"data.{key}={values}" for key, values in measured.items())
    distributed.print_main(
        f"auto: {words}, measured on {count} of {len(dataset)} training images; the numbers may be "
        "written into the file"
    )
    return given | measured


def channel_statistics(dataset, count, image_size, workers):
    """The mean (3,) and std (3,) over all pixels of a sample of `count` images, as lists."""
    rows = torch.randperm(len(dataset), generator=generator(0))[:count].sort().values
    cpu = torch.device("cpu")
    batches = ordered_batches(dataset, rows, "eval", image_size, cpu, BATCH, workers)
    total, squares = torch.zeros(2, 3, dtype=torch.float64)
    steps = -(-count // BATCH)
    # The first process comes here.
    for images, _ in progress(batches, "measuring", steps, unit="batches", is_shown=True):
        x = images.double()  # (b, 3, S, S)
        total += x.sum((0, 2, 3))
        squares += x.square().sum((0, 2, 3))
    pixels = count * image_size**2
    mean = total / pixels
    std = (squares / pixels - mean**2).clamp(min=0).sqrt()
    return round_numbers(mean), round_numbers(std)


def round_numbers(values):
    """Numbers as a list of floats of DIGITS digits."""
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def say_if_grey(dataset, *, augment: str):
    """Say so where images without colours are augmented in their colours.

    Every process may call it; one of them looks, at SAMPLED_FILES images at most, evenly spaced,
    and as a rule at one alone: the first in colours ends it.

    Args:
        dataset: an ArraySet or a FolderSet.
        augment: the name of the recipe.
    """
    operations = [name for name, _ in get_recipe(augment)]
    if "jitter" not in operations or not distributed.is_main():
        return
    rows = evenly_spaced(len(dataset), SAMPLED_FILES)
    if all(is_grey(dataset, row) for row in rows):
        distributed.print_main(
            f"all {len(rows)} images that were looked at are grey: of data.augment={augment} hue "
            "and saturation change nothing in them, brightness and contrast do"
        )


def is_grey(dataset, row):
    """Whether an image has three equal channels. One that cannot be read is told when it is met."""
    with contextlib.suppress(ValueError):
        pixels = np.asarray(dataset.decode(row))  # (h, w, 3)
        return bool((pixels == pixels[..., :1]).all())
    return False
