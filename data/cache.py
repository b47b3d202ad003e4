"""Decoded images: with `data.cache: 256` a folder's images are decoded and shrunk once, into one file that every later epoch and run maps into memory.

Beside the folder that holds the images lies <folder>.cache256/, with two files for each set and part, e.g. NAME imagenet100-train:

    NAME-STATE.u8     raw uint8 RGB, (h, w, 3) an image, one after the other. The shorter side is at most 256 pixels; no image is enlarged
    NAME-STATE.npy    (n, 3) int64, a row an image: its first byte, h, w; h and w 0 where, with data.on_error=skip, it could not be read. Written last:
                      where it is, the cache is whole

STATE is a hash of the files' names, sizes and times, so a changed folder has another one and is cached anew; a folder of caches may be deleted at any time.
Nodes that share the folder share the cache; one with a copy of the images of its own builds its own.
ImageNet at 256 takes about 330 GB (1.28 million images of 256 x 340 x 3 bytes), ImageNet-100 a tenth of that.

We differ from the papers, which crop the image as it is: here a crop is the same share of the image at 256. One of 0.2 of a photo of 500 x 375 has as many pixels
as a square of 132, theirs of 194, before both are resized to 224. Images that were not shrunk give the very same views.
"""

import contextlib
import hashlib
import os
import shutil

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import resize
from tqdm import tqdm

from engine import distributed

from .image_files import FolderSet, for_each_file, printable, unreadable
from .loader import default_workers
from .workers import InputLost, in_workers, shortage


class CachedSet(FolderSet):
    """A FolderSet whose images lie decoded in the file `path`. places: (n, 3) int64, the first byte, height and width of each."""

    def __init__(self, files, labels, classes, mean, std, path, places, pixels=None):
        super().__init__(files, labels, classes, mean, std)
        self.path, self.places, self.pixels = path, places, pixels

    def __getstate__(self):  # a map cannot be pickled: a worker that was not forked opens its own
        return {**self.__dict__, "pixels": None}

    def select(self, rows):
        some = super().select(rows)
        places = self.places[np.asarray(rows)]
        return CachedSet(
            some.files,
            some.labels,
            some.classes,
            some.mean,
            some.std,
            self.path,
            places,
            self.pixels,
        )

    def decode(self, i):
        """Image i as PIL's, RGB, at most as large as was asked for."""
        start, h, w = self.places[i].tolist()
        if h == 0:
            raise unreadable(
                self.files[i], ValueError("it could not be when the images were cached")
            )
        return Image.fromarray(self.open()[start : start + 3 * h * w].reshape(h, w, 3))

    def open(self):
        """The map of this process, all images' bytes. It reads nothing, and stays whole when another run replaces the file."""
        if self.pixels is None:
            try:
                self.pixels = np.memmap(self.path, np.uint8, "r")
            except OSError as error:
                raise ValueError(
                    f"{self.path} cannot be read ({error.strerror}): another run found the images changed and cached them anew; start this one again"
                )
        return self.pixels


def cached(dataset, name, size, skip=False):
    """A FolderSet -> the same set as a CachedSet, built if it is not there. Every process calls it;
    one of each node looks at the files.

    name: of the set and its part, for the files. size: pixels, at most, of the shorter side.
    skip: an image that cannot be read has no place; else SystemExit names it. SystemExit also says
    where the place cannot be written or is too small.
    """
    folder = os.path.abspath(os.fsdecode(dataset.files.common_folder()))
    place = f"{folder}.cache{size}"

    def find_base():
        return os.path.join(place, f"{name}-{state(dataset.files, skip)}")

    def build_if_missing():
        if read(base) is None:
            build(dataset, name, base, size, skip)

    base = distributed.run_on_first(find_base, per_node=True)
    # Where nodes share the folder, the second round finds what process 0 has built in the first;
    # a node with a copy of the images of its own builds a cache of its own. The nodes do not build
    # at once, for not every network disk has locks.
    distributed.run_on_first(build_if_missing, per_node=False)
    distributed.run_on_first(build_if_missing, per_node=True)
    places = read(base)
    if places is None:
        raise SystemExit(f"{base}.npy was written a moment ago and cannot be read now; start again")
    data = CachedSet(
        dataset.files,
        dataset.labels,
        dataset.classes,
        dataset.mean,
        dataset.std,
        base + ".u8",
        places,
    )
    if not skip and not places[:, 1].all():  # a run with skip built it
        file = data.files[int(places[:, 1].argmin())]
        why = ValueError("it could not be when the images were cached")
        raise SystemExit(str(unreadable(file, why)))
    data.open()  # before workers are forked, which then share it
    return data


def state(files, skip):
    """A hash of the files' names below the folder that holds them all, their sizes and times."""
    h = hashlib.sha256()
    names = files.names_below().split(b"\0")
    for name, (file, found) in zip(names, for_each_file(size_and_time, files)):
        if isinstance(found, tuple):
            h.update(b"%s %d %d\n" % (name, *found))
        elif skip:
            h.update(b"%s\n" % name)
        else:
            raise SystemExit(str(unreadable(file, ValueError(found))))
    return h.hexdigest()[:16]


