"""What did the encoder learn? A linear classifier on its frozen features, and kNN.

    python train_linear.py --cfg yaml/quickstart.yaml       the run's weights, the file's protocol
    python train_linear.py --cfg yaml/cifar10_ring.yaml --weights resnet18.pth
    python train_linear.py --cfg yaml/cifar10_ring.yaml linear.data=dtd linear.root=datasets
    python train_linear.py --cfg yaml/cifar10_ring.yaml --export detectron2 FILE
    torchrun --nproc_per_node 8 train_linear.py --cfg yaml/cifar10_moco.yaml

The second takes a backbone.pt, a last.pt, torchvision's file or other people's (engine/weights.py);
the third probes on another set, for transfer; the fourth writes the weights under another library's
names, and probes nothing. An untrained encoder and raw pixels stand beside the run's encoder.
Prints a table and appends it, with the protocol in words, to runs/<name>/linear.jsonl. Labels never
reach the encoder: it is frozen, in eval mode, and compared with its own copy at the end.

A probe on augmented images (linear.features=augmented) takes hours on ImageNet: it keeps its state
in runs/<name>/linear/, and goes on from there when the same line is given again.
"""

import copy
import math
import os
import time
from typing import Literal

from engine import config, signals


def make_parser():
    """The command line."""
    parser = config.command_line(__doc__)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="the encoder's weights; left out: those of the run that --cfg names",
    )
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out the untrained encoder and raw pixels"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start an unfinished augmented probe over"
    )
    parser.add_argument(
        "--export",
        nargs=2,
        metavar=("torchvision|detectron2", "FILE"),
        help="write the ResNet's weights for another library, and end",
    )
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    config.answer_early(make_parser())

import torch
from torch import nn
from torch.nn import functional as F

from data.augment import get_recipe
from data.datasets import MEAN_PER_CLASS, describe_set, find_obstacle, load
from data.image_files import say_if_dark
from data.loader import Loader, check_image_size
from data.statistics import replace_auto
from engine import checkpoint, distributed
from engine import device as devices
from engine.distributed import print_main
from engine.progress import progress
from engine.schedule import Schedule, check_optimizer_settings, sgd
from engine.weights import export, load_backbone, of_run
from evaluation.features import (
    KNN,
    KNN_BYTES,
    accuracy_percent,
    extract,
    knn,
    mean_per_class_accuracy,
    where_features_fit,
)
from evaluation.svm import svm
from training.build import Builder
from training.epoch import EpochProgress
from training.run import Run, append_line

TEST_ROWS = 2**14  # features that are classified at once
# Pre-training may change the linear: section and go on; an augmented probe may not.
MAY_CHANGE = [key for key in checkpoint.MAY_CHANGE if key != "linear"]


