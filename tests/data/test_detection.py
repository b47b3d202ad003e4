"""Detection's images and targets, from COCO's and from VOC's files."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from data import coco, detection
from data.coco_results import average_precision
from data.workers import InputLost
from detection_data import VOC_TRAIN, VOC_VAL, coco_mini_folder, make_coco, make_voc

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install -r requirements-dev.txt")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own


@pytest.fixture
def voc_devkit(tmp_path):
    return make_voc(tmp_path)


def load_voc(root, train=VOC_TRAIN[:1], val=VOC_VAL):
    return detection.load("voc", root, train, val, "box")


def as_detections(annotations):
    """Annotations as result records that are sure."""
    keys = "image_id", "category_id", "bbox"
    return [{key: a[key] for key in keys} | {"score": 1.0} for a in annotations]


def replace_in(path, *pairs):
    with open(path) as f:
        text = f.read()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    with open(path, "w") as f:
        f.write(text)


# ------------------------------------------------------------------------------ flips, plans


def test_a_flip_mirrors_and_two_are_none():
    image = torch.arange(3 * 4 * 10).view(3, 4, 10)
    mirrored_keypoints = coco.mirrored_keypoints(["nose", "left_eye", "right_eye"])
    assert mirrored_keypoints == [0, 2, 1]
    masks = torch.zeros(1, 4, 10, dtype=torch.uint8)
    masks[0, :, 2:5] = 1
    target = {
        "boxes": torch.tensor([[2.0, 0, 5, 4]]),
        "labels": torch.tensor([1]),
        "masks": masks,
        "keypoints": torch.tensor([[[3.5, 1.5, 2], [2.5, 0.5, 1], [0, 0, 0]]]),
    }
    mirrored, flipped = detection.flip(image, target, mirrored_keypoints)
    assert torch.equal(mirrored[..., 0], image[..., 9])
    assert flipped["boxes"].tolist() == [[5, 0, 8, 4]]
    # The mask still fills its box.
    assert flipped["masks"][0, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    # The left eye is now the right one; the one that is not labelled stays at 0.
    assert flipped["keypoints"].tolist() == [[[6.5, 1.5, 2], [0, 0, 0], [7.5, 0.5, 1]]]
    again, back = detection.flip(mirrored, flipped, mirrored_keypoints)
    assert torch.equal(again, image)
    assert all(torch.equal(back[key], target[key]) for key in target)


def test_the_plan_depends_on_seed_and_epoch_alone(monkeypatch):
    whole = list(detection.batch_plan(10, 4, 0, 0, 6))  # two steps an epoch
    first, rest = (list(detection.batch_plan(10, 4, 0, *part)) for part in ((0, 3), (3, 6)))
    assert whole == first + rest
    assert whole != list(detection.batch_plan(10, 4, 1, 0, 6))
    for epoch in range(3):
        steps = whole[2 * epoch : 2 * epoch + 2]
        assert len({row for step in steps for row, _ in step}) == 8
    assert {is_flipped for step in whole for _, is_flipped in step} == {True, False}
    assert whole[0] != whole[2]
    monkeypatch.setattr(detection.distributed, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(detection.distributed, "rank", lambda rank=rank: rank)
        parts.append(list(detection.batch_plan(10, 4, 0, 0, 6)))
    assert [a + b for a, b in zip(*parts)] == whole


# ------------------------------------------------------------------------------ COCO


def test_training_leaves_out_what_cannot_be_learned_from():
    part, truth = detection.load("coco", coco_mini_folder(), "train2017", "val2017", "mask")
    crowds = {a["id"] for a in part["annotations"] if a["iscrowd"]}
    train = detection.Images(part, "mask", training=True)
    val = detection.Images(truth, "mask")
    targets = {a["id"] for annotations in train.annotations.values() for a in annotations}
    assert crowds
    assert not crowds & targets
    assert len(val) == len(truth["images"])
    assert len(detection.Images(part, "mask", training=True, limit=7)) == 7

    image, target = train[0, True]
    n = len(target["labels"])
    assert image.dtype == torch.uint8
    assert target["masks"].shape == (n, *image.shape[1:])
    assert target["boxes"].shape == (n, 4)
    # A mask lies in its box, mirrored like it.
    for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].tolist()):
        y, x = mask.nonzero().unbind(1)
        assert x.min() >= x1 - 1.5
        assert x.max() <= x2 + 1.5
        assert y.min() >= y1 - 1.5
        assert y.max() <= y2 + 1.5


def test_keypoints_are_trained_on_images_with_people_and_evaluated_on_all():
    folder = coco_mini_folder()
    part, truth = detection.load("coco", folder, "train2017", "val2017", "keypoint")
    train = detection.Images(part, "keypoint", training=True)
    val = detection.Images(truth, "keypoint")
    whole, _ = detection.load("coco", folder, "train2017", "val2017", "mask")
    assert 0 < len(train) < len(detection.Images(whole, "mask", training=True))
    for image in train.images:
        assert any(a["num_keypoints"] for a in train.annotations[image["id"]])
    # Images without people are evaluated too.
    with_people = {a["image_id"] for a in truth["annotations"]}
    assert len(val) == len(truth["images"]) > len(with_people)


@pytest.mark.parametrize("box", [[1, 1, -5, 4], [1, 1, 0, 4], [9, 1, 3, 3], [1, 1, 0.001, 4]])
def test_cocos_boxes_without_area_neither_train_nor_are_evaluated(tmp_path, capsys, box):
    """A hundredth of a pixel is nothing either: in float32 its ends may be one."""

    def change(whole):
        whole["annotations"][0]["bbox"] = box

    parts = detection.load(
        "coco", make_coco(tmp_path, "box", change, change), "train", "val", "box"
    )
    assert [[a["id"] for a in part["annotations"]] for part in parts] == [[12], [12]]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, part in zip(lines, ("train", "val")):
        assert f"instances_{part}.json: 1 of its 2 boxes have no area inside their image " in line
        assert "; the first is annotation 11 of " in line


# ------------------------------------------------------------------------------ VOC


def test_vocs_files_become_cocos_form(voc_devkit):
    train, val = load_voc(voc_devkit, VOC_TRAIN)
    # A part is no object.
    assert [category["name"] for category in train["categories"]] == ["cat", "dog"]
    assert train["categories"] == val["categories"]
    assert [len(train["images"]), len(val["images"]), len(train["annotations"])] == [8, 4, 8]
    for annotation in train["annotations"]:
        assert annotation["bbox"] == [20, 10, 40, 30]
        assert annotation["area"] == 1200
        assert not annotation["iscrowd"]
    assert [a["category_id"] for a in val["annotations"]] == [1, 2, 1, 2]
    assert [a["iscrowd"] for a in val["annotations"]] == [0, 0, 0, 1]  # the difficult ones
    image, target = detection.Images(train, "box", training=True)[0, False]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    # It holds the red square.
    assert image[0, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].min() > 200
    assert image[0, : y1 - 3].max() < 160 > image[0, y2 + 3 :].max()
    detections = as_detections(val["annotations"])
    assert average_precision(val, detections, "box")["box AP"] == pytest.approx(100)
    assert average_precision(val, detections[:3], "box")["box AP"] == pytest.approx(100)


def test_vocs_boxes_without_area_neither_train_nor_are_evaluated(voc_devkit, capsys):
    """xmax below xmin, or beside the image; of one pixel's width it is a box."""
    for stem, xmin, xmax in (
        ("trainval_0", 60, 21),
        ("test_0", 60, 21),
        ("test_1", 90, 99),
        ("test_2", 21, 21),
    ):
        path = os.path.join(voc_devkit, "VOC2007", "Annotations", f"{stem}.xml")
        replace_in(path, ("<xmin>21<", f"<xmin>{xmin}<"), ("<xmax>60<", f"<xmax>{xmax}<"))
    train, val = load_voc(voc_devkit)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("VOC2007/trainval: 1 of its 4 boxes have no area")
    assert "trainval_0.jpg: x, y, width, height 59, 10, -38, 30" in first
    assert second.startswith("VOC2007/test: 2 of its 4 boxes have no area")
    assert len(detection.Images(train, "box", training=True)) == 3
    assert len(detection.Images(val, "box")) == 4
    assert [a["image_id"] for a in val["annotations"]] == [3, 4]
    assert val["annotations"][0]["bbox"][2] == 1
    detections = as_detections(val["annotations"])
    assert average_precision(val, detections, "box")["box AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("<xmin>21<", "<xmin>nan<", "a box has ends nan, 11.0, 60.0, 40.0"),
        ("<xmin>21<", "<xmin>many<", "could not convert string to float: 'many'"),
        ("<xmin>21</xmin>", "", "it has no bndbox/xmin"),
        ("<name>dog</name>", "", "it has no name"),
        ("<width>80<", "<width>0<", "its image is 0 x 60 pixels"),
        ("</annotation>", "", "no element found"),
    ],
)
def test_what_is_not_vocs_form_is_named(voc_devkit, old, new, message):
    path = os.path.join(voc_devkit, "VOC2007", "Annotations", "test_1.xml")
    replace_in(path, (old, new))
    with pytest.raises(SystemExit) as error:
        load_voc(voc_devkit)
    assert str(error.value).startswith(f"{path} is not an annotation of VOC: {message}")


