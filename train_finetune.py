"""How far do few labels go? The whole encoder is fine-tuned on a part of the training labels.

    python train_finetune.py --cfg yaml/quickstart.yaml            the run's weights, 10 % of labels
    python train_finetune.py --cfg yaml/quickstart.yaml finetune.labels=0.01 \
        finetune.batch_size=50 --fresh                             1 %, after that
    python train_finetune.py --cfg yaml/quickstart.yaml --weights none name=supervised
    python train_finetune.py --cfg FILE --weights resnet50.pth finetune.list=1percent.txt
    torchrun --nproc_per_node 8 train_finetune.py --cfg FILE       the same, shared out

The third trains from random weights: the supervised baseline. The fourth takes other weights, and
SimCLR's list of ImageNet images. The protocol is the file's section finetune, whose keys the class
Finetune explains. Prints top-1 and top-5 on the test part and appends them, with the protocol in
words, to runs/<name>/finetune.jsonl. runs/<name>/finetune/ has log.jsonl, TensorBoard's events and
last.pt, from which a run that was stopped goes on when the same line is given again. --fresh starts
over, which another share of the labels, or other weights, want in the same folder.
"""

import math
import os
from typing import Literal

from engine import config, signals


def make_parser():
    """The command line."""
    parser = config.command_line(__doc__)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="the encoder's weights, or `none` for random ones; left out: those of the run",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over, though there is a finetune/last.pt"
    )
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    config.answer_early(make_parser(), also=("finetune",))

import torch
from torch import nn
from torch.nn import functional as F

from data.augment import get_recipe
from data.datasets import MEAN_PER_CLASS, balanced_rows, find_obstacle
from data.image_files import say_if_dark
from data.loader import Loader, check_image_size
from engine import checkpoint, distributed
from engine.distributed import print_main
from engine.log import lines, round_figures
from engine.schedule import Schedule, check_optimizer_settings, sgd
from engine.weights import load_backbone, of_run
from evaluation.features import accuracy_percent, extract, mean_per_class_accuracy
from models.checks import check_batch
from training.build import Builder, loss_scaler
from training.epoch import EpochProgress
from training.run import Run, append_line

# Pre-training may change the finetune: section and go on; fine-tuning may not.
MAY_CHANGE = [key for key in checkpoint.MAY_CHANGE if key != "finetune"]


class Finetune:
    """The protocol: all layers by SGD with cross-entropy, BatchNorm in train mode.

    The last epoch counts; nothing is chosen by the test set. IFND fine-tunes backbone and
    classifier on SimCLR's lists of 1 % and 10 % of ImageNet. We have no source for its learning
    rates, schedule or augmentation: every default below is our own choice.

    Args:
        labels: the share of the training labels that is used, above 0 and at most 1. The images
            are drawn by `seed`, equally many of each class, those of a small share among those of
            a larger one.
        list: instead of labels, a text file of image file names, one a line, such as SimCLR's
            1percent.txt (n01440764_10043.JPEG and so on), for data that lie in folders.
        lr: of the encoder.
        lr_classifier: of the new layer.
        batch_size: global; the last, smaller batch of an epoch is left out.
        augment: a recipe of data/augment.py.
        epochs, schedule, milestones, gamma, momentum, weight_decay: see engine/schedule.py.
    """

    def __init__(
        self,
        *,
        labels: float = 0.1,
        list: str | None = None,
        epochs: int = 20,
        batch_size: int = 256,
        lr: float = 0.05,
        lr_classifier: float = 0.1,
        schedule: Literal["cosine", "step", "constant"] = "cosine",
        milestones: list[int] = [],
        gamma: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        augment: str = "crop_flip",
    ):
        if not 0 < labels <= 1:
            raise ValueError(
                f"labels is {labels:g}; it is a share of the training labels, above 0 and at most "
                "1, so 1 % is 0.01"
            )
        for name, value in {"lr": lr, "lr_classifier": lr_classifier}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0, and finite")
        get_recipe(augment)  # or there is none
        self.schedule = Schedule(
            epochs=epochs,
            batch_size=batch_size,
            lr=1.0,
            schedule=schedule,
            milestones=milestones,
            gamma=gamma,
        )
        check_optimizer_settings(momentum, weight_decay)
        self.labels, self.list, self.augment = labels, list, augment
        self.lrs = lr, lr_classifier
        self.epochs, self.batch_size = epochs, batch_size
        self.momentum, self.weight_decay = momentum, weight_decay

    def choose(self, train, seed):
        """The rows of a data set whose labels are used: (m,), sorted.

        Raises:
            ValueError: where the share or the list makes no sense for the data set.
        """
        if self.list is not None:
            return listed(self.list, train)
        n, classes = round(self.labels * len(train)), len(train.classes)
        if n < classes:
            raise ValueError(
                f"labels {self.labels:g} of {len(train)} training images is {n}, fewer than the "
                f"{classes} classes; take at least {classes}/{len(train)}"
            )
        return balanced_rows(train.labels, len(train), n, seed)

    def describe_share(self, n, n_train):
        """Which labels are used, in words: n of n_train."""
        percent_used = 100 * n / n_train if self.list else 100 * self.labels
        return (
            f"{percent_used:.3g} % of the labels: {n} of {n_train} training images, "
            f"{self.list or 'class-balanced'}"
        )

    def __str__(self):
        s = self.schedule
        decay = f"times {s.gamma:g} at {s.milestones}" if s.schedule == "step" else s.schedule
        return (
            f"augmentation {self.augment}; SGD, {self.epochs} epochs, batch {self.batch_size}, "
            f"lr {self.lrs[0]:g}, the classifier's {self.lrs[1]:g}, momentum {self.momentum:g}, "
            f"weight decay {self.weight_decay:g}, {decay}; last epoch"
        )


