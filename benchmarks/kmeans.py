"""k-means: what its start costs beside a Lloyd iteration, what it is worth, what ImageNet takes.

    python benchmarks/kmeans.py              some minutes of one CPU core, or less on a GPU
    python benchmarks/kmeans.py --small      the same tables of small data, in seconds

The start (losses/kmeans/start.py) stands beside random rows, beside greedy k-means++ on all rows,
which it replaces and which is kept here, and beside faiss where that is installed. On a CPU the
seconds are those that the process spent computing, so that a busy machine hardly changes them. All
cases take turns; medians are printed. Growth in the number of rows and clusters is fitted to these
medians, and carries them to 1,281,167 rows.
"""

import argparse
import functools
import itertools
import math
import os
import statistics
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from engine.progress import progress
from losses.kmeans import lloyd, start
from losses.kmeans.rows import Points

try:
    import faiss
except ImportError:
    faiss = None

DIM = 128
ITERATIONS = 20
RESTARTS = 5
IMAGENET = 1281167
LEVELS = (1000, 3000, 10000)
GREEDY = "greedy k-means++, all rows"

# n, k of the first table, and n, k of the second.
SIZES = [
    (50000, 100),
    (100000, 100),
    (50000, 1000),
    (64000, 1000),
    (100000, 1000),
    (50000, 3000),
    (100000, 3000),
]
QUALITY = (64000, 1000)
SMALL_SIZES = [(2000, 20), (2000, 80), (4000, 20), (4000, 80)]
SMALL_QUALITY = (3000, 60)

# NVIDIA's figures for a V100, and the part of them that is assumed to be reached.
V100_FLOPS = 15.7e12
V100_BYTES = 900e9
ASSUMED = 0.5
GPUS = 8


def grouped(n, groups, seed=0):
    """Return unit rows (n, 128) in `groups` groups: clustered data."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(groups, DIM, generator=generator), dim=1)
    group = torch.randint(groups, (n,), generator=generator)
    noise = torch.randn(n, DIM, generator=generator)
    return F.normalize(centres[group] + 0.06 * noise, dim=1)


def smooth(n, seed=0):
    """Return unit rows (n, 128) without groups; the variance of coordinate i falls as 1 / i."""
    generator = torch.Generator().manual_seed(seed)
    deviation = torch.arange(1, DIM + 1) ** -0.5
    return F.normalize(torch.randn(n, DIM, generator=generator) * deviation, dim=1)


def greedy_rows(points, k, generator):
    """Return rows (k,) by greedy k-means++ on all rows, as scikit-learn's: k passes in turn.

    Each new centroid is, of a few rows drawn by squared distance, the one that helps most.
    """
    x = points.take(slice(None))
    square = x.square().sum(1)
    tries = 2 + int(math.log(k))
    chosen = [torch.randint(len(x), (1,), generator=generator)[0].to(x.device)]
    distance = (square - 2 * (x @ x[chosen[0]]) + square[chosen[0]]).clamp_(min=0)
    for _ in range(k - 1):
        mass = distance.cumsum(0, dtype=torch.float64)
        chance = torch.rand(tries, generator=generator, dtype=torch.float64).to(x.device)
        drawn = torch.searchsorted(mass, chance * mass[-1], right=True).clamp(max=len(x) - 1)
        to_drawn = torch.addmm(square[drawn], x, x[drawn].T, alpha=-2) + square[:, None]
        closer = torch.minimum(to_drawn, distance[:, None]).clamp_(min=0)  # (n, tries)
        best = closer.sum(0).argmin()
        chosen.append(drawn[best])
        distance = closer[:, best]
    return torch.stack(chosen)


def clock(device):
    """Return seconds: of a GPU by the wall, of a CPU those spent computing."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(work, device):
    """Return what work() returns, and its seconds."""
    began = clock(device)
    result = work()
    return result, clock(device) - began


def time_sizes(sizes, rounds, device):
    """Return {(n, k): (seconds of a start, seconds of a Lloyd iteration)}, medians of rounds."""
    seconds = {size: ([], []) for size in sizes}
    data = {n: grouped(n, 1000).to(device) for n, _ in sizes}
    for turn in progress(range(rounds + 1), "rounds"):
        for n, k in sizes:
            points = Points(data[n], k)
            generator = torch.Generator().manual_seed(turn)
            choose = functools.partial(start.plus_plus_rows, points, k, generator)
            rows, of_start = measure(choose, device)
            iterate = functools.partial(iterate_once, points, points.take(rows))
            _, of_iteration = measure(iterate, device)
            # The first round warms up.
            if turn:
                seconds[n, k][0].append(of_start)
                seconds[n, k][1].append(of_iteration)
    return {size: tuple(map(statistics.median, both)) for size, both in seconds.items()}


