"""Views a second: batched augmentation beside PIL + torchvision.transforms, torchvision.transforms.v2 and kornia; all cases take turns, medians.

    python benchmarks/input.py                             images in memory, one process; with datasets/imagenette96 there, JPEG files as well
    python benchmarks/input.py --folder DIR --workers 8    JPEG files of another folder of class folders

PIL: an image at a time, moco's own way (pip install kornia for its row). JPEG: two views of each image, our Loader beside ImageFolder + PIL
transforms in a DataLoader, the same number of worker processes. Machines drift; only the ratios inside one table mean anything.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time

import torch
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.augment import RECIPES, Augment, pil_transforms
from data.datasets import IMAGENET, load
from data.loader import Loader

CASES = [
    ("cifar", 32, 32, 512),
    ("moco_v2", 32, 32, 512),
    ("moco_v2", 96, 96, 256),
    ("moco_v2", 256, 224, 64),
]  # recipe, from, to, batch
HALF = (0.5,) * 3


def ours(recipe, images, size):
    augment, g = Augment(recipe, size, HALF, HALF), torch.Generator().manual_seed(0)
    return lambda: augment(images, g)


def pil(recipe, images, size):
    transform, images = pil_transforms(recipe, size), [TF.to_pil_image(image) for image in images]
    return lambda: [TF.normalize(TF.to_tensor(transform(image)), HALF, HALF) for image in images]


def torchvision_v2(recipe, images, size):
    make = {
        "crop": lambda scale: v2.RandomResizedCrop(size, scale, antialias=True),
        "flip": lambda p: v2.RandomHorizontalFlip(p),
        "grey": lambda p: v2.RandomGrayscale(p),
        "jitter": lambda p, **strength: v2.RandomApply([v2.ColorJitter(**strength)], p),
        "blur": lambda sigma, p: v2.RandomApply([v2.GaussianBlur(13, sigma)], p),
    }
    transform = v2.Compose(
        [
            *(make[name](**p) for name, p in RECIPES[recipe]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(HALF, HALF),
        ]
    )
    return lambda: [transform(image) for image in images]


def kornia(recipe, images, size):
    import kornia.augmentation as K

    make = {
        "crop": lambda scale: K.RandomResizedCrop((size, size), scale),
        "flip": lambda p: K.RandomHorizontalFlip(p=p),
        "grey": lambda p: K.RandomGrayscale(p=p),
        "jitter": lambda p, **strength: K.ColorJitter(**strength, p=p),
        "blur": lambda sigma, p: K.RandomGaussianBlur((13, 13), sigma, p=p),
    }
    transform = K.AugmentationSequential(
        *(make[name](**p) for name, p in RECIPES[recipe]),
        K.Normalize(torch.tensor(HALF), torch.tensor(HALF)),
    )
    return lambda: transform(images.float() / 255)


class TwoViews:
    def __init__(self, size):
        self.transform = T.Compose(
            [pil_transforms("moco_v2", size), T.ToTensor(), T.Normalize(*IMAGENET)]
        )

    def __call__(self, image):
        return self.transform(image), self.transform(image)


def jpeg(folder, size, batch, workers):
    """-> two functions, each a whole epoch with the start of its workers, ours and ImageFolder's, and the views in it."""
    loader = Loader(
        load("pretrain", 0, name="folder", root=folder),
        batch,
        2,
        0,
        torch.device("cpu"),
        augment="moco_v2",
        image_size=size,
        workers=workers,
    )
    theirs = torch.utils.data.DataLoader(
        ImageFolder(folder, TwoViews(size)),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
    )
    through = lambda batches: sum(1 for _ in batches)
    return {
        "ours": (lambda: through(loader.epoch(0)), 2 * batch * len(loader)),
        "ImageFolder": (lambda: through(theirs), 2 * batch * len(theirs)),
    }


def measure(cases, rounds):
    """{(row, column): (function, views)} -> {row, column: views a second}."""
    seconds = {case: [] for case in cases}
    for _ in tqdm(range(rounds + 1), "rounds", leave=False):  # the first warms up
        for case, (work, _) in cases.items():
            began = time.perf_counter()
            work()
            seconds[case].append(time.perf_counter() - began)
    return {case: cases[case][1] / statistics.median(times[1:]) for case, times in seconds.items()}


def table(speed, columns):
    print(f"{'':24}" + f"{columns[0]:>10}" + "".join(f"{name:>20}" for name in columns[1:]))
    for row in dict.fromkeys(row for row, _ in speed):
        base = speed[row, columns[0]]
        print(
            f"{row:24}{base:10.0f}"
            + "".join(
                f"{speed[row, name]:12.0f}{speed[row, name] / base:7.2f}x" for name in columns[1:]
            )
        )
    print()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default="datasets/imagenette96/train")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    columns = {"PIL": pil, "ours": ours, "torchvision v2": torchvision_v2, "kornia": kornia}
    if importlib.util.find_spec("kornia") is None:
        columns.pop("kornia")
    cases = {}
    for recipe, source, size, n in CASES:
        images = torch.randint(256, (n, 3, source, source), dtype=torch.uint8)
        for name, make in columns.items():
            some = images if name in ("ours", "kornia") else images[: min(n, 128)]
            cases[f"{recipe}, {source} -> {size}", name] = make(recipe, some, size), len(some)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; views a second, medians of {args.rounds} rounds\n"
    )
    table(measure(cases, args.rounds), list(columns))
    if not os.path.isdir(args.folder):
        return print(f"no JPEG files: there is no {args.folder}")
    cases = {}
    for size in (96, 224):
        cases |= {
            (f"JPEG -> {size}", name): case
            for name, case in jpeg(args.folder, size, 64, args.workers).items()
        }
    print(f"{args.folder}, two views of each image, {args.workers} workers\n")
    table(measure(cases, max(1, args.rounds // 2)), ["ImageFolder", "ours"])


if __name__ == "__main__":
    main()