def listed(path, dataset):
    """The rows of a FolderSet whose files a text file names, one a line.

    A line is a file's name, or as much of its path as tells it from others of that name: a/0.png.

    Returns:
        (m,) int64, sorted.

    Raises:
        ValueError: names the first line that is no file's, or that of several.
    """
    if not hasattr(dataset, "files"):
        raise ValueError(
            "list names image files, and this data set has none; leave list out and set labels, "
            "the share, or take data that lie in folders"
        )
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as f:  # with or without a BOM
            names = [os.path.normpath(line.strip()) for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"list {path} cannot be read: {error}") from error
    if not names:
        raise ValueError(f"list {path} is empty; it must hold one image file name a line")
    rows = {name: [] for name in names}
    # As many of a path's last parts are compared as a line has.
    depths = {name.count(os.sep) + 1 for name in names}
    for row, file in enumerate(dataset.files):
        parts = file.split(os.sep)
        for depth in depths:
            ending = os.sep.join(parts[-depth:])
            if depth <= len(parts) and ending in rows:
                rows[ending].append(row)
    missing = [name for name in names if not rows[name]]
    if missing:
        raise ValueError(
            f"list {path}: {len(missing)} of its {len(names)} names are not among the "
            f"{len(dataset)} training images; the first is {missing[0]}; it is a list of other "
            "data, or data.limit leaves images out"
        )
    double = next((name for name in names if len(rows[name]) > 1), None)
    if double:
        both = " and ".join(dataset.files[row] for row in rows[double][:2])
        raise ValueError(
            f"list {path}: {double} is {both}; write the folder before the name, as far as it "
            "tells them apart, or give each image a file name of its own"
        )
    return torch.tensor(sorted({rows[name][0] for name in names}))


class Classifier(nn.Module):
    """The encoder's pooled features and one linear layer, as one module for DDP.

    Args:
        encoder: loses its head, for DDP wants no parameter that is never used.
        image_size: S, of the images.
        classes: how many.
    """

    def __init__(self, encoder, image_size, classes, device):
        super().__init__()
        encoder.head = nn.Identity()
        self.encoder = encoder.eval()
        with torch.no_grad():  # CMC's encoder has two streams: ask it how wide it is
            image = torch.zeros(1, 3, image_size, image_size, device=device)
            width = encoder(image, "backbone").shape[1]
        self.fc = nn.Linear(width, classes, device=device)
        nn.init.normal_(self.fc.weight, std=0.01)  # as the linear probe
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        """Images (n, 3, S, S) -> logits (n, classes), in fp32."""
        return self.fc(self.encoder(x, "backbone"))