def iterate_once(points, centroids):
    """Return the centroids after one of Lloyd's iterations."""
    _, distance, sums, counts, _ = lloyd.assign(points, centroids)
    return lloyd.centre(points, distance, sums, counts)


def fit(sizes, seconds):
    """Fit log t = log a + p log rows + q log k by least squares, and return a, p, q."""
    design = np.array([[1, math.log(rows), math.log(k)] for rows, k in sizes])
    log_a, p, q = np.linalg.lstsq(design, np.log(seconds), rcond=None)[0]
    return math.exp(log_a), p, q


def print_sizes(table):
    """Print the first table."""
    print(f"{'n':>10}{'k':>8}{'m':>10}{'start, s':>12}{'Lloyd, s':>12}{'start / Lloyd':>16}")
    for (n, k), (of_start, of_iteration) in table.items():
        m = start.sample_size(n, k)
        ratio = of_start / of_iteration
        print(f"{n:10,}{k:8,}{m:10,}{of_start:12.4f}{of_iteration:12.4f}{ratio:16.2f}")


def print_growth(table, is_small):
    """Print the exponents and, unless they come of small sizes, what they say of ImageNet."""
    starts, iterations = zip(*table.values())
    a, p, q = fit([(start.sample_size(n, k), k) for n, k in table], starts)
    b, r, s = fit(list(table), iterations)
    print(
        f"\na start grows as m^{p:.2f} k^{q:.2f}, of a sample of m = max({start.SAMPLE_ROWS} k, "
        f"n / {start.SAMPLE_PART}, {start.SAMPLE_LEAST}) rows\n"
        f"a Lloyd iteration grows as n^{r:.2f} k^{s:.2f}"
    )
    if is_small:
        print("sizes as small as these are not carried to ImageNet's")
        return
    carried = {}
    for k in LEVELS:
        m = start.sample_size(IMAGENET, k)
        carried[k] = a * m**p * k**q, b * IMAGENET**r * k**s
        of_start, of_iteration = carried[k]
        print(
            f"carried to n = {IMAGENET:,}, k = {k:,} (m = {m:,}): start {of_start:.1f} s, Lloyd "
            f"{of_iteration:.1f} s, ratio {of_start / of_iteration:.2f}"
        )
    total = 0
    for of_start, of_iteration in carried.values():
        total += RESTARTS * (of_start + (ITERATIONS + 1) * of_iteration)
    print(
        f"all {len(LEVELS)} levels, {RESTARTS} restarts of {ITERATIONS} iterations, by this one "
        f"process: {total / 3600:.1f} h"
    )


def run_ours(x, k, seed, rows_of):
    """Run our Lloyd iterations once.

    Args:
        x: (n, D) rows.
        k: the number of clusters.
        seed: of the start.
        rows_of: the start, one of losses/kmeans/start.py or `greedy_rows`.

    Returns:
        centroids (k, D), and the cluster of each row (n,).
    """
    points = Points(x, k)
    rows = rows_of(points, k, torch.Generator().manual_seed(seed))
    _, centroids, labels = lloyd.lloyd(points, points.take(rows), ITERATIONS)
    return centroids + points.mean, labels


def run_faiss(x, k, seed):
    """Do the same by faiss, on all rows."""
    rows = x.cpu().numpy()
    settings = {"niter": ITERATIONS, "nredo": 1, "seed": seed + 1}
    model = faiss.Kmeans(DIM, k, max_points_per_centroid=len(rows), **settings)
    model.train(rows)
    _, labels = model.index.search(rows, 1)
    centroids = torch.from_numpy(model.centroids)
    return centroids.to(x.device), torch.from_numpy(labels[:, 0]).to(x.device)


