"""Contrastive pre-training: an encoder learns from images without labels.

    python train_pretrain.py --cfg yaml/quickstart.yaml                                  a CPU, or one GPU: the same line
    python train_pretrain.py --cfg yaml/cifar10_ring.yaml optim.epochs=10 name=short     settings replaced on the command line
    torchrun --nproc_per_node 8 train_pretrain.py --cfg yaml/cifar10_moco.yaml           8 GPUs (or, without any, 8 processes)
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train_pretrain.py --cfg ...     on both of 2 nodes

A run lives in runs/<name>/ (name: the file's, unless set): config.yaml, log.jsonl, TensorBoard's events, augmentation.png, last.pt, and at the
end backbone.pt, torchvision's keys (CMC's: L.* and ab.*). A run that was stopped goes on from last.pt when it is started again; --fresh starts it over.
Batch size and learning rate are global, for all processes together; nothing is scaled silently.
"""
import contextlib
import math
import os
import shlex
import time

import torch
from tqdm import tqdm

from data.datasets import load
from data.loader import Loader
from engine import checkpoint, config, distributed
from engine.distributed import say
from engine.features import KNN, embeddings
from engine.log import Log, lines
from engine.schedule import Schedule, sgd
from losses.together import Together
from models.resnet import Encoder


def main():
    parser = config.command_line(__doc__)
    parser.add_argument("--fresh", action="store_true", help="start over, though the run has a last.pt")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks: the first step takes a minute, the others a few %% less")
    args = parser.parse_args()
    cfg = config.load(args.cfg, args.overrides)
    if args.print_config:
        return print(config.text(cfg), end="")

    # ------------------------------------------------------------------------------------------------ who takes part
    device = distributed.start()
    main_process = distributed.is_main()
    build = lambda target, section, **given: config.build(target, cfg[section], f"{args.cfg}: {section}", **given)
    folder = os.path.join("runs", cfg["name"])
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(cfg["seed"])                         # every process begins with the same weights, bank and queue

    pretrain = build(load, "data", part="pretrain", seed=cfg["seed"])
    train = pretrain if cfg["data"]["split"] == "train" else build(load, "data", part="train", seed=cfg["seed"])
    test = build(load, "data", part="test", seed=cfg["seed"])
    if cfg["data"]["augment_backend"] == "batched":
        [part.to(device) for part in (pretrain, train, test) if part]

    Host = config.chosen(cfg["model"], "model")
    encoder = build(getattr(Host, "Encoder", Encoder), "model", device=device, mean=pretrain.mean, std=pretrain.std)   # CMC brings one of its own
    host = build(Host, "model", encoder=encoder, n_data=len(pretrain))
    epochs = cfg["optim"]["epochs"]
    several = cfg["loss"] if isinstance(cfg["loss"], list) else [cfg["loss"]]
    losses = [config.build(config.chosen(one, "loss"), one, f"{args.cfg}: loss", epochs=epochs, n_data=len(pretrain), n_keys=host.n_keys, labels=pretrain.labels)
              for one in several]
    loss_fn = losses[0] if len(losses) == 1 else config.build(Together, {}, f"{args.cfg}: loss", losses=losses)
    host, loss_fn = host.to(device), loss_fn.to(device)
    model = distributed.wrap(encoder, device)
    if args.compile:
        for net in (encoder, host.key_encoder.net) if hasattr(host, "key_encoder") else (encoder,):
            net.backbone.compile()

    schedule = build(Schedule, "optim")
    optimizer = build(sgd, "optim", parameters=encoder.parameters(), lr=schedule.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=encoder.precision == "fp16")
    loader = config.build(Loader, cfg["data"], f"{args.cfg}: optim", dataset=pretrain, batch_size=schedule.batch_size, n_views=host.n_views, seed=cfg["seed"],
                          device=device)
    parts = cfg["optim"]["accumulate"]
    if loader.local % (parts * encoder.bn_splits):
        raise SystemExit(f"{args.cfg}: optim.batch_size {loader.batch} gives each process {loader.local} images, which optim.accumulate {parts} times "
                         f"model.bn_splits {encoder.bn_splits} does not divide")
    if parts > 1 and not hasattr(host, "news"):
        raise SystemExit(f"{args.cfg}: optim.accumulate is {parts}, but the negatives of {cfg['model']['host']} are the batch itself, which cannot be taken in parts; "
                         "take a smaller batch_size, more processes, or a host with a memory")
    monitor = build(KNN, "knn", train=train, test=test, image_size=cfg["data"]["image_size"], device=device, workers=loader.workers)
    torch.manual_seed(cfg["seed"] + 2 ** 20 * distributed.rank())

    # ------------------------------------------------------------------------------------------------ where it stands
    last, state = os.path.join(folder, "last.pt"), dict(encoder=encoder, host=host, loss=loss_fn, optimizer=optimizer, scaler=scaler)
    start = checkpoint.resume(last, cfg, **state) if os.path.exists(last) and not args.fresh else 0
    steps = len(loader)
    if main_process:
        with open(os.path.join(folder, "config.yaml"), "w") as f:
            f.write(config.text(cfg))
        log = Log(folder, start)
        if start == 0:
            for stale in (f for f in os.listdir(folder) if f.endswith(".jsonl") and f != "log.jsonl"):     # figures of the weights that --fresh forgets
                os.replace(os.path.join(folder, stale), os.path.join(folder, stale + ".before"))
            log.picture(os.path.join(folder, "augmentation.png"), loader.examples(), columns=8)
    say(config.text(cfg), end="")
    say(f"{folder}: {len(pretrain)} images, {steps} steps an epoch of {loader.batch} = {distributed.world_size()} processes x {loader.local}; "
        f"lr {schedule.lr:g}, both global; {device}, {encoder.precision}, {sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M parameters")
    say(f"{monitor}" if monitor.possible else "no kNN: the data set has no labels or no test part")
    if start:
        say(f"going on from {last} after epoch {start} of {epochs}")
    elif monitor.due(0, epochs):
        figures = {"knn": monitor(encoder)}
        say(f"untrained: kNN {figures['knn']:.1f} %")
        if main_process:
            log.write(0, figures)

    def diverged(what, epoch, step):
        saved = f"{last} holds the state after epoch {epoch}" if epoch else "nothing was saved yet"
        raise SystemExit(f"{what} at epoch {epoch + 1}, step {step + 1} of {steps}; {saved}; try a lower optim.lr")

    embed = lambda: embeddings(getattr(host, "key_encoder", encoder), pretrain, cfg["data"]["image_size"], device, loader.workers)      # IFND clusters them

    # ------------------------------------------------------------------------------------------------ the loop
    for epoch in range(start, epochs):
        total, began, wait = {}, time.time(), 0.0
        if hasattr(loss_fn, "before_epoch"):
            loss_fn.before_epoch(epoch, embed)
        encoder.train(), host.train()
        ready = time.time()
        bar = tqdm(loader.epoch(epoch), f"epoch {epoch + 1}/{epochs}", total=steps, leave=False, disable=None if main_process else True)
        for step, (views, index) in enumerate(bar):
            wait += time.time() - ready                    # for data; on a CPU that is the augmentation's own time
            now = epoch + step / steps
            for group in optimizer.param_groups:
                group["lr"] = schedule(now)

            optimizer.zero_grad(set_to_none=True)
            for part, (*some, rows) in enumerate(zip(*(x.chunk(parts) for x in (*views, index))), 1):
                with model.no_sync() if part < parts and distributed.world_size() > 1 else contextlib.nullcontext():
                    contrasts = host(model, some, rows)    # who is contrasted with whom
                    results = [loss_fn(contrast, now) for contrast in contrasts]        # how
                    loss = sum(value for value, _ in results)
                    scaler.scale(loss / parts).backward()

                with torch.no_grad():                      # figures stay on the device: nothing here waits for it
                    q = contrasts[0].query                 # spread: 1 when all over the sphere, 0 when collapsed
                    figures = {"loss": loss.detach(), "spread": q.std(0).mean() * q.shape[1] ** 0.5}
                    figures |= {name: sum(f[name] for _, f in results) / len(results) for name in results[0][1]}
                    for name, value in figures.items():
                        total[name] = total.get(name, 0) + value / (steps * parts)
            scaler.step(optimizer)
            scaler.update()
            host.after_step()
            if step % 20 == 0 or step == steps - 1:
                value = loss.item()
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                if not math.isfinite(value):
                    diverged(f"the loss is {value}", epoch, step)
            ready = time.time()
        if not all(p.isfinite().all() for p in encoder.parameters()):                  # the last step may have done it
            diverged("a weight is not finite", epoch, step)

        # -------------------------------------------------------------------------------------------- end of an epoch
        seconds = time.time() - began
        distributed.average_buffers(encoder), distributed.average_buffers(host)
        figures = dict(zip(total, distributed.mean(torch.stack([torch.as_tensor(v, device=device).float() for v in total.values()])).tolist()))
        chance = ("" if len(contrasts) == 1 else f"{len(contrasts)} ") + "log(K+1)"       # CMC sums two losses
        figures |= {"chance": len(contrasts) * math.log(figures["K"] + 1), "lr": schedule(now), "seconds": seconds, "images/s": steps * loader.batch / seconds,
                    "data wait": wait / seconds}
        if monitor.due(epoch + 1, epochs):
            figures["knn"] = monitor(encoder)
        say(f"epoch {epoch + 1:3d}/{epochs}  loss {figures['loss']:.3f} (chance: {chance} = {figures['chance']:.3f})  lr {figures['lr']:.4f}  "
            f"{seconds:.1f} s, {figures['images/s']:.0f} images/s" + (f"  kNN {figures['knn']:.1f} %" if "knn" in figures else ""))
        if main_process:
            log.write(epoch + 1, {k: float(f"{v:.6g}") for k, v in figures.items()} | {"hardware": distributed.hardware(device)})
        checkpoint.save(last, cfg, epoch + 1, **state)

    if main_process:
        backbone = os.path.join(folder, "backbone.pt")
        checkpoint.write(backbone, encoder.backbone.state_dict())
        seen = [(line["epoch"], line["knn"]) for line in lines(log.path) if "knn" in line]
        if seen:
            say(f"\n  kNN    untrained {seen[0][1]:5.1f} %\n  after {epochs:3d} epochs {seen[-1][1]:5.1f} %\n")
        say(f"{backbone}: the encoder, torchvision's keys\nnext: python train_linear.py --cfg {args.cfg}" + "".join(f" {shlex.quote(o)}" for o in args.overrides))
    distributed.stop()


if __name__ == "__main__":
    main()
