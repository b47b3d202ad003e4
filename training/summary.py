"""What pre-training tells its user: at the start, after each epoch, at the end."""

import math
import os
import shlex

from engine import config, distributed
from engine.distributed import print_main
from engine.log import lines, round_figures
from engine.weights import preprocessing_of, save_backbone
from losses.diagnostics import chance

from .pictures import draw_if_due

# Two images have a cosine of 1 - spread^2 on average: 0.9975. A first epoch has about 0.99.
COLLAPSED = 0.05


def begin(run, cfg, loader, schedule, encoder, loss_fn, monitor):
    """Begin or go on with the log, say what is trained, and monitor the encoder before it is."""
    begin_log(run, cfg, loader)
    describe_start(run, cfg, loader, schedule, encoder, monitor)
    evaluate_at_start(run, monitor, encoder, loss_fn)


def begin_log(run, cfg, loader):
    """Begin or go on with the log. A run that begins gets a picture of its augmented images."""
    run.open_log(cfg)
    if run.log and not run.is_resumed:
        path = os.path.join(run.folder, "augmentation.png")
        run.log.picture(path, loader.examples(), columns=8)


def describe_start(run, cfg, loader, schedule, encoder, monitor):
    """Print the settings, the sizes, and where the run stands."""
    print_main(config.to_yaml(cfg), end="")
    world, parameters = distributed.world_size(), sum(p.numel() for p in encoder.parameters())
    print_main(
        f"{run.folder}: {len(loader.dataset)} images, {run.steps} steps an epoch of {loader.batch} "
        f"= {world} processes x {loader.local}; lr {schedule.lr:g}, both global; {run.device}, "
        f"{encoder.precision}, {parameters / 1e6:.1f} M parameters"
    )
    knn, unlabelled = monitor
    is_monitored = monitor.due(run.epochs, run.epochs)
    print_main(f"{knn}" if knn.possible else f"no kNN: {knn.obstacle}")
    if unlabelled.possible and is_monitored:
        print_main(f"{unlabelled}")
    skips = cfg["data"]["on_error"] == "skip" and hasattr(knn.train, "files")
    if skips and knn.possible and is_monitored:
        print_main(
            "data.on_error=skip is for training alone: kNN stops the run at the first image that "
            "cannot be read, as another one in its place would be counted under its label; "
            "knn.every=0 trains without kNN"
        )
    if run.is_longer:
        print_main(
            f"{run.folder} is trained on, to epoch {run.epochs}; a backbone.pt of fewer epochs and "
            "what was evaluated of it have names that end in .before"
        )
    if run.is_resumed:
        print_main(f"going on after {run.position(run.start_epoch, run.progress.step)}")


def evaluate_at_start(run, monitor, encoder, loss_fn):
    """Monitor the encoder before training; or after the last epoch, if the run ended meanwhile."""
    figures = run.unlogged_figures()
    if figures:
        evaluate(run, run.start_epoch, figures, monitor, encoder, loss_fn)
    if run.is_resumed or not monitor.due(0, run.epochs):
        return
    figures = monitor(encoder)
    words = describe_knn(figures) + describe_unlabelled(figures)
    if words:
        print_main(f"{before_training(run.settings)}:{words.removeprefix(' ')}")
    if figures and run.log:
        run.log.write(0, figures)


def before_training(cfg):
    """What an encoder is before training, in words."""
    return "begun from weights" if "weights" in cfg else "untrained"


def after_epoch(run, epoch, figures, monitor, encoder, host, loss_fn, loader):
    """Log the epoch with that number, from 1, say what was wrong in it, and draw where it is due.

    Args:
        figures: of epoch_figures.
    """
    evaluate(run, epoch, figures, monitor, encoder, loss_fn)
    warn_of_replaced_images(loader)
    draw_if_due(run, epoch, encoder, host, loss_fn, loader)


def evaluate(run, epoch, figures, monitor, encoder, loss_fn):
    """Log the figures of the epoch with that number, from 1, and the monitor's where it is due."""
    if monitor.due(epoch, run.epochs):
        figures = figures | monitor(encoder)
    log_epoch(run, epoch, figures, loss_fn)


def describe_knn(figures):
    """kNN in words, "" where it is not among the figures."""
    return f"  kNN {figures['knn']:.1f} %" if "knn" in figures else ""


def describe_unlabelled(figures):
    """The figures of evaluation/unlabelled.py in words, "" where they are not there."""
    if "RankMe" not in figures:
        return ""
    return (
        f"  RankMe {figures['RankMe']:.1f}  alignment {figures['alignment']:.3f}"
        f"  uniformity {figures['uniformity']:.2f}"
    )


