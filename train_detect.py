"""Detection, instance segmentation or keypoints from a pre-trained backbone.

    python train_detect.py --cfg yaml/FILE.yaml
    python train_detect.py --cfg yaml/FILE.yaml --weights resnet50.pth
    python train_detect.py --cfg yaml/FILE.yaml --weights none detect.task=box
    torchrun --nproc_per_node 4 train_detect.py --cfg yaml/FILE.yaml

A Faster, Mask or Keypoint R-CNN with FPN is fine-tuned, all layers of it. The first line takes the
backbone of the run of that name, on a CPU or one GPU; the second takes a backbone.pt, a last.pt or
a torchvision ResNet's file; the third starts from random weights and replaces a setting; the fourth
uses 4 GPUs, or 4 processes where there are none. Batch size and learning rate are global.

It writes runs/<name>/detect/: last.pt, log.jsonl (its `epoch` counts iterations), TensorBoard's
events, and detections.png (the truth and, right of it, the surest detections). Each evaluation
appends COCO's average precision (AP), in percent, to runs/<name>/detect.jsonl, with the data, the
protocol in words, and the seconds since the script started.

A run that was stopped goes on from last.pt when it is started again, exactly, and one that was
stopped in an evaluation begins with that. --fresh starts over.

The AP is COCO's for both layouts. VOC2007's own, which papers print, takes precision at 11 points
of recall (COCO's at 101) and so differs. Needs pycocotools: pip install -r requirements-dev.txt.
"""

import contextlib
import math
import os
import time
from typing import Literal

from engine import config, signals


def make_parser():
    """The parser of this script's arguments."""
    parser = config.command_line(__doc__)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="the backbone's weights; left out: those of the run that --cfg names; "
        "none: random ones",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over, though there is a detect/last.pt"
    )
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    config.answer_early(make_parser(), also=("detect",))

import torch
from torch import nn

from data import detection
from data.coco_results import as_table, average_precision, picture, pycocotools, records
from data.image_files import say_if_dark
from data.workers import say_what_is_kept
from engine import checkpoint, distributed
from engine import device as devices
from engine.distributed import print_main
from engine.log import Log, lines, round_figures
from engine.progress import progress
from engine.schedule import check_milestones, check_optimizer_settings, sgd
from engine.weights import load_backbone, of_run
from models.rcnn import build_rcnn
from models.resnet import ResNet
from training.run import append_line

LOG_EVERY = 20  # iterations
PRINT_EVERY = 1000
# These settings of detect may change on resuming, and no others.
MAY_CHANGE = "data", "workers", "iterations", "eval_every", "save_every"
MOST_WORKERS = 1024
POSITIVE = (  # of the settings of detect
    *("iterations", "batch_size", "lr", "gamma"),
    *("max_size", "detections", "proposals", "channels"),
)