class Probe:
    """The protocol: one linear layer on the pooled features by SGD, or SVMs.

    The last epoch counts; nothing is chosen by the test set.

    Args:
        lr: one learning rate, or several that are trained side by side in one pass; the first is
            the one that is reported.
        features: `augmented`, the papers' way, passes `augment`ed images through the encoder in
            every epoch, the last, smaller batch included. `cached` extracts each image once,
            un-augmented: seconds instead of hours.
        standardize: features are brought to mean 0 and variance 1 by those of the training set,
            which makes one lr fit all encoders; no paper's way.
        data, root, image_size: of another set than the encoder was trained on, for transfer, which
            is normalised by its own statistics (ImageNet's where it has none); null: that one's
            own. With `data: folder`, root holds train/<class>/ and val/<class>/.
        classifier: `sgd`, or `svm` for VOC2007 (evaluation/svm.py), which uses of the keys below it
            only `C` and `difficult`.
        difficult: what an image is in which a class is there but difficult to see: `negative`, as
            in PCL's code, or `ignore`, VOC's own rule, by which it counts neither way.
        epochs, batch_size, schedule, milestones, gamma, momentum, weight_decay: see
            engine/schedule.py.
    """

    def __init__(
        self,
        *,
        data: str | None = None,
        root: str | None = None,
        image_size: int | None = None,
        classifier: Literal["sgd", "svm"] = "sgd",
        C: float = 0.5,
        difficult: Literal["negative", "ignore"] = "negative",
        epochs: int = 100,
        batch_size: int = 256,
        lr: float | list[float] = [0.01, 0.1],
        schedule: Literal["cosine", "step", "constant"] = "cosine",
        milestones: list[int] = [],
        gamma: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        features: Literal["cached", "augmented"] = "cached",
        augment: str = "crop_flip",
        standardize: bool = True,
    ):
        if (data == "voc2007") != (classifier == "svm"):
            raise ValueError(
                f"data {data} does not go with classifier {classifier}: voc2007, with several "
                "classes an image, and svm belong together"
            )
        if C <= 0:
            raise ValueError(f"C is {C}; it must be above 0")
        if image_size is not None and not 8 <= image_size <= 4096:
            raise ValueError(
                f"image_size is {image_size}; it must be at least 8 and 4096 at most, or null for "
                "the encoder's own"
            )
        self.data, self.root, self.image_size = data, root, image_size
        self.classifier, self.C, self.difficult = classifier, C, difficult
        self.lrs = lr if isinstance(lr, list) else [lr]
        check_learning_rates(self.lrs)
        self.schedule = Schedule(
            epochs=epochs,
            batch_size=batch_size,
            lr=1.0,
            schedule=schedule,
            milestones=milestones,
            gamma=gamma,
        )
        check_optimizer_settings(momentum, weight_decay)
        get_recipe(augment)  # or there is none
        self.epochs, self.batch_size = epochs, batch_size
        self.momentum, self.weight_decay = momentum, weight_decay
        self.features, self.augment, self.standardize = features, augment, standardize

    @property
    def is_augmented(self):
        """Whether the encoder sees augmented images in every epoch."""
        return self.classifier == "sgd" and self.features == "augmented"

    def __str__(self):
        if self.classifier == "svm":
            difficult = "are negatives" if self.difficult == "negative" else "count neither way"
            return (
                "linear SVM a class on L2-normalised pooled features of the frozen encoder, "
                f"C {self.C:g}, squared hinge, positives weigh twice, "
                f"difficult images {difficult}; VOC2007's mAP"
            )
        s = self.schedule
        standardized = "standardized " if self.standardize else ""
        augmentation = "no augmentation"
        if self.features == "augmented":
            augmentation = f"augmentation {self.augment}"
        decay = f"times {s.gamma:g} at {s.milestones}" if s.schedule == "step" else s.schedule
        return (
            f"linear layer on {standardized}pooled features of the frozen encoder, {augmentation}; "
            f"SGD, {self.epochs} epochs, batch {self.batch_size}, lr {self.lrs[0]:g}, momentum "
            f"{self.momentum:g}, weight decay {self.weight_decay:g}, {decay}; last epoch"
        )


def check_learning_rates(lrs):
    """Refuse a list of learning rates that makes no sense, by ValueError."""
    if not lrs:
        raise ValueError("lr is an empty list; give one learning rate or several")
    if min(lrs) <= 0:
        raise ValueError(f"lr {min(lrs)} must be above 0")
    if len({f"{lr:g}" for lr in lrs}) < len(lrs):  # as the table names them
        raise ValueError(f"lr {lrs} has one learning rate twice; keep one")