def size_and_time(file):
    """(bytes, nanoseconds) of a file, or in words why they are not known."""
    try:
        status = os.stat(file)
        return status.st_size, status.st_mtime_ns
    except OSError as error:
        return error.strerror


def read(base):
    """The index (n, 3) of a whole cache, or None."""
    try:
        places = np.load(base + ".npy")
        return (
            places
            if os.path.getsize(base + ".u8") == places[-1, 0] + 3 * places[-1, 1] * places[-1, 2]
            else None
        )
    except (
        OSError,
        EOFError,
        ValueError,
    ):  # not there; or half a file, which a copy that was stopped leaves
        return None


def build(dataset, name, base, size, skip):
    """Write the cache, aside first, the index last. -> (n, 3), its index."""
    place = os.path.dirname(base)
    aside = os.path.join(
        place, name + ".part"
    )  # always the same: what a killed build left is written over
    try:
        os.makedirs(place, exist_ok=True)
        with open(os.path.join(place, name + ".lock"), "w") as lock:
            alone(lock, place)
            places = read(base)  # another run may just have written it
            if places is not None:
                return places
            old = sorted(
                f for f in os.listdir(place) if f.startswith(name + "-")
            )  # .npy before .u8
            for stale in old:
                os.remove(os.path.join(place, stale))
            why = "the images have changed, or their cache is not whole; " if old else ""
            print(
                f"{place}: {why}caching {len(dataset)} images {'anew' if old else 'once'}",
                flush=True,
            )
            try:
                places = write(dataset, size, aside, skip)
                os.replace(aside, base + ".u8")
                with open(aside, "wb") as f:
                    np.save(f, places)
                os.replace(aside, base + ".npy")
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(aside)
            return places
    except OSError as error:
        raise SystemExit(
            f"data.cache is {size}, but {place} cannot be written ({error.strerror or error}); change that, take a data.root of your own with "
            "links to the folders of images, or leave data.cache out"
        )


def alone(lock, place):
    """Until `lock`, an open file, is closed, no other run builds here; it waits. The system frees the lock of a process that was killed."""
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{place}: another run is writing it; waiting", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (ImportError, OSError):  # Windows, some network file systems: do without
        pass


def write(dataset, size, path, skip):
    """All images, decoded by workers, into one file. -> (n, 3)"""
    n, shapes, done, written = len(dataset), [], 0, 0
    jobs = [rows.tolist() for rows in torch.arange(n).split(8)]
    workers = min(default_workers(), len(jobs))
    parts = in_workers(Shrunk(dataset, size, skip), jobs, workers, setting=None)
    bar = tqdm(total=n, desc="caching", unit=" images", leave=False, disable=None)
    with open(path, "wb") as f, bar, contextlib.closing(parts):
        for pixels, shape in parts:
            shapes.append(shape)
            done += len(shape)
            # As far as these images tell, surer and surer.
            need = (written + len(pixels)) * n / done
            free = shutil.disk_usage(path).free
            if done >= min(n, 128) and need - written > 1.25 * free:
                raise SystemExit(
                    f"data.cache is {size}: the {n} images take about {need / 1e9:.3g} GB in "
                    f"{os.path.dirname(path)}, {(free + written) / 1e9:.3g} GB are free there; "
                    "make room, lower data.cache or leave it out"
                )
            f.write(pixels.numpy())
            written += len(pixels)
            bar.update(len(shape))
        f.flush()
        # On the disk before the index says so.
        os.fsync(f.fileno())
    if not written:
        raise SystemExit(
            f"data.cache is {size}, but none of the {n} images can be read; "
            f"the first is {printable(dataset.files[0])}"
        )
    h, w = torch.cat(shapes).numpy().T  # (n,), (n,)
    return np.stack([np.cumsum(3 * h * w) - 3 * h * w, h, w], 1)


class Shrunk:
    """What a worker does for the images `rows`, a list.

    -> their bytes one after the other, and (b, 2) heights and widths.
    """

    def __init__(self, dataset, size, skip):
        self.dataset, self.size, self.skip = dataset, size, skip

    def __call__(self, rows):
        images = [self.decode(row) for row in rows]
        shapes = torch.tensor([image.shape[:2] for image in images])
        return torch.from_numpy(np.concatenate([image.ravel() for image in images])), shapes

    def decode(self, row):
        """(h, w, 3) uint8, no larger than asked for.

        h and w are 0 where the image cannot be read and may be skipped.
        """
        try:
            image = self.dataset.decode(row)
        except ValueError as error:
            # The image may be whole where something else is short.
            if shortage(error):
                raise
            if not self.skip:
                raise InputLost(str(error))
            return np.empty((0, 0, 3), np.uint8)
        if min(image.size) > self.size:
            # PIL's bilinear, which antialiases.
            image = resize(image, self.size)
        return np.array(image)
