"""Contrastive pre-training: an encoder learns from images without labels.

    python train_pretrain.py --cfg yaml/quickstart.yaml                     a CPU, or one GPU
    python train_pretrain.py --cfg yaml/cifar10_ring.yaml optim.epochs=10 name=short
    python train_pretrain.py --cfg yaml/cifar10_ring.yaml name=second --weights runs/short/last.pt
    torchrun --nproc_per_node 8 train_pretrain.py --cfg yaml/cifar10_moco.yaml
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
        train_pretrain.py --cfg yaml/imagenet_moco.yaml                     on each of 2 nodes

A run lives in runs/<name>/ (docs/running.md): settings, log, pictures, last.pt, from which it goes
on when the same line is given again, and at the end backbone.pt. Batch size and learning rate are
global, for all processes together; nothing is scaled silently.
"""

from engine import config, signals


def make_parser():
    """The command line."""
    parser = config.command_line(__doc__)
    parser.add_argument("--fresh", action="store_true", help="start over, though there is last.pt")
    parser.add_argument(
        "--weights", dest="begin_from", metavar="FILE", help="begin from a last.pt, or any ResNet"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    config.answer_early(make_parser())

import torch

from engine import distributed
from losses.diagnostics import step_diagnostics
from training import begin_from, summary
from training.build import Builder
from training.epoch import EpochProgress


@distributed.say_refusals_once()
def main():
    """Pre-train an encoder."""
    args, cfg = config.read_command_line(make_parser())
    device = distributed.init_distributed(args.device)
    build = Builder(cfg, args.cfg)
    with build.run(args.fresh) as run:
        pretrain(run, build, args, cfg, device)
    distributed.cleanup()


def pretrain(run, build, args, cfg, device):
    """Build everything, go on from the last checkpoint, and train."""
    # ------------------------------------------------------------------------------------- set-up
    source = begin_from.read_source(run, cfg.get("weights"))  # None: at random
    torch.manual_seed(cfg["seed"])  # the same weights, bank and queue in every process
    data = build.datasets(device, run)
    labels = data.labels(device)  # for the log alone
    encoder, host = build.host(data.pretrain, device)
    begin_from.fill(source, encoder, host, data.pretrain)
    del source  # it may hold a whole memory bank
    loss_fn = build.loss(data.pretrain, host, device)
    model = distributed.wrap_ddp(encoder, device)
    optimizer, schedule, scaler = build.optimizer(encoder, device)  # scaler: for fp16 alone
    loader = build.loader(data.pretrain, host, encoder, schedule, device)
    monitor = build.monitor(data, loader, device)
    if args.compile:
        build.compile(encoder, host)
    torch.manual_seed(cfg["seed"] + 2**20 * distributed.rank())  # each its own numbers from here

    steps, accumulate = len(loader), cfg["optim"]["accumulate"]
    progress = EpochProgress(len(data.pretrain), data.pretrain.fingerprint(), encoder, host)
    parts = {"encoder": encoder, "host": host, "loss": loss_fn}
    run.resume(progress, steps, device, **parts, optimizer=optimizer, scaler=scaler)
    summary.begin(run, cfg, loader, schedule, encoder, loss_fn, monitor)

    # ----------------------------------------------------------------------------------- training
    for epoch in range(run.start_epoch, schedule.epochs):
        first_step = run.begin_epoch(epoch)
        if hasattr(loss_fn, "before_epoch"):  # IFND clusters the embeddings of all images
            embed = None if first_step else build.embedder(encoder, host, data.pretrain, loader)
            loss_fn.before_epoch(epoch, embed)
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
                if run.is_figure_step(step):  # of the memory as the loss saw it
                    progress.add(step_diagnostics(loss_fn, contrasts, outputs, labels, now))
                del contrasts, outputs, loss  # their memory is needed by the next forward pass

                # update the encoder, then the memory: the gradient was that of the old keys
                scaler.step(optimizer)
                scaler.update()
                host.update_memory()
                run.after_step(step, bar)  # at some steps: check, save, stop

            distributed.average_buffers(encoder)
            distributed.average_buffers(host)
            figures = summary.epoch_figures(run, loss_fn, schedule, loader)
            run.end_epoch(figures)
        summary.after_epoch(run, epoch + 1, figures, monitor, encoder, host, loss_fn, loader)

    summary.finish(run, cfg, encoder, data.pretrain, data.obstacle, args)


def micro_batches(views, index, n):
    """The n equal parts of a batch: (views, index, whether it is the last part)."""
    parts = zip(*(x.chunk(n) for x in (*views, index)))
    for i, (*part, part_index) in enumerate(parts, 1):
        yield part, part_index, i == n


if __name__ == "__main__":
    signals.run(main)
