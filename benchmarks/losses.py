"""Each loss, forward and backward, beside its literal form and InfoNCE as the official moco code computes it (clone, cat, cross-entropy): time
and peak memory. Literal: the whole matrix of similarities, what the method makes of it, one logsumexp; the ring by sorting. Then IR's memory
bank, from contrast to update, at the size of CIFAR-10 and of ImageNet, there with all its rows and with 50,000 candidates drawn anew.

    python benchmarks/losses.py                            256 queries, 128 dimensions, 65,536 negatives; all cases take turns, medians are printed
    python benchmarks/losses.py --queries 64 --negatives 16384 --rounds 5
"""

import argparse
import os
import statistics
import sys
import time

import torch
from torch.nn import functional as F
from tqdm import trange

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from losses import Contrast, similarity
from losses.ifnd import IFND
from losses.jcl import JCL
from losses.mochi import MoCHi
from losses.nce import NCE
from losses.ring import Ring
from models.memory import MemoryBank

T, MOCO = 0.2, "moco's own code"


def fast(loss_fn, contrast):
    return loss_fn(contrast, 5.0)[0]


def literal(loss_fn, contrast):
    if isinstance(loss_fn, Ring):  # with a mask, it sorts
        contrast = contrast._replace(
            mask=torch.ones(
                len(contrast.query),
                len(contrast.negative),
                dtype=torch.bool,
                device=contrast.query.device,
            )
        )
    s = similarity(contrast)
    if hasattr(loss_fn, "negatives"):
        s = loss_fn.negatives(contrast, s, 5.0)[0]
    if hasattr(loss_fn, "objective"):
        return loss_fn.objective(contrast, s, 5.0)[0]
    return F.softplus(
        torch.logsumexp(s / T, -1) - (contrast.query * contrast.positive.mean(1)).sum(1) / T
    ).mean()


def official(q, k, queue):
    """moco/builder.py's lines, in their order. queue: (D, K)."""
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat([positive, negative], dim=1) / T
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


class Peak:
    """The most memory in use inside the block beyond what was before it, in MiB: of the process on a CPU (Linux), of the allocator on a GPU."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def now(self, name):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) / 1024 for line in f if line.startswith(name))

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")  # the peak begins anew
            self.before = self.now("VmRSS")
        return self

    def __exit__(self, *_):
        self.mib = (
            torch.cuda.max_memory_allocated() / 2**20 if self.cuda else self.now("VmHWM")
        ) - self.before


def banks(device, rounds):
    """(rows, candidates, loss) -> one step of 32 queries on IR's memory bank."""
    runs, losses = (
        {},
        {
            "nce, 4095 draws": NCE(n_negatives=4095),
            "ring, 4095 draws": Ring(1, anneal_epochs=0, n_negatives=4095),
        },
    )
    index = torch.arange(0, 50000, 1563, device=device)[:32]
    for rows, candidates in ((50000, None), (1281167, None), (1281167, 50000)):
        bank = MemoryBank(rows, 128, 0.5, candidates=candidates).to(device)
        for name, loss_fn in losses.items():

            def step(bank=bank, loss_fn=loss_fn):
                q = F.normalize(torch.randn(32, 1, 128, device=device), dim=2).requires_grad_()
                loss_fn(bank.contrast(q, q.detach(), index), 1.0)[0].backward()
                bank.update(q.detach()[:, 0], index)
                if device.type == "cuda":
                    torch.cuda.synchronize()

            runs[name, rows, candidates] = step, [], []
    for turn in trange(rounds + 1, desc="rounds", leave=False):
        for step, seconds, mib in runs.values():
            began = time.perf_counter()
            with Peak(device) as peak:
                step()
            seconds.append(time.perf_counter() - began), mib.append(peak.mib)
    print(
        f"\nIR's memory bank, 32 queries x 128\n\n{'':18}{'rows':>10}{'candidates':>12}{'ms':>8}{'ratio':>8}{'MiB':>8}"
    )
    for (name, rows, candidates), (_, seconds, mib) in runs.items():
        ms = lambda key: 1000 * statistics.median(runs[key][1][1:])
        print(
            f"{name:18}{rows:10}{candidates or 'all':>12}{ms((name, rows, candidates)):8.1f}{ms((name, rows, candidates)) / ms((name, 50000, None)):8.2f}{max(mib[1:]):8.0f}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("queries", 256), ("dim", 128), ("negatives", 65536), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    N, K, n_data = args.queries, args.negatives, 50000
    torch.manual_seed(0)
    unit = lambda *shape: F.normalize(torch.randn(*shape, device=device), dim=-1)
    q, k, n = unit(N, args.dim), unit(N, 5, args.dim), unit(K, args.dim)
    queue = n.T.contiguous()
    index, negative_index = (torch.randint(n_data, (m,), device=device) for m in (N, K))
    ifnd = IFND(10, n_data, temperature=T, acceptance=[1.0, 1.0]).to(device)
    ifnd.pseudo = torch.stack([torch.randint(c, (n_data,), device=device) for c in ifnd.clusters])
    cases = {
        MOCO: None,
        "nce": NCE(temperature=T),
        "ring, 1 to 10 %": Ring(1, temperature=T, anneal_epochs=0),
        "mochi (1024, 1024, 128)": MoCHi(temperature=T, warmup_epochs=0),
        "jcl, M = 5": JCL(10, temperature=T),
        "ifnd, 3 levels": ifnd,
    }

    def step(loss_fn, by):
        query = q.clone().requires_grad_()
        keys = k if isinstance(loss_fn, JCL) else k[:, :1]
        (
            by(loss_fn, Contrast(query, keys, n, index, negative_index))
            if loss_fn
            else official(query, k[:, 0], queue)
        ).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    runs = {
        (name, by): ([], [])
        for name, loss_fn in cases.items()
        for by in ((fast, literal) if loss_fn else (fast,))
    }  # seconds, MiB
    for turn in trange(
        args.rounds + 1, desc="rounds", leave=False
    ):  # the first warms up, and is looked at for its memory
        for (name, by), (seconds, mib) in runs.items():
            if turn == 0:
                step(cases[name], by)
                with Peak(device) as peak:
                    step(cases[name], by)
                mib.append(peak.mib)
                continue
            began = time.perf_counter()
            step(cases[name], by)
            seconds.append(time.perf_counter() - began)
    unit = statistics.median(runs[MOCO, fast][0])
    print(
        f"{N} x {args.dim} against {K}, forward + backward, {device}, {torch.get_num_threads()} threads; time as a ratio to moco's {1000 * unit:.0f} ms, peak MiB\n\n"
        f"{'':26}{'ours':>8}{'MiB':>8}{'literal':>10}{'MiB':>8}"
    )
    for name in cases:
        print(
            f"{name:26}"
            + "".join(
                f"{statistics.median(runs[name, by][0]) / unit:{width}.2f}{runs[name, by][1][0]:8.0f}"
                for by, width in ((fast, 8), (literal, 10))
                if (name, by) in runs
            )
        )
    banks(device, args.rounds)


if __name__ == "__main__":
    main()
