"""Data sets: index -> image.

Arrays live in memory as uint8; image files (data/image_files.py) are read by workers
(data/loader.py), or decoded once for all runs (data/cache.py).

    load("pretrain", name="cifar10")    what the encoder is pre-trained on (labels, where there are
                                        any, for reporting only)
    load("train", ...)                  the labelled training images: kNN's bank, the probe's
                                        training set
    load("test", ...)                   None where a folder or a list has no validation part
"""

import hashlib
import os
import shlex
from functools import partial
from typing import Literal

import numpy as np
import torch
import torchvision

from engine import device as devices
from engine import distributed

from . import shapes
from .cache import cached
from .folders import ROOT_KEY, first_lookalikes, folder_of_part, list_images
from .image_files import FolderSet, check_all_files, printable
from .image_list import check_list, read_list
from .statistics import measure

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The mean and std of each channel, of the training images in [0, 1].
STATISTICS = {
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}
# What torchvision loads (and downloads): name -> its class, arguments of its training part, and of
# its test part.
TORCHVISION = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "aircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}),
    "flowers": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "traffic_signs": ("GTSRB", {"split": "train"}, {"split": "test"}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "kmnist": ("KMNIST", {"train": True}, {"train": False}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
}
# The papers' transfer protocol gives these the mean of each class's accuracy beside top-1.
MEAN_PER_CLASS = "aircraft", "flowers", "pets"
# Sets of one's own, which have no other name than where they lie.
FOLDERS = "folder", "list"
NAMES = ("shapes", *TORCHVISION, *FOLDERS, "imagenet", "imagenet100", "voc2007")


class ArraySet:
    """n images in memory.

    Args:
        images: (n, 3, H, W) uint8.
        labels: (n,) int64, or None where not every image has one.
        classes: the names of the classes, or None.
        mean: of each channel, of the training images in [0, 1].
        std: likewise.
    """

    def __init__(self, images, labels, classes, mean, std):
        self.images = images
        self.labels, self.classes = labels, classes
        self.mean, self.std = mean, std

    def __len__(self):
        return len(self.images)

    def select(self, rows):
        """The images `rows` (m,), in that order, as an ArraySet."""
        labels = None if self.labels is None else self.labels[rows]
        return ArraySet(self.images[rows], labels, self.classes, self.mean, self.std)

    def to(self, device):
        """Move the images to a device, if they take less than half of what it has free."""
        if self.images.nbytes < devices.free_memory(device) / 2:
            self.images = self.images.to(device)
        return self

    def fingerprint(self):
        """A hash of the number and size of the images and of the pixels of some."""
        step = max(1, len(self.images) // 64)
        sample = self.images[::step].cpu().contiguous()
        shape = repr(tuple(self.images.shape)).encode()
        return hashlib.sha256(shape + sample.numpy().tobytes()).hexdigest()[:16]

    def decode(self, i):
        """Image i as PIL's."""
        return torchvision.transforms.functional.to_pil_image(self.images[i].cpu())


def load(
    part,
    seed,
    image_size=224,
    workers=None,
    *,
    name: str,
    root: str = "datasets",
    split: str = "train",
    limit: int | None = None,
    classes: int | None = None,
    cache: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    check_files: bool = False,
    mean: list[float] | Literal["auto"] | None = None,
    std: list[float] | Literal["auto"] | None = None,
):
    """One part of a data set: "pretrain", "train" or "test".

    Args:
        part: which; of a folder without validation images there is no "test".
        seed: of `limit`'s shuffle.
        image_size: that `auto` measures images at, in pixels.
        workers: that decode them; None as many as the Loader takes.
        name: one of NAMES.
        root: where the data sets lie; for `folder`, the folder itself; for `list`, a CSV file with
            the columns path and label (data/image_list.py).
        split: of stl10, what to pre-train on: train (the 5,000 labelled images, as the Ring code),
            unlabeled, train+unlabeled.
        limit: so many training images of that shuffle, whatever their labels. Test sets stay whole.
        classes: of shapes, how many, 2 to 100; null: twelve.
        cache: keep folders of images decoded in a file beside them, the shorter side at most that
            many pixels (data/cache.py: crops are then taken from these); null: decode them again
            in every epoch.
        on_error: an image file that cannot be read stops the run, which names it when it meets it;
            or skip: pre-training takes the next readable image of the folder in its place and says
            so after each epoch. Labelled parts, which evaluation goes over, always stop.
        check_files: look before training whether every image file is there, may be read and is not
            empty (ImageNet: seconds on a local disk, minutes on a network disk).
        mean: of the normalisation, one number a channel, for images in [0, 1]; null: the set's own
            (STATISTICS; ImageNet's for a set that has none there); auto: measured on some of the
            training images, whatever `limit` (data/statistics.py). For the test part and the next
            start `replace_auto` keeps what came out.
        std: likewise.

    Returns: an ArraySet or a FolderSet; None where the set has no such part.
    """
    refuse_statistics(part, mean, std)
    refuse_settings(part, name, split, limit, classes, cache, on_error, check_files)
    root = os.path.expanduser(root)
    dataset = whole_part(part, name, root, split, limit, classes)
    if dataset is None:
        return None
    list_file = root if name == "list" else None
    if list_file:
        check_list(list_file, dataset.files, on_error == "skip")
    if check_files and isinstance(dataset, FolderSet):
        check_all_files(dataset.files)
    if cache is not None:  # the whole part: every limit shares it
        dataset = with_cache(dataset, part, name, cache, on_error == "skip", list_file)
    skip = on_error == "skip" and part == "pretrain"
    given = {"mean": mean, "std": std}
    if "auto" in (mean, std):  # of the whole part: every limit and seed shares it
        given = measure(dataset, given, image_size, workers, skip)
    if limit is not None and (part == "pretrain" or part == "train" and split == "train"):
        dataset = limited(dataset, name, limit, seed)
    if isinstance(dataset, FolderSet):
        dataset.skip, dataset.list_file = skip, list_file
    for key, values in given.items():
        if values is not None:
            setattr(dataset, key, tuple(values))
    return dataset


def describe_set(name, root):
    """A data set by its name; of a folder or a list also which one. root: as in `load`, or None."""
    if name not in FOLDERS or not root:
        return name
    return f"{name} {os.path.basename(os.path.normpath(root))}"


def with_cache(dataset, part, name, cache, skip, list_file):
    """A FolderSet, cached (see `cached`); SystemExit where there is nothing to cache."""
    if isinstance(dataset, FolderSet):
        cache_name = f"{name}-{'test' if part == 'test' else 'train'}"
        return cached(dataset, cache_name, cache, skip, list_file)
    if part == "pretrain":
        raise SystemExit(
            f"data.cache is {cache}, but {name} is in memory already, decoded; leave data.cache out"
        )
    return dataset  # a probe may go to a set in memory


def limited(dataset, name, limit, seed):
    """So many images of a data set, of a fixed shuffle."""
    if limit > len(dataset):
        raise SystemExit(f"data.limit is {limit}; {name} has {len(dataset)} images to choose from")
    # No labels are given, for labels do not say what is trained on.
    return dataset.select(balanced_rows(None, len(dataset), limit, seed))


# ------------------------------------------------------------------------------- evaluation


def find_obstacle(train, test):
    """Why there is no evaluation with two data sets, and the way out; or None.

    Labels are positions in the lists of classes, so these must be the same.

    Args:
        train: the labelled training images.
        test: the test images; None where there is no such part.
    """
    if test is None and getattr(train, "list_file", None):
        return f"there are no validation images; {train.list_file} has no row whose part is val"
    if test is None:
        return "there are no validation images; a folder has them in val/, beside train/"
    for dataset, part in (train, "training"), (test, "validation"):
        if dataset.labels is None:
            return describe_unlabelled(dataset, part)
    lacking = sorted(set(train.classes) - set(test.classes))
    if lacking:
        return describe_lacking(lacking, "training", test.classes, "validation")
    lacking = sorted(set(test.classes) - set(train.classes))
    if lacking:
        return describe_lacking(lacking, "validation", train.classes, "training")
    if list(train.classes) != list(test.classes):
        return "the classes of the training images are in another order than the test images'"
    twins = first_lookalikes(map(str, train.classes))
    if twins:
        name, other = map(ascii, twins)
        return f"the classes {name} and {other} print alike; put their images into one class"


def describe_unlabelled(dataset, part):
    """Why a part of a data set has no labels, and the way out. part: its name in words."""
    if getattr(dataset, "list_file", None):
        return f"the {part} images in {dataset.list_file} have no labels of two or more classes"
    reason = f"the {part} images{in_folder(dataset)} are not in two or more class folders"
    return reason if part == "training" else f"{reason}; {how_to_sort(dataset)}"


def in_folder(dataset):
    """The words " in FOLDER", where the image files lie; "" for a data set in memory."""
    if not isinstance(dataset, FolderSet):
        return ""
    return " in " + printable(os.fsdecode(dataset.files.common_folder()))


def how_to_sort(dataset):
    """How the images of a validation part get into class folders."""
    way = "move each into one named as in train/"
    folder = os.fsdecode(dataset.files.common_folder()) if isinstance(dataset, FolderSet) else ""
    part, images = os.path.split(folder)
    if not os.path.exists(os.path.join(part, "val_annotations.txt")):
        return f"{way} (valprep.sh of imagenetloader.torch does it for ILSVRC2012)"
    # tiny-imagenet: a line is an image's file, its class, and a box.
    command = (
        f"cd {shlex.quote(part)} && while read -r image class box; do "
        f'mkdir -p "$class" && mv {shlex.quote(images)}/"$image" "$class"; '
        f"done < val_annotations.txt && rmdir {shlex.quote(images)}"
    )
    return f"{way}, as val_annotations.txt says: {command}"


def describe_lacking(lacking, part, others, other_part):
    """A sentence on the classes that one part has and the other, of classes `others`, lacks."""
    first = str(lacking[0])
    twin = next((other for other in others if first_lookalikes([first, str(other)])), None)
    if twin is None:
        which = f"class {printable(first)}"
    else:
        which = f"class {ascii(first)} (beside {ascii(twin)}, which prints alike)"
    more = f" and {len(lacking) - 1} more are" if len(lacking) > 1 else " is"
    return (
        f"{which}{more} among the {part} images and not among the {other_part} images; each "
        "class needs images in both parts"
    )


# ------------------------------------------------------------------------------- refusals


def refuse_settings(part, name, split, limit, classes, cache, on_error, check_files):
    """SystemExit where settings of `load` make no sense, with its names for them."""
    if name not in NAMES:
        from engine.config import did_you_mean

        raise SystemExit(
            f"data.name is {name!r}{did_you_mean(name, NAMES)}; there are {', '.join(NAMES)}"
        )
    if split != "train" and not (name == "stl10" and split in ("unlabeled", "train+unlabeled")):
        raise SystemExit(
            f"data.split is {split!r}; stl10 has train, unlabeled and "
            "train+unlabeled, every other set just train"
        )
    if name == "voc2007" and part == "pretrain":
        raise SystemExit(
            "voc2007 has several classes an image: it is for linear.data with "
            "linear.classifier svm; to pre-train on its images take data.name=folder"
        )
    if limit is not None and limit < 1:
        raise SystemExit(f"data.limit is {limit}; it must be above 0, or null for all images")
    if classes is not None and name != "shapes":
        raise SystemExit(
            f"data.classes is {classes}, but {name} has the classes that it has; leave it out, or "
            "set data.name=shapes"
        )
    if classes is not None and not 2 <= classes <= shapes.MOST_CLASSES:
        raise SystemExit(
            f"data.classes is {classes}; shapes has 2 to {shapes.MOST_CLASSES} classes, or null "
            f"for its {len(shapes.FORMS)}"
        )
    if cache is not None and cache < 8:
        raise SystemExit(
            f"data.cache is {cache}; it must be at least 8 pixels, or null for no cache"
        )
    if check_files and on_error == "skip":
        raise SystemExit(
            "data.check_files stops at the first image file that cannot be read, and "
            "data.on_error=skip goes on without it; leave one of the two out"
        )


def refuse_statistics(part, mean, std):
    """SystemExit where data.mean or data.std is no normalisation of three channels."""
    for key, values in (("mean", mean), ("std", std)):
        if values == "auto" and part == "test":
            raise SystemExit(
                f"data.{key} is auto, which is measured on training images, and these are test "
                "images; load the training part first (see replace_auto)"
            )
        if values in (None, "auto"):
            continue
        if len(values) != 3 or key == "std" and min(values) <= 0:
            above = ", each above 0" if key == "std" else ""
            raise SystemExit(
                f"data.{key} is {values}; it must be three numbers{above}, one for each of red, "
                "green and blue, or auto, or null for the set's own"
            )


# ------------------------------------------------------------------------------- the sets


def whole_part(part, name, root, split, limit, classes):
    """What `load` chooses from: that part of the set `name`, or None where it has none.

    Of shapes, which are balanced as they are drawn, no more than `limit` are drawn; other sets come
    whole.
    """
    if name == "shapes":
        drawn = 10000 if limit is None else min(limit, 10000)
        count, seed = (2400, 1) if part == "test" else (drawn, 0)
        classes = classes or len(shapes.FORMS)
        images, labels = map(torch.from_numpy, shapes.shapes(count, seed=seed, classes=classes))
        return ArraySet(images, labels, shapes.CLASSES[:classes], *STATISTICS[name])
    if name in TORCHVISION:
        return download(name, part, root, split)
    if name == "voc2007":
        return voc2007(part, root)
    if name == "list":
        listing = read_list(root, part)
        return None if listing is None else FolderSet(*listing, *IMAGENET)
    return image_folder(name, part, root)


def balanced_rows(labels, n, limit, seed):
    """Some of n rows: those of a fixed shuffle, from each class in turn if there are labels.

    Args:
        labels: (n,) int64, or None.
        n: how many rows there are.
        limit: how many of them are wanted.
        seed: of the shuffle.

    Returns:
        (limit,) int64, sorted.
    """
    order = np.random.default_rng(seed).permutation(n)
    if labels is not None:
        turn = np.empty(n, int)  # a row's position among those of its class
        for label in np.unique(labels):
            members = order[labels.numpy()[order] == label]
            turn[members] = np.arange(len(members))
        order = order[np.argsort(turn[order], kind="stable")]
    return torch.from_numpy(np.sort(order[:limit]))


def download(name, part, root, split):
    """A set of torchvision's, which downloads it when it is not there. Every process calls it."""
    class_name, train, test = TORCHVISION[name]
    dataset_class = getattr(torchvision.datasets, class_name)
    arguments = test if part == "test" else train
    if name == "stl10" and part == "pretrain":
        arguments = {"split": split}
    fetch = partial(try_to_download, dataset_class, root, arguments)
    problem = distributed.run_on_first(fetch, per_node=False)
    try:
        data = dataset_class(root, **arguments)
    except Exception as error:
        folder = os.path.join(root, getattr(dataset_class, "base_folder", ""))
        why = " ".join((problem or str(error)).split())
        raise SystemExit(
            f"{name} is not at {folder} and could not be downloaded ({why}); put the "
            f"extracted files there, as torchvision.datasets.{class_name} reads them, or "
            f"set {ROOT_KEY} to the folder that holds them"
        ) from error
    statistics = STATISTICS.get(name, IMAGENET)
    if hasattr(data, "data"):
        return to_array_set(data, name, *statistics)
    return to_folder_set(data, name, root, *statistics)


def try_to_download(dataset_class, root, arguments):
    """Download a set of torchvision's if it is not there. -> what went wrong, or None."""
    try:
        dataset_class(root, download=True, **arguments)
    except Exception as error:  # torchvision raises many kinds
        return str(error)


def to_array_set(data, name, mean, std):
    """A data set of torchvision's that holds its images -> an ArraySet."""
    images = torch.as_tensor(data.data)
    labels = data.labels if name == "stl10" else data.targets
    labels = torch.as_tensor(np.asarray(labels)).long()
    if (labels < 0).any():
        labels = None
    if images.dim() == 3:  # grey: MNIST and its like
        images = images[:, None].expand(-1, 3, -1, -1).contiguous()
    elif name != "stl10":
        images = images.permute(0, 3, 1, 2).contiguous()
    return ArraySet(images, labels, data.classes, mean, std)


def to_folder_set(data, name, root, mean, std):
    """A data set of torchvision's that lists image files -> a FolderSet."""
    if hasattr(data, "_samples"):
        files, labels = zip(*data._samples)
    else:
        files = data._image_files if hasattr(data, "_image_files") else data._images
        labels = data._labels
    files = [inside(root, str(file), f"a list of {name}'s files") for file in files]
    classes = getattr(data, "classes", sorted(set(labels)))
    return FolderSet(files, torch.tensor(labels), classes, mean, std)


def voc2007(part, root):
    """Classification on VOC2007, trainval and test, at root/VOCdevkit/VOC2007.

    labels: (n, 20), 1 where a class is there, -1 where not, 0 where only hard to see
    ("difficult"): linear.difficult says what these count as.
    """
    path = os.path.join(root, "VOCdevkit", "VOC2007")
    lists = os.path.join(path, "ImageSets", "Main")
    ending = f"_{'test' if part == 'test' else 'trainval'}.txt"
    try:
        classes, labels = read_voc_lists(lists, ending)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"voc2007: {lists} must hold CLASS_trainval.txt and CLASS_test.txt, as in "
            f"VOCdevkit ({error}); put it there or set {ROOT_KEY}"
        ) from error
    if not classes or any(len(values) != len(classes) for values in labels.values()):
        raise SystemExit(
            f"voc2007: the files CLASS{ending} in {lists} are missing or do not list "
            "the same images"
        )
    paths = [os.path.join(path, "JPEGImages", image + ".jpg") for image in labels]
    files = [inside(path, file, lists) for file in paths]
    return FolderSet(files, torch.tensor(list(labels.values())), classes, *IMAGENET)


def read_voc_lists(folder, ending):
    """The lists of one part. -> the classes, sorted, and {image: [its label in each class]}."""
    classes = sorted(
        file.removesuffix(ending) for file in os.listdir(folder) if file.endswith(ending)
    )
    labels = {}
    for name in classes:
        with open(os.path.join(folder, name + ending)) as f:
            lines = [line.split() for line in f if line.strip()]
        for image, value in lines:
            labels.setdefault(image, []).append(int(value))
    return classes, labels


def inside(folder, file, source):
    """A file that `source` names, if it lies in a folder; SystemExit if not.

    A list that came with data from elsewhere could name any file of this machine. Links in the
    folder are the user's own.
    """
    if not os.path.abspath(file).startswith(os.path.join(os.path.abspath(folder), "")):
        raise SystemExit(
            f"{source} names {file!r}, which lies outside {folder}; remove it from the list"
        )
    return file


def image_folder(name, part, root):
    """A folder of images, or None where there is no such part.

    The parts are ROOT/train and ROOT/val where they exist (or what data/folders.py takes for them),
    else all of it is for training. A part holds a folder for each class; or images alone, which
    have no labels then.
    """
    path = root if name == "folder" else os.path.join(root, "imagenet")
    path = folder_of_part(path, name, part)
    if path is None:
        return None
    only = None
    if name == "imagenet100":  # a selection of imagenet's classes
        with open(os.path.join(os.path.dirname(__file__), "imagenet100.txt")) as f:
            only = f.read().split()
    # A class that has training images alone is no reason not to train: `find_obstacle` tells it.
    empty = "drop" if part == "test" else "refuse"
    return FolderSet(*list_images(path, name, only, empty), *IMAGENET)
