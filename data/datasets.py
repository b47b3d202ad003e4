"""Data sets: index -> image. Arrays live in memory as uint8; JPEG folders are read by workers (data/loader.py), or decoded once
for all runs (data/cache.py).

    load("pretrain", name="cifar10")    what the encoder is pre-trained on (labels, where there are any, for reporting only)
    load("train", ...)                  the labelled training images: kNN's bank, the probe's training set
    load("test", ...)                   None where a folder has no validation part
"""
import hashlib
import os
import stat
from typing import Literal

import numpy as np
import torch
import torchvision
from torchvision.datasets.folder import IMG_EXTENSIONS

from engine import distributed

from . import shapes

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = {                                             # mean and std a channel, of the training images in [0, 1]
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}
# more that torchvision loads (and downloads), for transfer: name -> (class, arguments of its training and of its test part)
TORCHVISION = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}), "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}), "aircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}), "flowers": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "traffic_signs": ("GTSRB", {"split": "train"}, {"split": "test"}), "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}), "kmnist": ("KMNIST", {"train": True}, {"train": False}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}), "pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
}
FORMATS = "JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP"        # PIL knows them by their first bytes, whatever the name; for others, such as EPS, it starts programs
OTHERS = ".gif", ".jfif", ".jpe", ".heic", ".heif", ".avif", ".jp2", ".jxl"            # images, too, but not of torchvision's IMG_EXTENSIONS: not left out in silence
NAMES = ("shapes", *TORCHVISION, "folder", "imagenet", "imagenet100", "voc2007")