def compare_starts(n, k, rounds, device):
    """Print objective and seconds of a run, of each start, on data with groups and without."""
    methods = {
        GREEDY: functools.partial(run_ours, rows_of=greedy_rows),
        "k-means++ on a sample": functools.partial(run_ours, rows_of=start.plus_plus_rows),
        "random rows": functools.partial(run_ours, rows_of=start.random_rows),
    }
    if faiss is None:
        print("\nfaiss is not installed, so its row is left out: pip install faiss-cpu")
    else:
        methods["faiss, random rows"] = run_faiss
    sets = {f"{groups:,} groups": grouped(n, groups) for groups in (k // 5, k, 2 * k)}
    sets["no groups"] = smooth(n)
    print(
        f"\nn = {n:,}, k = {k:,}, {ITERATIONS} iterations, 1 restart, means of {rounds} seeds: "
        f"objective (to greedy, in %), seconds\n\n{'':28}" + "".join(f"{s:>32}" for s in sets)
    )
    runs = {}
    for seed in range(rounds):
        for (name, run), (kind, x) in itertools.product(methods.items(), sets.items()):
            x = x.to(device)
            (centroids, labels), seconds = measure(functools.partial(run, x, k, seed), device)
            objective = (x - centroids[labels]).double().square().sum().item()
            runs.setdefault((name, kind), []).append((objective, seconds))
    means = {case: np.mean(results, 0) for case, results in runs.items()}
    for name in methods:
        cells = ""
        for kind in sets:
            objective, seconds = means[name, kind]
            to_greedy = 100 * objective / means[GREEDY, kind][0] - 100
            cells += f"{objective:14.1f} ({to_greedy:+5.2f}){seconds:8.2f} s"
        print(f"{name:28}{cells}")


def print_gpus():
    """Print the arithmetic of ImageNet's clusters on 8 V100. No GPU was measured for it."""
    flops, memory = ASSUMED * V100_FLOPS, ASSUMED * V100_BYTES
    print(
        f"\n{IMAGENET:,} x {DIM} on {GPUS} V100, by arithmetic; no GPU was measured. Assumed: "
        f"{ASSUMED:.0%} of {V100_FLOPS / 1e12} TFLOPS\n"
        f"and of {V100_BYTES / 1e9:.0f} GB/s. A product of r rows with k centroids takes 2 r k D "
        "FLOPs; its scores are\n"
        "written and read once, 8 r k bytes. A start is 6 products of its sample (3 for the "
        "draws, about 3 for\n"
        f"the drops); the {RESTARTS} starts are computed at once, one a GPU. An iteration is one "
        "product of all rows,\nshared out.\n"
    )
    total = 0
    for k in LEVELS:
        m = start.sample_size(IMAGENET, k)
        of_start = 6 * (2 * m * k * DIM / flops + 8 * m * k / memory)
        product = 2 * IMAGENET * k * DIM / flops + 8 * IMAGENET * k / memory
        iteration = product / GPUS
        products = RESTARTS * (ITERATIONS + 1) + 1
        level = of_start + products * iteration
        total += level
        print(
            f"k = {k:6,}: start 6 x (2 x {m:,} x {k:,} x {DIM} FLOPs, 8 x {m:,} x {k:,} bytes) = "
            f"{of_start:.2f} s\n            iteration (2 x {IMAGENET:,} x {k:,} x {DIM} FLOPs = "
            f"{2 * IMAGENET * k * DIM / 1e12:.2f} T, {8 * IMAGENET * k / 1e9:.0f} GB) / {GPUS} = "
            f"{iteration:.4f} s\n            {of_start:.2f} + ({RESTARTS} x {ITERATIONS + 1} "
            f"iterations + 1 for the confidence) x {iteration:.4f} = {level:.1f} s"
        )
    print(f"all levels: {total:.1f} s a re-clustering, without the extraction of the embeddings")


def main():
    """Print all tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="small data, in seconds")
    parser.add_argument("--rounds", type=int, default=5, help="of the first table")
    parser.add_argument("--seeds", type=int, default=2, help="of the second table")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if faiss is not None:
        faiss.omp_set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = f"CPU, threads: {args.threads}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}; x is n x {DIM}; medians of {args.rounds} rounds\n")
    with torch.no_grad():
        table = time_sizes(SMALL_SIZES if args.small else SIZES, args.rounds, device)
        print_sizes(table)
        print_growth(table, args.small)
        compare_starts(*(SMALL_QUALITY if args.small else QUALITY), args.seeds, device)
    print_gpus()


if __name__ == "__main__":
    main()
