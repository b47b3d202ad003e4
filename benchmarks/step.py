"""The whole training step of MoCo, beside its two networks alone and beside lightly's own example: all cases take turns, medians are printed.

    python benchmarks/step.py                              batch 64, 32 pixels, queue 4096, ResNet-18, on the device there is; 3 minutes on 2 cores
    python benchmarks/step.py --batch 256 --backbone resnet50 --profile step.json          and a profile of one step: table and chrome trace (.png: bars)
    torchrun --nproc_per_node 2 benchmarks/step.py         and what each process sends

networks alone: f_q forward and backward, f_k forward, on ready tensors. ours: train_pretrain.py's loop, from stored uint8 images. lightly (pip install
lightly): its examples/pytorch/moco.py, fp32; whole: its MoCoV2Transform on PIL images in this process, where worker processes could bring it nearer to
its row on ready tensors, at best. Machines drift; only the ratios inside one table mean anything.
"""

import argparse
import copy
import math
import os
import statistics
import sys
import time
from functools import partial
from itertools import chain, count, repeat

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models.memory import Queue

from data.datasets import STATISTICS, ArraySet
from data.loader import Loader
from engine import distributed
from engine.distributed import print_main
from engine.schedule import Schedule, sgd
from losses import Contrast
from losses.diagnostics import step_diagnostics
from losses.nce import NCE
from models.moco import MoCo
from models.resnet import LAYERS, Encoder, choose_precision

DIM, T, RECIPE, OURS, ALONE = 128, 0.2, "moco_v2", "ours, whole step", "networks alone"


def ours(loader, encoder, model, host, loss_fn, labels, device):
    """train_pretrain.py's loop. Each `next` is one step, its views included."""
    schedule = Schedule(epochs=200, batch_size=loader.batch, lr=0.03)
    optimizer = sgd(encoder.parameters(), schedule.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=encoder.precision == "fp16")
    for epoch in range(schedule.epochs):
        total, steps, fine = {}, len(loader), torch.zeros((), device=device)
        for step, (views, index) in enumerate(loader.epoch(epoch)):
            now = epoch + step / steps
            for group in optimizer.param_groups:
                group["lr"] = schedule(now)
            contrasts = host(model, views, index)
            outputs = [loss_fn(contrast, now) for contrast in contrasts]
            loss = sum(output.loss for output in outputs)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            with torch.no_grad():
                figures = step_diagnostics(loss_fn, contrasts, outputs, labels, now)
                for name, value in figures.items():
                    total[name] = total.get(name, 0) + value / steps
            scaler.step(optimizer)
            scaler.update()
            host.update_memory()
            fine += total["loss"].isfinite()
            if step % 20 == 0 or step == steps - 1:
                weights = torch.stack(torch._foreach_norm(list(encoder.parameters()), math.inf))
                if distributed.any_rank(device, not (total["loss"] + weights).isfinite().all())[0]:
                    raise SystemExit("the loss is not finite")
            yield


def networks(encoder, host, x, y):
    encoder.zero_grad(set_to_none=True)
    host.key_encoder(y)
    encoder(x).sum().backward()


def loss_and_queue(loss_fn, queue, q, k, index):
    loss_fn(
        Contrast(q.clone().requires_grad_(), k, queue.keys, index, queue.index), 0.0
    ).loss.backward()
    queue.enqueue(distributed.all_gather(k.mean(1)), distributed.all_gather(index))


