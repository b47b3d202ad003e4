"""COCO's average precision: the truth itself has 100."""

import sys

import numpy as np
import pytest
import torch

from data import coco, detection
from data.coco_results import average_precision, picture, pycocotools, records
from detection_data import coco_mini_folder, make_coco

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install -r requirements-dev.txt")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own


def points(annotation):
    """An annotation's keypoints as a detector gives them.

    A person of whom none is labelled has some too, here in the middle of its box, and COCO ignores
    them.
    """
    x, y, w, h = annotation["bbox"]
    if annotation.get("num_keypoints"):
        return list(annotation["keypoints"])
    return [x + w / 2, y + h / 2, 1] * 17


def as_detection(annotation, size, task):
    """An annotation as a result record that is sure. size: (height, width)."""
    keys = "image_id", "category_id", "bbox"
    record = {key: annotation[key] for key in keys}
    record |= {"score": 1.0, "keypoints": points(annotation)}
    if task == "mask":
        mask = coco.decode_mask(annotation["segmentation"], *size)
        record["segmentation"] = pycocotools()[2].encode(np.asfortranarray(mask))
    return record


@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
def test_the_truth_as_detections_has_ap_100(task):
    _, truth = detection.load("coco", coco_mini_folder(), "train2017", "val2017", task)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    detections = [
        as_detection(annotation, sizes[annotation["image_id"]], task)
        for annotation in truth["annotations"]
        if not annotation["iscrowd"]
    ]
    figures = average_precision(truth, detections, task)
    kinds = ["box"] if task == "box" else ["box", task]
    assert list(figures) == [f"{kind} {name}" for kind in kinds for name in ("AP", "AP50", "AP75")]
    assert all(value == pytest.approx(100, abs=1e-6) for value in figures.values()), figures
    assert average_precision(truth, detections, task) == figures  # the truth was not written into
    assert all(value == 0 for value in average_precision(truth, [], task).values())
    for record in detections:  # each box beside its object
        x, y, w, h = record["bbox"]
        record["bbox"] = [x + w, y, w, h]
    assert average_precision(truth, detections, task)["box AP"] < 5


@pytest.mark.parametrize("task", ["mask", "keypoint"])
def test_targets_through_the_models_own_records_have_ap_100(task):
    """Training targets, in torchvision's form, written back as detections.

    Boxes, masks, labels and keypoints take no step aside on the way.
    """
    part, _ = detection.load("coco", coco_mini_folder(), "val2017", "val2017", task)
    images = detection.Images(part, task, training=True)
    detections = []
    for row, image in enumerate(images.images):
        _, target = images[row, False]
        output = target | {"scores": torch.ones(len(target["labels"]))}
        if task == "mask":
            output["masks"] = target["masks"][:, None].float()
        else:
            for annotation, k in zip(images.annotations[image["id"]], output["keypoints"]):
                if not annotation["num_keypoints"]:
                    k[:] = torch.tensor(points(annotation)).view(17, 3) + 0.5
        detections += records(output, image["id"], part["categories"], task)
    kept = {image["id"] for image in images.images}
    truth = part | {"annotations": [a for a in part["annotations"] if a["image_id"] in kept]}
    figures = average_precision(truth, detections, task)
    assert all(value == pytest.approx(100, abs=1e-6) for value in figures.values()), figures


def to_text(whole):
    """Make the ids in a file texts."""
    for image, annotation in zip(whole["images"], whole["annotations"]):
        image["id"] = annotation["image_id"] = f"image {image['id']}"
        annotation["category_id"] = "person"
    whole["categories"][0]["id"] = "person"


def test_ids_that_are_texts_give_the_same(tmp_path):
    for change in (None, to_text):
        root = make_coco(tmp_path, "mask", change, change)
        _, truth = detection.load("coco", root, "train", "val", "mask")
        detections = [as_detection(a, (6, 8), "mask") for a in truth["annotations"][:1]]
        figures = average_precision(truth, detections, "mask")
        assert figures["box AP50"] == figures["mask AP50"] == pytest.approx(50.495)


@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
def test_the_picture_draws_whatever_was_kept(tmp_path, task):
    """Boxes that reach beyond the image, and images with nothing found."""

    def change(whole):
        whole["annotations"][0]["bbox"] = [-3, 2, 3000, 5.5]

    root = make_coco(tmp_path, task, None, change)
    _, truth = detection.load("coco", root, "train", "val", task)
    detections = {1: [], 2: [as_detection(truth["annotations"][1], (6, 8), task)]}
    drawn = picture(truth, detection.Images(truth, task), detections)
    assert drawn.shape == (4, 3, 400, 400)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert torch.equal(drawn[1], torch.zeros(3, 400, 400))  # black, and nothing found in it
    assert drawn[0].any()
    assert drawn[2].any()
    assert drawn[3].any()


def test_a_missing_pycocotools_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(
        SystemExit, match="pycocotools.* is not installed.*pip install -r requirements-dev.txt"
    ):
        pycocotools()
