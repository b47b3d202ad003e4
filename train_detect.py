"""Detection, instance segmentation or keypoints from a pre-trained backbone: Faster, Mask or Keypoint R-CNN with FPN, all layers fine-tuned.

    python train_detect.py --cfg yaml/FILE.yaml                                  the backbone of the run of that name; a CPU, or one GPU: the same line
    python train_detect.py --cfg yaml/FILE.yaml --weights resnet50.pth           a backbone.pt, a last.pt, or a torchvision ResNet's file
    python train_detect.py --cfg yaml/FILE.yaml --weights none detect.task=box   from random weights; settings replaced on the command line
    torchrun --nproc_per_node 4 train_detect.py --cfg yaml/FILE.yaml             4 GPUs (or, without any, 4 processes)

Writes runs/<name>/detect/: last.pt, log.jsonl (its `epoch` counts iterations), TensorBoard's events, detections.png (truth, and right of it the surest
detections). Each evaluation appends COCO's AP, in percent, with the protocol in words, to runs/<name>/detect.jsonl; `seconds`: since the script started.
A run that was stopped goes on from last.pt when it is started again, exactly; --fresh starts it over. Batch size and learning rate are global.
The AP is COCO's for both layouts. VOC2007's own, which papers print, takes precision at 11 points of recall (COCO: 101) and so differs.
Needs pycocotools: pip install -r requirements-dev.txt.
"""

import contextlib
import io
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
        help="the backbone's weights; left out: those of the run that --cfg names; none: random ones",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over, though there is a detect/last.pt"
    )
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    config.answer_early(command_line(), also=("detect",))

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks
from tqdm import tqdm

from data import detection
from data.image_files import say_if_dark
from data.workers import or_say_what_is_kept, say_what_is_kept
from engine import checkpoint, distributed
from engine import device as devices
from engine.distributed import say
from engine.log import Log
from engine.schedule import reached, sensible, sgd
from engine.weights import load_backbone, of_run
from models.resnet import ResNet

COLOURS = ["red", "lime", "yellow", "cyan", "magenta", "orange", "deepskyblue", "white"]
# task -> the kinds of AP, by our names and by pycocotools'
KINDS = {
    "box": {"box": "bbox"},
    "mask": {"box": "bbox", "mask": "segm"},
    "keypoint": {"box": "bbox", "keypoint": "keypoints"},
}
MAY_CHANGE = (
    "data",
    "workers",
    "iterations",
    "eval_every",
    "save_every",
)  # on resuming; of the other settings of detect: none


