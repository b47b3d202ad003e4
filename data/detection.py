"""Detection data, COCO's form: one dict {"images", "annotations", "categories"}, whose images know their file; VOC's files are turned into it.

    train, val = load("coco", "datasets/coco", "train2017", "val2017", "mask")
    train, val = load("voc", "datasets/VOCdevkit", ["VOC2007/trainval", "VOC2012/trainval"], ["VOC2007/test"], "box")

coco: images in <root>/<name>/, annotations/instances_<name>.json, for keypoints person_keypoints_<name>.json. voc: <root>/<folder>/ImageSets/Main/<name>.txt
names the images. An annotation: {image_id, category_id, bbox [x, y, w, h] in pixels, area, iscrowd}, where there are any with segmentation (polygons
or RLE) and keypoints [x, y, v, ...].
Whatever is missing or broken ends the program with one sentence that names the file.
"""

import json
import os
from xml.etree import ElementTree

import numpy as np
import torch
from tqdm import tqdm

from engine import distributed

from .datasets import inside
from .image_files import read_rgb
from .loader import default_workers, generator, pinned
from .workers import InputLost, in_workers

JSON = {"box": "instances", "mask": "instances", "keypoint": "person_keypoints"}


def load(layout, root, train, val, task):
    """-> COCO's dict of the training part and of the validation part, with the same categories, sorted by id."""
    parts = [[part] if isinstance(part, str) else part for part in (train, val)]
    if not os.path.isdir(root):
        raise SystemExit(f"detect.data is {root!r}, and there is no such folder")
    if not all(parts):
        raise SystemExit(
            "detect.train or detect.val is an empty list; name one part of the data set or several"
        )
    if layout == "voc":
        found = [
            voc(root, parts[0], ignore_difficult=False),
            voc(root, parts[1], ignore_difficult=True),
        ]
        names = sorted({a["category"] for part in found for a in part["annotations"]})
        for part in found:
            part["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
            for a in part["annotations"]:
                a["category_id"] = names.index(a.pop("category")) + 1
        return drop_empty_boxes(found, parts)
    if len(parts[0]) != 1 or len(parts[1]) != 1:
        raise SystemExit(
            f"layout coco takes one name for detect.train and one for detect.val, not {train!r} and {val!r}"
        )
    found = [coco(root, *part, task) for part in parts]
    if found[0]["categories"] != found[1]["categories"]:
        raise SystemExit(
            f"{root}: the categories of {JSON[task]}_{parts[0][0]}.json are not those of {JSON[task]}_{parts[1][0]}.json"
        )
    return drop_empty_boxes(found, parts)


def drop_empty_boxes(found, parts):
    """Leave out the annotations whose box has no area inside its image, such as VOC's with xmax
    below xmin: nothing can be learned from one, and no detection can match it.

    found: COCO's dict of each part, changed in place. parts: the lists of their names.
    """
    for coco, names in zip(found, parts):
        images = {i["id"]: i for i in coco["images"]}
        empty = [a for a in coco["annotations"] if not has_area(a["bbox"], images[a["image_id"]])]
        if not empty:
            continue
        coco["annotations"] = [
            a for a in coco["annotations"] if has_area(a["bbox"], images[a["image_id"]])
        ]
        distributed.say(
            f"{', '.join(names)}: {len(empty)} boxes have no area inside their image "
            "and are left out of training and evaluation; the first is in "
            f"{images[empty[0]['image_id']]['file']}: x, y, width, height "
            f"{', '.join(f'{value:g}' for value in empty[0]['bbox'])}"
        )
    return found


def has_area(bbox, image):
    """Whether a box [x, y, w, h] covers a part of its image."""
    x1, y1, x2, y2 = corners(bbox, image["width"], image["height"])
    return x2 > x1 and y2 > y1


def coco(root, name, task):
    path, folder = (
        os.path.join(root, "annotations", f"{JSON[task]}_{name}.json"),
        os.path.join(root, name),
    )
    try:
        with open(path) as f:
            found = json.load(f)
    except FileNotFoundError:
        raise SystemExit(
            f"{path} does not exist; detect.data is the folder that holds annotations/ and {name}/"
        )
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not text
        raise SystemExit(f"{path} cannot be read as JSON: {error}")
    try:
        found = {
            "images": [
                {
                    "id": i["id"],
                    "height": i["height"],
                    "width": i["width"],
                    "file": inside(folder, os.path.join(folder, i["file_name"]), path),
                }
                for i in found["images"]
            ],
            "annotations": found["annotations"],
            "categories": sorted(found["categories"], key=lambda c: c["id"]),
        }
        images, categories = ({x["id"] for x in found[part]} for part in ("images", "categories"))
        for a in found["annotations"]:
            x, y, w, h = a["bbox"]
            if a["image_id"] not in images or a["category_id"] not in categories:
                raise ValueError(
                    f"an annotation is of image {a['image_id']} and category {a['category_id']}, which are not both in the file"
                )
            a.setdefault("iscrowd", 0)
            a.setdefault("area", w * h)
            if isinstance(
                a.get("segmentation"), list
            ):  # arrays: a fifth of the memory, and workers do not copy them by counting references
                a["segmentation"] = [
                    np.asarray(p, dtype=np.float64) for p in a["segmentation"] if len(p) >= 6
                ]
            if "keypoints" in a:
                a["keypoints"] = np.asarray(a["keypoints"], dtype=np.float64)
                a["num_keypoints"] = int((a["keypoints"][2::3] > 0).sum())
            elif task == "keypoint":
                raise ValueError(f"the annotation {a.get('id')} has no keypoints")
        if task == "keypoint" and any(
            len(c.get("keypoints", ())) != 17 for c in found["categories"]
        ):
            raise ValueError(
                "COCO's keypoint AP is defined for the 17 keypoints of a person, and a category has others"
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SystemExit(
            f"{path} is not in COCO's form: {f'{error} is missing' if isinstance(error, KeyError) else error}"
        )
    check_files(found["images"], path)
    return found


def voc(root, parts, ignore_difficult):
    """VOC's lists -> COCO's dict, but for the categories, whose names stand in "category".

    VOC counts pixels from 1 and a box holds both of its ends, so (1, 1, W, H) is the whole image: here [0, 0, W, H], as in detectron2. Objects
    marked difficult are trained on, as in detectron2, and ignored in evaluation, as in VOC, there by COCO's iscrowd: a detection that lies in one is
    neither right nor wrong.
    """
    images, annotations = [], []
    for part in parts:
        folder, _, name = part.rpartition("/")
        listed = os.path.join(root, folder, "ImageSets", "Main", f"{name}.txt")
        if not folder or not os.path.exists(listed):
            raise SystemExit(
                f"{listed} does not exist; with layout voc, detect.train and detect.val are lists such as [VOC2007/trainval, VOC2012/trainval]"
            )
        with open(listed) as f:
            stems = [line.split()[0] for line in f if line.split()]
        for stem in tqdm(stems, part, leave=False, disable=None if distributed.is_main() else True):
            path = inside(
                os.path.join(root, folder, "Annotations"),
                os.path.join(root, folder, "Annotations", f"{stem}.xml"),
                listed,
            )
            try:
                tree = ElementTree.parse(path, ElementTree.XMLParser(target=Plain())).getroot()
                images.append(
                    {
                        "id": len(images) + 1,
                        "height": int(tree.find("size/height").text),
                        "width": int(tree.find("size/width").text),
                        "file": os.path.join(root, folder, "JPEGImages", f"{stem}.jpg"),
                    }
                )
                for thing in tree.findall("object"):  # not .iter: an object's parts have boxes too
                    x1, y1, x2, y2 = (
                        float(thing.find(f"bndbox/{k}").text)
                        for k in ("xmin", "ymin", "xmax", "ymax")
                    )
                    x, y, w, h = x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1
                    difficult = thing.findtext("difficult", "0").strip() == "1"
                    annotations.append(
                        {
                            "image_id": len(images),
                            "category": thing.find("name").text.strip(),
                            "bbox": [x, y, w, h],
                            "area": w * h,
                            "iscrowd": int(difficult and ignore_difficult),
                        }
                    )
            except FileNotFoundError:
                raise SystemExit(f"{path} does not exist, and {listed} names it")
            except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
                raise SystemExit(f"{path} is not an annotation of VOC: {error}")
    check_files(images, ", ".join(parts))
    return {"images": images, "annotations": annotations}


class Plain(ElementTree.TreeBuilder):
    """XML without a document type, whose entities may stand for other files, or for more than memory holds."""

    def doctype(self, name, public, system):
        raise ValueError("it declares a document type")


def check_files(images, where):
    """Now, not after hours."""
    if not images:
        raise SystemExit(f"{where} lists no image")
    there = {
        folder: set(os.listdir(folder)) if os.path.isdir(folder) else set()
        for folder in {os.path.dirname(i["file"]) for i in images}
    }
    for i in images:
        if os.path.basename(i["file"]) not in there[os.path.dirname(i["file"])]:
            raise SystemExit(f"{i['file']} does not exist, and {where} names it")


class Images:
    """data[row, flip] -> (image (3, H, W) uint8, target). InputLost says what is wrong with an image.

    coco: COCO's dict. training: keep the images that have something to learn from, the first `limit` of them, and give targets for torchvision:
    boxes (n, 4) as x1 y1 x2 y2, labels (n,) from 1, masks (n, H, W) uint8, keypoints (n, 17, 3); otherwise keep all, and target is the image's id.
    Crowds, boxes without area, and for `mask` annotations without a polygon, are no targets; for `keypoint` an image must have one (detectron2's rule).
    """

    def __init__(self, coco, task, training=False, limit=None):
        self.task, self.training = task, training
        self.label = {c["id"]: i for i, c in enumerate(coco["categories"], 1)}
        self.pairs = pairs(coco["categories"][0]["keypoints"]) if task == "keypoint" else None
        self.images, self.annotations = coco["images"], {i["id"]: [] for i in coco["images"]}
        if training:
            by_id = {i["id"]: i for i in self.images}
            for a in coco["annotations"]:
                if (
                    not a["iscrowd"]
                    and has_area(a["bbox"], by_id[a["image_id"]])
                    and (task != "mask" or len(a.get("segmentation", ())))
                ):
                    self.annotations[a["image_id"]].append(a)
            good = lambda some: (
                any(a["num_keypoints"] for a in some) if task == "keypoint" else len(some)
            )
            self.images = [i for i in self.images if good(self.annotations[i["id"]])][:limit]

    @property
    def files(self):
        """The images' paths."""
        return [info["file"] for info in self.images]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, want):
        row, flipped = want
        info = self.images[row]
        try:
            # As stored: COCO's annotations know nothing of EXIF's rotation.
            pixels = np.array(read_rgb(info["file"]))
        except ValueError as error:
            raise InputLost(str(error))
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        if tuple(image.shape[1:]) != (info["height"], info["width"]):
            raise InputLost(
                f"{info['file']} is {image.shape[2]} x {image.shape[1]}, and its annotations are for "
                f"{info['width']} x {info['height']}; replace one of the two"
            )
        if not self.training:
            return image, info["id"]
        target = self.target(info)
        return flip(image, target, self.pairs) if flipped else (image, target)

    def target(self, info):
        some = self.annotations[info["id"]]
        target = {
            "boxes": torch.tensor(
                [corners(a["bbox"], info["width"], info["height"]) for a in some],
                dtype=torch.float32,
            ),
            "labels": torch.tensor([self.label[a["category_id"]] for a in some]),
        }
        if self.task == "mask":
            target["masks"] = torch.from_numpy(
                np.stack([mask(a["segmentation"], info["height"], info["width"]) for a in some])
            )
        if self.task == "keypoint":
            k = (
                torch.from_numpy(np.stack([a["keypoints"] for a in some]))
                .float()
                .view(len(some), 17, 3)
            )
            k[..., :2] += 0.5 * (
                k[..., 2:] > 0
            )  # COCO's are pixel indices; an index's middle is at + 0.5
            target["keypoints"] = k
        return target


def corners(bbox, width, height):
    """[x, y, w, h] -> [x1, y1, x2, y2], inside the image."""
    x, y, w, h = bbox
    return [
        min(max(x, 0), width),
        min(max(y, 0), height),
        min(max(x + w, 0), width),
        min(max(y + h, 0), height),
    ]


def mask(segmentation, height, width):
    """Polygons or an RLE -> (height, width) uint8, 1 inside."""
    from pycocotools import mask as tools

    if isinstance(segmentation, dict):
        return tools.decode(
            segmentation
            if not isinstance(segmentation["counts"], list)
            else tools.frPyObjects(segmentation, height, width)
        )
    return tools.decode(tools.merge(tools.frPyObjects(segmentation, height, width)))


def pairs(names):
    """Where each keypoint goes in a mirror: [left_eye, right_eye, nose] -> [1, 0, 2]."""
    swap = {"left": "right", "right": "left"}
    return [
        names.index("_".join(swap.get(word, word) for word in name.split("_"))) for name in names
    ]


def flip(image, target, pairs=None):
    """Mirror an image (3, H, W) and its target. Left and right keypoints change places; one that is not labelled stays at (0, 0)."""
    width, target = image.shape[2], dict(target)
    target["boxes"] = torch.stack(
        [
            width - target["boxes"][:, 2],
            target["boxes"][:, 1],
            width - target["boxes"][:, 0],
            target["boxes"][:, 3],
        ],
        1,
    )
    if "masks" in target:
        target["masks"] = target["masks"].flip(2)
    if "keypoints" in target:
        k = target["keypoints"][:, pairs].clone()  # (n, 17, 3)
        k[..., 0] = torch.where(k[..., 2] > 0, width - k[..., 0], k[..., 0])
        target["keypoints"] = k
    return image.flip(2), target


def plan(n, batch_size, seed, start, stop):
    """This process's (row, flip) of each step from `start` to `stop`. Order and flips depend on (seed, epoch) alone, so a resumed run sees the same.

    batch_size is global; each process has its consecutive part. The last, smaller batch of an epoch is left out.
    """
    local = batch_size // distributed.world_size()
    mine = torch.arange(local) + distributed.rank() * local
    for iteration in range(start, stop):
        epoch, step = divmod(iteration, n // batch_size)
        if step == 0 or iteration == start:
            g = generator(seed, epoch)
            order, flips = torch.randperm(n, generator=g), torch.rand(n, generator=g) < 0.5
        yield [(row, flips[row].item()) for row in order[step * batch_size + mine].tolist()]


def batches(images, plan, device, workers=None):
    """plan: lists of (row, flip). -> lists of (image (3, H, W) in [0, 1], target) on the device."""

    def to_device(x):
        if not isinstance(x, torch.Tensor):
            return x
        if device.type != "cuda":  # elsewhere a copy that is not waited for may read freed memory
            return x.to(device)
        return pinned(x, device).to(device, non_blocking=True)

    def on_device(target):
        if not isinstance(target, dict):  # an image's id
            return target
        return {name: to_device(value) for name, value in target.items()}

    workers = default_workers() if workers is None else workers
    if hasattr(plan, "__len__"):
        workers = min(workers, len(plan))
    for batch in in_workers(BatchOf(images), plan, workers, setting="detect.workers"):
        yield [(to_device(image).float().div_(255), on_device(target)) for image, target in batch]


class BatchOf:
    """What a worker does for a list of (row, flip): -> [(image, target)]."""

    def __init__(self, images):
        self.images = images

    def __call__(self, wanted):
        return [self.images[row, flipped] for row, flipped in wanted]
