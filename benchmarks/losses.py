"""Each loss, forward and backward: time and peak memory beside its literal form and moco's code.

    python benchmarks/losses.py      256 queries, 128 dimensions, 65,536 negatives
    python benchmarks/losses.py --queries 64 --negatives 16384 --rounds 5

The literal form computes the whole matrix of similarities, what the method makes of it, and one
logsumexp; the ring is found by sorting. The official moco code computes InfoNCE by clone, cat and
cross-entropy. All cases take turns; medians are printed.

A second table is of IR's memory bank, from contrast to update, at the size of CIFAR-10 and of
ImageNet. ImageNet's stands there with all its rows, and with 50,000 candidates drawn anew.
"""

import argparse
import functools
import os
import statistics
import sys
import time

import torch
from torch.nn import functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from engine.progress import progress
from losses import Contrast, info_nce, positive_similarity, similarity
from losses.ifnd import IFND
from losses.jcl import JCL
from losses.mochi import MoCHi
from losses.nce import NCE
from losses.ring import Ring
from models.memory_bank import MemoryBank

T = 0.2
EPOCH = 5.0
N_DATA = 50000
MOCO = "moco's own code"

# The memory bank: queries of a step, dimensions, and negatives drawn.
BANK_QUERIES = 32
BANK_DIM = 128
BANK_DRAWS = 4095
CIFAR10 = 50000
IMAGENET = 1281167


def fast(loss_fn, contrast):
    """Compute the loss as it is trained on."""
    return loss_fn(contrast, EPOCH).loss


def literal(loss_fn, contrast):
    """Compute the same as it is written."""
    # With a mask, Ring sorts.
    if isinstance(loss_fn, Ring):
        shape = len(contrast.query), len(contrast.negative)
        mask = torch.ones(shape, dtype=torch.bool, device=contrast.query.device)
        contrast = contrast._replace(mask=mask)
    s = similarity(contrast)
    if hasattr(loss_fn, "select"):
        s = loss_fn.select(contrast, s, EPOCH).similarity
    if hasattr(loss_fn, "synthesize"):
        s = torch.cat([s, loss_fn.synthesize(contrast, s, EPOCH).similarity], -1)
    if hasattr(loss_fn, "objective"):
        return loss_fn.objective(contrast, s, EPOCH)
    return info_nce(positive_similarity(contrast), torch.logsumexp(s / T, -1), T)


def official(q, k, queue):
    """Compute InfoNCE by moco/builder.py's lines, in their order.

    Args:
        q: (N, D) queries.
        k: (N, D) their keys.
        queue: (D, K).
    """
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat([positive, negative], dim=1) / T
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


class Peak:
    """The most memory in use inside the block beyond what was before it, in MiB.

    On a CPU it is the process's memory, as Linux counts it; on a GPU the allocator's.
    """

    def __init__(self, device):
        self.is_cuda = device.type == "cuda"

    def __enter__(self):
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            # The peak begins anew.
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")
            self.before = resident("VmRSS")
        return self

    def __exit__(self, *_):
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.is_cuda else resident("VmHWM")
        self.mib = peak - self.before


def resident(name):
    """Return a figure of this process's memory, in MiB."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(name))


def measure(step, device):
    """Return the seconds and the peak MiB of step()."""
    began = time.perf_counter()
    with Peak(device) as peak:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - began, peak.mib


def unit(*shape, device):
    """Return random vectors of length 1."""
    return F.normalize(torch.randn(*shape, device=device), dim=-1)


# ------------------------------------------------------------------------------------- the losses


def make_cases(device):
    """Return {name: loss}; moco's own code is no loss of ours, and has None."""
    ifnd = IFND(30, N_DATA, temperature=T, acceptance=[1.0, 1.0]).to(device)
    levels = [torch.randint(k, (N_DATA,), device=device) for k in ifnd.clusters]
    ifnd.pseudo = torch.stack(levels)
    return {
        MOCO: None,
        "nce": NCE(temperature=T),
        "ring, 1 to 10 %": Ring(1, temperature=T, anneal_epochs=0),
        "mochi (1024, 1024, 128)": MoCHi(temperature=T, warmup_epochs=0),
        "jcl, M = 5": JCL(10, temperature=T),
        "ifnd, 3 levels": ifnd,
    }


