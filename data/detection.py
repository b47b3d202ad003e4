"""Detection data: images with boxes, and masks or keypoints, for training and evaluation.

    train, val = load("coco", "datasets/coco", "train2017", "val2017", "mask")
    train, val = load("voc", "datasets/VOCdevkit", ["VOC2007/trainval"], ["VOC2007/test"], "box")

Both are dicts of COCO's form {"images", "annotations", "categories"}, which data/coco.py and
data/voc.py read and check. Whatever is missing or broken ends the program, before training, with
one sentence that names the file.
"""

import os

import numpy as np
import torch

from engine import distributed
from engine.progress import progress

from . import coco, voc
from .image_files import for_each_file, open_image, printable, read_rgb, unreadable
from .loader import default_workers, generator, pinned
from .workers import InputLost, in_workers, shortage

# A box that is narrower, in pixels, may come out empty in the float32 of torchvision's networks,
# which stop at such a box.
SMALLEST_SIDE = 0.01
EXIF_ORIENTATION = 0x0112
EXIF_SIDES_SWAPPED = 5, 6, 7, 8


# ------------------------------------------------------------------------------ reading a data set


def load(layout, root, train, val, task):
    """Read the annotations of the training and of the validation part.

    Args:
        layout: "coco" or "voc".
        root: the data set's folder.
        train: the name of a part or, of VOC, a list of names.
        val: likewise.
        task: "box", "mask" or "keypoint".

    Returns:
        COCO's dict of each, see data/coco.py, with the same categories, sorted by id.

    Raises:
        SystemExit: a file is missing, broken, or holds nothing for this task.
    """
    names = [[part] if isinstance(part, str) else part for part in (train, val)]
    if not os.path.isdir(root):
        raise SystemExit(f"detect.data is {root!r}, and there is no such folder")
    if not all(names):
        raise SystemExit(
            "detect.train or detect.val is an empty list; name one part of the data set or several"
        )
    if layout == "voc":
        parts = load_voc(root, *names)
        sources = [", ".join(name) for name in names]
    else:
        parts = load_coco(root, *names, task)
        sources = [coco.annotation_file(root, *name, task) for name in names]
    for part, source in zip(parts, sources):
        check_images_exist(part["images"], source)
        drop_empty_boxes(part, source)
        if task == "mask":
            drop_without_mask(part, source)
    check_usable(parts[0], sources[0], task, "detect.train")
    check_usable(parts[1], sources[1], task, "detect.val")
    return parts


