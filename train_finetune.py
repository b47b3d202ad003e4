"""How far do few labels go? The whole encoder and a new linear classifier are fine-tuned on a part of the training labels.

    python train_finetune.py --cfg yaml/quickstart.yaml                                          the weights of the run of that name; 10 % of the labels
    python train_finetune.py --cfg yaml/quickstart.yaml finetune.labels=0.01 finetune.batch_size=50 --fresh               1 %, after that
    python train_finetune.py --cfg yaml/quickstart.yaml --weights none name=supervised           from random weights: the supervised baseline
    python train_finetune.py --cfg FILE --weights resnet50.pth finetune.list=1percent.txt        other weights; SimCLR's list of ImageNet images
    torchrun --nproc_per_node 8 train_finetune.py --cfg FILE                                     the same, shared out

The protocol is the file's finetune: section, whose keys class Finetune explains. Prints top-1 and top-5 on the test part and appends them, with the
protocol in words, to runs/<name>/finetune.jsonl. runs/<name>/finetune/ has log.jsonl, TensorBoard's events and last.pt: what was stopped goes on from
there when it is started again; --fresh starts over, which another share of labels, or other weights, want in the same run's folder.
"""

import hashlib
import json
import math
import os
import time
from typing import Literal

from engine import config


def command_line():
    parser = config.command_line(__doc__)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="the encoder's weights, or `none` for random ones; left out: those of the run that --cfg names",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over, though the run has a finetune/last.pt"
    )
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    config.answer_early(command_line(), also=("finetune",))

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from data.augment import named
from data.datasets import balanced, find_obstacle, load
from data.image_files import say_if_dark
from data.loader import Loader, sensible_size
from data.workers import or_say_what_is_kept, say_what_is_kept
from engine import checkpoint, distributed
from engine.distributed import say
from engine.features import extract, percent
from engine.log import Log, lines
from engine.schedule import Schedule, sensible, sgd
from engine.weights import load_backbone, of_run
from models.resnet import Encoder


