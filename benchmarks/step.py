"""The whole training step of MoCo, beside its two networks alone and lightly's own example.

    python benchmarks/step.py        3 minutes on 2 cores: ResNet-18, batch 64, 32 pixels
    python benchmarks/step.py --batch 256 --backbone resnet50 --profile step.json
    torchrun --nproc_per_node 2 benchmarks/step.py         and what each process sends

All cases take turns; medians are printed. A profile is of one step: a table, and a chrome trace or,
in a file whose name ends in .png, bars.

Networks alone are the query encoder forward and backward and the key encoder forward, on ready
tensors. Ours is train_pretrain.py's loop, from stored uint8 images; the log's figures belong to
some steps only, so that a median of single steps, as on a CPU, leaves them out. Lightly's rows
(pip install lightly) are its examples/pytorch/moco.py in fp32. The whole one has its
MoCoV2Transform on PIL images in this process. Worker processes could bring it nearer to its row on
ready tensors, at best. Machines drift: only the ratios inside one table mean anything.
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
from torch.profiler import ProfilerActivity
from torch.utils.data import DataLoader, default_collate

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.datasets import STATISTICS, ArraySet
from data.loader import Loader
from engine import distributed
from engine.distributed import print_main
from engine.progress import progress
from engine.schedule import Schedule, sgd
from losses import Contrast
from losses.diagnostics import step_diagnostics
from losses.nce import NCE
from models.memory_queue import Queue
from models.moco import MoCo
from models.resnet import LAYERS, Encoder, choose_precision
from training.build import loss_scaler
from training.epoch import EpochProgress
from training.run import Run

DIM = 128
T = 0.2
RECIPE = "moco_v2"
STEPS_AN_EPOCH = 50
STEPS_A_ROUND_ON_A_GPU = 20

# The names of the cases that other figures refer to.
ALONE = "networks alone"
OURS = "ours, whole step"
AUGMENTATION = "augmentation alone"
LOSS = "loss and queue alone"


# --------------------------------------------------------------------------------------- our steps


def ours(loader, encoder, host, loss_fn, device):
    """train_pretrain.py's loop. Each `next` is one step, its views included."""
    model = distributed.wrap_ddp(encoder, device)
    labels = loader.dataset.labels.to(device)
    schedule = Schedule(epochs=200, batch_size=loader.batch, lr=0.03)
    optimizer = sgd(encoder.parameters(), schedule.lr)
    scaler = loss_scaler(encoder, optimizer, device)
    # The run has no folder, and is never saved.
    advice = "no figures are printed"
    run = Run(os.devnull, {}, schedule.epochs, advice=advice, save_minutes=math.inf)
    epoch_progress = EpochProgress(len(loader.dataset), "random images", encoder, host)
    run.resume(epoch_progress, len(loader), device, encoder=encoder)
    for epoch in range(schedule.epochs):
        run.begin_epoch(epoch)
        bar = progress(loader.epoch(epoch), is_shown=False)
        for step, (views, index) in enumerate(bar):
            run.progress.batch_arrived()
            now = epoch + step / run.steps
            for group in optimizer.param_groups:
                group["lr"] = schedule(now)

            optimizer.zero_grad(set_to_none=True)
            contrasts = host(model, views, index)
            outputs = [loss_fn(contrast, now) for contrast in contrasts]
            loss = sum(output.loss for output in outputs)
            scaler.scale(loss).backward()
            run.progress.add({"loss": loss.detach()})
            if run.is_figure_step(step):
                figures = step_diagnostics(loss_fn, contrasts, outputs, labels, now)
                run.progress.add(figures)
            scaler.step(optimizer)
            scaler.update()
            host.update_memory()
            run.after_step(step, bar)
            yield


def networks(encoder, host, x, y):
    """Both encoders on the views x and y, the first with its gradient."""
    encoder.zero_grad(set_to_none=True)
    host.key_encoder(y)
    encoder(x).sum().backward()


def loss_and_queue(loss_fn, queue, q, k, index):
    """The loss with its gradient, and the queue's update, on queries q and keys k."""
    query = q.clone().requires_grad_()
    contrast = Contrast(query, k, queue.keys, index, queue.index)
    loss_fn(contrast, 0.0).loss.backward()
    queue.enqueue(distributed.all_gather(k.mean(1)), distributed.all_gather(index))


def make_encoder(args, precision, device):
    """MoCo's encoder, with the stem that fits the images."""
    return Encoder(
        device,
        backbone=args.backbone,
        stem=stem(args.size),
        head="mlp",
        dim=DIM,
        bn_splits=args.bn_splits,
        precision=precision,
    )