def load_voc(root, train, val):
    """Two lists of VOC's parts -> COCO's dict of each. Its categories are the names in both."""
    parts = [
        voc.read_parts(root, train, ignore_difficult=False),
        voc.read_parts(root, val, ignore_difficult=True),
    ]
    names = sorted({a["category"] for part in parts for a in part["annotations"]})
    for part in parts:
        part["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
        for annotation in part["annotations"]:
            annotation["category_id"] = names.index(annotation.pop("category")) + 1
    return parts


def load_coco(root, train, val, task):
    """Two lists of one name each -> COCO's dict of each."""
    if len(train) != 1 or len(val) != 1:
        raise SystemExit(
            "layout coco takes one name for detect.train and one for detect.val, not "
            f"{train!r} and {val!r}"
        )
    parts = [coco.read_part(root, name, task) for (name,) in (train, val)]
    if parts[0]["categories"] != parts[1]["categories"]:
        kind = coco.KIND[task]
        raise SystemExit(
            f"{root}: the categories of {kind}_{train[0]}.json are not those of "
            f"{kind}_{val[0]}.json: {first_difference(*(part['categories'] for part in parts))}; "
            "give both files the same list"
        )
    return parts


def first_difference(ours, theirs):
    """The first category, in words, in which two lists of them differ."""
    for one, other in zip([*ours, None], [*theirs, None]):
        if one != other:
            break
    return f"one has {one or 'no more'}, the other {other or 'no more'}"


def check_images_exist(images, source):
    """End the program unless each image's file is in its folder.

    The folders are listed, which at COCO's size takes a tenth of a second.
    """
    if not images:
        raise SystemExit(f"{source} lists no image")
    folders = {os.path.dirname(image["file"]) for image in images}
    present = {
        folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in folders
    }
    for image in images:
        folder, name = os.path.split(image["file"])
        if name not in present[folder]:
            raise SystemExit(f"{image['file']} does not exist, and {source} names it")


# ------------------------------------------------------------------------------ what is left out


def drop_empty_boxes(part, source):
    """Leave out the annotations whose box has no area inside its image.

    Such are VOC's with xmax below xmin, and COCO's of negative width. Nothing can be learned from
    one, and no detection can match it.
    """
    images = {image["id"]: image for image in part["images"]}
    drop(
        part,
        source,
        [has_area(a["bbox"], images[a["image_id"]]) for a in part["annotations"]],
        "have no area inside their image",
    )


def drop_without_mask(part, source):
    """Leave out the annotations without a mask. SystemExit, if all are."""
    has_mask = [a["segmentation"] is not None for a in part["annotations"]]
    if has_mask and not any(has_mask):
        raise SystemExit(
            f"{source}: none of its {len(has_mask)} annotations has a mask (segmentation, with a "
            "polygon of at least three points); detect.task=box needs none"
        )
    drop(
        part,
        source,
        has_mask,
        "have no mask (segmentation, with a polygon of at least three points)",
    )


def drop(part, source, keep, why):
    """Leave annotations out, the same in training and evaluation, and say how many.

    Args:
        part: COCO's dict, changed in place.
        source: the file or the list that it was read from.
        keep: a bool for each annotation.
        why: what is the matter with the others, in words.
    """
    dropped = [a for a, kept in zip(part["annotations"], keep) if not kept]
    if not dropped:
        return
    first = dropped[0]
    file = next(i["file"] for i in part["images"] if i["id"] == first["image_id"])
    name = f"annotation {first['id']}" if "id" in first else "a box"
    box = ", ".join(f"{value:g}" for value in first["bbox"])
    distributed.print_main(
        f"{source}: {len(dropped)} of its {len(keep)} boxes {why} and are left out of training and "
        f"evaluation; the first is {name} of {file}: x, y, width, height {box}"
    )
    part["annotations"] = [a for a, kept in zip(part["annotations"], keep) if kept]


def has_area(box, image):
    """Whether a box [x, y, w, h] covers a part of its image."""
    x1, y1, x2, y2 = corners(box, image["width"], image["height"])
    return x2 - x1 >= SMALLEST_SIDE and y2 - y1 >= SMALLEST_SIDE


def corners(box, width, height):
    """[x, y, w, h] -> [x1, y1, x2, y2], inside the image."""
    x, y, w, h = box
    return [
        min(max(x, 0), width),
        min(max(y, 0), height),
        min(max(x + w, 0), width),
        min(max(y + h, 0), height),
    ]


def check_usable(part, source, task, key):
    """End the program where no annotation is left to learn from, or to evaluate with.

    Args:
        part: COCO's dict.
        source: the file or the list that it was read from.
        task: "box", "mask" or "keypoint".
        key: the setting that names the part.
    """
    if any(is_object(a) and has_points(a, task) for a in part["annotations"]):
        return
    reason = "all are crowds or difficult" if part["annotations"] else "it has none"
    if task == "keypoint" and any(map(is_object, part["annotations"])):
        reason = "none has a keypoint that is labelled"
    use = "learn from" if key == "detect.train" else "compute average precision with"
    raise SystemExit(f"{source} has no annotation to {use}: {reason}; name another part as {key}")


def is_object(annotation):
    """Whether an annotation is of a single object: not a crowd, and in VOC not difficult."""
    return not annotation["iscrowd"]


def has_points(annotation, task):
    """Whether an annotation has a keypoint, if those are the task."""
    return task != "keypoint" or annotation["num_keypoints"] > 0


# ------------------------------------------------------------------------------ images and targets


class Images:
    """data[row, flip] -> (image (3, H, W) uint8, target).

    For training, target is torchvision's: boxes (n, 4) as x1 y1 x2 y2, labels (n,) from 1, masks
    (n, H, W) uint8, keypoints (n, 17, 3). Crowds are no targets, and images without targets are
    left out; for `keypoint` one of an image's must have a labelled point (detectron2's rule). For
    evaluation all images are kept, and target is the image's id.

    InputLost says what is wrong with an image.

    Args:
        part: COCO's dict.
        task: "box", "mask" or "keypoint".
        training: see above.
        limit: so many training images at most, the first ones.
    """

    def __init__(self, part, task, training=False, limit=None):
        self.part, self.task, self.training = part, task, training
        self.label = {c["id"]: i for i, c in enumerate(part["categories"], 1)}
        self.mirrored = None
        if task == "keypoint":
            self.mirrored = coco.mirrored_keypoints(part["categories"][0]["keypoints"])
        self.images = part["images"]
        self.annotations = {image["id"]: [] for image in part["images"]}
        if training:
            for annotation in filter(is_object, part["annotations"]):
                self.annotations[annotation["image_id"]].append(annotation)
            self.images = [
                image
                for image in part["images"]
                if any(has_points(a, task) for a in self.annotations[image["id"]])
            ][:limit]

    @property
    def files(self):
        """The images' paths."""
        return [image["file"] for image in self.images]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        row, is_flipped = key
        record = self.images[row]
        try:
            # As stored: COCO's annotations know nothing of EXIF's rotation.
            pixels = np.array(read_rgb(record["file"]))
        except ValueError as error:
            raise InputLost(str(error)) from None
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        height, width = image.shape[1:]
        if (width, height) != (record["width"], record["height"]):
            raise InputLost(describe_sizes(record, width, height))
        if not self.training:
            return image, record["id"]
        target = self.target(record)
        return flip(image, target, self.mirrored) if is_flipped else (image, target)

    def target(self, image):
        """What torchvision's networks learn from an image's annotations, not flipped."""
        annotations = self.annotations[image["id"]]
        height, width = image["height"], image["width"]
        boxes = [corners(a["bbox"], width, height) for a in annotations]
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor([self.label[a["category_id"]] for a in annotations]),
        }
        if self.task == "mask":
            masks = [coco.decode_mask(a["segmentation"], height, width) for a in annotations]
            target["masks"] = torch.from_numpy(np.stack(masks))
        if self.task == "keypoint":
            points = torch.from_numpy(np.stack([a["keypoints"] for a in annotations]))
            points = points.float().view(len(annotations), coco.N_KEYPOINTS, 3)
            # COCO's are pixel indices; the middle of a pixel is at its index + 0.5.
            points[..., :2] += 0.5 * (points[..., 2:] > 0)
            target["keypoints"] = points
        return target