def lightly(batches, backbone, stem, queue_size, device):
    """Lightly's example, its parts in its order: plain SGD, fp32, no channels_last. Ours are the stem, the temperature and the bank's size."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    net = torchvision.models.ResNet(*LAYERS[backbone])
    features = net.fc.in_features
    if stem == "cifar":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    query = nn.Sequential(
        nn.Sequential(*list(net.children())[:-1], nn.Flatten()),
        MoCoProjectionHead(features, features, DIM),
    ).to(device)
    key = copy.deepcopy(query)
    deactivate_requires_grad(key)
    criterion = NTXentLoss(
        T, memory_bank_size=(queue_size, DIM)
    )  # left on the CPU, as there: on a GPU the bank travels each step
    optimizer, total = torch.optim.SGD(query.parameters(), lr=0.06), 0
    for x, y in batches:
        for part, average in zip(query, key):
            update_momentum(part, average, m=0.996)
        x, y = x.to(device), y.to(device)
        loss = criterion(query(x), key(y))
        total += loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(step, path, device):
    """One step: torch.profiler's table, and at path a chrome trace or, if it ends with .png, the operations that take longest."""
    kinds, where = torch.profiler.ProfilerActivity, "device" if device.type == "cuda" else "cpu"
    with torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if where == "device" else [kinds.CPU]
    ) as p:
        step()
        synchronize(device)
    own = f"self_{where}_time_total"
    print_main("\n" + p.key_averages().table(sort_by=own, row_limit=20))
    if distributed.is_main() and not path.endswith(".png"):
        p.export_chrome_trace(path)
    elif distributed.is_main():
        from matplotlib.figure import Figure

        ms = {
            e.key: getattr(e, own) / 1000
            for e in p.key_averages()
            if e.device_type == torch.autograd.DeviceType.CPU
        }  # operations, which own their kernels
        top = sorted(ms, key=ms.get)[-15:]
        page = Figure(figsize=(9, 4.5), layout="constrained")
        axis = page.subplots()
        axis.barh([name[:50] for name in top], [ms[name] for name in top])
        axis.set_xlabel(
            f"ms of the {sum(ms.values()):.0f} that one step takes on {distributed.describe_devices(device)}, in each operation itself"
        )
        page.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("batch", 64),
        ("rounds", 21),
        ("queue", 4096),
        ("size", 32),
        ("threads", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backbone", choices=LAYERS, default="resnet18")
    parser.add_argument("--profile", metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, world, stem = (
        distributed.init_distributed(),
        distributed.world_size(),
        "cifar" if args.size <= 64 else "imagenet",
    )
    torch.manual_seed(0)
    n = 50 * args.batch
    dataset = ArraySet(
        torch.randint(256, (n, 3, args.size, args.size), dtype=torch.uint8),
        torch.randint(10, (n,)),
        list("0123456789"),
        *STATISTICS["cifar10"],
    )
    loader = Loader(
        dataset.to(device), args.batch, 2, 0, device, augment=RECIPE, image_size=args.size
    )
    loss_fn = NCE(temperature=T).to(device)
    labels = dataset.labels.to(device)
    x, y = torch.randn(2, loader.local, 3, args.size, args.size, device=device)
    q, k = F.normalize(torch.randn(2, loader.local, DIM, device=device), dim=2)

    cases, precisions = (
        {},
        list(dict.fromkeys(["fp32", choose_precision(device)])),
    )  # (precision, name) -> one step
    for precision in precisions:
        encoder = Encoder(
            device, backbone=args.backbone, stem=stem, head="mlp", dim=DIM, precision=precision
        )
        host = MoCo(encoder, queue_size=args.queue).to(device)
        cases[precision, ALONE] = partial(networks, encoder, host, x, y)
        cases[precision, OURS] = partial(
            next,
            ours(
                loader,
                encoder,
                distributed.wrap_ddp(encoder, device),
                host,
                loss_fn,
                labels,
                device,
            ),
        )
    why = "they are for one process" if world > 1 else None
    try:
        import lightly as package
        from lightly.transforms import MoCoV2Transform
    except ImportError as error:
        why = why or f"pip install lightly ({error})"
    if not why:
        transform, pictures = (
            MoCoV2Transform(input_size=args.size),
            [dataset.decode(i) for i in range(n)],
        )
        pil = DataLoader(
            pictures,
            args.batch,
            shuffle=True,
            drop_last=True,
            collate_fn=lambda images: default_collate([transform(image) for image in images]),
        )
        example = f"lightly {package.__version__}, whole step"
        cases["fp32", "lightly, ready tensors"] = partial(
            next, lightly(repeat((x, y)), args.backbone, stem, args.queue, device)
        )
        cases["fp32", example] = partial(
            next, lightly(chain.from_iterable(repeat(pil)), args.backbone, stem, args.queue, device)
        )
    cases["", "augmentation alone"] = partial(next, chain.from_iterable(map(loader.epoch, count())))
    cases["", "loss and queue alone"] = partial(
        loss_and_queue,
        loss_fn,
        Queue(args.queue, DIM).to(device),
        q,
        k[:, None],
        torch.arange(len(q), device=device),
    )

    seconds, steps = (
        {case: [] for case in cases},
        20 if device.type == "cuda" else 1,
    )  # a GPU is given the next step before it has done the last
    for _ in tqdm(
        range(args.rounds + 1), "rounds", disable=None if distributed.is_main() else True
    ):  # the first warms up
        for case, step in cases.items():
            distributed.barrier()
            synchronize(device)
            began = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize(device)
            seconds[case].append((time.perf_counter() - began) / steps)
    median = {case: statistics.median(times[1:]) for case, times in seconds.items()}

    print_main(
        f"MoCo, {args.backbone}, {args.batch} images of {args.size} pixels, queue {args.queue}, recipe {RECIPE}; {distributed.describe_devices(device)}, torch "
        f"{torch.__version__}; medians of {args.rounds} rounds\n\n{'':33}{'ms a step':>10}{'ratio':>8}{'images/s':>10}"
        + ("" if why else f"{'to lightly':>12}")
    )
    for (precision, name), t in median.items():
        beside = (
            f"{t / median[precision, ALONE]:8.2f}{args.batch / t:10.1f}"
            + ("" if why else f"{median['fp32', example] / t:12.2f}")
            if precision
            else ""
        )
        print_main(f"{precision:6}{name:27}{1000 * t:10.1f}{beside}")
    print_main()
    for precision in precisions:
        whole, parts = (
            median[precision, OURS],
            [median["", "augmentation alone"], median["", "loss and queue alone"]],
        )
        parts = [100 * t / whole for t in (*parts, whole - median[precision, ALONE] - sum(parts))]
        print_main(
            "of our {} step: augmentation {:.1f} %, loss and queue {:.1f} %, the rest (SGD, moving average, figures{}) {:.1f} %".format(
                precision, *parts[:2], ", sending" if world > 1 else "", parts[2]
            )
        )
    print_main(
        f"augmentation alone: {2 * args.batch / median['', 'augmentation alone']:.0f} views/s"
        + (f"\nno rows of lightly: {why}" if why else "")
    )
    if world > 1:
        before = getattr(distributed, "bytes_sent", None)
        cases["fp32", OURS]()
        print_main(
            "a step, each process gives "
            + (
                "a number of bytes that is not counted"
                if before is None
                else f"{(distributed.bytes_sent - before) / 1024:.1f} KiB"
            )
            + f" to collectives, and {sum(p.nbytes for p in encoder.parameters()) / 2**20:.1f} MiB of gradients to DDP"
        )
    if args.profile:
        profile(cases[precisions[-1], OURS], args.profile, device)
    distributed.cleanup()


if __name__ == "__main__":
    main()
