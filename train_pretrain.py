"""Contrastive pre-training: an encoder learns from images without labels.

    python train_pretrain.py --cfg yaml/quickstart.yaml                                  a CPU, or one GPU: the same line
    python train_pretrain.py --cfg yaml/cifar10_ring.yaml optim.epochs=10 name=short     settings replaced on the command line
    torchrun --nproc_per_node 8 train_pretrain.py --cfg yaml/cifar10_moco.yaml           8 GPUs (or, without any, 8 processes)
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train_pretrain.py --cfg ...     on both of 2 nodes

A run lives in runs/<name>/ (name: the file's, unless set): config.yaml, log.jsonl, TensorBoard's events, augmentation.png, last.pt, and at the
end backbone.pt, torchvision's keys (CMC's: L.* and ab.*). A run that was stopped goes on from last.pt when it is started again; --fresh starts it
over, and what there is of the old weights gets names ending in .before.
SIGTERM and SIGUSR1 end a step, save within the epoch, and exit with 75: see engine/signals.py. previous.pt is the checkpoint before last.pt.
Batch size and learning rate are global, for all processes together; nothing is scaled silently.
"""

import contextlib
import math
import os
import shlex
import time

from engine import config


def command_line():
    parser = config.command_line(__doc__)
    parser.add_argument(
        "--fresh", action="store_true", help="start over, though the run has a last.pt"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the networks: the first step takes a minute, the others a few %% less",
    )
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    config.answer_early(command_line())

import torch
from tqdm import tqdm

from data.datasets import load
from data.image_files import say_if_dark
from data.loader import Loader
from data.workers import or_say_what_is_kept, say_what_is_kept
from engine import checkpoint, distributed, signals
from engine.distributed import say
from engine.features import KNN, embeddings
from engine.log import Log, lines
from engine.place import Place
from engine.schedule import Schedule, sgd
from engine.weights import save_backbone
from losses.together import Together
from models.resnet import Encoder


@distributed.say_refusals_once()
def main():
    args, cfg = config.read_command_line(command_line())
    # ------------------------------------------------------------------------------------------------ who takes part
    device = distributed.start(args.device)
    folder = os.path.join("runs", cfg["name"])
    with checkpoint.claim(folder):  # meanwhile no second process trains there
        run(args, cfg, device, folder)