class Detect:
    """The protocol; its defaults are detectron2's 1x schedule for FPN, by which JCL fine-tunes.

    All is fp32. torchvision's models are not detectron2's to the letter (RoIAlign without the half
    pixel; 2,000 proposals, not 1,000, in training; a smooth L1 of its own), so a paper's row is
    approached here, and met with the files in yaml/detectron2.

    Args:
        task: box: Faster R-CNN; mask: Mask R-CNN; keypoint: Keypoint R-CNN, for persons.
        data: the data set's folder, see data/detection.py; so layout, train and val.
        layout: of its files.
        train: the name of the training part; of VOC, a name or several.
        val: likewise.
        limit: so many training images, the first ones; null: all. Images without annotations are
            left out before.
        iterations: steps of training.
        batch_size: global, in images.
        lr: rises linearly over warmup_iterations, then times gamma at each milestone.
        momentum: of SGD.
        weight_decay: spares BatchNorm's parameters, as detectron2 does.
        warmup_iterations: see lr.
        milestones: iterations, see lr.
        gamma: see lr.
        norm: of backbone, FPN and mask head. sync: BatchNorm, trained, its statistics over all
            processes where these have GPUs, as in moco's detection code; a process on a CPU, or
            alone, has its own. batch: each process has its own. frozen: the backbone's statistics
            and affine parameters stay as pre-trained, and nothing else has BatchNorm. The box head,
            of two linear layers, and the keypoint head never have it, as in detectron2.
        min_size: the shorter side, in pixels: each training image gets one of these by chance,
            evaluation the last.
        max_size: the longer side, at most.
        detections: kept an image. COCO's AP looks at 100, and at 20 persons' keypoints.
        proposals: those sampled an image for the heads' loss.
        channels: of FPN and mask head; the keypoint head has twice, the box head four times as
            many. 256 is torchvision's and detectron2's.
        eval_every: iterations; 0: at the end only.
        save_every: iterations; before each evaluation it is saved too.
        workers: processes that read images; null: the cores there are, 8 at most.
    """

    def __init__(
        self,
        *,
        task: Literal["box", "mask", "keypoint"] = "mask",
        data: str = "datasets/coco",
        layout: Literal["coco", "voc"] = "coco",
        train: str | list[str] = "train2017",
        val: str | list[str] = "val2017",
        limit: int | None = None,
        iterations: int = 90000,
        batch_size: int = 16,
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup_iterations: int = 1000,
        milestones: list[int] = [60000, 80000],  # noqa: B006, nothing writes into it
        gamma: float = 0.1,
        norm: Literal["sync", "batch", "frozen"] = "sync",
        min_size: list[int] = [640, 672, 704, 736, 768, 800],  # noqa: B006
        max_size: int = 1333,
        detections: int = 100,
        proposals: int = 512,
        channels: int = 256,
        eval_every: int = 0,
        save_every: int = 5000,
        workers: int | None = None,
    ):
        self.task, self.data, self.layout = task, data, layout
        self.train, self.val, self.limit = train, val, limit
        self.iterations, self.batch_size = iterations, batch_size
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.warmup_iterations, self.milestones, self.gamma = warmup_iterations, milestones, gamma
        self.norm, self.min_size, self.max_size = norm, min_size, max_size
        self.detections, self.proposals, self.channels = detections, proposals, channels
        self.eval_every, self.save_every, self.workers = eval_every, save_every, workers
        check_settings(self)
        several_gpus = distributed.world_size() > 1 and devices.current.type == "cuda"
        self.is_synchronized = norm == "sync" and several_gpus

    def learning_rate(self, iteration):
        """The learning rate of a step, counted from 0."""
        warmup = min(1, (iteration + 1) / max(1, self.warmup_iterations))
        passed = sum(iteration >= milestone for milestone in self.milestones)
        return self.lr * warmup * self.gamma**passed

    def evaluation_is_due(self, done):
        """Whether to evaluate after so many iterations."""
        return done == self.iterations or bool(self.eval_every and done % self.eval_every == 0)

    def save_is_due(self, done):
        """Whether to save after so many iterations."""
        at_interval = bool(self.save_every and done % self.save_every == 0)
        return at_interval or self.evaluation_is_due(done)

    def __str__(self):
        network = {"box": "Faster", "mask": "Mask", "keypoint": "Keypoint"}[self.task]
        width = "" if self.channels == 256 else f" of {self.channels} channels"
        limit = f" ({self.limit} images)" if self.limit else ""
        decay = f"times {self.gamma:g} at {self.milestones}" if self.milestones else "no milestones"
        n_images = self.batch_size
        if not self.is_synchronized:
            n_images //= distributed.world_size()
        norm = f"BatchNorm over {n_images} images"
        return (
            f"{network} R-CNN, FPN{width}, all layers fine-tuned on {join(self.train)}{limit}, "
            f"COCO's AP on {join(self.val)}; SGD, {self.iterations} iterations, "
            f"batch {self.batch_size}, lr {self.lr:g}, momentum {self.momentum:g}, "
            f"weight decay {self.weight_decay:g}, warm-up {self.warmup_iterations}, {decay}; "
            f"{'frozen BatchNorm' if self.norm == 'frozen' else norm}; "
            f"shorter side {', '.join(map(str, self.min_size))}, longer at most {self.max_size}"
        )


def join(part):
    """One name, or several with + between them."""
    return part if isinstance(part, str) else "+".join(part)