class Detect:
    """The protocol; its defaults are detectron2's 1x schedule for FPN, by which JCL fine-tunes.

    task: box, Faster R-CNN; mask, Mask R-CNN; keypoint, Keypoint R-CNN, for persons. data, layout, train, val: see data/detection.py. limit: the
    first that many training images; images without annotations are left out before.
    lr: rises linearly over warmup_iterations, then times gamma at each milestone. Weight decay spares BatchNorm's parameters, as detectron2 does.
    norm: BatchNorm in backbone, FPN and mask head, trained and synchronised, as moco's detection code does; the box
    head, of two linear layers, and the keypoint head have none, as in detectron2. `sync`: statistics over all processes where these have GPUs; a
    process on a CPU, or alone, has its own, as with `batch`. `frozen`: the backbone's statistics and affine parameters stay as pre-trained, and nothing
    else has BatchNorm.
    min_size: the shorter side, in pixels; each training image gets one of these by chance, evaluation the last. max_size: the longer side, at most.
    detections: kept an image (COCO's AP looks at 100, and at 20 persons' keypoints). proposals: those sampled an image for the heads' loss.
    channels: of FPN and mask head; the keypoint head has twice, the box head four times as many. 256 is torchvision's and detectron2's.
    eval_every, save_every: iterations; 0: at the end only. workers: processes that read images; null: the cores there are, 8 at most.
    All is fp32. torchvision's models are not detectron2's to the letter (RoIAlign without the half pixel; 2,000 proposals, not 1,000, in training; an own
    smooth L1), so a paper's row is approached here, and met with the files in yaml/detectron2.
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
        milestones: list[int] = [60000, 80000],
        gamma: float = 0.1,
        norm: Literal["sync", "batch", "frozen"] = "sync",
        min_size: list[int] = [640, 672, 704, 736, 768, 800],
        max_size: int = 1333,
        detections: int = 100,
        proposals: int = 512,
        channels: int = 256,
        eval_every: int = 0,
        save_every: int = 5000,
        workers: int | None = None,
    ):
        above = dict(
            iterations=iterations,
            batch_size=batch_size,
            lr=lr,
            gamma=gamma,
            max_size=max_size,
            detections=detections,
            proposals=proposals,
            channels=channels,
            limit=1 if limit is None else limit,
            min_size=min(min_size, default=0),
        )
        for name, value in above.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0, and finite")
        for name, value in dict(
            eval_every=eval_every,
            save_every=save_every,
            warmup_iterations=warmup_iterations,
            workers=workers or 0,
        ).items():
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        if workers is not None and workers > 1024:
            raise ValueError(
                f"workers is {workers}; it must be 1024 at most, or null for as many as there are cores"
            )
        sensible(momentum, weight_decay)
        reached(milestones, iterations, "iterations")
        if warmup_iterations >= iterations:
            distributed.say(
                f"warmup_iterations {warmup_iterations} leaves nothing of iterations {iterations}: the learning rate does not get up to lr {lr:g}; lower it"
            )
        if max(min_size) > max_size:
            raise ValueError(f"min_size {max(min_size)} is above max_size {max_size}")
        if layout == "voc" and task != "box":
            raise ValueError(f"layout voc has boxes only; task {task} wants layout coco")
        if batch_size % distributed.world_size():
            raise ValueError(
                f"batch_size {batch_size} does not divide by {distributed.world_size()} processes"
            )
        self.task, self.data, self.layout, self.train, self.val, self.limit = (
            task,
            data,
            layout,
            train,
            val,
            limit,
        )
        self.iterations, self.batch_size, self.lr, self.momentum, self.weight_decay = (
            iterations,
            batch_size,
            lr,
            momentum,
            weight_decay,
        )
        self.warmup, self.milestones, self.gamma, self.norm = (
            warmup_iterations,
            milestones,
            gamma,
            norm,
        )
        self.min_size, self.max_size, self.detections, self.proposals, self.channels = (
            min_size,
            max_size,
            detections,
            proposals,
            channels,
        )
        self.eval_every, self.save_every, self.workers = eval_every, save_every, workers
        self.synchronized = (
            norm == "sync" and distributed.world_size() > 1 and devices.current.type == "cuda"
        )

    def rate(self, iteration):
        """The learning rate of a step, counted from 0."""
        return (
            self.lr
            * min(1, (iteration + 1) / max(1, self.warmup))
            * self.gamma ** sum(iteration >= m for m in self.milestones)
        )

    def __str__(self):
        name = {"box": "Faster", "mask": "Mask", "keypoint": "Keypoint"}[self.task] + " R-CNN"
        norm = f"BatchNorm over {self.batch_size if self.synchronized else self.batch_size // distributed.world_size()} images"
        part = lambda p: p if isinstance(p, str) else "+".join(p)
        return (
            f"{name}, FPN{f' of {self.channels} channels' if self.channels != 256 else ''}, all layers fine-tuned on {part(self.train)}"
            f"{f' ({self.limit} images)' if self.limit else ''}, COCO's AP on {part(self.val)}; SGD, {self.iterations} iterations, "
            f"batch {self.batch_size}, lr {self.lr:g}, momentum {self.momentum:g}, weight decay {self.weight_decay:g}, warm-up {self.warmup}, "
            f"{f'times {self.gamma:g} at {self.milestones}' if self.milestones else 'no milestones'}; "
            f"{'frozen BatchNorm' if self.norm == 'frozen' else norm}; shorter side {', '.join(map(str, self.min_size))}, longer at most {self.max_size}"
        )


@distributed.say_refusals_once()
def main():
    args, cfg = config.read_command_line(command_line(), also=("detect",))
    # ------------------------------------------------------------------------------------------------ who takes part
    device = distributed.start(args.device)
    torch.backends.cudnn.benchmark = (
        False  # every batch has another shape: it would measure kernels at each
    )
    main_process = distributed.is_main()
    detect = config.build(Detect, cfg["detect"], f"{args.cfg}: detect")
    pycocotools()  # missing? now, not after the last iteration
    if cfg["model"]["host"] == "cmc":
        raise SystemExit(
            f"{args.cfg}: CMC's two-stream encoder takes no RGB image, so no detector can be built on it; choose another model.host"
        )
    run = os.path.join("runs", cfg["name"])
    folder = os.path.join(run, "detect")
    weights = of_run(args.weights, run, args.cfg)
    if weights == "none" and detect.norm == "frozen":
        raise SystemExit(
            f"{args.cfg}: detect.norm frozen keeps BatchNorm as pre-trained, and --weights none has no such; use norm batch"
        )

    coco, truth = detection.load(detect.layout, detect.data, detect.train, detect.val, detect.task)
    train, val = (
        detection.Images(coco, detect.task, training=True, limit=detect.limit),
        detection.Images(truth, detect.task),
    )
    say_if_dark(train)
    if len(train) < detect.batch_size:
        raise SystemExit(
            f"{args.cfg}: detect.batch_size {detect.batch_size} is larger than the {len(train)} training images with annotations"
        )
    classes = truth["categories"]  # label 1 is the first, 0 the background

    torch.manual_seed(cfg["seed"])  # every process begins with the same weights
    net = ResNet(cfg["model"]["backbone"], cfg["model"]["stem"], cfg["model"]["width"])
    if weights != "none":
        load_backbone(weights, net)
    model = build_model(net, len(classes), detect).to(device)
    norms = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        for p in m.parameters()
    }
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in norms]},
        {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0},
    ]
    optimizer = sgd(
        [g for g in groups if g["params"]],
        detect.lr,
        momentum=detect.momentum,
        weight_decay=detect.weight_decay,
    )
    wrapped = distributed.wrap(model, device)
    torch.manual_seed(
        cfg["seed"] + 2**20 * distributed.rank()
    )  # image sizes, and which proposals are looked at

    # ------------------------------------------------------------------------------------------------ where it stands
    settings = {
        "seed": cfg["seed"],
        "weights": weights,
        **{f"model.{k}": cfg["model"][k] for k in ("backbone", "stem", "width")},
        **{f"detect.{k}": v for k, v in cfg["detect"].items() if k not in MAY_CHANGE},
    }
    last = os.path.join(folder, "last.pt")
    start = (
        checkpoint.resume(last, settings, model=model, optimizer=optimizer)
        if os.path.exists(last) and not args.fresh
        else 0
    )
    os.makedirs(folder, exist_ok=True)
    if main_process:
        config.keep(cfg, run)
    log = Log(folder, start) if main_process else None
    say(
        f"{folder}: {weights if weights != 'none' else 'random weights'}; {len(train)} training and {len(val)} validation images, {len(classes)} classes; "
        f"{distributed.world_size()} processes x {detect.batch_size // distributed.world_size()} images; {device}, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters\n{detect}"
    )
    if start:
        say(
            f"going on from {last} after iteration {start} of {detect.iterations}"
            if start < detect.iterations
            else f"{last} is at iteration {start}, and detect.iterations is {detect.iterations}: nothing is left to do; --fresh starts over"
        )

    # ------------------------------------------------------------------------------------------------ the loop
    saved = start

    def kept_and_how_on():
        if not saved:
            return "nothing was saved yet"
        return f"{last} holds the state after iteration {saved} of {detect.iterations}, and the same line goes on from there"

    began, total, since, seen = time.time(), {}, time.time(), 0
    steps = detection.plan(len(train), detect.batch_size, cfg["seed"], start, detect.iterations)
    batches = or_say_what_is_kept(
        detection.batches(train, steps, device, detect.workers), kept_and_how_on
    )
    bar = tqdm(
        batches,
        "detect",
        initial=start,
        total=detect.iterations,
        leave=False,
        disable=None if main_process else True,
    )
    model.train()
    for iteration, batch in enumerate(bar, start):
        for group in optimizer.param_groups:
            group["lr"] = detect.rate(iteration)
        images, targets = zip(*batch)
        parts = wrapped(
            list(images), list(targets)
        )  # {"loss_classifier": ..., "loss_box_reg": ..., ...}
        loss = sum(parts.values())
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit(
                f"the loss is {value} at iteration {iteration + 1} of {detect.iterations}; "
                + (
                    f"{last} holds an earlier state"
                    if os.path.exists(last)
                    else "nothing was saved yet"
                )
                + "; try a lower detect.lr"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        # -------------------------------------------------------------------------------------------- now and then
        done, seen = iteration + 1, seen + 1
        for name, part in {"loss": loss, **parts}.items():
            total[name] = total.get(name, 0) + part.detach()
        at_end = done == detect.iterations
        evaluate, save = (
            at_end or detect.eval_every and done % detect.eval_every == 0,
            at_end or detect.save_every and done % detect.save_every == 0,
        )
        if iteration % 20 == 0 or evaluate:
            figures = dict(
                zip(total, (distributed.mean(torch.stack(list(total.values()))) / seen).tolist())
            )
            figures |= {
                "lr": detect.rate(iteration),
                "images/s": seen * detect.batch_size / (time.time() - since),
            }
            bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
            if evaluate or iteration % 1000 == 0:
                say(
                    f"iteration {done}/{detect.iterations}  loss {figures['loss']:.3f}  lr {figures['lr']:.5f}  {figures['images/s']:.1f} images/s"
                )
            total, seen = {}, 0
        if evaluate or save:
            distributed.average_buffers(
                model
            )  # BatchNorm's statistics, where each process has its own
        if evaluate:
            with say_what_is_kept(kept_and_how_on):
                found = predictions(model, val, classes, detect.task, device, detect.workers)
            detections = [record for records in found.values() for record in records]
            # It takes minutes on COCO, for which a collective would not wait.
            ap = distributed.run_on_first(lambda: average_precision(truth, detections, detect.task))
            if main_process:
                say(
                    "\n".join(
                        [f"{'':12}" + "".join(f"{c:>8}" for c in ("AP", "AP50", "AP75"))]
                        + [
                            f"{kind:12}"
                            + "".join(f"{ap[f'{kind} {c}']:8.2f}" for c in ("AP", "AP50", "AP75"))
                            for kind in KINDS[detect.task]
                        ]
                    )
                )
                figures |= ap
                log.picture(
                    os.path.join(folder, "detections.png"), picture(truth, val, found), columns=4
                )
                with open(os.path.join(run, "detect.jsonl"), "a") as f:
                    f.write(
                        json.dumps(
                            {
                                "weights": weights,
                                "protocol": str(detect),
                                "seed": cfg["seed"],
                                "iteration": done,
                                "seconds": round(time.time() - began, 1),
                                "figures": ap,
                            }
                        )
                        + "\n"
                    )
            model.train()
        if main_process and (iteration % 20 == 0 or evaluate):
            log.write(done, {k: float(f"{v:.6g}") for k, v in figures.items()})
        if save:
            checkpoint.save(last, settings, done, model=model, optimizer=optimizer)
            saved = done
        if seen == 0:
            since = time.time()  # images/s: training alone
    distributed.stop()


# ---------------------------------------------------------------------------------------------------- the model


def build_model(net, n_classes, detect):
    """Torchvision's R-CNN on a models.resnet.ResNet, whose fc and pooling are dropped."""
    c = detect.channels
    norm = None if detect.norm == "frozen" else nn.BatchNorm2d
    if detect.norm == "frozen":
        freeze(net)
    stages = [net.features // 2**i for i in (3, 2, 1, 0)]  # channels of layer1 ... layer4
    backbone = BackboneWithFPN(
        net, {f"layer{i + 1}": str(i) for i in range(4)}, stages, c, norm_layer=norm
    )
    common = dict(
        box_head=TwoMLPHead(c * 7**2, 4 * c),
        box_predictor=FastRCNNPredictor(4 * c, n_classes + 1),
        min_size=detect.min_size,
        max_size=detect.max_size,
        box_detections_per_img=detect.detections,
        box_batch_size_per_image=detect.proposals,
    )
    if detect.task == "mask":
        model = MaskRCNN(
            backbone,
            mask_head=MaskRCNNHeads(c, [c] * 4, 1, norm_layer=norm),
            mask_predictor=MaskRCNNPredictor(c, c, n_classes + 1),
            **common,
        )
    elif detect.task == "keypoint":
        model = KeypointRCNN(
            backbone,
            keypoint_head=KeypointRCNNHeads(c, [2 * c] * 8),
            keypoint_predictor=KeypointRCNNPredictor(2 * c, 17),
            **common,
        )
    else:
        model = FasterRCNN(backbone, **common)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if detect.synchronized else model


def freeze(module):
    """Replace every BatchNorm2d in module by torchvision's frozen one, with its statistics and parameters, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze(child)


# ---------------------------------------------------------------------------------------------------- evaluation


def pycocotools():
    """-> its COCO, COCOeval and mask, which the scripts that detect nothing do without."""
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise SystemExit(
            f"{error.name} is not installed, and COCO's masks and AP need it: pip install -r requirements-dev.txt"
        )
    return COCO, COCOeval, mask


@torch.no_grad()
def predictions(model, val, classes, task, device, workers=None):
    """-> {image id: COCO's result records} of all validation images, on every process.

    The processes share the images out, none lost or repeated; one image at a time, so that padding, and the result, are the same for any number of processes.
    """
    model.eval()
    rows = range(distributed.rank(), len(val), distributed.world_size())
    bar = tqdm(
        detection.batches(val, [[(row, False)] for row in rows], device, workers),
        "evaluation",
        total=len(rows),
        leave=False,
        disable=None if distributed.is_main() else True,
    )
    mine = {
        image_id: records(model([image])[0], image_id, classes, task)
        for ((image, image_id),) in bar
    }
    parts = distributed.gather_objects(mine)
    found = {i: one for part in parts for i, one in part.items()}
    if len(found) != len(val) or sum(map(len, parts)) != len(val):
        raise SystemExit(
            f"of {len(val)} validation images {len(found)} different ones were evaluated; does an image id appear twice in the annotations?"
        )
    return found


def records(output, image_id, classes, task):
    """Torchvision's detections of one image -> COCO's result records, in the image's own pixels."""
    boxes, scores, labels = (output[k].cpu() for k in ("boxes", "scores", "labels"))
    boxes[:, 2:] -= boxes[:, :2]  # x1 y1 x2 y2 -> x y w h
    found = [
        {"image_id": image_id, "category_id": classes[label - 1]["id"], "bbox": box, "score": score}
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist())
    ]
    if task == "mask" and found:
        masks = (output["masks"][:, 0] > 0.5).byte().cpu().numpy()  # (n, H, W)
        for one, rle in zip(
            found, pycocotools()[2].encode(np.asfortranarray(masks.transpose(1, 2, 0)))
        ):
            one["segmentation"] = rle
    if task == "keypoint":
        points = output["keypoints"].cpu()  # (n, 17, 3)
        points[..., :2] -= 0.5  # back to COCO's pixel indices
        for one, k in zip(found, points.flatten(1).tolist()):
            one["keypoints"] = k
    return found


def average_precision(truth, found, task):
    """Pycocotools' AP over IoU (for keypoints: OKS) .50:.95, AP50 and AP75, in percent. truth: COCO's dict; found: its result records."""
    COCO, COCOeval, _ = pycocotools()
    key, figures = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}, {}
    with contextlib.redirect_stdout(io.StringIO()):  # it is talkative
        real = (
            COCO()
        )  # copies, as it writes into them; ids from 1, as it takes a match with 0 for none
        real.dataset = {
            **truth,
            "annotations": [{**a, "id": i} for i, a in enumerate(truth["annotations"], 1)],
        }
        real.createIndex()
        for name, kind in KINDS[task].items():
            some = [
                {k: one[k] for k in ("image_id", "category_id", "score", key[kind])}
                for one in found
            ]  # with a box, a mask's area would be the box's
            values = np.zeros(3)
            if some:  # it cannot load none
                judge = COCOeval(real, real.loadRes(some), kind)
                judge.evaluate(), judge.accumulate(), judge.summarize()
                values = judge.stats[:3]
            if values[0] < 0:
                raise SystemExit(
                    f"the validation annotations have nothing to compute {name} AP with"
                )
            figures |= {
                f"{name} {what}": round(100 * float(value), 3)
                for what, value in zip(("AP", "AP50", "AP75"), values)
            }
    return figures


