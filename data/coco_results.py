"""Detections as COCO's result records: their average precision, and a picture of them.

The records: https://cocodataset.org/#format-results.
"""

import contextlib
import io

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from . import coco

# task -> the kinds of AP: our name, pycocotools' name, and the key that its records must have.
KINDS = {
    "box": [("box", "bbox", "bbox")],
    "mask": [("box", "bbox", "bbox"), ("mask", "segm", "segmentation")],
    "keypoint": [("box", "bbox", "bbox"), ("keypoint", "keypoints", "keypoints")],
}
FIGURES = "AP", "AP50", "AP75"
COLOURS = ["red", "lime", "yellow", "cyan", "magenta", "orange", "deepskyblue", "white"]
PICTURE_ROWS = 4  # images in the picture
PICTURE_SIDE = 400  # pixels
PICTURE_DETECTIONS = 5  # the surest of each image


def pycocotools():
    """Its COCO, COCOeval and mask, which the scripts that detect nothing do without."""
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise SystemExit(
            f"{error.name} is not installed, and COCO's masks and AP need it: "
            "pip install -r requirements-dev.txt"
        ) from None
    return COCO, COCOeval, mask


def records(output, image_id, categories, task):
    """Turn torchvision's detections of one image into COCO's result records.

    Args:
        output: {boxes (n, 4), scores (n,), labels (n,)}, for `mask` with masks (n, 1, H, W), for
            `keypoint` with keypoints (n, 17, 3), in the image's own pixels.
        image_id: of COCO's dict.
        categories: those of COCO's dict; label 1 is the first.
        task: "box", "mask" or "keypoint".
    """
    boxes, scores, labels = (output[key].cpu() for key in ("boxes", "scores", "labels"))
    boxes[:, 2:] -= boxes[:, :2]  # x1 y1 x2 y2 -> x y w h
    detections = [
        {
            "image_id": image_id,
            "category_id": categories[label - 1]["id"],
            "bbox": box,
            "score": score,
        }
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist())
    ]
    if task == "mask" and detections:
        masks = (output["masks"][:, 0] > 0.5).byte().cpu().numpy()  # (n, H, W)
        encode = pycocotools()[2].encode
        encodings = encode(np.asfortranarray(masks.transpose(1, 2, 0)))
        for detection, encoding in zip(detections, encodings):
            detection["segmentation"] = encoding
    if task == "keypoint":
        points = output["keypoints"].cpu()  # (n, 17, 3)
        points[..., :2] -= 0.5  # back to COCO's pixel indices
        for detection, values in zip(detections, points.flatten(1).tolist()):
            detection["keypoints"] = values
    return detections


def average_precision(truth, detections, task):
    """COCO's average precision by pycocotools, in percent.

    Args:
        truth: COCO's dict, which is not changed.
        detections: a list of result records.
        task: "box", "mask" or "keypoint".

    Returns:
        {"box AP": ..., "box AP50": ..., "box AP75": ...}, and the same of masks or keypoints: the
        mean over thresholds of IoU (for keypoints: OKS) .50:.95, and that at .50 and at .75.

    Raises:
        SystemExit: no annotation counts.
    """
    coco_class, evaluation_class, _ = pycocotools()
    figures = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it is talkative
        real = coco_class()
        # Copies, as it writes into them, with ids from 1, as it takes a match with 0 for none.
        annotations = [{**a, "id": i} for i, a in enumerate(truth["annotations"], 1)]
        real.dataset = {**truth, "annotations": annotations}
        real.createIndex()
        for name, kind, key in KINDS[task]:
            # Without the other keys: a mask's area would be its box's if the record had one.
            keys = "image_id", "category_id", "score", key
            found = [{k: detection[k] for k in keys} for detection in detections]
            values = np.zeros(3)
            if found:  # it cannot load none
                judge = evaluation_class(real, real.loadRes(found), kind)
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
                values = judge.stats[:3]
            if values[0] < 0:
                raise SystemExit(
                    f"the validation annotations have nothing to compute {name} AP with"
                )
            for figure, value in zip(FIGURES, values):
                figures[f"{name} {figure}"] = round(100 * float(value), 3)
    return figures


def as_table(figures, task):
    """The figures of `average_precision` in lines, for the screen."""
    lines = [f"{'':12}" + "".join(f"{figure:>8}" for figure in FIGURES)]
    for name, _, _ in KINDS[task]:
        values = [figures[f"{name} {figure}"] for figure in FIGURES]
        lines.append(f"{name:12}" + "".join(f"{value:8.2f}" for value in values))
    return "\n".join(lines)


# ------------------------------------------------------------------------------ picture


def picture(truth, images, detections):
    """The truth and, right of it, the surest detections, of the first images with annotations.

    Args:
        truth: COCO's dict.
        images: a data.detection.Images of its images, for evaluation.
        detections: {image id: result records}.

    Returns:
        (2 rows, 3, side, side) in [0, 1].
    """
    categories = {category["id"]: category for category in truth["categories"]}
    objects = {}
    for annotation in truth["annotations"]:
        if not annotation["iscrowd"]:
            objects.setdefault(annotation["image_id"], []).append(annotation)
    rows = [row for row, image in enumerate(images.images) if image["id"] in objects]
    cells = []
    for row in rows[:PICTURE_ROWS]:
        image, image_id = images[row, False]
        surest = sorted(detections[image_id], key=lambda one: -one["score"])[:PICTURE_DETECTIONS]
        for annotations in (objects[image_id], surest):
            cells.append(fit(draw(image, annotations, categories), PICTURE_SIDE))
    return torch.cat(cells)


def fit(image, side):
    """(3, H, W) uint8 -> (1, 3, side, side) in [0, 1], its longer side resized, padded with 0."""
    image = image.float() / 255
    scale = side / max(image.shape[1:])
    size = [max(1, round(scale * length)) for length in image.shape[1:]]
    image = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)
    return F.pad(image, (0, side - image.shape[3], 0, side - image.shape[2]))


def draw(image, annotations, categories):
    """Draw COCO's annotations, or result records, on an image (3, H, W) uint8.

    Args:
        image: is not changed.
        annotations: a list of either.
        categories: {id: COCO's category}.
    """
    if not annotations:
        return image
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(annotations))]
    for annotation, colour in zip(annotations, colours):
        if "segmentation" in annotation:
            mask = coco.decode_mask(annotation["segmentation"], *image.shape[1:])
            mask = torch.from_numpy(mask).bool()
            image = draw_segmentation_masks(image, mask, alpha=0.5, colors=colour)
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations])  # (n, 4)
    boxes[:, 2:] += boxes[:, :2]
    names = [
        categories[a["category_id"]]["name"] + (f" {a['score']:.2f}" if "score" in a else "")
        for a in annotations
    ]
    image = draw_bounding_boxes(image, boxes, names, colours, width=2)
    if "keypoints" in annotations[0]:
        points = torch.tensor(np.array([a["keypoints"] for a in annotations])).float()
        points = points.view(len(annotations), coco.N_KEYPOINTS, 3)
        skeleton = next(iter(categories.values())).get("skeleton") or []
        bones = [(i - 1, j - 1) for i, j in skeleton]
        is_labelled = points[..., 2] > 0
        image = draw_keypoints(
            image, points[..., :2], bones, colors="lime", width=1, visibility=is_labelled
        )
    return image