def check_settings(detect):
    """Raise ValueError where a setting of Detect makes no sense."""
    values = {name: getattr(detect, name) for name in POSITIVE}
    values["limit"] = 1 if detect.limit is None else detect.limit
    values["min_size"] = min(detect.min_size, default=0)
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be above 0, and finite")
    for name in ("eval_every", "save_every", "warmup_iterations", "workers"):
        if (getattr(detect, name) or 0) < 0:
            raise ValueError(f"{name} is {getattr(detect, name)}; it must be at least 0")
    if (detect.workers or 0) > MOST_WORKERS:
        raise ValueError(
            f"workers is {detect.workers}; it must be {MOST_WORKERS} at most, or null for as many "
            "as there are cores"
        )
    check_optimizer_settings(detect.momentum, detect.weight_decay)
    check_milestones(detect.milestones, detect.iterations, "iterations")
    if detect.warmup_iterations >= detect.iterations:
        print_main(
            f"warmup_iterations {detect.warmup_iterations} leaves nothing of iterations "
            f"{detect.iterations}: the learning rate does not get up to lr {detect.lr:g}; lower "
            "warmup_iterations"
        )
    if max(detect.min_size) > detect.max_size:
        raise ValueError(f"min_size {max(detect.min_size)} is above max_size {detect.max_size}")
    if detect.layout == "voc" and detect.task != "box":
        raise ValueError(f"layout voc has boxes only; task {detect.task} wants layout coco")
    if detect.batch_size % distributed.world_size():
        raise ValueError(
            f"batch_size {detect.batch_size} does not divide by {distributed.world_size()} "
            "processes"
        )


@distributed.say_refusals_once()
def main():
    """Fine-tune a detector."""
    args, cfg = config.read_command_line(make_parser(), also=("detect",))
    device = distributed.init_distributed(args.device)
    # Every batch has another shape, so that kernels would be measured at each step.
    torch.backends.cudnn.benchmark = False
    detect = config.build(Detect, cfg["detect"], f"{args.cfg}: detect")
    weights = find_weights(args, cfg, detect)
    train, val = load_images(detect, args.cfg)
    torch.manual_seed(cfg["seed"])  # every process begins with the same weights
    model = build_model(cfg["model"], weights, detect, n_classes=len(val.label)).to(device)
    optimizer = build_optimizer(model, detect)
    wrapped = distributed.wrap_ddp(model, device)
    # Now each process draws image sizes and proposals of its own.
    torch.manual_seed(cfg["seed"] + 2**20 * distributed.rank())

    with Run(cfg, detect, weights) as run:
        run.resume(args.fresh, model, optimizer)
        run.open_log()
        run.describe(model, train, val, device)
        if run.evaluation_is_missing:
            evaluate(run, model, val, device, run.start)
        with signals.deferred():  # a signal is obeyed after a step, by run.stop_if_told
            fine_tune(run, detect, model, wrapped, optimizer, train, val, device)
    distributed.cleanup()


def fine_tune(run, detect, model, wrapped, optimizer, train, val, device):
    """Train, and now and then save and evaluate."""
    model.train()
    run.progress.restart_clock()
    for iteration, batch in enumerate(run.batches(train, device), run.start):
        lr = detect.learning_rate(iteration)
        for group in optimizer.param_groups:
            group["lr"] = lr

        images, targets = zip(*batch)
        losses = wrapped(list(images), list(targets))  # {"loss_classifier": (), ...}
        loss = sum(losses.values())
        run.stop_if_diverged(loss, iteration)

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        # Figures; then the checkpoint; then the evaluation, within which nothing can be lost.
        done = iteration + 1
        run.after_step(done, {"loss": loss, **losses}, lr)
        if detect.save_is_due(done):
            distributed.average_buffers(model)  # of BatchNorm, where each process has its own
            run.save(done)
        else:
            run.stop_if_told(done, device)
        if detect.evaluation_is_due(done):
            with signals.interruptible():
                evaluate(run, model, val, device, done)
            model.train()


# ------------------------------------------------------------------------------- setup


def find_weights(args, cfg, detect):
    """The file of the backbone's weights, or "none". SystemExit where none can be used."""
    pycocotools()  # is it missing? Now, not after the last iteration.
    if cfg["model"]["host"] == "cmc":
        raise SystemExit(
            f"{args.cfg}: CMC's two-stream encoder takes no RGB image, so no detector can be built "
            "on it; choose another model.host"
        )
    weights = of_run(args.weights, os.path.join("runs", cfg["name"]), args.cfg)
    if weights == "none" and detect.norm == "frozen":
        raise SystemExit(
            f"{args.cfg}: detect.norm frozen keeps BatchNorm as pre-trained, and --weights none "
            "has no such; use norm batch"
        )
    return weights


