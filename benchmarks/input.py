"""Views a second: batched augmentation against PIL + torchvision.transforms, one process, images in memory, all cases taking turns.

    python benchmarks/input.py [--rounds 7]

Machines drift; only the ratios inside one table mean anything.
"""
import argparse
import os
import statistics
import sys
import time

import torch
from torchvision.transforms import functional as TF
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.augment import Augment, pil_transforms

CASES = [("cifar", 32, 32, 512), ("moco_v2", 32, 32, 512), ("moco_v2", 96, 96, 256), ("moco_v2", 256, 224, 64)]      # recipe, from, to, batch


def batched(recipe, images, size):
    augment, g = Augment(recipe, size, (0.5,) * 3, (0.25,) * 3), torch.Generator().manual_seed(0)
    return lambda: augment(images, g)


def pil(recipe, images, size):
    transform, images = pil_transforms(recipe, size), [TF.to_pil_image(image) for image in images]
    return lambda: [TF.normalize(TF.to_tensor(transform(image)), (0.5,) * 3, (0.25,) * 3) for image in images]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    runs = []
    for recipe, source, size, n in CASES:
        images = torch.randint(256, (n, 3, source, source), dtype=torch.uint8)
        runs.append((f"{recipe}, {source} -> {size}", n, batched(recipe, images, size), min(n, 128), pil(recipe, images[:128], size), [], []))
    for _ in tqdm(range(rounds + 1), "rounds", leave=False):            # the first warms up
        for _, _, ours, _, theirs, t_ours, t_theirs in runs:
            for work, times in ((ours, t_ours), (theirs, t_theirs)):
                began = time.perf_counter()
                work()
                times.append(time.perf_counter() - began)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; views a second, median of {rounds} rounds\n{'':24}{'PIL':>10}{'batched':>10}{'ratio':>8}")
    for name, n, _, m, _, t_ours, t_theirs in runs:
        ours, theirs = n / statistics.median(t_ours[1:]), m / statistics.median(t_theirs[1:])
        print(f"{name:24}{theirs:10.0f}{ours:10.0f}{ours / theirs:8.1f}")


if __name__ == "__main__":
    main()
