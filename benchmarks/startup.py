"""The start of a run at ImageNet's size: listing its images, and the list's memory in workers.

    python benchmarks/startup.py                        1,281,167 names in 1,000 classes, in /tmp
    python benchmarks/startup.py --folder /mnt/disk     on another disk; removed afterwards
    python benchmarks/startup.py --images 100000        fewer

The names are hard links of a few small JPEGs.

To list them, torchvision's ImageFolder and ours take turns; medians are printed. System calls are
counted by strace, where it is installed. Those of check_files are two looks at each file, and its
threads' waiting for each other.

To measure memory, four forked workers read each path and label once, in shuffled batches, as in an
epoch; no image is decoded. Private is what a worker does not share with its parent, by the Linux
kernel's own account.
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
from functools import partial

import torch
from PIL import Image
from torchvision.datasets import ImageFolder

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.datasets import load
from engine.progress import progress

# Names a file; ext4 allows 65,000.
LINKS = 50_000
# What more names cost is measured with so many, as strace takes long.
TRACED_IMAGES = 20_000
TRACED_CLASSES = 10
WORKERS = 4
BATCH = 64
MEMORY = "/proc/self/smaps_rollup"

# {name: a function of the folder, `root`}
LISTINGS = {
    "ImageFolder": ImageFolder,
    "ours": partial(load, "pretrain", 0, name="folder"),
    "ours, check_files": partial(load, "pretrain", 0, name="folder", check_files=True),
}


def make_images(folder, images, classes):
    """Make so many names, called as ImageNet's are, spread over the folders of the classes."""
    for label in range(classes):
        os.makedirs(os.path.join(folder, f"n{label:08d}"))
    for i in progress(range(images), "making names"):
        label = f"n{i * classes // images:08d}"
        path = os.path.join(folder, label, f"{label}_{i}.JPEG")
        if i % LINKS == 0:
            file = path
            Image.new("RGB", (64, 48), (i // LINKS, 100, 200)).save(file)
        else:
            os.link(file, path)


# ------------------------------------------------------------------------------------------ listing


def time_listings(folder, rounds):
    """Return {name: (seconds by the clock, seconds of CPU)}, medians; all take turns."""
    measured = {name: [] for name in LISTINGS}
    for _ in progress(range(rounds + 1), "rounds"):
        for name, listing in LISTINGS.items():
            clock, cpu = time.perf_counter(), time.process_time()
            listing(root=folder)
            measured[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    medians = {}
    for name, times in measured.items():
        # The first round fills the system's caches.
        medians[name] = [statistics.median(column) for column in zip(*times[1:])]
    return medians


def count_calls(name, folder):
    """Count the system calls of a process that lists `folder` and does nothing else, by strace."""
    listing = [sys.executable, os.path.abspath(__file__), "--only", name, "--folder", folder]
    with tempfile.NamedTemporaryFile("r") as counts:
        subprocess.run(
            ["strace", "-f", "-c", "-o", counts.name, *listing],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        total = next(line.split() for line in counts if line.rstrip().endswith(" total"))
    # The columns are: % time, seconds, usecs/call, calls.
    return int(total[3])


def count_calls_per_file(folder, images, classes):
    """Return {name: system calls a file}, of what `images` names more cost."""
    small, large = os.path.join(folder, "small"), os.path.join(folder, "large")
    make_images(small, classes, classes)
    make_images(large, classes + images, classes)
    calls = {}
    for name in LISTINGS:
        calls[name] = (count_calls(name, large) - count_calls(name, small)) / images
    return calls


def print_listings(seconds, calls):
    """Print the seconds of each listing, and its system calls unless they are None."""
    print(f"{'listing':20}{'seconds':>10}{'of CPU':>10}{'to ImageFolder':>16}{'calls a file':>14}")
    for name, (clock, cpu) in seconds.items():
        share = cpu / seconds["ImageFolder"][1]
        calls_a_file = f"{calls[name]:.3f}" if calls else "no strace"
        print(f"{name:20}{clock:10.2f}{cpu:10.2f}{share:16.2f}{calls_a_file:>14}")


# ------------------------------------------------------------------------------------------- memory


def memory():
    """Return the resident and the private memory of this process, in MB."""
    sizes = {}
    with open(MEMORY) as f:
        for line in f:
            if "kB" in line:
                name, size, *_ = line.split()
                sizes[name.rstrip(":")] = int(size) / 1e3
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def read_share(files, labels, order, worker, meet, results):
    """Read a worker's part of an epoch. All workers measure while all are there."""
    meet.wait()
    before = memory()
    for first in range(worker * BATCH, len(files), WORKERS * BATCH):
        for i in order[first : first + BATCH].tolist():
            _ = files[i], labels[i]
    meet.wait()
    results.put((before, memory()))
    meet.wait()


def measure_workers(files, labels):
    """Return of each worker resident and private MB before the epoch, and both after it."""
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
    """Print the memory of workers that have our list of paths, or a list of strings."""
    dataset = load("pretrain", 0, name="folder", root=folder)
    paths = dataset.files
    print(f"our paths take {(paths.names.nbytes + paths.ends.nbytes) / 1e6:.0f} MB\n")
    print(f"{'MB of each worker':24}{'resident':>12}{'private':>12}{'resident':>12}{'private':>12}")
    print(f"{'':24}{'before':>12}{'before':>12}{'after':>12}{'after':>12}")
    for name, files in (("our paths", paths), ("a list of str", list(paths))):
        for row in measure_workers(files, dataset.labels):
            print(f"{name:24}" + "".join(f"{value:12.1f}" for value in row))


def main(arguments=None):
    """Make the names, print both tables and remove the names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    # For strace: list the folder, and do nothing else.
    parser.add_argument("--only", choices=LISTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.only:
        LISTINGS[args.only](root=args.folder)
        return
    scratch = tempfile.mkdtemp(prefix="startup", dir=args.folder)
    try:
        folder = os.path.join(scratch, "images")
        make_images(folder, args.images, args.classes)
        print(
            f"{args.images} images in {args.classes} classes; Python {sys.version.split()[0]}, "
            f"medians of {args.rounds} rounds\n"
        )
        calls = None
        if shutil.which("strace"):
            n_more = min(args.images, TRACED_IMAGES)
            calls = count_calls_per_file(scratch, n_more, TRACED_CLASSES)
        print_listings(time_listings(folder, args.rounds), calls)
        if os.path.exists(MEMORY):
            print_memory(folder)
        else:
            print(f"no memory of workers: there is no {MEMORY}")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
