"""COCO's files: what is refused, with one sentence, before training; what is left out, and said."""

import math
import os

import numpy as np
import pytest

from data import coco, detection
from detection_data import coco_mini_folder, make_coco, read_json

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install -r requirements-dev.txt")
from pycocotools import mask as tools  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own


def first(name, /, **values):
    """A change of the first image, category or annotation of a file."""

    def change(whole):
        whole[name][0].update(values)

    return change


def without(name, key):
    """A change that takes a key from the first image, category or annotation of a file."""

    def change(whole):
        del whole[name][0][key]

    return change


def every(**values):
    """A change of all annotations of a file."""

    def change(whole):
        for annotation in whole["annotations"]:
            annotation.update(values)

    return change


def twice(name):
    """A change that adds the first image or category of a file once more."""

    def change(whole):
        whole[name].append(dict(whole[name][0]))

    return change


def text_id_of_the_first_image(whole):
    whole["images"][0]["id"] = whole["annotations"][0]["image_id"] = "1"


def leave_out(whole):
    del whole["annotations"][0]["area"], whole["annotations"][0]["iscrowd"]
    whole["annotations"][1].update(area=None, iscrowd=None)
    for image, annotation in zip(whole["images"], whole["annotations"]):
        image["id"] = annotation["image_id"] = f"image {image['id']}"


def no_images(whole):
    whole["images"].clear()
    whole["annotations"].clear()


def another_category(whole):
    whole["categories"].append(dict(whole["categories"][0], id=2, name="dog"))


def refusal(root, task="box"):
    """The sentence with which the data set is refused."""
    with pytest.raises(SystemExit) as error:
        detection.load("coco", str(root), "train", "val", task)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