def stem(size):
    """CIFAR's stem for small images, else ImageNet's."""
    return "cifar" if size <= 64 else "imagenet"


def our_cases(args, encoders, loader, x, y, device):
    """Return {(precision, name): one step}, of each encoder alone and in the whole step."""
    loss_fn = NCE(temperature=T).to(device)
    cases = {}
    for precision, encoder in encoders.items():
        host = MoCo(encoder, queue_size=args.queue).to(device)
        steps = ours(loader, encoder, host, loss_fn, device)
        cases[precision, ALONE] = partial(networks, encoder, host, x, y)
        cases[precision, OURS] = partial(next, steps)
    return cases


def part_cases(args, loader, device):
    """Return {("", name): one step} of two parts of our step."""
    loss_fn = NCE(temperature=T).to(device)
    q, k = F.normalize(torch.randn(2, loader.local, DIM, device=device), dim=2)
    index = torch.arange(len(q), device=device)
    queue = Queue(args.queue, DIM).to(device)
    batches = chain.from_iterable(map(loader.epoch, count()))
    return {
        ("", AUGMENTATION): partial(next, batches),
        ("", LOSS): partial(loss_and_queue, loss_fn, queue, q, k[:, None], index),
    }


# ----------------------------------------------------------------------------------- lightly's step


def lightly_example(batches, backbone, stem, queue_size, device):
    """Lightly's example, its parts in its order: plain SGD, fp32, no channels_last.

    The stem, the temperature and the bank's size are ours. Each `next` is one step.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    net = torchvision.models.ResNet(*LAYERS[backbone])
    features = net.fc.in_features
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    trunk = nn.Sequential(*list(net.children())[:-1], nn.Flatten())
    head = MoCoProjectionHead(features, features, DIM)
    query = nn.Sequential(trunk, head).to(device)
    key = copy.deepcopy(query)
    deactivate_requires_grad(key)
    # It is left on the CPU, as in the example: on a GPU the bank travels at each step.
    criterion = NTXentLoss(T, memory_bank_size=(queue_size, DIM))
    optimizer = torch.optim.SGD(query.parameters(), lr=0.06)
    total = 0
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


def collate_views(transform, images):
    """Return a batch of the views of PIL images."""
    return default_collate([transform(image) for image in images])


def lightly_cases(args, dataset, x, y, device):
    """Return {("fp32", name): one step}, the whole step last, and why there is none or None."""
    if distributed.world_size() > 1:
        return {}, "they are for one process"
    try:
        import lightly
        from lightly.transforms import MoCoV2Transform
    except ImportError as error:
        return {}, f"pip install lightly ({error})"
    pictures = [dataset.decode(i) for i in range(len(dataset))]
    pil = DataLoader(
        pictures,
        args.batch,
        shuffle=True,
        drop_last=True,
        collate_fn=partial(collate_views, MoCoV2Transform(input_size=args.size)),
    )
    settings = args.backbone, stem(args.size), args.queue, device
    ready = lightly_example(repeat((x, y)), *settings)
    whole = lightly_example(chain.from_iterable(repeat(pil)), *settings)
    cases = {
        ("fp32", "lightly, ready tensors"): partial(next, ready),
        ("fp32", f"lightly {lightly.__version__}, whole step"): partial(next, whole),
    }
    return cases, None


# ----------------------------------------------------------------------------------------- measure


def measure_in_turn(cases, rounds, device):
    """Return {case: the median of the seconds of a step}. The first round warms up."""
    # A GPU is given the next step before it has done the last.
    steps = STEPS_A_ROUND_ON_A_GPU if device.type == "cuda" else 1
    seconds = {case: [] for case in cases}
    for _ in progress(range(rounds + 1), "rounds"):
        for case, step in cases.items():
            distributed.barrier()
            synchronize(device)
            began = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize(device)
            seconds[case].append((time.perf_counter() - began) / steps)
    return {case: statistics.median(times[1:]) for case, times in seconds.items()}


def synchronize(device):
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(step, path, device):
    """Print torch.profiler's table of one step, and write it to a file.

    Args:
        step: a function.
        path: of a chrome trace or, where it ends with .png, of a picture.
        device: the networks'.
    """
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU]
    if is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronize(device)
    own_time = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    events = profiler.key_averages()
    print_main("\n" + events.table(sort_by=own_time, row_limit=20))
    if not distributed.is_main():
        return
    if path.endswith(".png"):
        draw_operations(events, own_time, path, device)
    else:
        profiler.export_chrome_trace(path)


def draw_operations(events, own_time, path, device):
    """Draw the operations that take longest as bars."""
    from matplotlib.figure import Figure

    # Events of the CPU are the operations, to which their kernels' time is counted.
    cpu = torch.autograd.DeviceType.CPU
    ms = {e.key: getattr(e, own_time) / 1000 for e in events if e.device_type == cpu}
    longest = sorted(ms, key=ms.get)[-15:]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.barh([name[:50] for name in longest], [ms[name] for name in longest])
    axis.set_xlabel(
        f"ms of the {sum(ms.values()):.0f} that one step takes on "
        f"{distributed.describe_devices(device)}, in each operation itself"
    )
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------- print


def print_table(args, median, lightly_seconds, device):
    """Print the seconds of each case beside those of its networks and of lightly's whole step."""
    print_main(
        f"MoCo, {args.backbone}, {args.batch} images of {args.size} pixels, queue {args.queue}, "
        f"model.bn_splits {args.bn_splits}, recipe {RECIPE}; "
        f"{distributed.describe_devices(device)}, torch {torch.__version__}; "
        f"medians of {args.rounds} rounds\n"
    )
    titles = f"{'':33}{'ms a step':>10}{'ratio':>8}{'images/s':>10}"
    if lightly_seconds:
        titles += f"{'to lightly':>12}"
    print_main(titles)
    for (precision, name), seconds in median.items():
        cells = f"{precision:6}{name:27}{1000 * seconds:10.1f}"
        if precision:
            cells += f"{seconds / median[precision, ALONE]:8.2f}{args.batch / seconds:10.1f}"
        if precision and lightly_seconds:
            cells += f"{lightly_seconds / seconds:12.2f}"
        print_main(cells)
    print_main()