class Finetune:
    """The protocol. All layers by SGD with cross-entropy, BatchNorm in train mode; the last epoch counts, nothing is chosen by the test set.

    IFND fine-tunes backbone and classifier on SimCLR's lists of 1 % and 10 % of ImageNet. We have no source for its learning rates, schedule or
    augmentation: every value below is our own choice. labels: the share of the training labels that is used, above 0 and at most 1; the images are
    drawn by `seed`, equally many of each class, those of a small share among those of a larger one. list: instead, a text file of image file names,
    one a line, such as SimCLR's 1percent.txt with n01440764_10043.JPEG and so on, for data that lie in folders. lr: of the encoder. lr_classifier: of
    the new layer. batch_size: global; the last, smaller batch of an epoch is left out. augment: a recipe of data/augment.py. The rest: engine.schedule's.
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
                f"labels is {labels:g}; it is a share of the training labels, above 0 and at most 1, so 1 % is 0.01"
            )
        for name, value in dict(lr=lr, lr_classifier=lr_classifier).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0, and finite")
        named(augment)  # or there is none
        self.schedule = Schedule(
            epochs=epochs,
            batch_size=batch_size,
            lr=1.0,
            schedule=schedule,
            milestones=milestones,
            gamma=gamma,
        )
        sensible(momentum, weight_decay)
        self.labels, self.list, self.lrs, self.augment = labels, list, (lr, lr_classifier), augment
        self.epochs, self.batch_size, self.momentum, self.weight_decay = (
            epochs,
            batch_size,
            momentum,
            weight_decay,
        )

    def choose(self, train, seed):
        """The rows of a data set whose labels are used: (m,), sorted. ValueError where the share or the list makes no sense for it."""
        if self.list is not None:
            return listed(self.list, train)
        n, classes = round(self.labels * len(train)), len(train.classes)
        if n < classes:
            raise ValueError(
                f"labels {self.labels:g} of {len(train)} training images is {n}, fewer than the {classes} classes; "
                f"take at least {classes}/{len(train)}"
            )
        return balanced(train.labels, len(train), n, seed)

    def __str__(self):
        s = self.schedule
        return (
            f"augmentation {self.augment}; SGD, {self.epochs} epochs, batch {self.batch_size}, lr {self.lrs[0]:g}, the classifier's {self.lrs[1]:g}, "
            f"momentum {self.momentum:g}, weight decay {self.weight_decay:g}, "
            + (f"times {s.gamma:g} at {s.milestones}" if s.schedule == "step" else s.schedule)
            + "; last epoch"
        )


def listed(path, dataset):
    """The rows of a FolderSet whose file names a text file holds, one a line: (m,), sorted. ValueError names the first that is not there."""
    if not hasattr(dataset, "files"):
        raise ValueError(
            "list names image files, and this data set has none; leave list out and set labels, the share, or take data that lie in folders"
        )
    try:
        with open(path) as f:
            names = f.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"list {path} cannot be read: {error}")
    names = [name.strip() for name in names if name.strip()]
    rows = {name: [] for name in names}
    for row, file in enumerate(dataset.files):
        name = os.path.basename(file)
        if name in rows:
            rows[name].append(row)
    missing = [name for name in names if not rows[name]]
    if not names:
        raise ValueError(f"list {path} is empty; it must hold one image file name a line")
    if missing:
        raise ValueError(
            f"list {path}: {len(missing)} of its {len(names)} names are not among the {len(dataset)} training images; the first is "
            f"{missing[0]}; it is a list of other data, or data.limit leaves images out"
        )
    double = next((name for name in names if len(rows[name]) > 1), None)
    if double:
        both = " and ".join(dataset.files[row] for row in rows[double][:2])
        raise ValueError(f"list {path}: {double} is {both}; give each image a file name of its own")
    return torch.tensor(sorted({rows[name][0] for name in names}))


class Classifier(nn.Module):
    """Images (n, 3, S, S) -> logits (n, classes): the encoder's pooled features and one linear layer, as one module for DDP."""

    def __init__(self, encoder, image_size, classes, device):
        super().__init__()
        encoder.head = (
            nn.Identity()
        )  # of the pre-training; DDP wants no parameter that is never used
        self.encoder = encoder.eval()
        with torch.no_grad():  # CMC's encoder has two streams: ask it how wide it is
            width = encoder(
                torch.zeros(1, 3, image_size, image_size, device=device), "backbone"
            ).shape[1]
        self.fc = nn.Linear(width, classes, device=device)
        (
            nn.init.normal_(self.fc.weight, std=0.01),
            nn.init.zeros_(self.fc.bias),
        )  # as the linear probe

    def forward(self, x):
        return self.fc(
            self.encoder(x, "backbone")
        )  # fp32; mixed precision stays inside the encoder


