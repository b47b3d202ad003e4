"""Contrastive pre-training: an encoder learns from images without labels.

    python train_pretrain.py --cfg yaml/quickstart.yaml                     a CPU, or one GPU
    python train_pretrain.py --cfg yaml/cifar10_ring.yaml optim.epochs=10 name=short
    torchrun --nproc_per_node 8 train_pretrain.py --cfg yaml/cifar10_moco.yaml
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
        train_pretrain.py --cfg yaml/imagenet_moco.yaml                     on each of 2 nodes

A run lives in runs/<name>/, where name is the file's unless it is set: config.yaml, log.jsonl,
TensorBoard's events, augmentation.png, last.pt, previous.pt (the checkpoint before it), and at the
end backbone.pt with torchvision's keys (CMC's: L.* and ab.*). A run that was stopped goes on from
last.pt when the same line is given again. --fresh starts over; what the old weights left gets names
ending in .before. How a run is stopped: engine/signals.py. Batch size and learning rate are global,
for all processes together; nothing is scaled silently.
"""

import os

from engine import config, signals


def make_parser():
    """The command line."""
    parser = config.command_line(__doc__)
    parser.add_argument(
        "--fresh", action="store_true", help="start over, though there is a last.pt"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    config.answer_early(make_parser())

import torch

from data.image_files import say_if_dark
from engine import distributed
from evaluation.features import embeddings
from losses.diagnostics import step_diagnostics
from training.build import Builder, compile_backbones
from training.epoch import EpochProgress
from training.run import Run
from training.summary import (
    describe_start,
    epoch_figures,
    finish,
    log_epoch,
    warn_of_replaced_images,
)


@distributed.say_refusals_once()
def main():
    args, cfg = config.read_command_line(make_parser())
    device = distributed.init_distributed(args.device)
    folder = os.path.join("runs", cfg["name"])
    epochs = cfg["optim"]["epochs"]
    build = Builder(cfg, args.cfg)
    with build("log", Run, folder=folder, settings=cfg, epochs=epochs, fresh=args.fresh) as run:
        pretrain(run, build, args, cfg, device)
    distributed.cleanup()


def pretrain(run, build, args, cfg, device):
    # ------------------------------------------------------------------------------------- set-up
    torch.manual_seed(cfg["seed"])  # the same weights, bank and queue in every process
    data = build.datasets(device)
    say_if_dark(data.pretrain)
    labels = data.labels(device)  # for the log alone
    encoder, host = build.host(data.pretrain, device)
    loss_fn = build.loss(data.pretrain, host, device)
    model = distributed.wrap_ddp(encoder, device)
    optimizer, schedule, scaler = build.optimizer(encoder, device)
    loader = build.loader(data.pretrain, host, encoder, schedule, device)
    knn = build.knn(data, loader, device)
    if args.compile:
        compile_backbones(encoder, host)
    torch.manual_seed(cfg["seed"] + 2**20 * distributed.rank())  # each its own numbers from here

    steps, accumulate = len(loader), cfg["optim"]["accumulate"]
    progress = EpochProgress(len(data.pretrain), data.pretrain.fingerprint(), encoder, host)
    run.resume(
        progress,
        steps,
        device,
        encoder=encoder,
        host=host,
        loss=loss_fn,
        optimizer=optimizer,
        scaler=scaler,
    )
    run.open_log(cfg)
    if run.log and not run.is_resumed:
        run.log.picture(os.path.join(run.folder, "augmentation.png"), loader.examples(), columns=8)
    describe_start(run, cfg, loader, schedule, encoder, knn, device)
    evaluate_at_start(run, knn, encoder, loss_fn)

    def embed():  # the whole data set, for IFND's clusters
        key_encoder = getattr(host, "key_encoder", encoder)
        size = cfg["data"]["image_size"]
        return embeddings(key_encoder, data.pretrain, size, device, loader.workers)

    # ----------------------------------------------------------------------------------- training
    for epoch in range(run.start_epoch, schedule.epochs):
        first_step = run.begin_epoch(epoch)
        if hasattr(loss_fn, "before_epoch"):
            loss_fn.before_epoch(epoch, None if first_step else embed)
        encoder.train()
        host.train()
        with signals.deferred():  # a signal is obeyed after a step, by run.after_step
            bar = run.progress_bar(loader.epoch(epoch, first_step))
            for step, (views, index) in enumerate(bar, first_step):
                progress.batch_arrived()
                now = epoch + step / steps  # in epochs: 12.5 is half-way through the 13th
                for group in optimizer.param_groups:
                    group["lr"] = schedule(now)

                # forward and backward, summing the gradients of the micro-batches
                optimizer.zero_grad(set_to_none=True)
                for part, part_index, is_last in micro_batches(views, index, accumulate):
                    with distributed.gradient_sync(model, is_last):
                        contrasts = host(model, part, part_index)  # who meets whom
                        outputs = [loss_fn(contrast, now) for contrast in contrasts]
                        loss = sum(output.loss for output in outputs)  # CMC has two contrasts
                        scaler.scale(loss / accumulate).backward()
                    progress.add({"loss": loss.detach()})

                # update the encoder, then the memory: the gradient was that of the old keys
                scaler.step(optimizer)
                scaler.update()
                host.update_memory()

                # log, check and save; only at sync steps the device is waited for
                if run.is_sync_step(step):
                    progress.add(step_diagnostics(loss_fn, contrasts, outputs, labels, now))
                run.after_step(step, bar)

            distributed.average_buffers(encoder)
            distributed.average_buffers(host)
            last_lr = schedule(epoch + (steps - 1) / steps)
            figures = epoch_figures(run, loss_fn, last_lr, steps * loader.batch)
            run.end_epoch(figures)
        evaluate(run, epoch + 1, figures, knn, encoder, loss_fn)
        warn_of_replaced_images(loader)

    finish(run, cfg, encoder, data.pretrain, knn.obstacle, args)


def micro_batches(views, index, n):
    """n equal parts of a batch: (views, index, whether it is the last part)."""
    parts = zip(*(x.chunk(n) for x in (*views, index)))
    for i, (*part, part_index) in enumerate(parts, 1):
        yield part, part_index, i == n


def evaluate_at_start(run, knn, encoder, loss_fn):
    """kNN of the untrained encoder; or of the last epoch, if the run was ended during its kNN."""
    figures = run.unlogged_figures()
    if figures:
        evaluate(run, run.start_epoch, figures, knn, encoder, loss_fn)
    if not run.is_resumed and knn.due(0, run.epochs):
        accuracy = knn(encoder)
        distributed.print_main(f"untrained: kNN {accuracy:.1f} %")
        if run.log:
            run.log.write(0, {"knn": accuracy, "knn voters": knn.voters})


def evaluate(run, epoch, figures, knn, encoder, loss_fn):
    """Log the figures of an epoch, with kNN where it is due; epoch counts from 1."""
    if knn.due(epoch, run.epochs):
        figures = {**figures, "knn": knn(encoder), "knn voters": knn.voters}
    log_epoch(run, epoch, figures, loss_fn)


if __name__ == "__main__":
    signals.run(main)