def load_images(detect, cfg_file):
    """The training and the validation images, checked as far as can be before training."""
    with distributed.same_exit_on_all_ranks():
        parts = detection.load(detect.layout, detect.data, detect.train, detect.val, detect.task)
        train = detection.Images(parts[0], detect.task, training=True, limit=detect.limit)
        val = detection.Images(parts[1], detect.task)
        if len(train) < detect.batch_size:
            raise SystemExit(
                f"{cfg_file}: detect.batch_size {detect.batch_size} is larger than the "
                f"{len(train)} training images with annotations"
            )
    for images in (val, train):
        detection.check_image_sizes(images)
    say_if_dark(train)
    return train, val


def build_model(settings, weights, detect, n_classes):
    """The detector, on a backbone of the run's `model` section."""
    backbone = ResNet(settings["backbone"], settings["stem"], settings["width"])
    if weights != "none":
        load_backbone(weights, backbone)
    return build_rcnn(backbone, n_classes, detect)


def build_optimizer(model, detect):
    """SGD, without weight decay for BatchNorm's parameters."""
    norm = [
        parameter
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters()
    ]
    norm_ids = set(map(id, norm))
    others = [parameter for parameter in model.parameters() if id(parameter) not in norm_ids]
    groups = [{"params": others}]
    if norm:
        groups.append({"params": norm, "weight_decay": 0.0})
    return sgd(groups, detect.lr, momentum=detect.momentum, weight_decay=detect.weight_decay)


# ------------------------------------------------------------------------------- the run on disk


class Progress:
    """The losses since the last line of the log, and a line that waits for its evaluation.

    Attributes:
        unlogged: the figures of a saved iteration whose evaluation is not in the log yet, or None.
            It is the only part that a checkpoint keeps.
    """

    def __init__(self):
        self.unlogged = None
        self.clear()

    def clear(self):
        """Begin the next line."""
        self.sums, self.steps = {}, 0
        self.restart_clock()

    def restart_clock(self):
        """Begin to count the seconds of training, without those of saving and evaluating."""
        self.since = time.time()

    def add(self, losses):
        """Add a step's {name: scalar tensor}."""
        self.steps += 1
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()

    def means(self):
        """{name: the mean over the steps and over all processes}."""
        means = distributed.all_reduce_mean(torch.stack(list(self.sums.values()))) / self.steps
        return dict(zip(self.sums, means.tolist()))

    def state_dict(self):
        """For the checkpoint."""
        return {"unlogged": self.unlogged}

    def load_state_dict(self, saved):
        """Take it back; {} of a checkpoint that was written after its evaluation, as once all."""
        self.unlogged = saved.get("unlogged")