class ArraySet:
    """images: (n, 3, H, W) uint8. labels: (n,) int64, or None where not every image has one."""

    def __init__(self, images, labels, classes, mean, std):
        self.images, self.labels, self.classes, self.mean, self.std = images, labels, classes, mean, std

    def __len__(self):
        return len(self.images)

    def select(self, rows):
        return ArraySet(self.images[rows], None if self.labels is None else self.labels[rows], self.classes, self.mean, self.std)

    def to(self, device):
        """Move the images to a device, if they take less than half of what it has free."""
        if device.type == "cuda" and self.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.images = self.images.to(device)
        return self

    def fingerprint(self):
        """A hash of the number and size of the images and of the pixels of some."""
        some = self.images[::max(1, len(self.images) // 64)].cpu().contiguous()
        return hashlib.sha256(repr(tuple(self.images.shape)).encode() + some.numpy().tobytes()).hexdigest()[:16]

    def decode(self, i):
        """Image i as PIL's."""
        return torchvision.transforms.functional.to_pil_image(self.images[i].cpu())


class FolderSet:
    """files: paths of n images. labels, classes: as ArraySet's. skip: see `instead`."""

    skip = False

    def __init__(self, files, labels, classes, mean, std):
        self.files, self.labels, self.classes, self.mean, self.std = files, labels, classes, mean, std

    def __len__(self):
        return len(self.files)

    def select(self, rows):
        return FolderSet([self.files[i] for i in rows], None if self.labels is None else self.labels[rows], self.classes, self.mean, self.std)

    def to(self, device):
        return self

    def decode(self, i):
        """Image i as PIL's, RGB. ValueError names a file that is no image.

        As torchvision's ImageFolder: of an animation the first frame, transparency dropped, as stored, whatever EXIF says of its rotation. Other than there, 16 bits
        become 8 by their upper half (PIL's convert makes all above 255 white), and 32 bits a pixel, whose range nobody knows, are refused. PIL refuses above 179 million
        pixels (0.7 GB).
        """
        from PIL import Image
        try:
            if not os.path.isfile(self.files[i]):          # a pipe would be waited for
                raise ValueError("it is not there" if not os.path.exists(self.files[i]) else "it is not a file")
            with Image.open(self.files[i], formats=FORMATS) as image:
                if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
                    raise ValueError("it has 32 bits a pixel; store it with 8 or 16")
                if image.mode.startswith("I"):             # I;16, I;16B, or I, as which PIL opens PGM's 16 bits
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
                if image.mode == "P" and "transparency" in image.info:
                    image = image.convert("RGBA")          # straight to RGB is the same, with a warning
                return image.convert("RGB")
        except Exception as error:                         # PIL raises many kinds
            raise unreadable(self.files[i], error)

    def instead(self, i, broken):
        """Image i; or with `skip`, where it cannot be read, the next one that can, and broken[i] says why. It depends on i alone: a row of a bank stays one image's."""
        for ahead in range(min(len(self), 100)):           # more in a row are no broken images: the disk is gone
            try:
                return self.decode((i + ahead) % len(self))
            except ValueError as error:
                if not self.skip:
                    raise
                broken.setdefault(i, str(error))
        raise ValueError(f"{broken.pop(i)}, and so it is with the {ahead} images after it, which is too much for data.on_error=skip")

    def fingerprint(self):
        """A hash of the images' names below the folder that holds them all, in order: which row is which image. No file is read."""
        folder = len(os.path.dirname(os.path.commonprefix(self.files)))
        return hashlib.sha256("\0".join(f[folder:] for f in self.files).encode(errors="surrogateescape")).hexdigest()[:16]


def printable(path):
    """A path in a sentence: as it is, if it is one line of text."""
    return path if path.isprintable() else repr(path)      # bytes that are not UTF-8; a line feed


def unreadable(file, error):
    why = getattr(error, "strerror", None) or str(error).replace(f" {file!r}", "") or type(error).__name__
    return ValueError(f"{printable(file)} cannot be read as an image ({why}); remove or replace it")


def check(files):
    """Every file's status, not its contents: SystemExit names the first that is missing, empty, or may not be read. Of ImageNet it takes 4 seconds on a local disk."""
    with distributed.agreeing():
        for file in files if os.environ.get("LOCAL_RANK", "0") == "0" else ():         # one process of each node
            try:
                s = os.stat(file)
                wrong = "it is not a file" if not stat.S_ISREG(s.st_mode) else "it is empty" if s.st_size == 0 else None if os.access(file, os.R_OK) else "Permission denied"
            except OSError as error:
                wrong = error.strerror
            if wrong:
                raise SystemExit(str(unreadable(file, ValueError(wrong))))


def load(part, seed, *, name: str, root: str = "datasets", split: str = "train", limit: int | None = None, cache: int | None = None,
         on_error: Literal["stop", "skip"] = "stop", mean: list[float] | None = None,
         std: list[float] | None = None):
    """One part of a data set: "pretrain", "train" or "test".

    name: one of NAMES. root: where the data sets lie; for `folder`, the folder itself. split: of stl10, what to pre-train on: train (the
    5,000 labelled images, as the Ring code), unlabeled, train+unlabeled. limit: the first that many training images of a fixed shuffle by
    `seed`, whatever their labels; test sets stay whole. cache: keep folders of images decoded in a file beside them, the shorter
    side at most that many pixels (data/cache.py: crops are then taken from these); null: decode them again in every epoch.
    on_error: an image file that cannot be read stops the run, which names it, before training where a look at its status tells; or skip: pre-training takes
    the next readable image of the folder in its place and says so after each epoch. Labelled parts, which evaluation goes over, always stop.
    mean, std: the normalisation, one number a channel, for images in [0, 1]; null: the set's own
    (STATISTICS; ImageNet's for a set that has none there).
    """
    if name not in NAMES:
        from engine.config import nearest
        raise SystemExit(f"data.name is {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
    if split != "train" and not (name == "stl10" and split in ("unlabeled", "train+unlabeled")):
        raise SystemExit(f"data.split is {split!r}; stl10 has train, unlabeled and train+unlabeled, every other set just train")
    if name == "voc2007" and part == "pretrain":
        raise SystemExit("voc2007 has several classes an image: it is for linear.data with linear.classifier svm; to pre-train on its images take data.name=folder")
    if limit is not None and limit < 1:
        raise SystemExit(f"data.limit is {limit}; it must be above 0, or null for all images")
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != 3 or key == "std" and min(values) <= 0):
            above = ", each above 0" if key == "std" else ""
            raise SystemExit(f"data.{key} is {values}; it must be three numbers{above}, one for "
                             "each of red, green and blue, or null for the set's own")
    if cache is not None and cache < 8:
        raise SystemExit(f"data.cache is {cache}; it must be at least 8 pixels, or null for no cache")
    if name == "shapes":
        n = 10000 if limit is None else min(limit, 10000)                              # balanced as drawn: no need to draw the rest
        images, labels = shapes.shapes(n, seed=0) if part != "test" else shapes.shapes(2400, seed=1)
        dataset = ArraySet(torch.from_numpy(images), torch.from_numpy(labels), shapes.CLASSES, *STATISTICS[name])
    elif name in TORCHVISION:
        dataset = download(name, part, root, split)
    elif name == "voc2007":
        dataset = voc2007(part, root)
    else:
        dataset = folder(name, part, root)
    if dataset is None:
        return None
    if isinstance(dataset, FolderSet) and on_error == "stop":
        check(dataset.files)
    if cache is not None and isinstance(dataset, FolderSet):                           # the whole part, so that every limit shares it
        from .cache import cached
        dataset = cached(dataset, f"{name}-{'test' if part == 'test' else 'train'}", cache, on_error == "skip")
    elif cache is not None and part == "pretrain":         # a probe may well go from a cached set to one in memory: linear.data
        raise SystemExit(f"data.cache is {cache}, but {name} is in memory already, decoded; leave data.cache out")
    if limit is not None and (part == "pretrain" or part == "train" and split == "train"):
        if limit > len(dataset):
            raise SystemExit(f"data.limit is {limit}; {name} has {len(dataset)} images to choose from")
        dataset = dataset.select(balanced(None, len(dataset), limit, seed))            # labels do not say what is trained on
    if isinstance(dataset, FolderSet):
        dataset.skip = on_error == "skip" and part == "pretrain"
    dataset.mean = dataset.mean if mean is None else tuple(mean)
    dataset.std = dataset.std if std is None else tuple(std)
    return dataset


def balanced(labels, n, limit, seed):
    """`limit` of n rows: a fixed shuffle, taken from each class in turn if there are labels. -> (limit,) sorted rows."""
    order = np.random.default_rng(seed).permutation(n)
    if labels is not None:
        turn = np.empty(n, int)                            # a row's place among those of its class, in the shuffled order
        for label in np.unique(labels):
            members = order[labels.numpy()[order] == label]
            turn[members] = np.arange(len(members))
        order = order[np.argsort(turn[order], kind="stable")]
    return torch.from_numpy(np.sort(order[:limit]))


def download(name, part, root, split):
    """A set of torchvision's, which downloads it when it is not there."""
    kind, train, test = TORCHVISION[name]
    make, which = getattr(torchvision.datasets, kind), test if part == "test" else train
    if name == "stl10" and part == "pretrain":
        which = {"split": split}
    error = None
    if distributed.is_main():                              # one process downloads, the others wait
        try:
            make(root, download=True, **which)
        except Exception as e:
            error = e
    distributed.barrier()
    try:
        data = make(root, **which)
    except Exception as e:
        raise SystemExit(f"{name} is not at {os.path.join(root, getattr(make, 'base_folder', ''))} and could not be downloaded ({' '.join(str(error or e).split())}); put the extracted "
                         f"files there, as torchvision.datasets.{kind} reads them, or set the root to the folder that holds them")
    mean, std = STATISTICS.get(name, IMAGENET)
    if hasattr(data, "_image_files") or hasattr(data, "_samples") or hasattr(data, "_images"):       # files
        files, labels = zip(*data._samples) if hasattr(data, "_samples") else (getattr(data, "_image_files", None) or data._images, data._labels)
        return FolderSet([inside(root, str(f), f"a list of {name}'s files") for f in files], torch.tensor(labels), getattr(data, "classes", sorted(set(labels))), mean, std)
    images, labels = torch.as_tensor(data.data), torch.as_tensor(np.asarray(data.labels if name == "stl10" else data.targets)).long()
    if images.dim() == 3:                                  # grey: MNIST and its like
        images = images[:, None].expand(-1, 3, -1, -1).contiguous()
    elif name != "stl10":
        images = images.permute(0, 3, 1, 2).contiguous()
    return ArraySet(images, None if (labels < 0).any() else labels, data.classes, mean, std)


def voc2007(part, root):
    """Classification on VOC2007, trainval and test, at root/VOCdevkit/VOC2007. labels: (n, 20), 1 where a class is there, -1 where not, 0 where
    only hard to see ("difficult"): linear.difficult says what these count as."""
    path = os.path.join(root, "VOCdevkit", "VOC2007")
    lists = os.path.join(path, "ImageSets", "Main")
    which = "test" if part == "test" else "trainval"
    try:
        classes = sorted(f.removesuffix(f"_{which}.txt") for f in os.listdir(lists) if f.endswith(f"_{which}.txt"))
        table = {}
        for c in classes:
            with open(os.path.join(lists, f"{c}_{which}.txt")) as f:
                for image, value in (line.split() for line in f if line.strip()):
                    table.setdefault(image, []).append(int(value))
    except (OSError, ValueError) as error:
        raise SystemExit(f"voc2007: {lists} must hold CLASS_trainval.txt and CLASS_test.txt, as in VOCdevkit ({error}); put it there or set the root")
    if not classes or any(len(v) != len(classes) for v in table.values()):
        raise SystemExit(f"voc2007: the files CLASS_{which}.txt in {lists} are missing or do not list the same images")
    files = [inside(path, os.path.join(path, "JPEGImages", image + ".jpg"), lists) for image in table]
    return FolderSet(files, torch.tensor(list(table.values())), classes, *IMAGENET)


def inside(folder, file, where):
    """file, which `where` names, if it lies in folder: a list that came with data from elsewhere could name any file of this machine. Links there are the user's own."""
    if not os.path.abspath(file).startswith(os.path.join(os.path.abspath(folder), "")):
        raise SystemExit(f"{where} names {file!r}, which lies outside {folder}; remove it from the list")
    return file


def folder(name, part, root):
    """A folder of images: ROOT/train and ROOT/val where they exist, else all of it for training. Inside, a folder a class; or flat, no labels."""
    path, only = root, None
    if name != "folder":                                   # imagenet100 is a selection of imagenet's classes
        path = os.path.join(root, "imagenet")
        if name == "imagenet100":
            with open(os.path.join(os.path.dirname(__file__), "imagenet100.txt")) as f:
                only = f.read().split()
    parts = {p: os.path.join(path, p) for p in ("train", "val", "test") if os.path.isdir(os.path.join(path, p))}
    if not os.path.isdir(path):
        raise SystemExit(f"{name}: there is no folder {path}; " + (
            "set data.root to a folder of images" if name == "folder" else "put train/<class>/*.JPEG and val/<class>/*.JPEG there, or set data.root"))
    if name != "folder" and not {"train", "val"} <= set(parts):
        raise SystemExit(f"{name}: {path} must hold train/<class>/*.JPEG and val/<class>/*.JPEG")
    if part == "test":
        path = parts.get("val", parts.get("test")) if "train" in parts else None
        if path is None:
            return None
    else:
        path = parts.get("train", path)

    def refuse(error):
        raise SystemExit(f"{name}: {printable(error.filename)} cannot be listed ({error.strerror})")

    files, tops, others, folders_there = [], [], [], []    # a file's class is the first folder below path
    above = {path: [os.path.realpath(path)]}               # the folders that hold a folder, itself included, links resolved
    for place, folders, names in os.walk(path, onerror=refuse, followlinks=True):      # as torchvision
        folders.sort()
        top = os.path.relpath(place, path).split(os.sep)[0]
        if only is not None:
            folders[:] = [f for f in folders if top != "." or f in only]
        if top == ".":
            folders_there = list(folders)
        for inner in (os.path.join(place, f) for f in folders):
            above[inner] = [*above[place], os.path.realpath(inner)]
            if above[inner][-1] in above[place]:
                raise SystemExit(f"{name}: {printable(inner)} is a link to {printable(above[inner][-1])}, which holds it, and so on without end; remove the link")
        for file in sorted(names):
            if file.lower().endswith(IMG_EXTENSIONS):
                files.append(os.path.join(place, file))
                tops.append(top)
            elif file.lower().endswith(OTHERS):
                others.append(os.path.join(place, file))
            elif not os.path.exists(os.path.join(place, file)):                        # perhaps to a folder of images
                raise SystemExit(f"{name}: {printable(os.path.join(place, file))} is a link to what is not there; remove or mend it")
    if others:
        distributed.say(f"{name}: {len(others)} files under {path} left out, not named {', '.join(IMG_EXTENSIONS)}; the first: {printable(others[0])}")
    if not files:
        raise SystemExit(f"{name}: no images ({', '.join(IMG_EXTENSIONS)}) under {path}")
    classes = sorted(set(tops))
    if only is not None and len(classes) < len(only):
        missing = sorted(set(only) - set(classes))
        raise SystemExit(f"{name}: {len(missing)} of its {len(only)} classes are not under {path}; the first is {missing[0]}")
    if "." in classes or len(classes) < 2:
        return FolderSet(files, None, None, *IMAGENET)
    empty = sorted(set(folders_there) - set(classes))
    if empty:
        raise SystemExit(f"{name}: {printable(os.path.join(path, empty[0]))} holds no images ({', '.join(IMG_EXTENSIONS)}), and a folder here is a class; "
                         "fill it or remove it")
    return FolderSet(files, torch.tensor([classes.index(t) for t in tops]), classes, *IMAGENET)