@distributed.say_refusals_once()
def main():
    """Fine-tune an encoder on few labels."""
    args, cfg = config.read_command_line(make_parser(), also=("finetune",))
    device = distributed.init_distributed(args.device)
    build = Builder(cfg, args.cfg)
    protocol = build("finetune", Finetune)
    run_folder = os.path.join("runs", cfg["name"])
    weights = of_run(args.weights, run_folder, args.cfg)
    checkpoint.check_writable(run_folder)

    torch.manual_seed(cfg["seed"])  # every process begins with the same weights
    build.take_statistics(weights)
    train, test = load_labelled(build, args.cfg)
    rows = config.build(protocol.choose, {}, f"{args.cfg}: finetune", train=train, seed=cfg["seed"])
    if protocol.batch_size > len(rows):
        raise SystemExit(
            f"{args.cfg}: finetune.batch_size {protocol.batch_size} is larger than the {len(rows)} "
            "labelled images; lower finetune.batch_size, or use more labels"
        )
    settings = {
        **cfg,
        "weights": "none" if weights == "none" else checkpoint.file_digest(weights),
        "labelled": checkpoint.digest(rows.numpy().tobytes()),
    }
    with build(
        "log",
        Run,
        folder=os.path.join(run_folder, "finetune"),
        settings=settings,
        epochs=protocol.epochs,
        fresh=args.fresh,
        may_change=MAY_CHANGE,
        advice="try a lower finetune.lr or finetune.lr_classifier with --fresh",
    ) as run:
        finetune(run, build, protocol, weights, train, test, rows, device)
    distributed.cleanup()


def load_labelled(build, file):
    """The training and the test part; SystemExit where they allow no fine-tuning."""
    settings = build.settings["data"]
    train, test = build.dataset("train"), build.dataset("test")
    say_if_dark(train)
    obstacle = find_obstacle(train, test)
    if obstacle:
        raise SystemExit(
            f"{file}: no fine-tuning on {settings['name']} at {settings['root']}: {obstacle}"
        )
    # The Loader would say so, but the encoder meets it first.
    config.build(check_image_size, {}, file, image_size=settings["image_size"])
    return train, test


def finetune(run, build, protocol, weights, train, test, rows, device):
    """Train, evaluate, and write the figures."""
    # ------------------------------------------------------------------------------------- set-up
    cfg = build.settings
    classes, size = len(train.classes), cfg["data"]["image_size"]
    subset, test = train.select(rows).to(device), test.to(device)
    encoder = build.encoder(train, device)
    if weights != "none":
        load_backbone(weights, encoder.backbone)
    net = Classifier(encoder, size, classes, device)
    model = distributed.wrap_ddp(net, device)
    optimizer = make_optimizer(build, protocol, net)
    scaler = loss_scaler(encoder, optimizer, device)
    loader = make_loader(build, protocol, subset, encoder, device)
    labels, steps = subset.labels.to(device), len(loader)

    progress = EpochProgress(len(subset), subset.fingerprint(), net)
    run.resume(progress, steps, device, model=net, optimizer=optimizer, scaler=scaler)
    share = protocol.describe_share(len(rows), len(train))
    describe_start(run, cfg, loader, weights, share, test, encoder, device)
    if run.is_finished:
        return

    # ----------------------------------------------------------------------------------- training
    for epoch in range(run.start_epoch, protocol.epochs):
        first_step = run.begin_epoch(epoch)
        net.train()
        with signals.deferred():  # a signal is obeyed after a step, by run.after_step
            bar = run.progress_bar(loader.epoch(epoch, first_step))
            for step, ((images,), index) in enumerate(bar, first_step):
                progress.batch_arrived()
                now = epoch + step / steps
                for group, lr in zip(optimizer.param_groups, protocol.lrs):
                    group["lr"] = lr * protocol.schedule(now)

                logits = model(images)  # (b, classes)
                loss = F.cross_entropy(logits, labels[index])
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

                right = 100 * (logits.argmax(1) == labels[index]).float().mean()
                progress.add({"loss": loss.detach(), "train top-1": right})
                run.after_step(step, bar)

            distributed.average_buffers(net)
            figures = progress.means(device)
            last_step = epoch + (steps - 1) / steps
            figures["lr"] = protocol.lrs[0] * protocol.schedule(last_step)
            figures["seconds"] = progress.seconds
            run.end_epoch(figures)
        log_epoch(run, epoch + 1, figures)

    # ------------------------------------------------------------------------------------ evaluate
    net.eval()
    logits = extract(net, test, size, device, loader.workers, what="test")  # (m, classes)
    hits = logits.topk(min(5, classes)).indices == test.labels.to(device)[:, None]  # (m, 5)
    figures = {"top-1": accuracy_percent(hits[:, 0]), "top-5": accuracy_percent(hits.any(1))}
    if cfg["data"]["name"] in MEAN_PER_CLASS:
        predictions = logits.argmax(1)
        figures["per class"] = mean_per_class_accuracy(predictions, test.labels.to(device))
    start = "from random weights " if weights == "none" else ""
    words = f"all layers and a linear classifier fine-tuned {start}on {share}; {protocol}"
    print_main(f"\n{words}\n\n{'':24}" + "".join(f"{name:>10}" for name in figures))
    print_main(f"{cfg['name']:24}" + "".join(f"{value:10.2f}" for value in figures.values()))
    if distributed.is_main():
        line = {
            "weights": weights,
            "protocol": words,
            "seed": cfg["seed"],
            "seconds": round(sum(line["seconds"] for line in lines(run.log.path)), 1),
            "figures": figures,
        }
        append_line(figures_file(run), line)
    run.mark_finished()  # only now: a run that counts as finished has its figures