class Run:
    """A detection run on disk, runs/<name>/detect/: its checkpoint, its log, and what is said.

    Args:
        cfg: the resolved settings.
        detect: the Detect of them.
        weights: the file of the backbone's weights, or "none".

    Attributes:
        start: how many iterations were done at the start.
        saved: how many the checkpoint has; 0 where there is none.
        log: the Log, on the first process; None on the others.
    """

    def __init__(self, cfg, detect, weights):
        self.cfg, self.detect, self.weights = cfg, detect, weights
        self.parent = os.path.join("runs", cfg["name"])
        self.folder = os.path.join(self.parent, "detect")
        self.last = os.path.join(self.folder, "last.pt")
        self.began = time.time()
        self.start = self.saved = 0
        self.progress = Progress()
        self.log = None

    def __enter__(self):
        checkpoint.check_writable(self.parent)
        self.contexts = contextlib.ExitStack()
        self.contexts.enter_context(checkpoint.lock_run_folder(self.folder))
        self.contexts.enter_context(say_what_is_kept(self.describe_saved))
        signals.say_when_stopped(self.describe_saved_state)
        return self

    def __exit__(self, kind, error, trace):
        self.contexts.__exit__(kind, error, trace)

    def resume(self, fresh, model, optimizer):
        """Load the last checkpoint into model and optimizer, if there is one."""
        digest = self.weights if self.weights == "none" else checkpoint.file_digest(self.weights)
        network = {key: self.cfg["model"][key] for key in ("backbone", "stem", "width")}
        fixed = {key: v for key, v in self.cfg["detect"].items() if key not in MAY_CHANGE}
        self.settings = {
            "seed": self.cfg["seed"],
            "weights": digest,
            **{f"model.{key}": value for key, value in network.items()},
            **{f"detect.{key}": value for key, value in fixed.items()},
        }
        self.state = {"model": model, "optimizer": optimizer, "place": self.progress}
        if os.path.exists(self.last) and not fresh:
            self.start = checkpoint.resume(self.last, self.settings, **self.state)
        self.saved = self.start

    def open_log(self):
        """Begin or go on with the log, on the first process. Every process calls it."""
        is_logged = False
        if distributed.is_main():
            with checkpoint.writing(self.folder):
                os.makedirs(self.folder, exist_ok=True)
            config.save_if_missing(self.cfg, self.parent)
            self.log = Log(self.folder, self.start)
            is_logged = any(line["epoch"] == self.start for line in lines(self.log.path))
        if distributed.all_gather_object(is_logged)[0]:
            self.progress.unlogged = None

    @property
    def evaluation_is_missing(self):
        """Whether the run was ended between its last save and the end of the evaluation then due.

        To be asked before training goes on.
        """
        return self.progress.unlogged is not None

    def describe(self, model, train, val, device):
        """Print what is done, and where the run stands."""
        weights = "random weights" if self.weights == "none" else self.weights
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        world = distributed.world_size()
        print_main(
            f"{self.folder}: {weights}; {len(train)} training and {len(val)} validation images, "
            f"{len(val.label)} classes; {world} processes x {self.detect.batch_size // world} "
            f"images; {device}, {parameters:.1f} M parameters\n{self.detect}"
        )
        if not self.start:
            return
        iterations = self.detect.iterations
        if self.evaluation_is_missing:
            print_main(f"{self.last} is at iteration {self.start}, which is evaluated first")
        if self.start < iterations:
            print_main(f"going on from {self.last} after iteration {self.start} of {iterations}")
        elif not self.evaluation_is_missing:
            print_main(
                f"{self.last} is at iteration {self.start}, and detect.iterations is {iterations}: "
                "nothing is left to do; --fresh starts over"
            )

    def batches(self, train, device):
        """Batches from the first iteration on that is not done, with a progress bar."""
        detect = self.detect
        plan = detection.batch_plan(
            len(train), detect.batch_size, self.cfg["seed"], self.start, detect.iterations
        )
        batches = detection.batches(train, plan, device, detect.workers)
        self.bar = progress(batches, "detect", initial=self.start, total=detect.iterations)
        return self.bar

    def stop_if_told(self, done, device):
        """Save and end the program if it was told to stop.

        Several processes must stop at the same iteration: they look at every LOG_EVERY-th.
        """
        signals.step_finished()
        if distributed.world_size() > 1 and done % LOG_EVERY:
            return
        if distributed.any_rank(device, signals.stop_requested())[0]:
            distributed.average_buffers(self.state["model"])
            self.save(done)
            distributed.cleanup()
            signals.raise_once()

    def stop_if_diverged(self, loss, iteration):
        """End the program where a loss is not finite."""
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit(
                f"the loss is {value} at iteration {iteration + 1} of {self.detect.iterations}; "
                f"{self.describe_saved(how_on=False)}; try a lower detect.lr"
            )

    def after_step(self, done, losses, lr):
        """Count a step's losses; at some of them make a line for the log.

        Where an evaluation is due the line waits for its figures.
        """
        progress = self.progress
        progress.add(losses)
        is_evaluated = self.detect.evaluation_is_due(done)
        if (done - 1) % LOG_EVERY and not is_evaluated:
            return
        figures = progress.means()
        seconds = time.time() - progress.since
        figures["lr"] = lr
        figures["images/s"] = progress.steps * self.detect.batch_size / seconds
        progress.clear()
        self.bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
        if is_evaluated or (done - 1) % PRINT_EVERY == 0:
            print_main(
                f"iteration {done}/{self.detect.iterations}  loss {figures['loss']:.3f}  "
                f"lr {lr:.5f}  {figures['images/s']:.1f} images/s"
            )
        if is_evaluated:
            progress.unlogged = figures
        else:
            self.write_log(done, figures)

    def write_log(self, done, figures):
        """Write a line of the log, on the first process."""
        if self.log:
            self.log.write(done, round_figures(figures))

    def log_evaluation(self, done, figures):
        """Write the line of the log that waits, with an evaluation's figures."""
        self.write_log(done, self.progress.unlogged | figures)
        self.progress.unlogged = None
        self.progress.clear()

    def save(self, done):
        """Write the checkpoint. Every process calls it."""
        began = time.time()
        with signals.deferred(signals.PATIENCE_OF_A_SAVE):
            checkpoint.save(self.last, self.settings, done, **self.state)
            self.saved = done
        self.progress.since += time.time() - began  # images/s are of training alone

    def describe_saved_state(self):
        """Which checkpoint holds what; None where there is none."""
        return self.describe_saved() if self.saved else None

    def describe_saved(self, how_on=True):
        """Which checkpoint holds what, and how to go on, as half a sentence."""
        if not self.saved:
            return "nothing was saved yet"
        state = f"{self.last} holds the state after iteration {self.saved} of "
        state += str(self.detect.iterations)
        return state + (", and the same line goes on from there" if how_on else "")

    def record_evaluation(self, done, figures):
        """Write an evaluation to detect.jsonl, with what it is of."""
        line = {
            "weights": self.weights,
            "dataset": {
                "layout": self.detect.layout,
                "root": self.detect.data,
                "train": self.detect.train,
                "val": self.detect.val,
            },
            "protocol": str(self.detect),
            "seed": self.cfg["seed"],
            "iteration": done,
            "seconds": round(time.time() - self.began, 1),
            "figures": figures,
        }
        append_line(os.path.join(self.parent, "detect.jsonl"), line)