def run(args, cfg, device, folder):
    """Training, in a folder that is this run's alone."""
    main_process = distributed.is_main()
    build = lambda target, section, **given: config.build(
        target, cfg[section], f"{args.cfg}: {section}", **given
    )
    torch.manual_seed(cfg["seed"])  # every process begins with the same weights, bank and queue

    pretrain = build(load, "data", part="pretrain", seed=cfg["seed"])
    say_if_dark(pretrain)
    same = (
        cfg["data"]["split"] == "train" and cfg["data"]["on_error"] == "stop"
    )  # what evaluates must not replace an image, whose label would be another's
    train = pretrain if same else build(load, "data", part="train", seed=cfg["seed"])
    test = build(load, "data", part="test", seed=cfg["seed"])
    if cfg["data"]["augment_backend"] == "batched":
        [part.to(device) for part in (pretrain, train, test) if part]

    Host = config.chosen(cfg["model"], "model")
    encoder = build(
        getattr(Host, "Encoder", Encoder),
        "model",
        device=device,
        mean=pretrain.mean,
        std=pretrain.std,
    )  # CMC brings one of its own
    host = build(Host, "model", encoder=encoder, n_data=len(pretrain))
    epochs = cfg["optim"]["epochs"]
    losses = [
        config.build(
            config.chosen(one, "loss"),
            one,
            f"{args.cfg}: loss",
            epochs=epochs,
            n_data=len(pretrain),
            n_keys=host.n_keys,
            labels=pretrain.labels,
        )
        for one in config.several(cfg["loss"])
    ]
    loss_fn = (
        losses[0]
        if len(losses) == 1
        else config.build(Together, {}, f"{args.cfg}: loss", losses=losses)
    )
    host, loss_fn = host.to(device), loss_fn.to(device)
    model = distributed.wrap(encoder, device)
    if args.compile:
        for net in (encoder, host.key_encoder.net) if hasattr(host, "key_encoder") else (encoder,):
            net.backbone.compile()

    schedule = build(Schedule, "optim")
    optimizer = build(sgd, "optim", parameters=encoder.parameters(), lr=schedule.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=encoder.precision == "fp16")
    if (
        scaler.is_enabled()
    ):  # it may skip the first step, and a fused SGD's momentum would be whatever the memory held
        for p in encoder.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    loader = config.build(
        Loader,
        cfg["data"],
        f"{args.cfg}: optim",
        dataset=pretrain,
        batch_size=schedule.batch_size,
        n_views=host.n_views,
        seed=cfg["seed"],
        device=device,
    )
    parts = cfg["optim"]["accumulate"]
    if loader.local % (parts * encoder.bn_splits):
        raise SystemExit(
            f"{args.cfg}: optim.batch_size {loader.batch} gives each process {loader.local} images, which optim.accumulate {parts} times "
            f"model.bn_splits {encoder.bn_splits} does not divide"
        )
    if parts > 1 and not hasattr(host, "news"):
        raise SystemExit(
            f"{args.cfg}: optim.accumulate is {parts}, but the negatives of {cfg['model']['host']} are the batch itself, which cannot be taken in parts; "
            "take a smaller batch_size, more processes, or a host with a memory"
        )
    monitor = build(
        KNN,
        "knn",
        train=train,
        test=test,
        image_size=cfg["data"]["image_size"],
        device=device,
        workers=loader.workers,
    )
    torch.manual_seed(cfg["seed"] + 2**20 * distributed.rank())

    # ------------------------------------------------------------------------------------------------ where it stands
    last, place = (
        os.path.join(folder, "last.pt"),
        Place(len(pretrain), pretrain.fingerprint(), encoder, host),
    )
    state = dict(
        place=place, encoder=encoder, host=host, loss=loss_fn, optimizer=optimizer, scaler=scaler
    )
    again = any(
        os.environ.get(f"{who}_RESTART_COUNT", "0") != "0" for who in ("TORCHELASTIC", "SLURM")
    )  # they use the same line, --fresh and all
    resumed = (again or not args.fresh) and checkpoint.exists(last)
    start = checkpoint.resume(last, cfg, **state) if resumed else 0
    steps, saved = len(loader), (start, place.step) if resumed else None
    there = lambda epoch, step: (
        f"step {step} of {steps} of epoch {epoch + 1}" if step else f"epoch {epoch} of {epochs}"
    )
    if main_process:
        with checkpoint.writing(folder):
            if not resumed:
                checkpoint.move_aside(folder)
            with open(os.path.join(folder, "config.yaml"), "w") as f:
                f.write(config.text(cfg))
            log = Log(folder, start, within=place.step > 0)
            if not resumed:
                log.picture(os.path.join(folder, "augmentation.png"), loader.examples(), columns=8)
    say(config.text(cfg), end="")
    say(
        f"{folder}: {len(pretrain)} images, {steps} steps an epoch of {loader.batch} = {distributed.world_size()} processes x {loader.local}; "
        f"lr {schedule.lr:g}, both global; {device}, {encoder.precision}, {sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M parameters"
    )
    say(f"{monitor}" if monitor.possible else f"no kNN: {monitor.obstacle}")
    if (
        cfg["data"]["on_error"] == "skip"
        and monitor.due(epochs, epochs)
        and hasattr(train, "files")
    ):
        say(
            "data.on_error=skip is for training alone: kNN stops the run at the first image that cannot be read, as another one in its place would be "
            "counted under its label; knn.every=0 trains without kNN"
        )
    if resumed:
        say(f"going on after {there(start, place.step)}")
    elif monitor.due(0, epochs):
        with say_what_is_kept(lambda: "nothing was saved yet"):
            figures = {"knn": monitor(encoder)}
        say(f"untrained: kNN {figures['knn']:.1f} %")
        if main_process:
            log.write(0, figures)

    def kept():
        return f"{last} holds the state after {there(*saved)}" if saved else "nothing was saved yet"

    def kept_and_how_on():
        return kept() + (", and the same line goes on from there" if saved else "")

    def diverged(epoch, first, step, total, fine):
        good, value = min(
            distributed.gather_objects((int(fine), total["loss"].item()))
        )  # of the process that lost it first
        lost = first + good
        what = f"the loss is {value}" if lost <= step else "a weight is not finite"
        distributed.agree(
            f"{what} at epoch {epoch + 1}, step {min(lost, step) + 1} of {steps}; {kept()}; try a lower optim.lr, with --fresh or another name=..."
        )

    def leave(epoch, step):
        say(
            f"told to stop: {last} holds the state after {there(epoch, step)}, and the same line goes on from there"
        )
        distributed.stop()
        raise SystemExit(signals.EXIT)

    embed = lambda: embeddings(
        getattr(host, "key_encoder", encoder),
        pretrain,
        cfg["data"]["image_size"],
        device,
        loader.workers,
    )  # IFND clusters them

    # ------------------------------------------------------------------------------------------------ the loop
    collapsed = False
    for epoch in range(start, epochs):
        first, seconds, wait, total = (
            place.take()
        )  # 0, 0, 0, {}; or what was done of this epoch when the run was told to stop
        began = time.time() - seconds
        if hasattr(loss_fn, "before_epoch"):
            with say_what_is_kept(kept_and_how_on):
                loss_fn.before_epoch(epoch, None if first else embed)
        encoder.train(), host.train()
        fine, ready = (
            torch.zeros((), device=device),
            time.time(),
        )  # fine: steps until the loss was not finite any more
        batches = or_say_what_is_kept(loader.epoch(epoch, first), kept_and_how_on)
        bar = tqdm(
            batches,
            f"epoch {epoch + 1}/{epochs}",
            initial=first,
            total=steps,
            leave=False,
            disable=None if main_process else True,
        )
        for step, (views, index) in enumerate(bar, first):
            wait += time.time() - ready  # for data; on a CPU that is the augmentation's own time
            now = epoch + step / steps
            for group in optimizer.param_groups:
                group["lr"] = schedule(now)

            optimizer.zero_grad(set_to_none=True)
            for part, (*some, rows) in enumerate(
                zip(*(x.chunk(parts) for x in (*views, index))), 1
            ):
                with (
                    model.no_sync()
                    if part < parts and distributed.world_size() > 1
                    else contextlib.nullcontext()
                ):
                    contrasts = host(model, some, rows)  # who is contrasted with whom
                    results = [loss_fn(contrast, now) for contrast in contrasts]  # how
                    loss = sum(value for value, _ in results)
                    scaler.scale(loss / parts).backward()

                with torch.no_grad():  # figures stay on the device: nothing here waits for it
                    q = contrasts[0].query  # spread: 1 when all over the sphere, 0 when collapsed
                    figures = {
                        "loss": loss.detach(),
                        "spread": q.std(0).mean() * q.shape[1] ** 0.5,
                        "contrasts": len(contrasts),
                    }
                    figures |= {
                        name: sum(f[name] for _, f in results) / len(results)
                        for name in results[0][1]
                    }
                    for name, value in figures.items():
                        total[name] = total.get(name, 0) + value / (steps * parts)
            scaler.step(optimizer)
            scaler.update()
            host.after_step()
            fine += total["loss"].isfinite()
            if (
                step % 20 == 0
                or step == steps - 1
                or signals.asked()
                and distributed.world_size() == 1
            ):
                # Only here is the device waited for, and one process for another: many processes, which must stop at the same step, look for signals only here.
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                weights = torch.stack(torch._foreach_norm(list(encoder.parameters()), math.inf))
                finite = (
                    (total["loss"] + weights).isfinite().all()
                )  # in weights a gradient shows, unless GradScaler skipped its step
                lost, stop = distributed.anywhere(device, not finite, signals.asked())
                if lost:
                    diverged(epoch, first, step, total, fine)
                if stop:
                    place.keep(step + 1, time.time() - began, wait, total)
                    checkpoint.save(last, cfg, epoch, **state)
                    leave(epoch, step + 1)
            ready = time.time()

        # -------------------------------------------------------------------------------------------- end of an epoch
        seconds = time.time() - began
        distributed.average_buffers(encoder), distributed.average_buffers(host)
        figures = dict(
            zip(
                total,
                distributed.mean(
                    torch.stack([torch.as_tensor(v, device=device).float() for v in total.values()])
                ).tolist(),
            )
        )
        summed = round(figures.pop("contrasts"))  # CMC: two losses
        scale = summed * getattr(loss_fn, "scale", 1.0)  # base_temperature
        chance = ("" if scale == 1 else f"{scale:.3g} ") + "log(K+1)"
        figures |= {
            "chance": scale * math.log(figures["K"] + 1),
            "lr": schedule(epoch + (steps - 1) / steps),
            "seconds": seconds,
            "images/s": steps * loader.batch / seconds,
            "data wait": wait / seconds,
        }
        if monitor.due(epoch + 1, epochs):
            with say_what_is_kept(kept_and_how_on):
                figures["knn"] = monitor(encoder)
        say(
            f"epoch {epoch + 1:3d}/{epochs}  loss {figures['loss']:.3f} (chance: {chance} = {figures['chance']:.3f})  lr {figures['lr']:.4f}  "
            f"{seconds:.1f} s, {figures['images/s']:.0f} images/s"
            + (f"  kNN {figures['knn']:.1f} %" if "knn" in figures else "")
        )
        broken = loader.replaced()
        if broken:
            say(f"WARNING: {broken}")
        if main_process:
            log.write(
                epoch + 1,
                {k: float(f"{v:.6g}") for k, v in figures.items()}
                | {"hardware": distributed.hardware(device)},
            )
        if (
            figures["spread"] < 0.05 and not collapsed
        ):  # two images have a cosine of 1 - spread^2 on average: 0.9975; a first epoch has about 0.99
            collapsed = True
            say(
                f"WARNING: the embeddings collapse: their spread is {figures['spread']:.3f}, of 1 at best, so all images look alike; try a lower optim.lr or weight_decay"
            )
        checkpoint.save(last, cfg, epoch + 1, **state)
        saved = epoch + 1, 0
        if epoch + 1 < epochs and distributed.anywhere(device, signals.asked())[0]:
            leave(*saved)

    if main_process:
        backbone = os.path.join(folder, "backbone.pt")
        save_backbone(backbone, encoder.backbone, cfg)
        say(knn_summary(lines(log.path)), end="")
        say(f"{backbone}: the encoder, torchvision's keys")
        say(f"next: {probe_command(args, cfg, monitor.obstacle)}")
    distributed.stop()


def knn_summary(log):
    """KNN before training and at the end, as words; "" if a log's lines have none.

    A run that began with knn.every 0 has no line of epoch 0: what stands first is not untrained.
    """
    measured = {line["epoch"]: line["knn"] for line in log if "knn" in line}
    rows = []
    if 0 in measured:
        rows.append(f"  kNN    untrained {measured[0]:5.1f} %")
    if any(measured):
        last = max(measured)
        first_words = "  after" if rows else "  kNN after"
        rows.append(f"{first_words} {last:3d} epochs {measured[last]:5.1f} %")
    return "\n" + "\n".join(rows) + "\n\n" if rows else ""


def probe_command(args, cfg, obstacle):
    """How to run the linear probe. obstacle: why the data of this run allow none, or None."""
    words = ["python", "train_linear.py", "--cfg", args.cfg, *args.overrides]
    if obstacle is None or cfg["linear"]["data"] is not None:
        return shlex.join(words)
    command = shlex.join([*words, "linear.data=folder", "linear.root=PATH"])
    return f"{command}\n      where PATH holds train/<class>/ and val/<class>/, which this run's data do not"


if __name__ == "__main__":
    signals.listen()
    main()