def epoch_figures(run, loss_fn, schedule, loader):
    """The figures of an epoch: the means of its steps' figures, the loss at chance, and times."""
    figures = run.progress.means(run.device)
    seconds = run.progress.seconds
    n_contrasts = round(figures.pop("contrasts"))  # CMC has two, whose losses are summed
    return figures | {
        "chance": n_contrasts * chance(loss_fn, figures["K"]),
        "lr": schedule(run.epoch + (run.steps - 1) / run.steps),  # of the last step
        "seconds": seconds,
        "images/s": run.steps * loader.batch / seconds,
        "data wait": run.progress.data_seconds / seconds,
    }


def log_epoch(run, epoch, figures, loss_fn):
    """Print the figures of the epoch with that number, from 1, and write them into the log."""
    print_main(
        f"epoch {epoch:3d}/{run.epochs}  loss {figures['loss']:.3f} "
        f"(chance: {describe_chance(figures, loss_fn)})  lr {figures['lr']:.4f}  "
        f"{figures['seconds']:.1f} s, {figures['images/s']:.0f} images/s"
        f"{describe_knn(figures)}"
    )
    if "RankMe" in figures:
        print_main(f"{'':12}{describe_unlabelled(figures)}")
    if not run.log:
        return
    warned = any(line.get("spread", 1.0) < COLLAPSED for line in lines(run.log.path))
    run.log.write(
        epoch, round_figures(figures) | {"hardware": distributed.describe_devices(run.device)}
    )
    if figures["spread"] < COLLAPSED and not warned:
        print_main(
            f"WARNING: the embeddings collapse: their spread is {figures['spread']:.3f}, of 1 at "
            "best, so all images look alike; try a lower optim.lr or weight_decay"
        )


def describe_chance(figures, loss_fn):
    """The loss at chance, in words: with its formula, unless the loss has one of its own."""
    value = f"{figures['chance']:.3f}"
    if hasattr(loss_fn, "chance"):
        return value
    formula = math.log(figures["K"] + 1)
    scale = figures["chance"] / formula if formula else 1.0
    factor = "" if math.isclose(scale, 1, rel_tol=1e-3) else f"{scale:.3g} "
    return f"{factor}log(K+1) = {value}"


def warn_of_replaced_images(loader):
    """Say how many images could not be read in this epoch (data.on_error=skip)."""
    problem = loader.replaced()
    if problem:
        print_main(f"WARNING: {problem}")


def finish(run, cfg, encoder, dataset, obstacle, args):
    """Write backbone.pt, and say what came out and how to go on. Only the first process does.

    Args:
        dataset: that was trained on, whose normalisation the weights want.
        obstacle: why the run's data allow no evaluation, or None.
        args: of the command line.
    """
    if not distributed.is_main():
        return
    path = os.path.join(run.folder, "backbone.pt")
    preprocessing = preprocessing_of(cfg["data"]["image_size"], dataset.mean, dataset.std)
    save_backbone(path, encoder.backbone, cfg, preprocessing)
    print_main(knn_summary(lines(run.log.path), before_training(cfg)), end="")
    print_main(f"{path}: the encoder, torchvision's keys")
    print_main(f"next: {probe_command(cfg, obstacle, args.cfg, args.overrides)}")


def knn_summary(log, before="untrained"):
    """kNN before training and at the end, in words; "" if none of a log's lines has it.

    A run that began with knn.every 0 has no line of epoch 0: what stands first is not untrained.

    Args:
        log: its lines.
        before: what the encoder is before training, see before_training.
    """
    width = max(10, len(before))
    measured = {line["epoch"]: line["knn"] for line in log if "knn" in line}
    rows = []
    if 0 in measured:
        rows.append(f"  kNN   {before:>{width}} {measured[0]:5.1f} %")
    if any(measured):
        last = max(measured)
        first_words = "  after" if rows else "  kNN after"
        rows.append(f"{first_words} {f'{last} epochs':>{width}} {measured[last]:5.1f} %")
    return "\n" + "\n".join(rows) + "\n\n" if rows else ""


def probe_command(cfg, obstacle, file, overrides):
    """How to run the linear probe. obstacle: why the data of this run allow none, or None."""
    words = ["python", "train_linear.py", "--cfg", file, *overrides]
    if obstacle is None or cfg["linear"]["data"] is not None:
        return shlex.join(words)
    data, root = cfg["knn"]["data"], cfg["knn"]["root"] or "datasets"
    if data is not None:  # kNN had labels from elsewhere, and so has the probe
        return shlex.join([*words, f"linear.data={data}", f"linear.root={root}"])
    command = shlex.join([*words, "linear.data=folder", "linear.root=PATH"])
    return (
        f"{command}\n      where PATH holds train/<class>/ and val/<class>/, which this run's data "
        "do not"
    )