# ------------------------------------------------------------------------------- evaluation


def evaluate(run, model, val, device, done):
    """Compute, print and record COCO's average precision. Every process calls it.

    Args:
        run: the Run.
        model: the detector, which is left in eval mode.
        val: the validation images.
        device: the model's.
        done: how many iterations it was trained.
    """
    task = run.detect.task
    found = predictions(model, val, task, device, run.detect.workers)
    detections = [record for of_image in found.values() for record in of_image]
    # It takes minutes on COCO, for which a collective would not wait.
    figures = distributed.run_on_first(lambda: average_precision(val.part, detections, task))
    print_main(as_table(figures, task))
    if distributed.is_main():
        run.record_evaluation(done, figures)
        path = os.path.join(run.folder, "detections.png")
        run.log.picture(path, picture(val.part, val, found), columns=4)
    run.log_evaluation(done, figures)


@torch.no_grad()
def predictions(model, val, task, device, workers=None):
    """Detect in all validation images.

    The processes share the images out, none lost or repeated. Each is a batch of its own, so that
    the padding, and with it the result, is the same for any number of processes.

    Args:
        model: a detector, which is left in eval mode.
        val: a data.detection.Images, for evaluation.
        task: "box", "mask" or "keypoint".
        device: the model's.
        workers: processes that read images.

    Returns:
        {image id: COCO's result records}, on every process.
    """
    model.eval()
    rows = range(distributed.rank(), len(val), distributed.world_size())
    bar = progress(
        detection.batches(val, [[(row, False)] for row in rows], device, workers),
        "evaluation",
        total=len(rows),
    )
    categories = val.part["categories"]
    of_process = {
        image_id: records(model([image])[0], image_id, categories, task)
        for ((image, image_id),) in bar
    }
    parts = distributed.all_gather_object(of_process)
    found = {image_id: of_image for part in parts for image_id, of_image in part.items()}
    if len(found) != len(val) or sum(map(len, parts)) != len(val):
        raise SystemExit(
            f"of {len(val)} validation images {len(found)} different ones were evaluated; does an "
            "image id appear twice in the annotations?"
        )
    return found


if __name__ == "__main__":
    signals.run(main)
