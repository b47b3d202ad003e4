"""Views a second: our batched augmentation beside PIL, torchvision.transforms.v2 and kornia.

    python benchmarks/input.py        images in memory, and JPEG files of datasets/imagenette96
    python benchmarks/input.py --folder DIR --workers 8    JPEG files of other class folders

In memory, one process augments: PIL an image at a time with torchvision.transforms, as moco does.
Kornia has a row where it is installed (pip install kornia), and a GPU where there is one: it takes
images from its own memory. Of JPEG files, two views of each image
are made: by our Loader, and by ImageFolder with PIL's transforms in a DataLoader, with as many
worker processes. All cases take turns; medians are printed. Machines drift: only the ratios inside
one table mean anything.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from functools import partial

import torch
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.augment import RECIPES, Augment, pil_transforms
from data.datasets import IMAGENET, load
from data.loader import Loader
from engine.progress import progress

# recipe, stored size, size of the views, images
CASES = [
    ("cifar", 32, 32, 512),
    ("moco_v2", 32, 32, 512),
    ("moco_v2", 96, 96, 256),
    ("moco_v2", 256, 224, 64),
]
# What takes an image at a time gets at most so many.
MOST_SINGLE_IMAGES = 128
HALF = (0.5,) * 3
JPEG_SIZES = (96, 224)
JPEG_BATCH = 64


# --------------------------------------------------------------------------------------- in memory
# Each function returns one without arguments, which augments images (n, 3, s, s) of uint8.


def ours(recipe, images, size):
    """Our augmentation, a batch at a time."""
    augment = Augment(recipe, size, HALF, HALF)
    generator = torch.Generator().manual_seed(0)
    return partial(augment, images, generator)


def ours_on_gpu(recipe, images, size):
    """Our augmentation on the GPU, which is waited for."""
    augment = ours(recipe, images.cuda(), size)

    def augment_and_wait():
        augment()
        torch.cuda.synchronize()

    return augment_and_wait


def pil(recipe, images, size):
    """PIL's operations, an image at a time."""
    to_float = [T.ToTensor(), T.Normalize(HALF, HALF)]
    transform = T.Compose([pil_transforms(recipe, size), *to_float])
    return partial(each, transform, [TF.to_pil_image(image) for image in images])


def torchvision_v2(recipe, images, size):
    """The operations of torchvision.transforms.v2, an image at a time."""
    make = {
        "crop": lambda scale: v2.RandomResizedCrop(size, scale, antialias=True),
        "flip": v2.RandomHorizontalFlip,
        "grey": v2.RandomGrayscale,
        "jitter": lambda p, **strength: v2.RandomApply([v2.ColorJitter(**strength)], p),
        "blur": lambda sigma, p: v2.RandomApply([v2.GaussianBlur(13, sigma)], p),
    }
    operations = [make[name](**settings) for name, settings in RECIPES[recipe]]
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(HALF, HALF)]
    return partial(each, v2.Compose(operations + to_float), images)


def kornia(recipe, images, size):
    """Kornia's operations, a batch at a time."""
    import kornia.augmentation as K

    make = {
        "crop": lambda scale: K.RandomResizedCrop((size, size), scale),
        "flip": lambda p: K.RandomHorizontalFlip(p=p),
        "grey": lambda p: K.RandomGrayscale(p=p),
        "jitter": lambda p, **strength: K.ColorJitter(**strength, p=p),
        "blur": lambda sigma, p: K.RandomGaussianBlur((13, 13), sigma, p=p),
    }
    operations = [make[name](**settings) for name, settings in RECIPES[recipe]]
    normalize = K.Normalize(torch.tensor(HALF), torch.tensor(HALF))
    transform = K.AugmentationSequential(*operations, normalize)
    return lambda: transform(images.float() / 255)


def each(transform, images):
    """Transform one image after the other."""
    return [transform(image) for image in images]