def print_shares(args, median, precisions):
    """Print which share of our step its parts take."""
    augmentation, loss = median["", AUGMENTATION], median["", LOSS]
    sending = ", sending" if distributed.world_size() > 1 else ""
    for precision in precisions:
        whole = median[precision, OURS]
        rest = whole - median[precision, ALONE] - augmentation - loss
        print_main(
            f"of our {precision} step: augmentation {100 * augmentation / whole:.1f} %, "
            f"loss and queue {100 * loss / whole:.1f} %, "
            f"the rest (SGD, moving average, figures{sending}) {100 * rest / whole:.1f} %"
        )
    print_main(f"augmentation alone: {2 * args.batch / augmentation:.0f} views/s")


def print_bytes(step, encoder):
    """Print what each process sends in one more step."""
    before = distributed.bytes_sent
    step()
    sent = distributed.bytes_sent - before
    gradients = sum(parameter.nbytes for parameter in encoder.parameters())
    print_main(
        f"a step, each process gives {sent / 1024:.1f} KiB to collectives, "
        f"and {gradients / 2**20:.1f} MiB of gradients to DDP"
    )


def parse_arguments(arguments):
    """Read the command line; None takes the program's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--queue", type=int, default=4096)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--backbone", choices=LAYERS, default="resnet18")
    parser.add_argument("--bn_splits", type=int, default=1, help="parts of BatchNorm, as moco's 8")
    parser.add_argument("--profile", metavar="FILE")
    return parser.parse_args(arguments)


def random_images(args):
    """A data set of random images, of so many steps."""
    n = STEPS_AN_EPOCH * args.batch
    images = torch.randint(256, (n, 3, args.size, args.size), dtype=torch.uint8)
    labels = torch.randint(10, (n,))
    return ArraySet(images, labels, list("0123456789"), *STATISTICS["cifar10"])


def main(arguments=None):
    """Measure all cases and print the table."""
    args = parse_arguments(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = distributed.init_distributed()
    torch.manual_seed(0)
    dataset = random_images(args).to(device)
    recipe = {"augment": RECIPE, "image_size": args.size}
    loader = Loader(dataset, args.batch, 2, 0, device, **recipe)
    x, y = torch.randn(2, loader.local, 3, args.size, args.size, device=device)
    precisions = dict.fromkeys(["fp32", choose_precision(device)])
    encoders = {precision: make_encoder(args, precision, device) for precision in precisions}

    cases = our_cases(args, encoders, loader, x, y, device)
    of_lightly, why_not = lightly_cases(args, dataset, x, y, device)
    cases |= of_lightly | part_cases(args, loader, device)
    median = measure_in_turn(cases, args.rounds, device)

    lightly_seconds = median[list(of_lightly)[-1]] if of_lightly else None
    print_table(args, median, lightly_seconds, device)
    print_shares(args, median, precisions)
    if why_not:
        print_main(f"no rows of lightly: {why_not}")
    if distributed.world_size() > 1:
        print_bytes(cases["fp32", OURS], encoders["fp32"])
    if args.profile:
        profile(cases[list(precisions)[-1], OURS], args.profile, device)
    distributed.cleanup()


if __name__ == "__main__":
    main()