@distributed.say_refusals_once()
def main():
    """Probe an encoder."""
    args, cfg = config.read_command_line(make_parser())
    device = distributed.init_distributed(args.device)
    build = Builder(cfg, args.cfg)
    probe = build("linear", Probe)
    run_folder = os.path.join("runs", cfg["name"])
    weights = of_run(args.weights, run_folder, args.cfg, random=False)
    if args.export and args.export[0] not in ("torchvision", "detectron2"):
        raise SystemExit(f"--export {args.export[0]}: there are torchvision and detectron2")

    torch.manual_seed(cfg["seed"])
    build.take_statistics(weights)
    source = data_settings(cfg["data"], probe)
    train, test = load_parts(source, cfg["seed"], args.cfg)
    encoder = build.encoder(train, device).eval().requires_grad_(False)
    untrained = copy.deepcopy(encoder)  # the random weights that a run begins with
    preprocessing = load_backbone(weights, encoder.backbone)
    if args.export:
        return print_main(export(*args.export, encoder.backbone, weights, preprocessing))
    refuse_unfit_data(train, test, source, args.cfg)
    checkpoint.check_writable(run_folder)
    before = copy.deepcopy(encoder.backbone.state_dict())

    # ----------------------------------------------------------------------------------- evaluate
    encoders = {} if args.no_baselines else baselines(untrained, source["image_size"])
    encoders[cfg["name"]] = lambda x: encoder(x, "backbone")  # (b, 3, S, S) -> (b, F)
    parts = train.to(device), test.to(device)
    evaluation = Evaluation(build, probe, source, encoders, *parts, device)
    set_name = describe_set(source["name"], source["root"])
    print_main(
        f"{weights} on {set_name}: {len(train)} training and {len(test)} test images, "
        f"{len(train.classes)} classes"
    )
    evaluation.choose_memory(not args.no_baselines)
    if probe.is_augmented:
        with augmented_run(build, probe, run_folder, weights, args.fresh) as run:
            rows = evaluation.of_augmented_images(run)
            run.remove_checkpoints()
    else:
        rows = evaluation.of_cached_features()

    # ------------------------------------------------------------------------------ what came out
    refuse_moved_weights(encoder.backbone, before)
    print_table(rows, probe, evaluation.knn, not args.no_baselines)
    if distributed.is_main():
        os.makedirs(run_folder, exist_ok=True)
        config.save_if_missing(cfg, run_folder)
        line = {
            "weights": weights,
            "data": set_name,
            "root": source["root"],
            "protocol": str(probe),
            "knn": str(evaluation.knn).replace(evaluation.knn.feature, "backbone"),
            "seed": cfg["seed"],
            "seconds": round(evaluation.seconds, 1),
            "figures": reported_figures(rows[cfg["name"]], probe),
            "rows": rows,
        }
        append_line(os.path.join(run_folder, "linear.jsonl"), line)
    distributed.cleanup()


# ------------------------------------------------------------------------------------------ set-up


def data_settings(settings, probe):
    """The settings of the data that are probed: those of the run, or of another set."""
    if probe.data is not None:  # which has a normalisation of its own
        own = dict.fromkeys(("limit", "classes", "mean", "std"))
        settings = {**settings, **own, "name": probe.data, "split": "train"}
    given = {"root": probe.root, "image_size": probe.image_size}
    return {**settings, **{key: value for key, value in given.items() if value is not None}}


def load_parts(source, seed, file):
    """The training and the test part."""
    # The Loader would refuse a size, but cached features want none.
    config.build(check_image_size, {}, file, image_size=source["image_size"])
    given = {key: source[key] for key in ("image_size", "workers")}
    file = f"{file}: linear"
    train = config.build(load, source, file, part="train", seed=seed, **given)
    replace_auto(source, train.mean, train.std)
    test = config.build(load, source, file, part="test", seed=seed, **given)
    say_if_dark(train)
    return train, test


def refuse_unfit_data(train, test, source, file):
    """End the program where the data allow no probe."""
    obstacle = find_obstacle(train, test)
    if obstacle:
        raise SystemExit(
            f"{file}: no linear probe on {source['name']} at {source['root']}: {obstacle}; or take "
            "another set: linear.data=folder linear.root=PATH, which holds train/<class>/ and "
            "val/<class>/"
        )
    if len(train) < 2:
        raise SystemExit(
            f"{file}: a linear probe needs more training images than {len(train)}; raise data.limit"
        )


