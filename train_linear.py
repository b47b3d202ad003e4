"""What did the encoder learn? A linear classifier on its frozen features, and kNN, beside an untrained encoder and raw pixels.

    python train_linear.py --cfg yaml/quickstart.yaml                            the weights of the run of that name, and the file's linear: protocol
    python train_linear.py --cfg yaml/cifar10_ring.yaml --weights resnet18.pth   a backbone.pt, a last.pt, torchvision's, or other people's (engine/weights.py)
    python train_linear.py --cfg yaml/cifar10_ring.yaml linear.data=dtd linear.root=datasets      transfer to another set
    python train_linear.py --cfg yaml/cifar10_ring.yaml --export detectron2 FILE  no probe: the weights under another library's names
    torchrun --nproc_per_node 8 train_linear.py --cfg yaml/cifar10_moco.yaml     the same, shared out

Prints a table and appends it, with the protocol in words, to runs/<name>/linear.jsonl. Labels never reach the encoder: it is frozen, in eval
mode, and compared with its own copy at the end.
"""

import copy
import json
import os
import time
from typing import Literal

from engine import config


def command_line():
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
        "--export",
        nargs=2,
        metavar=("torchvision|detectron2", "FILE"),
        help="write the ResNet's weights for another library, and end",
    )
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    config.answer_early(command_line())

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from data.augment import named
from data.datasets import find_obstacle, load
from data.image_files import say_if_dark
from data.loader import Loader, sensible_size
from data.workers import or_say_what_is_kept
from engine import device as devices
from engine import distributed
from engine.distributed import say
from engine.features import KNN, KNN_BYTES, extract, knn, percent, where_features_fit
from engine.schedule import Schedule, sensible, sgd
from engine.svm import svm
from engine.weights import export, load_backbone, of_run
from models.resnet import Encoder

TEST_ROWS = 2**14  # features that are classified at once


