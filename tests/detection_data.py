"""Data sets for the tests of detection: a real one, small ones that are drawn, broken ones."""

import copy
import json
import os

import numpy as np
import pytest
from PIL import Image

REAL = os.path.abspath(os.environ.get("DATASETS", "datasets"))
PARTS = "train2017", "val2017"
VOC_TRAIN = ["VOC2007/trainval", "VOC2012/trainval"]
VOC_VAL = ["VOC2007/test"]
VOC_PARTS = ("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test")
VOC_XML = """<annotation>
<size><width>80</width><height>60</height><depth>3</depth></size>
<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>40</ymax></bndbox>
{part}</object>
</annotation>"""
VOC_PART = """<part><name>head</name>
<bndbox><xmin>30</xmin><ymin>15</ymin><xmax>40</xmax><ymax>20</ymax></bndbox></part>"""
POINTS = [
    "nose",
    *(f"{side}_{point}" for point in ("eye", "ear", "shoulder") for side in ("left", "right")),
    *(f"{side}_{point}" for point in ("elbow", "wrist", "hip") for side in ("left", "right")),
    *(f"{side}_{point}" for point in ("knee", "ankle") for side in ("left", "right")),
]


def coco_mini_folder():
    """The folder of coco_mini, 80 training and 79 validation images; skips where it is missing."""
    folder = os.path.join(REAL, "coco_mini")
    if not os.path.exists(os.path.join(folder, "annotations")):
        pytest.skip(f"needs coco_mini in {REAL}")
    return folder


def read_json(*path):
    with open(os.path.join(*path)) as f:
        return json.load(f)


def write_json(value, *path):
    with open(os.path.join(*path), "w") as f:
        json.dump(value, f)


def make_voc(root):
    """Draw three parts of VOC with four images each. Returns its folder.

    Images 0 and 2 have a red square, a cat, 1 and 3 a blue one, a dog: x 20 ... 59, y 10 ... 39,
    which are 21 ... 60 and 11 ... 40 in VOC's counting from 1. The last is difficult, the first has
    a part that is no object.
    """
    root = os.path.join(root, "VOCdevkit")
    for year, name in VOC_PARTS:
        for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
            os.makedirs(os.path.join(root, year, folder), exist_ok=True)
        stems = [f"{name}_{i}" for i in range(4)]
        with open(os.path.join(root, year, "ImageSets", "Main", f"{name}.txt"), "w") as f:
            f.write("\n".join(stems) + "\n")
        for i, stem in enumerate(stems):
            pixels = np.full((60, 80, 3), 128, np.uint8)
            pixels[10:40, 20:60, 2 * (i % 2)] = 255
            Image.fromarray(pixels).save(os.path.join(root, year, "JPEGImages", f"{stem}.jpg"))
            text = VOC_XML.format(
                name=("cat", "dog")[i % 2], difficult=int(i == 3), part=VOC_PART * (i == 0)
            )
            with open(os.path.join(root, year, "Annotations", f"{stem}.xml"), "w") as f:
                f.write(text)
    return root


def good_coco(task):
    """What one of COCO's files holds: two images of 8 x 6 pixels, with an object each."""
    person = {"id": 1, "name": "person"}
    if task == "keypoint":
        person |= {"keypoints": list(POINTS), "skeleton": [[1, 2], [2, 3]]}
    images = [
        {"id": i, "height": 6, "width": 8, "file_name": f"{name}.jpg"}
        for i, name in ((1, "a"), (2, "b"))
    ]
    annotations = [
        {
            "id": 10 + image["id"],
            "image_id": image["id"],
            "category_id": 1,
            "bbox": [1, 1, 4, 4],
            "area": 16,
            "iscrowd": 0,
            "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]],
            "keypoints": [2, 2, 2] * 17,
        }
        for image in images
    ]
    return {"images": images, "annotations": annotations, "categories": [person]}


def make_coco(root, task, change_train=None, change_val=None):
    """Write a small data set in COCO's layout, with the parts `train` and `val`.

    change_train, change_val: functions that change what the file of a part holds, in place.
    """
    kind = "person_keypoints" if task == "keypoint" else "instances"
    os.makedirs(os.path.join(root, "annotations"), exist_ok=True)
    for part, change in (("train", change_train), ("val", change_val)):
        os.makedirs(os.path.join(root, part), exist_ok=True)
        for name in ("a", "b"):
            Image.new("RGB", (8, 6)).save(os.path.join(root, part, f"{name}.jpg"))
        whole = copy.deepcopy(good_coco(task))
        if change:
            change(whole)
        write_json(whole, root, "annotations", f"{kind}_{part}.json")
    return str(root)