def baselines(untrained, image_size):
    """What the run's encoder is compared with: {name: (b, 3, S, S) -> (b, F)}."""
    side = min(32, image_size)
    return {
        "raw pixels": lambda x: F.adaptive_avg_pool2d(x, side).flatten(1),
        "untrained encoder": lambda x: untrained(x, "backbone"),
    }


def augmented_run(build, probe, run_folder, weights, fresh):
    """The Run of a probe on augmented images, which may take hours."""
    return build(
        "log",
        Run,
        folder=os.path.join(run_folder, "linear"),
        settings={**build.settings, "weights": checkpoint.file_digest(weights)},
        epochs=probe.epochs,
        fresh=fresh,
        may_change=MAY_CHANGE,
        advice="lower linear.lr, with --fresh",
    )


def refuse_moved_weights(backbone, before):
    """End the program if a frozen weight changed, or a statistic of BatchNorm."""
    for name, value in backbone.state_dict().items():
        if not torch.equal(value, before[name]):
            raise SystemExit(
                f"the frozen encoder moved: {name} changed; this is a fault of the program, and "
                "the figures are void"
            )


# ---------------------------------------------------------------------------------------- evaluate


class Evaluation:
    """kNN, and linear layers or SVMs, on the features of several encoders.

    One encoder's features are extracted after the other's, so that no more than one encoder's are
    in memory.

    Args:
        build: the Builder of the settings.
        probe: the protocol.
        source: the settings of the data.
        encoders: {name: (b, 3, S, S) -> (b, F)}; the last one is the run's own.
        train, test: the parts.
        device: that computes.

    Attributes:
        seconds: that it took beside the extraction.
    """

    def __init__(self, build, probe, source, encoders, train, test, device):
        self.build, self.probe, self.source = build, probe, source
        self.encoders, self.train, self.test = encoders, train, test
        self.device, self.keep_on, self.seconds = device, device, 0.0
        self.seed, self.classes = build.settings["seed"], len(train.classes)
        self.labels, self.test_labels = train.labels.to(device), test.labels.to(device)
        self.knn = config.build(
            KNN,
            {**build.settings["knn"], "limit": None},  # which is for pre-training
            f"{build.file}: knn",
            train=train,
            test=test,
            image_size=source["image_size"],
            device=device,
            workers=source["workers"],
        )
        with torch.no_grad():  # CMC's encoder has two streams: ask how wide it is
            image = torch.zeros(1, 3, source["image_size"], source["image_size"], device=device)
            self.widths = {name: encode(image).shape[1] for name, encode in encoders.items()}

    def choose_memory(self, has_baselines):
        """Choose where the features are kept: on the device, or the CPU if it has more room.

        All processes call it. SystemExit, before anything is extracted, where the features of one
        encoder fit nowhere.
        """
        name, width = max(self.widths.items(), key=lambda item: item[1])
        n_train, n_test = len(self.train), len(self.test)
        needed = 4 * width * (n_train + n_test)
        if self.probe.is_augmented:  # the test features of all encoders wait for the end
            needed += 4 * n_test * (sum(self.widths.values()) - width)
        if self.probe.classifier == "svm":
            needed *= 2  # it makes a copy of unit length
        self.keep_on, lacking = where_features_fit(needed + KNN_BYTES, self.device)
        problem = None
        if lacking is not None:
            problem = (
                f"{self.build.file}: the features of {n_train} training and {n_test} test images, "
                f"{width} numbers an image ({name}), need {(needed + KNN_BYTES) / 1e9:.3g} GB of "
                f"memory, but {lacking}; {self.ways_to_fit(has_baselines)}"
            )
        distributed.exit_all_ranks(problem)
        if self.keep_on.type != self.device.type:
            print_main(
                f"the features, {needed / 1e9:.3g} GB, are kept in the machine's memory: "
                f"{self.device} has {devices.free_memory(self.device) / 1e9:.3g} GB free"
            )

    def ways_to_fit(self, has_baselines):
        """What would make the features fit, in words."""
        ways = ["allow more memory"]
        if self.source["limit"] is not None or self.probe.data is None:
            ways.insert(0, "take fewer training images with data.limit")
        if has_baselines:
            ways.insert(0, "leave out raw pixels and the untrained encoder with --no-baselines")
        return ", or ".join(ways)

    def extract(self, name):
        """The features of an encoder: of the training images (n, F) and the test images (m, F)."""
        test, train = (
            extract(
                self.encoders[name],
                part,
                self.source["image_size"],
                self.device,
                self.source["workers"],
                what=f"{words}, {name}",
                keep_on=self.keep_on,
            )
            for part, words in ((self.test, "test"), (self.train, "train"))
        )
        return train, test

    def knn_accuracy(self, x, x_test):
        """Top-1 of kNN, in %."""
        k, temperature = self.knn.voters, self.knn.temperature
        predictions = knn(x, self.labels, x_test, k, temperature)
        return accuracy_percent(predictions == self.test_labels)

    def of_cached_features(self):
        """{encoder: {figure: %}}, from features that are extracted once."""
        # All layers at once, so that each begins with the same numbers whichever others there are.
        layers = None
        if self.probe.classifier == "sgd":
            layers = LinearLayers(self.widths, self.probe.lrs, self.classes).to(self.device)
        rows = {}
        for name in self.encoders:
            x, x_test = self.extract(name)
            began = time.time()
            if layers is None:
                rows[name] = {"mAP": self.svm(x, x_test)}
            else:
                rows[name] = {"knn": self.knn_accuracy(x, x_test)}
                scale = Standardize(x if self.probe.standardize else None, self.device)
                self.train_on_features(layers, name, x, scale)
                rows[name] |= self.accuracies(layers, name, scale, x_test)
            self.seconds += time.time() - began
            x = x_test = None  # or they would stay while the next encoder's are extracted
        return rows

    def svm(self, x, x_test):
        """VOC2007's mAP of a linear SVM for each class."""
        return svm(
            x,
            self.labels,
            x_test,
            self.test_labels,
            self.probe.C,
            self.train.classes,
            self.probe.difficult,
        )

    def train_on_features(self, layers, name, x, scale):
        """Train one encoder's layers on its features x (n, F), every process the same way.

        The order of the images is the same for each encoder.
        """
        order = torch.Generator().manual_seed(self.seed)
        optimizers = layers.optimizers(self.probe, [name])
        for epoch in progress(range(self.probe.epochs), "linear"):
            rows_of_epoch = torch.randperm(len(x), generator=order).to(self.labels.device)
            for rows in rows_of_epoch.split(self.probe.batch_size):
                features = {name: scale(x[rows.to(x.device)])}  # (b, F)
                step(layers, optimizers, features, self.labels[rows], self.probe, epoch)
            layers.retire_diverged(optimizers, epoch)
            if layers.all_diverged(name):
                break
        self.refuse_divergence(layers)

    def of_augmented_images(self, run):
        """{encoder: {figure: %}}, with layers that see features of augmented images.

        All encoders see the same images, side by side.
        """
        layers = LinearLayers(self.widths, self.probe.lrs, self.classes).to(self.device)
        rows, scales, x_tests = {}, {}, {}
        for name in self.encoders:
            x, x_tests[name] = self.extract(name)
            began = time.time()
            rows[name] = {"knn": self.knn_accuracy(x, x_tests[name])}
            scales[name] = Standardize(x if self.probe.standardize else None, self.device)
            self.seconds += time.time() - began
            x = None
        began = time.time()
        self.train_on_images(run, layers, scales)
        for name in self.encoders:
            rows[name] |= self.accuracies(layers, name, scales[name], x_tests[name])
        self.seconds += time.time() - began
        return rows

    def train_on_images(self, run, layers, scales):
        """Train the layers of all encoders; the run keeps their state."""
        loader = self.make_loader()
        optimizers = layers.optimizers(self.probe, layers.names)
        progress = EpochProgress(len(self.train), self.train.fingerprint())
        parts = {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}
        run.resume(progress, len(loader), self.device, layers=layers, **parts)
        run.open_log()
        if run.is_resumed:
            print_main(f"going on after {run.position(run.start_epoch, progress.step)}")
        model = distributed.wrap_ddp(layers, self.device)
        for epoch in range(run.start_epoch, self.probe.epochs):
            first_step = run.begin_epoch(epoch)
            with signals.deferred():  # a signal is obeyed after a step, by run.after_step
                bar = run.progress_bar(loader.epoch(epoch, first_step))
                for i, ((images,), index) in enumerate(bar, first_step):
                    progress.batch_arrived()
                    features = {
                        name: scales[name](encode(images)) for name, encode in self.encoders.items()
                    }
                    loss = step(model, optimizers, features, self.labels[index], self.probe, epoch)
                    progress.add({"loss": loss})
                    if run.is_sync_step(i) or signals.stop_requested():
                        layers.retire_diverged(optimizers, epoch)
                        self.refuse_divergence(layers)
                    run.after_step(i, bar)
                figures = progress.means(self.device)
                run.end_epoch(figures)
            if run.log:
                run.log.write(epoch + 1, figures)

    def make_loader(self):
        """The Loader of augmented training images."""
        settings = {
            **self.source,
            "augment": self.probe.augment,
            "augment_backend": "batched",
        }
        return config.build(
            Loader,
            settings,
            f"{self.build.file}: linear",
            dataset=self.train,
            batch_size=self.probe.batch_size,
            n_views=1,
            seed=self.seed + 1,
            device=self.device,
            drop_last=False,
        )

    def refuse_divergence(self, layers):
        """End the program if no layer of the run's own encoder is left."""
        name = list(self.encoders)[-1]
        if layers.all_diverged(name):
            raise SystemExit(
                f"the probe diverged at every learning rate; lower linear.lr ({self.probe.lrs})"
            )

    @torch.no_grad()
    def accuracies(self, layers, name, scale, x_test):
        """{"top-1, lr ...": %, "top-5, lr ...": %} of an encoder's layers on x_test (m, F).

        "per class, lr ..." too, where that is the data set's protocol. None for a layer that
        diverged.
        """
        figures = {}
        for lr, layer in zip(self.probe.lrs, layers.layers[key(name)]):
            k = min(5, layer.out_features)
            top = [layer(scale(x)).topk(k).indices for x in x_test.split(TEST_ROWS)]
            right = torch.cat(top) == self.test_labels[:, None]  # (m, 5)
            is_void = (name, lr) in layers.diverged
            figures[f"top-1, lr {lr:g}"] = None if is_void else accuracy_percent(right[:, 0])
            figures[f"top-5, lr {lr:g}"] = None if is_void else accuracy_percent(right.any(1))
            if self.source["name"] in MEAN_PER_CLASS:
                accuracy = mean_per_class_accuracy(torch.cat(top)[:, 0], self.test_labels)
                figures[f"per class, lr {lr:g}"] = None if is_void else accuracy
        return figures