class Probe:
    """The protocol. One linear layer on the pooled features by SGD; the last epoch counts, nothing is chosen by the test set.

    lr: one, or several that are trained side by side in one pass; the first is the one reported. features: `augmented`, the papers' way,
    passes `augment`ed images through the encoder in every epoch, the last, smaller batch included;
    `cached` extracts each image once, un-augmented: seconds instead of hours.
    standardize: features are brought to mean 0 and variance 1 by the training set's, which makes one lr fit all encoders; no paper's way.
    data, root, image_size: of another set than the encoder was trained on, for transfer, normalised by its own statistics (ImageNet's where it has
    none); null: that one's own. With `data: folder`, root holds train/<class>/ and val/<class>/.
    classifier: `sgd`, or `svm` for VOC2007 (engine/svm.py), which uses no key below it but `C` and
    `difficult`.
    difficult: what an image is in which a class is there but difficult to see: `negative`, as in
    PCL's code, or `ignore`, VOC's own rule, by which it counts neither way.
    The other keys are engine.schedule's.
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
                f"data {data} does not go with classifier {classifier}: voc2007, with several classes an image, and svm belong together"
            )
        if C <= 0:
            raise ValueError(f"C is {C}; it must be above 0")
        self.data, self.root, self.image_size, self.classifier, self.C = (
            data,
            root,
            image_size,
            classifier,
            C,
        )
        self.difficult = difficult
        self.lrs = lr if isinstance(lr, list) else [lr]
        if not self.lrs:
            raise ValueError("lr is an empty list; give one learning rate or several")
        self.schedule = Schedule(
            epochs=epochs,
            batch_size=batch_size,
            lr=1.0,
            schedule=schedule,
            milestones=milestones,
            gamma=gamma,
        )
        sensible(momentum, weight_decay)
        if min(self.lrs) <= 0:
            raise ValueError(f"lr {min(self.lrs)} must be above 0")
        if len({f"{lr:g}" for lr in self.lrs}) < len(self.lrs):  # as the table names them
            raise ValueError(f"lr {self.lrs} has one learning rate twice; keep one")
        if image_size is not None and not 8 <= image_size <= 4096:
            raise ValueError(
                f"image_size is {image_size}; it must be at least 8 and 4096 at most, or null for the encoder's own"
            )
        named(augment)  # or there is none
        self.epochs, self.batch_size, self.momentum, self.weight_decay = (
            epochs,
            batch_size,
            momentum,
            weight_decay,
        )
        self.features, self.augment, self.standardize = features, augment, standardize

    def __str__(self):
        if self.classifier == "svm":
            difficult = "are negatives" if self.difficult == "negative" else "count neither way"
            return (
                "linear SVM a class on L2-normalised pooled features of the frozen encoder, "
                f"C {self.C:g}, squared hinge, positives weigh twice, "
                f"difficult images {difficult}; VOC2007's mAP"
            )
        s = self.schedule
        return (
            f"linear layer on {'standardized ' if self.standardize else ''}pooled features of the frozen encoder, "
            + ("no augmentation" if self.features == "cached" else f"augmentation {self.augment}")
            + f"; SGD, {self.epochs} epochs, batch {self.batch_size}, lr {self.lrs[0]:g}, momentum {self.momentum:g}, weight decay {self.weight_decay:g}, "
            + (f"times {s.gamma:g} at {s.milestones}" if s.schedule == "step" else s.schedule)
            + "; last epoch"
        )


@distributed.say_refusals_once()
def main():
    args, cfg = config.read_command_line(command_line())
    device = distributed.start(args.device)
    main_process = distributed.is_main()
    build = lambda target, section, **given: config.build(
        target, cfg[section], f"{args.cfg}: {section}", **given
    )
    probe = build(Probe, "linear")
    folder = os.path.join("runs", cfg["name"])
    weights = of_run(args.weights, folder, args.cfg, random=False)

    torch.manual_seed(cfg["seed"])
    if args.export and args.export[0] not in ("torchvision", "detectron2"):
        raise SystemExit(f"--export {args.export[0]}: there are torchvision and detectron2")
    source = cfg["data"]
    if probe.data is not None:  # it has a normalisation of its own
        source = {
            **source,
            "name": probe.data,
            "split": "train",
            "limit": None,
            "mean": None,
            "std": None,
        }
    source = {
        **source,
        **{
            k: v
            for k, v in dict(root=probe.root, image_size=probe.image_size).items()
            if v is not None
        },
    }
    config.build(
        sensible_size, {}, args.cfg, image_size=source["image_size"]
    )  # the Loader would say so, but cached features want none
    train, test = (
        config.build(load, source, f"{args.cfg}: linear", part=part, seed=cfg["seed"])
        for part in ("train", "test")
    )
    say_if_dark(train)
    encoder = build(
        getattr(config.chosen(cfg["model"], "model"), "Encoder", Encoder),
        "model",
        device=device,
        mean=train.mean,
        std=train.std,
    )
    encoder.eval().requires_grad_(False)
    untrained = copy.deepcopy(encoder)  # the very weights that the run began with
    load_backbone(weights, encoder.backbone)
    if args.export:
        export(*args.export, encoder.backbone, weights)
        return say(f"{args.export[1]}: {weights}, for {args.export[0]}")
    before = copy.deepcopy(encoder.backbone.state_dict())
    obstacle = find_obstacle(train, test)
    if obstacle:
        raise SystemExit(
            f"{args.cfg}: no linear probe on {source['name']} at {source['root']}: {obstacle}; or take another set: "
            "linear.data=folder linear.root=PATH, which holds train/<class>/ and val/<class>/"
        )
    if len(train) < 2:
        raise SystemExit(
            f"{args.cfg}: a linear probe needs more training images than {len(train)}; raise data.limit"
        )
    train, test = train.to(device), test.to(device)
    size, workers = source["image_size"], source["workers"]
    classes = len(train.classes)

    # ------------------------------------------------------------------------------------------------ whose features
    encoders = (
        {}
        if args.no_baselines
        else {
            "raw pixels": lambda x: F.adaptive_avg_pool2d(x, min(32, size)).flatten(1),
            "untrained encoder": lambda x: untrained(x, "backbone"),
        }
    )  # (b, F)
    encoders[cfg["name"]] = lambda x: encoder(x, "backbone")
    data = (
        source["name"]
        if source["name"] != "folder"
        else f"folder {os.path.basename(os.path.normpath(source['root']))}"
    )
    say(
        f"{weights} on {data}: {len(train)} training and {len(test)} test images, {classes} classes"
    )
    widths = measure_widths(encoders, size, device)
    fewer = (
        []
        if args.no_baselines
        else ["leave out raw pixels and the untrained encoder with --no-baselines"]
    )
    fewer += (
        []
        if source["limit"] is None and probe.data is not None
        else ["take fewer training images with data.limit"]
    )
    keep_on = choose_memory(probe, widths, len(train), len(test), device, fewer, args.cfg)
    features_of = lambda encode, part, what: extract(
        encode, part, size, device, workers, what=what, keep_on=keep_on
    )
    monitor = build(
        KNN, "knn", train=train, test=test, image_size=size, device=device, workers=workers
    )
    augmented = probe.classifier == "sgd" and probe.features == "augmented"
    loader = (
        None
        if not augmented
        else config.build(
            Loader,
            {**source, "augment": probe.augment, "augment_backend": "batched"},
            f"{args.cfg}: linear",
            dataset=train,
            batch_size=probe.batch_size,
            n_views=1,
            seed=cfg["seed"] + 1,
            device=device,
            drop_last=False,
        )
    )
    rows, seconds = evaluate(
        probe, encoders, widths, train, test, features_of, monitor, loader, cfg["seed"], device
    )

    # ------------------------------------------------------------------------------------------------ what came out
    for name, value in encoder.backbone.state_dict().items():
        if not torch.equal(value, before[name]):
            raise SystemExit(
                f"the frozen encoder moved: {name} changed; this is a fault of the program, and the figures are void"
            )
    columns = list(next(iter(rows.values())))
    neighbours = (
        ""
        if probe.classifier == "svm"
        else f"\nkNN: {monitor.neighbours()}, T {monitor.temperature:g}, on the pooled features"
    )
    say(
        f"\n{probe}{neighbours}{'; raw pixels at most 32 x 32' if not args.no_baselines else ''}; the encoder's weights did not move\n"
    )
    say(
        "\n".join(
            [f"{'':24}" + "".join(f"{c:>16}" for c in columns)]
            + [
                f"{name:24}" + "".join(f"{row[c]:16.2f}" for c in columns)
                for name, row in rows.items()
            ]
        )
    )
    if main_process:
        os.makedirs(folder, exist_ok=True)
        config.keep(cfg, folder)
        row = rows[cfg["name"]]
        figures = {
            k.split(",")[0]: row[k]
            for k in columns
            if "," not in k or k.endswith(f", lr {probe.lrs[0]:g}")
        }  # of several lr the first is reported
        with open(os.path.join(folder, "linear.jsonl"), "a") as f:
            f.write(
                json.dumps(
                    {
                        "weights": weights,
                        "data": data,
                        "protocol": str(probe),
                        "knn": str(monitor).replace(monitor.feature, "backbone"),
                        "seed": cfg["seed"],
                        "seconds": round(seconds, 1),
                        "figures": figures,
                        "rows": rows,
                    }
                )
                + "\n"
            )
    distributed.stop()


def measure_widths(encoders, image_size, device):
    """-> {encoder: how many numbers it makes of an image}"""
    with torch.no_grad():  # CMC's encoder has two streams: ask how wide it is
        image = torch.zeros(1, 3, image_size, image_size, device=device)
        return {name: encode(image).shape[1] for name, encode in encoders.items()}


def choose_memory(probe, widths, n_train, n_test, device, fewer, file):
    """The device that the features are kept on: `device`, or the CPU where that has too little
    memory free.

    widths: {encoder: F}. fewer: what else would make them fit, in words. All processes call it.
    SystemExit, before anything is extracted, where the features of one encoder fit nowhere.
    """
    name, width = max(widths.items(), key=lambda item: item[1])
    needed = 4 * width * (n_train + n_test)
    if probe.features == "augmented":  # the test images' features of all encoders wait for the end
        needed += 4 * n_test * (sum(widths.values()) - width)
    if probe.classifier == "svm":
        needed *= 2  # it makes a copy of unit length
    keep_on, lacking = where_features_fit(needed + KNN_BYTES, device)
    problem = (
        None
        if lacking is None
        else (
            f"{file}: the features of {n_train} training and {n_test} test images, {width} numbers an "
            f"image ({name}), need {(needed + KNN_BYTES) / 1e9:.3g} GB of memory, but {lacking}; "
            + ", or ".join([*fewer, "allow more memory"])
        )
    )
    distributed.agree(problem)
    if keep_on.type != device.type:
        say(
            f"the features, {needed / 1e9:.3g} GB, are kept in the machine's memory: {device} has "
            f"{devices.free_memory(device) / 1e9:.3g} GB free"
        )
    return keep_on


def evaluate(probe, encoders, widths, train, test, features_of, monitor, loader, seed, device):
    """KNN and linear layers, or SVMs, on the features of one encoder after the other, so that no
    more than one encoder's are in memory.

    encoders: {name: (b, 3, S, S) -> (b, F)}. widths: {name: F}.
    features_of: (encode, data set, words for the progress bar) -> (n, F).
    loader: of augmented images, which all encoders see side by side; None to train on features.
    -> {encoder: {figure: %}}, and the seconds that it took beside the extraction
    """
    y, y_test = train.labels.to(device), test.labels.to(device)
    classes = len(train.classes)
    # All at once, so that each begins with the same numbers whichever others there are.
    layers = None
    if probe.classifier == "sgd":
        layers = new_layers(widths, len(probe.lrs), classes, device)
    rows, scales, x_tests, seconds = {}, {}, {}, 0.0
    for name, encode in encoders.items():
        x_test = features_of(encode, test, f"test, {name}")
        x = features_of(encode, train, f"train, {name}")
        began = time.time()
        if probe.classifier == "svm":
            rows[name] = {"mAP": svm(x, y, x_test, y_test, probe.C, train.classes, probe.difficult)}
        else:
            right = knn(x, y, x_test, monitor.voters, monitor.temperature) == y_test
            rows[name] = {"knn": percent(right)}
            scale = Standardize(x, device) if probe.standardize else Standardize(None, device)
            if loader is None:
                own = nn.ModuleDict({key(name): layers[key(name)]})
                batches = cached_batches(name, x, y, scale, probe.batch_size, seed)
                by_sgd(probe, own, batches, Heads(own), device)
                rows[name] |= accuracies(probe, layers[key(name)], scale, x_test, y_test)
            else:
                scales[name], x_tests[name] = scale, x_test
        seconds += time.time() - began
        x = x_test = None  # or they would stay while the next encoder's are extracted
    if loader is not None:
        began = time.time()
        batches = augmented_batches(loader, encoders, scales, y)
        by_sgd(probe, layers, batches, distributed.wrap(Heads(layers), device), device)
        for name in encoders:
            rows[name] |= accuracies(probe, layers[key(name)], scales[name], x_tests[name], y_test)
        seconds += time.time() - began
    return rows, seconds


class Standardize:
    """Features (b, F), wherever they are kept -> on `device`, brought to mean 0 and variance 1 by
    those of the training set, x (n, F); with x None, as they are.
    """

    def __init__(self, x, device):
        self.device, self.mean, self.std = device, 0.0, 1.0
        if x is not None:
            self.mean, self.std = x.mean(0).to(device), x.std(0).clamp(min=1e-6).to(device)

    def __call__(self, features):
        return (features.to(self.device) - self.mean) / self.std


def new_layers(widths, count, classes, device):
    """{encoder: F} -> a ModuleDict of `count` linear layers for each encoder."""
    layers = nn.ModuleDict(
        {
            key(name): nn.ModuleList(nn.Linear(width, classes) for _ in range(count))
            for name, width in widths.items()
        }
    ).to(device)
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):  # the convention of the released code
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    return layers


def cached_batches(name, x, y, scale, batch_size, seed):
    """-> epoch -> ({name: features (b, F)}, labels (b,)) for each step, of features x (n, F).

    In the same order for each encoder. Every process trains the same layer on all features.
    """
    order = torch.Generator().manual_seed(seed)

    def batches(epoch):
        for rows in torch.randperm(len(y), generator=order).to(y.device).split(batch_size):
            yield {name: scale(x[rows.to(x.device)])}, y[rows]

    return batches


def augmented_batches(loader, encoders, scales, y):
    """-> epoch -> ({encoder: features (b, F)}, labels (b,)) for each step, of augmented images."""

    def batches(epoch):
        images_of_epoch = or_say_what_is_kept(
            loader.epoch(epoch),
            lambda: "a linear probe saves nothing before its end: start it again",
        )
        for (images,), rows in images_of_epoch:
            yield {name: scales[name](encode(images)) for name, encode in encoders.items()}, y[rows]

    return batches


def by_sgd(probe, layers, batches, heads, device):
    """Train linear layers side by side: of each encoder in `layers`, one for each learning rate.

    batches: see cached_batches. heads: Heads(layers), or DDP of it. SystemExit where the loss is
    not finite at the end.
    """
    optimizers = []
    for i, lr in enumerate(probe.lrs):
        parameters = [p for of_encoder in layers.values() for p in of_encoder[i].parameters()]
        how = {"momentum": probe.momentum, "weight_decay": probe.weight_decay}
        optimizers.append(sgd(parameters, lr, **how))
    hidden = None if distributed.is_main() else True
    for epoch in tqdm(range(probe.epochs), "linear", leave=False, disable=hidden):
        for lr, optimizer in zip(probe.lrs, optimizers):
            optimizer.param_groups[0]["lr"] = lr * probe.schedule(epoch)
        for features, target in batches(epoch):
            logits = [one for of_encoder in heads(features).values() for one in of_encoder]
            loss = sum(F.cross_entropy(one, target) for one in logits)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    if not loss.isfinite():
        raise SystemExit(f"the probe's loss is {loss.item()}; lower linear.lr ({probe.lrs})")


@torch.no_grad()
def accuracies(probe, layers, scale, x_test, y_test):
    """-> {"top-1, lr ...": %, "top-5, lr ...": %} of the layers of one encoder, one a learning rate.

    x_test: (m, F).
    """
    figures = {}
    for lr, layer in zip(probe.lrs, layers):
        k = min(5, layer.out_features)
        top = [layer(scale(x)).topk(k).indices for x in x_test.split(TEST_ROWS)]
        right = torch.cat(top) == y_test[:, None]  # (m, 5)
        figures[f"top-1, lr {lr:g}"] = percent(right[:, 0])
        figures[f"top-5, lr {lr:g}"] = percent(right.any(1))
    return figures


class Heads(nn.Module):
    """All linear layers, as one module for DDP."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, features):
        return {
            name: [layer(v) for layer in self.layers[key(name)]] for name, v in features.items()
        }


def key(name):
    return name.replace(".", "_")  # nn.ModuleDict takes no point


if __name__ == "__main__":
    main()