# The first is what the others are compared with.
COLUMNS = {
    "PIL": pil,
    "ours": ours,
    "ours, GPU": ours_on_gpu,
    "torchvision v2": torchvision_v2,
    "kornia": kornia,
}
BATCHED = "ours", "ours, GPU", "kornia"


def memory_cases(columns, most_images):
    """Return {(row, column): (function, views)}."""
    cases = {}
    for recipe, stored, size, n in CASES:
        n = min(n, most_images)
        images = torch.randint(256, (n, 3, stored, stored), dtype=torch.uint8)
        for name in columns:
            takes_batches = name in BATCHED
            part = images if takes_batches else images[:MOST_SINGLE_IMAGES]
            case = f"{recipe}, {stored} -> {size}", name
            cases[case] = COLUMNS[name](recipe, part, size), len(part)
    return cases


# -------------------------------------------------------------------------------------- JPEG files


class TwoViews:
    """Two views of a PIL image, each a normalised tensor."""

    def __init__(self, size):
        to_float = [T.ToTensor(), T.Normalize(*IMAGENET)]
        self.transform = T.Compose([pil_transforms("moco_v2", size), *to_float])

    def __call__(self, image):
        """Return two views (3, size, size)."""
        return self.transform(image), self.transform(image)


def jpeg_cases(folder, size, batch, workers):
    """Return {(row, column): (function, views)}: a whole epoch, the workers' start included."""
    dataset = load("pretrain", 0, name="folder", root=folder)
    settings = {"augment": "moco_v2", "image_size": size, "workers": workers}
    loader = Loader(dataset, batch, 2, 0, torch.device("cpu"), **settings)
    image_folder = DataLoader(
        ImageFolder(folder, TwoViews(size)),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
    )
    row = f"JPEG -> {size}"
    return {
        (row, "ours"): (lambda: exhaust(loader.epoch(0)), 2 * batch * len(loader)),
        (row, "ImageFolder"): (partial(exhaust, image_folder), 2 * batch * len(image_folder)),
    }


def exhaust(batches):
    """Take all batches."""
    for _ in batches:
        pass


# ------------------------------------------------------------------------------ measure and print


def measure_in_turn(cases, rounds):
    """Return the views a second of {case: (function, views)}. The first round warms up."""
    seconds = {case: [] for case in cases}
    for _ in progress(range(rounds + 1), "rounds"):
        for case, (augment, _) in cases.items():
            began = time.perf_counter()
            augment()
            seconds[case].append(time.perf_counter() - began)
    return {case: cases[case][1] / statistics.median(times[1:]) for case, times in seconds.items()}


def print_table(speed, columns):
    """Print {(row, column): views a second}, with ratios to the first column."""
    first, *others = columns
    print(f"{'':24}{first:>10}" + "".join(f"{name:>20}" for name in others))
    for row in dict.fromkeys(row for row, _ in speed):
        base = speed[row, first]
        cells = [f"{speed[row, name]:12.0f}{speed[row, name] / base:7.2f}x" for name in others]
        print(f"{row:24}{base:10.0f}" + "".join(cells))
    print()


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default="datasets/imagenette96/train")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=512, help="in memory, at most")
    args = parser.parse_args()
    torch.manual_seed(0)

    columns = list(COLUMNS)
    if importlib.util.find_spec("kornia") is None:
        columns.remove("kornia")
    if not torch.cuda.is_available():
        columns.remove("ours, GPU")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; views a second, "
        f"medians of {args.rounds} rounds\n"
    )
    print_table(measure_in_turn(memory_cases(columns, args.images), args.rounds), columns)

    if not os.path.isdir(args.folder):
        print(f"no JPEG files: there is no {args.folder}")
        return
    cases = {}
    for size in JPEG_SIZES:
        cases |= jpeg_cases(args.folder, size, JPEG_BATCH, args.workers)
    print(f"{args.folder}, two views of each image, {args.workers} workers\n")
    speed = measure_in_turn(cases, max(1, args.rounds // 2))
    print_table(speed, ["ImageFolder", "ours"])


if __name__ == "__main__":
    main()
