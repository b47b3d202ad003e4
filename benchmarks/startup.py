"""The start of a run at ImageNet's size: the time to list a folder of images, and what the list of
paths costs in each worker.

    python benchmarks/startup.py                           1,281,167 names in 1,000 classes, in /tmp
    python benchmarks/startup.py --folder /mnt/disk        on another disk; removed afterwards
    python benchmarks/startup.py --images 100000           fewer

The names are hard links of a few small JPEGs. Listing: torchvision's ImageFolder and ours take
turns, medians; system calls are counted by strace, where it is installed (those of check_files are
two looks at each file, and its threads' waiting for each other). Memory: four forked workers read
each path and label once, in shuffled batches, as in an epoch; no image is decoded. Private is what
a worker does not share with its parent, of the Linux kernel's own account.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from PIL import Image
from torchvision.datasets import ImageFolder

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.datasets import load

LINKS = 50_000  # names a file; ext4 allows 65,000
WORKERS = 4
BATCH = 64
MEMORY = "/proc/self/smaps_rollup"

LISTINGS = {
    "ImageFolder": lambda folder: ImageFolder(folder),
    "ours": lambda folder: load("pretrain", 0, name="folder", root=folder),
    "ours, check_files": lambda folder: load(
        "pretrain", 0, name="folder", root=folder, check_files=True
    ),
}


def make_images(folder, images, classes):
    """`images` names, spread over the folders of `classes` classes, as ImageNet's are called."""
    for label in range(classes):
        os.makedirs(os.path.join(folder, f"n{label:08d}"))
    for i in range(images):
        label = f"n{i * classes // images:08d}"
        path = os.path.join(folder, label, f"{label}_{i}.JPEG")
        if i % LINKS == 0:
            file = path
            Image.new("RGB", (64, 48), (i // LINKS, 100, 200)).save(file)
        else:
            os.link(file, path)


# ------------------------------------------------------------------------------------------ listing


def time_listings(folder, rounds):
    """{name: (seconds by the clock, seconds of CPU)}, medians; all take turns."""
    measured = {name: [] for name in LISTINGS}
    for _ in range(rounds + 1):  # the first fills the system's caches
        for name, listing in LISTINGS.items():
            clock, cpu = time.perf_counter(), time.process_time()
            listing(folder)
            measured[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    return {
        name: [statistics.median(column) for column in zip(*times[1:])]
        for name, times in measured.items()
    }


def count_calls(name, folder):
    """The system calls of a process that lists `folder` and does nothing else, by strace."""
    with tempfile.NamedTemporaryFile("r") as counts:
        listing = [sys.executable, os.path.abspath(__file__), "--only", name, "--folder", folder]
        subprocess.run(
            ["strace", "-f", "-c", "-o", counts.name, *listing],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        total = next(line.split() for line in counts if line.rstrip().endswith(" total"))
    return int(total[3])  # % time, seconds, usecs/call, calls


def count_calls_per_file(place, images, classes):
    """{name: calls}: what `images` names more cost, by name."""
    small, large = os.path.join(place, "small"), os.path.join(place, "large")
    make_images(small, classes, classes)
    make_images(large, classes + images, classes)
    return {
        name: (count_calls(name, large) - count_calls(name, small)) / images for name in LISTINGS
    }


def print_listings(seconds, calls):
    print(f"{'listing':20}{'seconds':>10}{'of CPU':>10}{'to ImageFolder':>16}{'calls a file':>14}")
    for name, (clock, cpu) in seconds.items():
        share = cpu / seconds["ImageFolder"][1]
        called = f"{calls[name]:14.3f}" if calls else f"{'no strace':>14}"
        print(f"{name:20}{clock:10.2f}{cpu:10.2f}{share:16.2f}{called}")


# ------------------------------------------------------------------------------------------- memory


def memory():
    """(resident, private) of this process, in MB."""
    with open(MEMORY) as f:
        sizes = {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in f if "kB" in line}
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def read_share(files, labels, order, worker, meet, results):
    """A worker's part of an epoch. All of them measure while all are there."""
    meet.wait()
    before = memory()
    for first in range(worker * BATCH, len(files), WORKERS * BATCH):
        for i in order[first : first + BATCH].tolist():
            files[i], labels[i]
    meet.wait()
    results.put((before, memory()))
    meet.wait()


def measure_workers(files, labels):
    """A row a worker: resident and private before, resident and private after the epoch, in MB."""
    fork = multiprocessing.get_context("fork")
    meet, results = fork.Barrier(WORKERS), fork.Queue()
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    workers = [
        fork.Process(target=read_share, args=(files, labels, order, w, meet, results))
        for w in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    rows = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return [(*before, *after) for before, after in rows]


def print_memory(folder):
    dataset = load("pretrain", 0, name="folder", root=folder)
    paths = dataset.files
    print(f"our paths take {(paths.names.nbytes + paths.ends.nbytes) / 1e6:.0f} MB\n")
    print(f"{'MB of each worker':24}{'resident':>12}{'private':>12}{'resident':>12}{'private':>12}")
    print(f"{'':24}{'before':>12}{'before':>12}{'after':>12}{'after':>12}")
    for name, files in (("our paths", paths), ("a list of str", list(paths))):
        for row in measure_workers(files, dataset.labels):
            print(f"{name:24}" + "".join(f"{value:12.1f}" for value in row))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--only", choices=LISTINGS, help=argparse.SUPPRESS)  # for strace
    args = parser.parse_args(arguments)
    if args.only:
        LISTINGS[args.only](args.folder)
        return
    place = tempfile.mkdtemp(prefix="startup", dir=args.folder)
    try:
        folder = os.path.join(place, "images")
        make_images(folder, args.images, args.classes)
        print(
            f"{args.images} images in {args.classes} classes; Python {sys.version.split()[0]}, "
            f"medians of {args.rounds} rounds\n"
        )
        strace = shutil.which("strace")
        calls = count_calls_per_file(place, min(args.images, 20_000), 10) if strace else None
        print_listings(time_listings(folder, args.rounds), calls)
        if os.path.exists(MEMORY):
            print_memory(folder)
        else:
            print(f"no memory of workers: there is no {MEMORY}")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