def loss_step(loss_fn, form, contrast, queue):
    """Compute a loss forward and backward.

    Args:
        loss_fn: None stands for moco's own code.
        form: `fast` or `literal`.
        contrast: with several keys a query, of which JCL takes all and the others one.
        queue: (D, K), the contrast's negatives.
    """
    query = contrast.query.clone().requires_grad_()
    if loss_fn is None:
        official(query, contrast.positive[:, 0], queue).backward()
        return
    keys = contrast.positive if isinstance(loss_fn, JCL) else contrast.positive[:, :1]
    form(loss_fn, contrast._replace(query=query, positive=keys)).backward()


def compare_losses(args, device):
    """Print the first table."""
    N, K, D = args.queries, args.negatives, args.dim
    index = torch.randint(N_DATA, (N,), device=device)
    negative_index = torch.randint(N_DATA, (K,), device=device)
    q = unit(N, D, device=device)
    k = unit(N, 5, D, device=device)
    n = unit(K, D, device=device)
    contrast = Contrast(q, k, n, index, negative_index)
    queue = n.T.contiguous()
    cases = make_cases(device)
    steps = {}
    for name, loss_fn in cases.items():
        for form in (fast,) if loss_fn is None else (fast, literal):
            step = functools.partial(loss_step, loss_fn, form, contrast, queue)
            steps[name, form] = step
    seconds, mib = measure_in_turn(steps, args.rounds, device)
    moco = seconds[MOCO, fast]
    print(
        f"{N} x {D} against {K}, forward + backward, {device}, {torch.get_num_threads()} threads; "
        f"time as a ratio to moco's {1000 * moco:.0f} ms, peak MiB\n\n"
        f"{'':26}{'ours':>8}{'MiB':>8}{'literal':>10}{'MiB':>8}"
    )
    for name in cases:
        cells = ""
        for form, width in ((fast, 8), (literal, 10)):
            if (name, form) in steps:
                cells += f"{seconds[name, form] / moco:{width}.2f}{mib[name, form]:8.0f}"
        print(f"{name:26}{cells}")


def measure_in_turn(steps, rounds, device):
    """Return {case: median seconds} and {case: peak MiB}. The first round warms up."""
    measured = {case: [] for case in steps}
    for _ in progress(range(rounds + 1), "rounds"):
        for case, step in steps.items():
            measured[case].append(measure(step, device))
    seconds, peaks = {}, {}
    for case, runs in measured.items():
        seconds[case] = statistics.median(s for s, _ in runs[1:])
        peaks[case] = max(mib for _, mib in runs[1:])
    return seconds, peaks


# --------------------------------------------------------------------------------- the memory bank


def bank_step(bank, loss_fn, index, device):
    """Run one step of some queries on a memory bank."""
    q = unit(len(index), 1, BANK_DIM, device=device).requires_grad_()
    loss_fn(bank.contrast(q, q.detach(), index), 1.0).loss.backward()
    bank.update(q.detach()[:, 0], index)


def compare_banks(rounds, most_rows, device):
    """Print the second table, of banks of at most so many rows."""
    losses = {
        f"nce, {BANK_DRAWS} draws": NCE(n_negatives=BANK_DRAWS),
        f"ring, {BANK_DRAWS} draws": Ring(1, anneal_epochs=0, n_negatives=BANK_DRAWS),
    }
    small, large = min(CIFAR10, most_rows), min(IMAGENET, most_rows)
    index = torch.arange(BANK_QUERIES, device=device) * (small // BANK_QUERIES)
    steps = {}
    for rows, candidates in ((small, None), (large, None), (large, small)):
        bank = MemoryBank(rows, BANK_DIM, 0.5, candidates=candidates).to(device)
        for name, loss_fn in losses.items():
            step = functools.partial(bank_step, bank, loss_fn, index, device)
            steps[name, rows, candidates] = step
    seconds, mib = measure_in_turn(steps, rounds, device)
    print(
        f"\nIR's memory bank, {BANK_QUERIES} queries x {BANK_DIM}\n\n"
        f"{'':18}{'rows':>10}{'candidates':>12}{'ms':>8}{'ratio':>8}{'MiB':>8}"
    )
    for name, rows, candidates in steps:
        case = name, rows, candidates
        ratio = seconds[case] / seconds[name, small, None]
        print(
            f"{name:18}{rows:10}{candidates or 'all':>12}{1000 * seconds[case]:8.1f}{ratio:8.2f}"
            f"{mib[case]:8.0f}"
        )


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--negatives", type=int, default=65536)
    parser.add_argument("--rows", type=int, default=IMAGENET, help="of a bank, at most")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    compare_losses(args, device)
    compare_banks(args.rounds, args.rows, device)


if __name__ == "__main__":
    main()
