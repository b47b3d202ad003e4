"""COCO's annotation files: read, checked, and turned into what training and evaluation need.

A file is `annotations/instances_<part>.json`, for keypoints `person_keypoints_<part>.json`; the
images lie in `<part>/`. The format: https://cocodataset.org/#format-data.

Whatever would end in a traceback, or in a wrong figure, hours later is refused here by one
sentence, which names the file and the image or annotation.
"""

import contextlib
import gc
import json
import math
import os

import numpy as np

from .datasets import inside

KIND = {"box": "instances", "mask": "instances", "keypoint": "person_keypoints"}
N_KEYPOINTS = 17  # COCO's average precision is defined for those of a person alone
SHORTEST_POLYGON = 6  # numbers: three points
# What Python raises where a value is of another kind than the format says.
NOT_OF_THE_FORMAT = KeyError, TypeError, ValueError, AttributeError, OverflowError


def annotation_file(root, part, task):
    """The path of a part's annotations."""
    return os.path.join(root, "annotations", f"{KIND[task]}_{part}.json")


@contextlib.contextmanager
def garbage_collection_paused():
    """Keep Python from looking for garbage again and again among millions of new objects.

    For COCO's training part that takes a third of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@garbage_collection_paused()
def read_part(root, part, task):
    """Read one part of a data set in COCO's layout.

    Args:
        root: the folder that holds annotations/ and the parts.
        part: such as "val2017".
        task: "box", "mask" or "keypoint".

    Returns:
        a dict {"images", "annotations", "categories"}:
        images: dicts {id, height, width, file}, where file is a path.
        annotations: dicts {id, image_id, category_id, bbox, area, iscrowd}; for `mask` with
            segmentation (see `parse_segmentation`), for `keypoint` with keypoints, a (51,) array,
            and num_keypoints.
        categories: as they stand in the file, sorted by id.

    Raises:
        SystemExit: the file is missing, broken, or not in COCO's form.
    """
    path = annotation_file(root, part, task)
    folder = os.path.join(root, part)
    whole = read_json(path, part)
    try:
        if not isinstance(whole, dict):
            raise ValueError(f"it holds a {type(whole).__name__}, and no object with images")
        images = check_records(whole, "images", lambda image: check_image(image, folder, path))
        categories = check_records(whole, "categories", lambda one: check_category(one, task))
        if not categories:
            raise ValueError("it lists no category")
        annotations = check_annotations(whole, images, categories, task)
    except NOT_OF_THE_FORMAT as error:
        raise SystemExit(f"{path} is not in COCO's form: {describe(error)}") from None
    return {
        "images": images,
        "annotations": annotations,
        "categories": sorted(categories, key=lambda category: category["id"]),
    }


def read_json(path, part):
    """What a JSON file holds. SystemExit says what is wrong with it."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except FileNotFoundError:
        raise SystemExit(
            f"{path} does not exist; detect.data is the folder that holds annotations/ and {part}/"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not text
        raise SystemExit(f"{path} cannot be read as JSON: {error}") from None


def describe(error):
    """What an error says; of a KeyError, which key is missing."""
    return f"{error} is missing; add it" if isinstance(error, KeyError) else str(error)


# ------------------------------------------------------------------------------ images, categories


def check_records(whole, name, check):
    """Check the images or the categories of a file.

    Args:
        whole: what the file holds.
        name: "images" or "categories".
        check: a function of one of them, which returns it checked or raises.

    Returns:
        the list of what `check` returned.

    Raises:
        ValueError: one is broken, or an id stands twice.
    """
    checked, seen = [], {}
    one = {"images": "image", "categories": "category"}[name]
    if not isinstance(whole[name], list):
        raise ValueError(f"{name} is no list")
    for position, record in enumerate(whole[name]):
        try:
            key = check_id(record["id"])
            checked.append(check(record))
        except NOT_OF_THE_FORMAT as error:
            raise ValueError(f"{label(one, record, position)}: {describe(error)}") from None
        if key in seen:
            raise ValueError(
                f"the id {key!r} stands twice among the {name}, in places {seen[key] + 1} and "
                f"{position + 1}; remove one of them or give it an id of its own"
            )
        seen[key] = position
    if len({isinstance(key, str) for key in seen}) > 1:
        raise ValueError(f"the ids of its {name} are numbers and texts mixed; take one kind")
    return checked


def label(kind, record, position):
    """A record in a sentence: "annotation 918", by its place where it has no id."""
    if isinstance(record, dict) and "id" in record:
        return f"{kind} {record['id']}"
    return f"{kind} number {position + 1} of the list"


def check_id(key):
    """An id that can be compared and sorted. ValueError for any other."""
    if isinstance(key, str) or is_number(key):
        return key
    raise ValueError(f"its id is {key!r}; give it a whole number")


def is_number(value):
    """Whether a value of a JSON file is a finite number. NaN and Infinity are none."""
    kind = type(value)  # not isinstance: true and false are no numbers
    return kind is int or kind is float and math.isfinite(value)


def check_image(image, folder, path):
    """An image's record -> {id, height, width, file}, whose file lies in the folder."""
    name = image["file_name"]
    if not isinstance(name, str):
        raise ValueError(f"its file_name is {name!r}; it must be text")
    size = {}
    for side in ("height", "width"):
        value = image[side]
        if not is_number(value) or value < 1 or value != int(value):
            raise ValueError(f"its {side} is {value!r}; it must be a whole number above 0")
        size[side] = int(value)
    return {"id": image["id"], **size, "file": inside(folder, os.path.join(folder, name), path)}


def check_category(category, task):
    """A category with a name, and for `keypoint` with those of a person's points."""
    if not isinstance(category["name"], str):
        raise ValueError(f"its name is {category['name']!r}; it must be text")
    if task == "keypoint":
        names = category.get("keypoints") or []
        if len(names) != N_KEYPOINTS:
            raise ValueError(
                "COCO's keypoint AP is defined for the 17 keypoints of a person, and this "
                f"category has {len(names)}; leave it out, or take detect.task=box"
            )
        mirrored_keypoints(names)
        for bone in category.get("skeleton") or []:
            if not all(1 <= point <= N_KEYPOINTS for point in bone) or len(bone) != 2:
                raise ValueError(f"its skeleton has {bone}, which is no pair of points from 1 on")
    return category


def mirrored_keypoints(names):
    """Where each keypoint goes in a mirror: [left_eye, right_eye, nose] -> [1, 0, 2].

    Raises ValueError where a left one has no right one, or a right one no left one.
    """
    swap = {"left": "right", "right": "left"}
    mirrored = ["_".join(swap.get(word, word) for word in name.split("_")) for name in names]
    missing = [name for name in mirrored if name not in names]
    if missing:
        raise ValueError(f"its keypoints have no {missing[0]}, which a mirror makes of another one")
    return [names.index(name) for name in mirrored]


# ------------------------------------------------------------------------------ annotations


def check_annotations(whole, images, categories, task):
    """The annotations of a file, checked, completed, and without what the task does not need.

    Args:
        whole: what the file holds; its annotations are changed in place.
        images: those of the file, checked.
        categories: likewise.
        task: "box", "mask" or "keypoint".

    Raises:
        ValueError: one is broken; the sentence names it.
    """
    images = {image["id"]: image for image in images}
    categories = {category["id"] for category in categories}
    if not isinstance(whole["annotations"], list):
        raise ValueError("annotations is no list")
    for position, annotation in enumerate(whole["annotations"]):
        try:
            check_references(annotation, images, categories)
            check_box(annotation)
            segmentation = annotation.pop("segmentation", None)
            if task == "mask":
                image = images[annotation["image_id"]]
                size = image["height"], image["width"]
                annotation["segmentation"] = parse_segmentation(segmentation, *size)
            keypoints = annotation.pop("keypoints", None)
            if task == "keypoint":
                annotation["keypoints"] = parse_keypoints(keypoints)
                annotation["num_keypoints"] = int((annotation["keypoints"][2::3] > 0).sum())
        except NOT_OF_THE_FORMAT as error:
            raise ValueError(
                f"{label('annotation', annotation, position)}: {describe(error)}"
            ) from None
    return whole["annotations"]


def check_references(annotation, images, categories):
    """Raise ValueError unless an annotation's image and category are in the file."""
    for kind, plural, listed in (
        ("image", "images", images),
        ("category", "categories", categories),
    ):
        key = annotation[f"{kind}_id"]
        if key not in listed:
            example = f", whose ids are such as {next(iter(listed))!r}" if listed else ""
            raise ValueError(
                f"it is of {kind} {key!r}, which is not among the file's {plural}{example}; "
                f"remove the annotation or list the {kind}"
            )


def check_box(annotation):
    """Check bbox, area and iscrowd; those two are filled in where they are missing or null."""
    box = annotation["bbox"]
    if len(box) != 4 or not all(map(is_number, box)):
        raise ValueError(f"its bbox is {box}; it must be four numbers: x, y, width, height")
    if annotation.get("area") is None:
        annotation["area"] = max(0, box[2]) * max(0, box[3])
    area = annotation["area"]
    if not is_number(area) or area < 0:
        raise ValueError(f"its area is {area!r}; it must be a number of at least 0, or left out")
    if annotation.get("iscrowd") is None:
        annotation["iscrowd"] = 0
    if annotation["iscrowd"] not in (0, 1):
        raise ValueError(f"its iscrowd is {annotation['iscrowd']!r}; it must be 0 or 1")


def parse_keypoints(keypoints):
    """[x, y, v, ...] -> (51,) float64."""
    if keypoints is None:
        raise ValueError("it has no keypoints; take detect.task=box, or remove it")
    points = np.asarray(keypoints, dtype=np.float64)
    if points.shape != (3 * N_KEYPOINTS,):
        raise ValueError(
            f"its keypoints are {points.size} numbers; they must be {3 * N_KEYPOINTS}: x, y and "
            f"visibility of each of the {N_KEYPOINTS}"
        )
    if not np.isfinite(points).all():
        raise ValueError("its keypoints hold NaN or infinity; write 0, 0, 0 for what is not there")
    return points


# ------------------------------------------------------------------------------ masks


def parse_segmentation(segmentation, height, width):
    """An annotation's segmentation -> its mask, None where it has none.

    Args:
        segmentation: a list of polygons [x1, y1, x2, y2, ...], a run-length encoding {size,
            counts}, or None.
        height: of its image, in pixels.
        width: likewise.

    Returns:
        a list of arrays, (2 points,) float64: a fifth of a list's memory, and workers do not copy
        them by counting references; or the run-length encoding, its counts as a string.
        None where there is no polygon of at least three points.

    Raises:
        ValueError: it is malformed, or of another size than its image.
    """
    if isinstance(segmentation, dict):
        return parse_run_lengths(segmentation, height, width)
    polygons = []
    for polygon in segmentation or ():
        if not isinstance(polygon, list) or (polygon and isinstance(polygon[0], list)):
            raise ValueError(
                "its segmentation is no list of polygons [[x1, y1, x2, y2, ...], ...]; "
                "write it so, or take detect.task=box"
            )
        if len(polygon) < SHORTEST_POLYGON:
            continue
        points = np.asarray(polygon, dtype=np.float64)
        if len(points) % 2:
            raise ValueError(
                f"its segmentation has a polygon of {len(points)} numbers; x and y must alternate"
            )
        if not math.isfinite(points.sum()):
            raise ValueError("its segmentation holds NaN or infinity; remove that polygon")
        polygons.append(points)
    return polygons or None


def parse_run_lengths(encoding, height, width):
    """A run-length encoding of exactly an image's pixels, its counts as a string."""
    from pycocotools import mask as tools

    size, counts = encoding["size"], encoding["counts"]
    if list(size) != [height, width]:
        raise ValueError(
            f"its segmentation is of {size} pixels (height, width), and its image of "
            f"{[height, width]}; make one of them anew, or take detect.task=box"
        )
    lengths = decode_counts(counts) if isinstance(counts, str) else np.asarray(counts)
    if lengths.dtype.kind != "i" or len(lengths) == 0 or lengths.min() < 0:
        raise ValueError("its segmentation has counts that are no run lengths")
    if lengths.sum() != height * width:
        raise ValueError(
            f"its segmentation's counts are of {lengths.sum()} pixels, and its image has "
            f"{height * width}; make it anew, or take detect.task=box"
        )
    if isinstance(counts, str):
        return encoding
    return tools.frPyObjects(encoding, height, width)


def decode_counts(text):
    """The run lengths in COCO's string, (runs,) int64.

    A character, in ASCII from 48 on, holds five bits, the lowest first; a sixth says that the
    number goes on. From the fourth run on it is the difference to the run before the last one
    (pycocotools, maskApi.c, rleFrString).
    """
    bits = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if len(bits) == 0 or bits.min() < 0 or bits.max() > 63 or bits[-1] & 32:
        raise ValueError("its segmentation has counts that are no run lengths")
    last = np.flatnonzero((bits & 32) == 0)  # of each number
    first = np.append(0, last[:-1] + 1)
    digits = last - first + 1
    shift = 5 * (np.arange(len(bits)) - first.repeat(digits))
    if shift.max() > 30:
        raise ValueError("its segmentation has counts that are no run lengths")
    values = np.add.reduceat((bits & 31) << shift, first)
    values -= (bits[last] >> 4 & 1) << 5 * digits  # the highest bit is the sign
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def decode_mask(segmentation, height, width):
    """A mask that `parse_segmentation` returned -> (height, width) uint8, 1 inside."""
    from pycocotools import mask as tools

    if isinstance(segmentation, dict):
        return tools.decode(segmentation)
    return tools.decode(tools.merge(tools.frPyObjects(segmentation, height, width)))