def test_an_image_that_vocs_lists_name_twice_is_refused(voc_devkit):
    with pytest.raises(SystemExit, match="trainval.txt names trainval_0, which .* already"):
        load_voc(voc_devkit, train=["VOC2007/trainval", "VOC2007/trainval"])


def test_vocs_validation_part_of_difficult_objects_alone_is_refused(voc_devkit):
    for i in range(3):
        path = os.path.join(voc_devkit, "VOC2007", "Annotations", f"test_{i}.xml")
        replace_in(path, ("<difficult>0<", "<difficult>1<"))
    with pytest.raises(SystemExit, match="VOC2007/test has no annotation to compute average prec"):
        load_voc(voc_devkit)


# ------------------------------------------------------------------------------ image files


@pytest.mark.parametrize(
    "file,content,message",
    [
        (
            "Annotations/trainval_1.xml",
            "<annotation><size>",
            "trainval_1.xml is not an annotation of VOC: ",
        ),
        ("Annotations/trainval_1.xml", None, "trainval_1.xml does not exist, and "),
        (
            "JPEGImages/trainval_1.jpg",
            None,
            "trainval_1.jpg does not exist, and VOC2007/trainval names it",
        ),
        ("JPEGImages/trainval_1.jpg", "no image", "trainval_1.jpg cannot be read as an image"),
        (
            "JPEGImages/trainval_1.jpg",
            (50, 60),
            "trainval_1.jpg is 50 x 60, and its annotations are for 80 x 60",
        ),
    ],
)
def test_broken_files_are_named(voc_devkit, file, content, message):
    """By the checks before training, and where an image breaks later, by the one that reads it."""
    path = os.path.join(voc_devkit, "VOC2007", file)
    os.remove(path)
    if isinstance(content, str):
        with open(path, "w") as f:
            f.write(content)
    elif content:
        Image.new("RGB", content).save(path)
    for use in (detection.check_image_sizes, read_all):
        with pytest.raises(SystemExit) as error:
            part, _ = load_voc(voc_devkit)
            use(detection.Images(part, "box", training=True))
        sentence = str(error.value)
        assert message in sentence
        assert path in sentence
        assert "\n" not in sentence