def check_image_sizes(dataset):
    """End the program unless each image has the size that its annotations are for.

    Every process calls it; one of each node reads the files' headers, as COCO's 118,287 training
    images take a few seconds.

    Args:
        dataset: an Images.

    Raises:
        SystemExit: names the first file that cannot be read or has another size.
    """
    distributed.run_on_first(lambda: read_image_sizes(dataset), per_node=True)


def read_image_sizes(dataset):
    """`check_image_sizes`, in this process."""
    bar = progress(
        for_each_file(size_problem, dataset.images),
        "looking at the images' sizes",
        total=len(dataset),
    )
    for _, problem in bar:
        if problem:
            raise SystemExit(problem)


def size_problem(record):
    """What is wrong with the size of an image, by its file's header, or None."""
    try:
        with open_image(record["file"]) as image:
            if image.size == (record["width"], record["height"]):
                return None
            orientation = image.getexif().get(EXIF_ORIENTATION)
            return describe_sizes(record, *image.size, orientation)
    except Exception as error:  # PIL raises many kinds
        if shortage(error):  # the image may be whole
            raise
        return str(unreadable(record["file"], error))


def describe_sizes(record, width, height, orientation=None):
    """One sentence on an image of other sides than those that its annotations are for."""
    file = printable(record["file"])
    sizes = (
        f"{width} x {height}, and its annotations are for {record['width']} x {record['height']}"
    )
    if (height, width) == (record["width"], record["height"]) and (
        orientation in EXIF_SIDES_SWAPPED
    ):
        return (
            f"{file} is {sizes}: its EXIF data turn it, which is not done here, as COCO's "
            "annotations are for the stored pixels; store it turned (ImageMagick: mogrify "
            "-auto-orient FILE)"
        )
    return f"{file} is {sizes}; replace one of the two"