def picture(truth, val, found, rows=4, side=400, best=5):
    """(2 rows, 3, side, side) in [0, 1]: of the first images with annotations the truth and, beside it, the `best` surest detections."""
    categories, real = {c["id"]: c for c in truth["categories"]}, {}
    for a in truth["annotations"]:
        if not a["iscrowd"]:
            real.setdefault(a["image_id"], []).append(
                a if val.task == "mask" else {k: v for k, v in a.items() if k != "segmentation"}
            )
    cells = []
    for row in [row for row, info in enumerate(val.images) if info["id"] in real][:rows]:
        image, image_id = val[row, False]
        for some in (real[image_id], sorted(found[image_id], key=lambda one: -one["score"])[:best]):
            drawn = draw(image, some, categories).float() / 255
            scale = side / max(drawn.shape[1:])
            drawn = F.interpolate(
                drawn[None],
                size=[max(1, round(scale * s)) for s in drawn.shape[1:]],
                mode="bilinear",
                antialias=True,
            )
            cells.append(F.pad(drawn, (0, side - drawn.shape[3], 0, side - drawn.shape[2])))
    return torch.cat(cells)


def draw(image, some, categories):
    """COCO's annotations or result records on an image (3, H, W) uint8."""
    if not some:
        return image
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(some))]
    for a, colour in zip(some, colours):
        if len(a.get("segmentation", ())):
            image = draw_segmentation_masks(
                image,
                torch.from_numpy(detection.mask(a["segmentation"], *image.shape[1:])).bool(),
                alpha=0.5,
                colors=colour,
            )
    boxes = torch.tensor([a["bbox"] for a in some])  # (n, 4)
    boxes[:, 2:] += boxes[:, :2]
    words = [
        categories[a["category_id"]]["name"] + (f" {a['score']:.2f}" if "score" in a else "")
        for a in some
    ]
    image = draw_bounding_boxes(image, boxes, words, colours, width=2)
    if "keypoints" in some[0]:
        points = (
            torch.tensor(np.array([a["keypoints"] for a in some])).float().view(len(some), -1, 3)
        )  # (n, 17, 3)
        bones = [(i - 1, j - 1) for i, j in next(iter(categories.values())).get("skeleton", [])]
        image = draw_keypoints(
            image, points[..., :2], bones, colors="lime", width=1, visibility=points[..., 2] > 0
        )
    return image


if __name__ == "__main__":
    main()