@distributed.say_refusals_once()
def main():
    args, cfg = config.read_command_line(command_line(), also=("finetune",))
    # ------------------------------------------------------------------------------------------------ who takes part
    device = distributed.start(args.device)
    main_process = distributed.is_main()
    build = lambda target, section, **given: config.build(
        target, cfg[section], f"{args.cfg}: {section}", **given
    )
    how = build(Finetune, "finetune")
    run = os.path.join("runs", cfg["name"])
    folder = os.path.join(run, "finetune")
    weights = of_run(args.weights, run, args.cfg)

    torch.manual_seed(cfg["seed"])  # every process begins with the same weights
    train, test = (build(load, "data", part=part, seed=cfg["seed"]) for part in ("train", "test"))
    say_if_dark(train)
    obstacle = find_obstacle(train, test)
    if obstacle:
        raise SystemExit(
            f"{args.cfg}: no fine-tuning on {cfg['data']['name']} at {cfg['data']['root']}: {obstacle}"
        )
    classes, size = len(train.classes), cfg["data"]["image_size"]
    config.build(
        sensible_size, {}, args.cfg, image_size=size
    )  # the Loader would say so, but the encoder meets it first
    rows = config.build(how.choose, {}, f"{args.cfg}: finetune", train=train, seed=cfg["seed"])
    if how.batch_size > len(rows):
        raise SystemExit(
            f"{args.cfg}: finetune.batch_size {how.batch_size} is larger than the {len(rows)} labelled images; lower it, or use more labels"
        )
    share = (
        f"{100 * (len(rows) / len(train) if how.list else how.labels):.3g} % of the labels: {len(rows)} of {len(train)} training images, "
        + (how.list or "class-balanced")
    )
    subset, test = train.select(rows).to(device), test.to(device)

    encoder = build(
        getattr(config.chosen(cfg["model"], "model"), "Encoder", Encoder),
        "model",
        device=device,
        mean=train.mean,
        std=train.std,
    )
    if weights != "none":
        load_backbone(weights, encoder.backbone)
    net = Classifier(encoder, size, classes, device)
    model = distributed.wrap(net, device)
    groups = [
        {"params": part.parameters(), "lr": lr} for part, lr in zip((encoder, net.fc), how.lrs)
    ]
    optimizer = build(sgd, "finetune", parameters=groups, lr=how.lrs[0])
    scaler = torch.amp.GradScaler(device.type, enabled=encoder.precision == "fp16")
    loader = config.build(
        Loader,
        {**cfg["data"], "augment": how.augment, "augment_backend": "batched"},
        f"{args.cfg}: finetune",
        dataset=subset,
        batch_size=how.batch_size,
        n_views=1,
        seed=cfg["seed"],
        device=device,
    )
    if loader.local % encoder.bn_splits:
        raise SystemExit(
            f"{args.cfg}: finetune.batch_size {loader.batch} gives each process {loader.local} images, which model.bn_splits "
            f"{encoder.bn_splits} does not divide; set another batch_size, or model.bn_splits=1"
        )
    if loader.local // encoder.bn_splits < 2:
        raise SystemExit(
            f"{args.cfg}: finetune.batch_size {loader.batch} leaves BatchNorm one image at a time, with {distributed.world_size()} processes and "
            f"model.bn_splits {encoder.bn_splits}; it needs two, so raise batch_size"
        )
    y, y_test = subset.labels.to(device), test.labels.to(device)
    protocol = f"all layers and a linear classifier fine-tuned {'from random weights ' if weights == 'none' else ''}on {share}; {how}"

    # ------------------------------------------------------------------------------------------------ where it stands
    last, state = (
        os.path.join(folder, "last.pt"),
        dict(model=net, optimizer=optimizer, scaler=scaler),
    )
    settings = {
        **cfg,
        "weights": "none" if weights == "none" else file_digest(weights),
        "labelled": digest(rows.numpy().tobytes()),
    }
    start = 0
    if (
        os.path.exists(last) and not args.fresh
    ):  # pre-training may change the finetune: section and go on, fine-tuning may not
        saved = checkpoint.read(last).get("settings", settings)
        other = config.difference(
            saved, settings, [key for key in checkpoint.MAY_CHANGE if key != "finetune"]
        )
        if other:
            raise SystemExit(
                f"{last} is of another fine-tuning: {other}; choose another name=..., or start this one over with --fresh"
            )
        start = checkpoint.resume(last, settings, **state)
    figures_file, steps = os.path.join(run, "finetune.jsonl"), len(loader)
    if start == how.epochs:
        say(
            f"{last} is finished, all {start} epochs; its figures are in {figures_file}; --fresh starts it over"
        )
        return distributed.stop()
    if main_process:
        os.makedirs(folder, exist_ok=True)
        config.keep(cfg, run)
        log = Log(folder, start)
    say(config.text(cfg), end="")
    say(
        f"{weights} on {cfg['data']['name']}: {share}; {len(test)} test images, {classes} classes; {steps} steps an epoch of {loader.batch} = "
        f"{distributed.world_size()} processes x {loader.local}; {device}, {encoder.precision}"
    )
    if start:
        say(f"going on from {last} after epoch {start} of {how.epochs}")

    def kept_and_how_on():
        if not epoch:
            return "nothing was saved yet"
        return f"{last} holds the state after epoch {epoch} of {how.epochs}, and the same line goes on from there"

    def diverged(what, epoch):
        saved = f"{last} holds the state after epoch {epoch}" if epoch else "nothing was saved yet"
        raise SystemExit(
            f"{what} at epoch {epoch + 1}; {saved}; try a lower finetune.lr or finetune.lr_classifier with --fresh"
        )

    # ------------------------------------------------------------------------------------------------ the loop
    for epoch in range(start, how.epochs):
        net.train()
        total, began = torch.zeros(2, device=device), time.time()
        batches = or_say_what_is_kept(loader.epoch(epoch), kept_and_how_on)
        bar = tqdm(
            batches,
            f"epoch {epoch + 1}/{how.epochs}",
            total=steps,
            leave=False,
            disable=None if main_process else True,
        )
        for step, ((images,), index) in enumerate(bar):
            now = epoch + step / steps
            for group, lr in zip(optimizer.param_groups, how.lrs):
                group["lr"] = lr * how.schedule(now)

            logits = model(images)  # (b, classes)
            loss = F.cross_entropy(logits, y[index])
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            total += (
                torch.stack([loss.detach(), 100 * (logits.argmax(1) == y[index]).float().mean()])
                / steps
            )  # stays on the device
            if step % 20 == 0:
                value = loss.item()
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                if not math.isfinite(value):
                    diverged(f"the loss is {value}", epoch)

        # -------------------------------------------------------------------------------------------- end of an epoch
        seconds = time.time() - began
        distributed.average_buffers(net)
        mean_loss, right = distributed.mean(total).tolist()
        if not math.isfinite(mean_loss):
            diverged(f"the loss is {mean_loss}", epoch)
        if not all(p.isfinite().all() for p in net.parameters()):  # the last step may have done it
            diverged("a weight is not finite", epoch)
        say(
            f"epoch {epoch + 1:3d}/{how.epochs}  loss {mean_loss:.3f}  right {right:.1f} % of the augmented training images  {seconds:.1f} s"
        )
        if main_process:
            log.write(
                epoch + 1,
                {
                    k: float(f"{v:.6g}")
                    for k, v in {
                        "loss": mean_loss,
                        "train top-1": right,
                        "lr": how.lrs[0] * how.schedule(now),
                        "seconds": seconds,
                    }.items()
                },
            )
        if epoch + 1 < how.epochs:
            checkpoint.save(last, settings, epoch + 1, **state)

    # ------------------------------------------------------------------------------------------------ what came out
    net.eval()
    with say_what_is_kept(kept_and_how_on):
        logits = extract(net, test, size, device, loader.workers, what="test")  # (m, classes)
    hits = logits.topk(min(5, classes)).indices == y_test[:, None]  # (m, 5)
    figures = {"top-1": percent(hits[:, 0]), "top-5": percent(hits.any(1))}
    say(
        f"\n{protocol}\n\n{'':24}{'top-1':>10}{'top-5':>10}\n{cfg['name']:24}{figures['top-1']:10.2f}{figures['top-5']:10.2f}"
    )
    if main_process:
        with open(figures_file, "a") as f:
            f.write(
                json.dumps(
                    {
                        "weights": weights,
                        "protocol": protocol,
                        "seed": cfg["seed"],
                        "seconds": round(sum(line["seconds"] for line in lines(log.path)), 1),
                        "figures": figures,
                    }
                )
                + "\n"
            )
    checkpoint.save(
        last, settings, how.epochs, **state
    )  # only now: a run that counts as finished has its figures
    distributed.stop()


def digest(data):
    return "sha256 " + hashlib.sha256(data).hexdigest()[:16]


def file_digest(path):
    with open(path, "rb") as f:
        return digest(f.read())


if __name__ == "__main__":
    main()