def read_all(images):
    plan = detection.batch_plan(4, 2, 0, 0, 2)
    list(detection.batches(images, plan, torch.device("cpu"), workers=1))


def test_an_image_that_exif_turns_is_named(voc_devkit):
    """A photograph whose annotations were made on a screen that obeys EXIF's rotation."""
    path = os.path.join(voc_devkit, "VOC2007", "JPEGImages", "test_1.jpg")
    exif = Image.Exif()
    exif[detection.EXIF_ORIENTATION] = 6
    Image.new("RGB", (60, 80)).save(path, exif=exif)
    _, val = load_voc(voc_devkit)
    images = detection.Images(val, "box")
    with pytest.raises(SystemExit) as error:
        detection.check_image_sizes(images)
    assert str(error.value).startswith(
        f"{path} is 60 x 80, and its annotations are for 80 x 60: its EXIF data turn it"
    )
    assert "mogrify -auto-orient" in str(error.value)
    with pytest.raises(InputLost, match="is 60 x 80, and its annotations are for 80 x 60"):
        images[1, False]


def test_one_decoder_for_detection_and_folders(voc_devkit):
    """A ramp of 16 bits is read by its upper half, and a float TIFF is refused."""
    part, _ = load_voc(voc_devkit)
    images = detection.Images(part, "box", training=True)
    ramp = np.linspace(0, 65535, 60 * 80).astype(np.uint16).reshape(60, 80)
    Image.fromarray(ramp).save(images.files[0], "PNG")
    Image.fromarray(ramp.astype(np.float32)).save(images.files[1], "TIFF")
    read, _ = images[0, False]
    assert torch.equal(read, torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1))
    with pytest.raises(
        SystemExit, match="trainval_1.jpg cannot be .*it has 32 bits a pixel; store"
    ):
        images[1, False]