class Standardize:
    """Brings features to mean 0 and variance 1 by those of the training set, on a device.

    Args:
        x: (n, F), the training features; None leaves all features as they are.
        device: that gets the features (b, F), wherever they are kept.
    """

    def __init__(self, x, device):
        self.device, self.mean, self.std = device, 0.0, 1.0
        if x is not None:
            self.mean, self.std = x.mean(0).to(device), x.std(0).clamp(min=1e-6).to(device)

    def __call__(self, features):
        """Features (b, F), standardized."""
        return (features.to(self.device) - self.mean) / self.std


class LinearLayers(nn.Module):
    """One linear layer for each encoder and learning rate, trained side by side.

    Args:
        widths: {encoder: F}.
        lrs: the learning rates.
        classes: how many.
    """

    def __init__(self, widths, lrs, classes):
        super().__init__()
        self.names, self.lrs = list(widths), lrs
        self.layers = nn.ModuleDict(
            {
                key(name): nn.ModuleList(nn.Linear(width, classes) for _ in lrs)
                for name, width in widths.items()
            }
        )
        for layer in self.layers.modules():
            if isinstance(layer, nn.Linear):  # the convention of the released code
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        self.diverged = set()  # (encoder, learning rate) of layers that are not finite any more

    def get_extra_state(self):
        """What a checkpoint keeps beside the layers."""
        return sorted(self.diverged)

    def set_extra_state(self, state):
        """Take it back."""
        self.diverged = {tuple(pair) for pair in state}

    def forward(self, features):
        """{encoder: (b, F)} -> [(b, classes) for each encoder and learning rate]."""
        return [layer(x) for name, x in features.items() for layer in self.layers[key(name)]]

    def optimizers(self, probe, names):
        """SGD for each learning rate, over the layers of the encoders of these names."""
        of_names = [self.layers[key(name)] for name in names]
        given = {"momentum": probe.momentum, "weight_decay": probe.weight_decay}
        return [
            sgd([p for layers in of_names for p in layers[i].parameters()], lr, **given)
            for i, lr in enumerate(self.lrs)
        ]

    @torch.no_grad()
    def retire_diverged(self, optimizers, epoch):
        """Set a layer that is not finite any more to 0, and say so: the others go on."""
        for name in self.names:
            for i, layer in enumerate(self.layers[key(name)]):
                norms = torch._foreach_norm(list(layer.parameters()), math.inf)
                if torch.stack(norms).isfinite().all():
                    continue
                if (name, self.lrs[i]) not in self.diverged:
                    print_main(
                        f"WARNING: linear.lr {self.lrs[i]:g} diverges in epoch {epoch + 1} ({name})"
                    )
                self.diverged.add((name, self.lrs[i]))
                for parameter in layer.parameters():
                    parameter.zero_()
                    optimizers[i].state[parameter]["momentum_buffer"].zero_()

    def all_diverged(self, name):
        """Whether an encoder has no layer left."""
        return all((name, lr) in self.diverged for lr in self.lrs)