def make_optimizer(build, protocol, net):
    """SGD, with a learning rate of its own for the new layer."""
    groups = [
        {"params": part.parameters(), "lr": lr}
        for part, lr in zip((net.encoder, net.fc), protocol.lrs)
    ]
    return build("finetune", sgd, parameters=groups, lr=protocol.lrs[0])


def make_loader(build, protocol, subset, encoder, device):
    """The Loader of the labelled images; SystemExit where BatchNorm can't do with its batches."""
    settings = {
        **build.settings["data"],
        "augment": protocol.augment,
        "augment_backend": "batched",
    }
    section = f"{build.file}: finetune"
    loader = config.build(
        Loader,
        settings,
        section,
        dataset=subset,
        batch_size=protocol.batch_size,
        n_views=1,
        seed=build.settings["seed"],
        device=device,
    )
    config.build(
        check_batch,
        {},
        build.file,
        key="finetune.batch_size",
        batch_size=loader.batch,
        processes=distributed.world_size(),
        bn_splits=encoder.bn_splits,
    )
    return loader


def describe_start(run, cfg, loader, weights, share, test, encoder, device):
    """Print what is trained on what, and begin the log."""
    if run.is_finished:
        return print_main(
            f"{run.last} is finished, all {run.epochs} epochs; its figures are in "
            f"{figures_file(run)}; --fresh starts it over"
        )
    run.open_log()
    if distributed.is_main():
        config.save_if_missing(cfg, os.path.dirname(run.folder))
    print_main(config.to_yaml(cfg), end="")
    print_main(
        f"{weights} on {cfg['data']['name']}: {share}; {len(test)} test images, "
        f"{len(test.classes)} classes; {run.steps} steps an epoch of {loader.batch} = "
        f"{distributed.world_size()} processes x {loader.local}; {device}, {encoder.precision}"
    )
    if run.is_resumed:
        print_main(f"going on after {run.position(run.start_epoch, run.progress.step)}")
    figures = run.unlogged_figures()
    if figures:
        log_epoch(run, run.start_epoch, figures)


def log_epoch(run, epoch, figures):
    """Print the figures of the epoch with that number, from 1, and write them into the log."""
    print_main(
        f"epoch {epoch:3d}/{run.epochs}  loss {figures['loss']:.3f}  right "
        f"{figures['train top-1']:.1f} % of the augmented training images  "
        f"{figures['seconds']:.1f} s"
    )
    if run.log:
        run.log.write(epoch, round_figures(figures))


def figures_file(run):
    """Where the figures of all fine-tunings of a run are kept."""
    return os.path.join(os.path.dirname(run.folder), "finetune.jsonl")


if __name__ == "__main__":
    signals.run(main)