BROKEN = {
    # of the file
    "no images": (lambda whole: whole.pop("images"), "'images' is missing"),
    "images are no list": (lambda whole: whole.update(images={}), "images is no list"),
    "annotations are no list": (lambda whole: whole.update(annotations=3), "annotations is no"),
    "no category": (lambda whole: whole["categories"].clear(), "it lists no category"),
    # of an image
    "no file name": (without("images", "file_name"), "image 1: 'file_name' is missing"),
    "no id": (without("images", "id"), "image number 1 of the list: 'id' is missing"),
    "file name": (first("images", file_name=5), "image 1: its file_name is 5; it must be text"),
    "height": (first("images", height="6"), "image 1: its height is '6'; it must be a whole"),
    "width": (first("images", width=0), "image 1: its width is 0; it must be a whole number above"),
    "image twice": (twice("images"), "the id 1 stands twice among the images, in places 1 and 3"),
    "ids mixed": (text_id_of_the_first_image, "its images are numbers and texts mixed"),
    "id is null": (first("images", id=None), "image None: its id is None; give it a whole number"),
    # of a category
    "no name": (without("categories", "name"), "category 1: 'name' is missing"),
    "name": (first("categories", name=7), "category 1: its name is 7; it must be text"),
    "category twice": (twice("categories"), "the id 1 stands twice among the categories"),
    # of an annotation
    "no box": (without("annotations", "bbox"), "annotation 11: 'bbox' is missing"),
    "NaN": (
        first("annotations", bbox=[1, math.nan, 4, 4]),
        "annotation 11: its bbox is [1, nan, 4",
    ),
    "infinite": (first("annotations", bbox=[1, 1, math.inf, 4]), "annotation 11: its bbox is"),
    "text": (
        first("annotations", bbox=["1", 1, 4, 4]),
        "annotation 11: its bbox is ['1', 1, 4, 4]",
    ),
    "three": (first("annotations", bbox=[1, 1, 4]), "it must be four numbers: x, y, width, height"),
    "null": (first("annotations", bbox=None), "annotation 11: "),
    "image": (
        first("annotations", image_id=99),
        "annotation 11: it is of image 99, which is not among the file's images, whose ids are "
        "such as 1; remove the annotation or list the image",
    ),
    "image's id is text": (
        first("annotations", image_id="1"),
        "annotation 11: it is of image '1', which is not among the file's images",
    ),
    "category": (first("annotations", category_id=5), "annotation 11: it is of category 5, which"),
    "no image id": (without("annotations", "image_id"), "annotation 11: 'image_id' is missing"),
    "image id is a list": (first("annotations", image_id=[1]), "annotation 11: "),
    "crowd": (first("annotations", iscrowd="0"), "annotation 11: its iscrowd is '0'; it must be 0"),
    "area": (first("annotations", area=-3), "annotation 11: its area is -3; it must be a number"),
    "area is NaN": (first("annotations", area=math.nan), "annotation 11: its area is nan"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_cocos_form_is_named(tmp_path, name):
    """In the training file, and in the validation file, before anything is trained."""
    change, message = BROKEN[name]
    for parts in ((change, None), (None, change)):
        root = make_coco(tmp_path, "box", *parts)
        sentence = refusal(root)
        file = "instances_train.json" if parts[0] else "instances_val.json"
        assert sentence.startswith(os.path.join(root, "annotations", file))
        assert "is not in COCO's form: " in sentence
        assert message in sentence


@pytest.mark.parametrize(
    "change,message",
    [
        (first("images", file_name="c.jpg"), "c.jpg does not exist, and "),
        (no_images, "lists no image"),
        (
            another_category,
            "the categories of instances_train.json are not those of instances_val.json: one has "
            "{'id': 2, 'name': 'dog'}, the other no more; give both files the same list",
        ),
        (
            lambda whole: whole["annotations"].clear(),
            "has no annotation to learn from: it has none",
        ),
        (every(iscrowd=1), "has no annotation to learn from: all are crowds or difficult"),
        (every(bbox=[1, 1, 0, 4]), "has no annotation to learn from: it has none; name another"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path, change, message):
    assert message in refusal(make_coco(tmp_path, "box", change))


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda whole: whole["annotations"].clear(), "it has none"),
        (every(iscrowd=1), "all are crowds or difficult"),
    ],
)
def test_a_validation_file_without_annotations_is_refused_before_training(tmp_path, change, reason):
    sentence = refusal(make_coco(tmp_path, "box", None, change))
    assert sentence.endswith(
        "instances_val.json has no annotation to compute average precision with: "
        f"{reason}; name another part as detect.val"
    )


@pytest.mark.parametrize("content", ["", "{", "[" * 10**5, "\xff"])
def test_what_is_no_json_is_named(tmp_path, content):
    root = make_coco(tmp_path, "box")
    path = os.path.join(root, "annotations", "instances_train.json")
    with open(path, "w", encoding="latin-1") as f:
        f.write(content)
    assert refusal(root).startswith(f"{path} cannot be read as JSON: ")


def test_json_of_another_kind_is_named(tmp_path):
    root = make_coco(tmp_path, "box")
    with open(os.path.join(root, "annotations", "instances_train.json"), "w") as f:
        f.write("[]")
    assert "it holds a list, and no object with images" in refusal(root)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    root = make_coco(tmp_path, "box")
    path = os.path.join(root, "annotations", "instances_train.json")
    with open(path, encoding="utf-8") as f:
        text = f.read()
    with open(path, "w", encoding="utf-8-sig") as f:
        f.write(text)
    detection.load("coco", root, "train", "val", "box")


def test_what_may_be_left_out_is_filled_in(tmp_path):
    """Area and iscrowd; and ids may be texts."""
    root = make_coco(tmp_path, "box", leave_out)
    train, _ = detection.load("coco", root, "train", "val", "box")
    assert [(a["area"], a["iscrowd"]) for a in train["annotations"]] == [(16, 0), (16, 0)]
    assert [a["image_id"] for a in train["annotations"]] == ["image 1", "image 2"]


# ------------------------------------------------------------------------------ masks

SEGMENTATIONS = {
    "numbers": ([1, 1, 5, 1, 5, 5], "its segmentation is no list of polygons [[x1, y1, x2, y2"),
    "points": ([[[1, 1], [5, 1], [5, 5]]], "its segmentation is no list of polygons"),
    "text": ("1 1 5 1 5 5", "its segmentation is no list of polygons"),
    "odd": ([[1, 1, 5, 1, 5, 5, 1]], "has a polygon of 7 numbers; x and y must alternate"),
    "NaN": ([[1, 1, 5, 1, 5, math.nan]], "its segmentation holds NaN or infinity"),
    "size": (
        {"size": [8, 6], "counts": [40, 8]},
        "its segmentation is of [8, 6] pixels (height, width), and its image of [6, 8]; make one "
        "of them anew, or take detect.task=box",
    ),
    "no size": ({"counts": [40, 8]}, "'size' is missing"),
    "no counts": ({"size": [6, 8]}, "'counts' is missing"),
    "too few": (
        {"size": [6, 8], "counts": [30, 8]},
        "counts are of 38 pixels, and its image has 48",
    ),
    "too many": ({"size": [6, 8], "counts": [50, 8]}, "counts are of 58 pixels"),
    "negative": ({"size": [6, 8], "counts": [-4, 52]}, "counts that are no run lengths"),
    "no runs": ({"size": [6, 8], "counts": []}, "counts that are no run lengths"),
    "words": ({"size": [6, 8], "counts": ["a"]}, "counts that are no run lengths"),
    "empty string": ({"size": [6, 8], "counts": ""}, "counts that are no run lengths"),
    "string": ({"size": [6, 8], "counts": "é"}, "counts that are no run lengths"),
    "cut off": ({"size": [6, 8], "counts": "X1P"}, "counts that are no run lengths"),
    "endless": ({"size": [6, 8], "counts": "o" * 30 + "1"}, "counts that are no run lengths"),
    "short string": ({"size": [6, 8], "counts": "X1"}, "counts are of 40 pixels"),
}


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_a_mask_that_is_malformed_is_named(tmp_path, name):
    segmentation, message = SEGMENTATIONS[name]
    root = make_coco(tmp_path, "mask", None, first("annotations", segmentation=segmentation))
    sentence = refusal(root, "mask")
    assert "instances_val.json is not in COCO's form: annotation 11: " in sentence
    assert message in sentence
    detection.load("coco", root, "train", "val", "box")  # which needs none


@pytest.mark.parametrize("segmentation", [None, [], [[]], [[1, 1, 5, 5]]])
def test_objects_without_a_mask_neither_train_nor_are_evaluated(tmp_path, capsys, segmentation):
    change = first("annotations", segmentation=segmentation)
    parts = detection.load(
        "coco", make_coco(tmp_path, "mask", change, change), "train", "val", "mask"
    )
    assert [[a["id"] for a in part["annotations"]] for part in parts] == [[12], [12]]
    assert len(detection.Images(parts[0], "mask", training=True)) == 1
    assert len(detection.Images(parts[1], "mask")) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, part in zip(lines, ("train", "val")):
        assert f"instances_{part}.json: 1 of its 2 boxes have no mask (segmentation, " in line
        assert "left out of training and evaluation; the first is annotation 11 of " in line


def test_a_missing_segmentation_is_as_an_empty_one(tmp_path):
    root = make_coco(tmp_path, "mask", without("annotations", "segmentation"))
    train, _ = detection.load("coco", root, "train", "val", "mask")
    assert [a["id"] for a in train["annotations"]] == [12]


def test_no_mask_at_all_names_the_task(tmp_path):
    sentence = refusal(make_coco(tmp_path, "mask", every(segmentation=[])), "mask")
    assert "instances_train.json: none of its 2 annotations has a mask (segm" in sentence
    assert sentence.endswith("; detect.task=box needs none")


def test_runs_are_decoded_as_pycocotools_does():
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = generator.integers(1, 300, 2)
        smooth = generator.random((height, width)) < generator.random()
        encoding = tools.encode(np.asfortranarray(smooth, dtype=np.uint8))
        lengths = coco.decode_counts(encoding["counts"].decode())
        assert (lengths >= 0).all()
        assert lengths.sum() == height * width
        again = tools.frPyObjects(
            {"size": [height, width], "counts": lengths.tolist()}, height, width
        )
        assert again["counts"] == encoding["counts"]


def test_all_ways_to_write_a_mask_are_one(tmp_path):
    """Polygons, run lengths as a list, and as a string."""
    polygons = [np.array([1.0, 1, 5, 1, 5, 5, 1, 5])]
    mask = coco.decode_mask(polygons, 6, 8)
    assert mask.shape == (6, 8)
    assert mask.sum() == 16
    string = tools.encode(np.asfortranarray(mask))["counts"].decode()
    runs = coco.decode_counts(string).tolist()
    for counts in (string, runs):
        parsed = coco.parse_segmentation({"size": [6, 8], "counts": counts}, 6, 8)
        assert (coco.decode_mask(parsed, 6, 8) == mask).all()


# ------------------------------------------------------------------------------ keypoints

KEYPOINTS = {
    "missing": (without("annotations", "keypoints"), "annotation 11: it has no keypoints; take"),
    "null": (first("annotations", keypoints=None), "annotation 11: it has no keypoints"),
    "short": (
        first("annotations", keypoints=[1, 1, 2]),
        "are 3 numbers; they must be 51: x, y and",
    ),
    "pairs": (first("annotations", keypoints=[[1, 1, 2]] * 17), "they must be 51"),
    "NaN": (
        first("annotations", keypoints=[math.nan, 1, 2] * 17),
        "keypoints hold NaN or infinity",
    ),
    "others": (
        first("categories", keypoints=["nose"]),
        "category 1: COCO's keypoint AP is defined",
    ),
    "no names": (without("categories", "keypoints"), "defined for the 17 keypoints of a person"),
    "one-eyed": (
        first("categories", keypoints=["left_eye", *map(str, range(16))]),
        "category 1: its keypoints have no right_eye, which a mirror makes of another one",
    ),
    "skeleton": (first("categories", skeleton=[[0, 1]]), "category 1: its skeleton has [0, 1]"),
}


@pytest.mark.parametrize("name", KEYPOINTS)
def test_keypoints_that_are_malformed_are_named(tmp_path, name):
    change, message = KEYPOINTS[name]
    sentence = refusal(make_coco(tmp_path, "keypoint", None, change), "keypoint")
    assert "person_keypoints_val.json is not in COCO's form: " in sentence
    assert message in sentence


def test_no_labelled_keypoint_at_all_is_refused(tmp_path):
    root = make_coco(tmp_path, "keypoint", None, every(keypoints=[0, 0, 0] * 17))
    assert "none has a keypoint that is labelled; name another" in refusal(root, "keypoint")


def test_a_real_persons_mirror():
    path = coco.annotation_file(coco_mini_folder(), "train2017", "keypoint")
    names = read_json(path)["categories"][0]["keypoints"]
    mirrored = coco.mirrored_keypoints(names)
    assert [mirrored[i] for i in mirrored] == list(range(17))
    assert mirrored[0] == 0
    assert mirrored[1] == 2
    for name, i in zip(names, mirrored):
        assert names[i][-3:] == name[-3:]
        assert (names[i] != name) == ("_" in name)