def step(model, optimizers, features, labels, probe, epoch):
    """One step of all layers. Returns the smallest of their losses, a scalar on the device.

    Args:
        model: LinearLayers, or DDP of it.
        features: {encoder: (b, F)}.
        labels: (b,).
        epoch: from 0, for the learning rate.
    """
    for lr, optimizer in zip(probe.lrs, optimizers):
        optimizer.param_groups[0]["lr"] = lr * probe.schedule(epoch)
        optimizer.zero_grad(set_to_none=True)
    losses = [F.cross_entropy(logits, labels) for logits in model(features)]
    sum(losses).backward()
    for optimizer in optimizers:
        optimizer.step()
    return torch.stack(losses).detach().nan_to_num(nan=math.inf).min()


def key(name):
    """A name as nn.ModuleDict takes it: without a point."""
    return name.replace(".", "_")


# ------------------------------------------------------------------------------ what came out


def print_table(rows, probe, knn, has_baselines):
    """Print the protocol and all figures."""
    words = str(probe)
    if probe.classifier == "sgd":
        words += f"\nkNN: {knn.neighbours()}, T {knn.temperature:g}, on the pooled features"
    if has_baselines:
        words += "; raw pixels at most 32 x 32"
    print_main(f"\n{words}; the encoder's weights did not move\n")
    columns = list(next(iter(rows.values())))
    print_main(f"{'':24}" + "".join(f"{column:>16}" for column in columns))
    for name, row in rows.items():
        cells = [
            f"{'diverged':>16}" if row[column] is None else f"{row[column]:16.2f}"
            for column in columns
        ]
        print_main(f"{name:24}" + "".join(cells))


def reported_figures(row, probe):
    """{figure: %} of the run's encoder; of several learning rates the first is reported."""
    end = f", lr {probe.lrs[0]:g}"
    return {
        column.split(",")[0]: value
        for column, value in row.items()
        if value is not None and ("," not in column or column.endswith(end))
    }


if __name__ == "__main__":
    signals.run(main)