def flip(image, target, mirrored=None):
    """Mirror an image (3, H, W) and its target.

    Left and right keypoints change places; one that is not labelled stays at (0, 0).

    Args:
        image: (3, H, W).
        target: torchvision's, see Images.
        mirrored: where each keypoint goes, see coco.mirrored_keypoints.
    """
    width = image.shape[2]
    target = dict(target)
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], 1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(2)
    if "keypoints" in target:
        points = target["keypoints"][:, mirrored].clone()  # (n, 17, 3)
        is_labelled = points[..., 2] > 0
        points[..., 0] = torch.where(is_labelled, width - points[..., 0], points[..., 0])
        target["keypoints"] = points
    return image.flip(2), target


# ------------------------------------------------------------------------------ batches


def batch_plan(n, batch_size, seed, start, stop):
    """Yield this process's [(row, flip), ...] of each step from `start` to `stop`.

    Order and flips depend on (seed, epoch) alone, so that a resumed run sees the same.

    Args:
        n: the number of images.
        batch_size: global; each process has its consecutive part. The last, smaller batch of an
            epoch is left out.
        seed: a whole number.
        start: the first step, counted from the beginning of training.
        stop: the one after the last.
    """
    local = batch_size // distributed.world_size()
    local_rows = torch.arange(local) + distributed.rank() * local
    for iteration in range(start, stop):
        epoch, step = divmod(iteration, n // batch_size)
        if step == 0 or iteration == start:
            g = generator(seed, epoch)
            order = torch.randperm(n, generator=g)
            flips = torch.rand(n, generator=g) < 0.5
        rows = order[step * batch_size + local_rows].tolist()
        yield [(row, flips[row].item()) for row in rows]


def batches(images, plan, device, workers=None):
    """Read batches in image workers.

    Args:
        images: an Images.
        plan: an iterable of lists of (row, flip).
        device: where the images go.
        workers: how many processes read; None: default_workers().

    Yields:
        a list of (image (3, H, W) in [0, 1], target), on the device.
    """
    workers = default_workers() if workers is None else workers
    if hasattr(plan, "__len__"):
        workers = min(workers, len(plan))
    for batch in in_workers(ReadBatch(images), plan, workers, setting="detect.workers"):
        yield [
            (to_device(image, device).float().div_(255), target_to_device(target, device))
            for image, target in batch
        ]


class ReadBatch:
    """Call it, in a worker, with a list of (row, flip), for a list of (image, target).

    Args:
        images: an Images.
    """

    def __init__(self, images):
        self.images = images

    def __call__(self, rows):
        """Read them."""
        return [self.images[row, is_flipped] for row, is_flipped in rows]


def target_to_device(target, device):
    """A target's tensors on the device; an image's id as it is."""
    if not isinstance(target, dict):
        return target
    return {name: to_device(value, device) for name, value in target.items()}


def to_device(tensor, device):
    """A copy of a tensor on the device."""
    if device.type != "cuda":  # elsewhere a copy that is not waited for may read freed memory
        return tensor.to(device)
    return pinned(tensor, device).to(device, non_blocking=True)
