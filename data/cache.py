"""Decoded images, kept on the disk for all later epochs and runs.

With `data.cache: 256` a folder's images are decoded and shrunk once, into one file that is mapped
into memory. Beside the folder lies FOLDER.cache256/ (beside a list of images, LIST.csv.cache256/),
with two files for each set and part, of which NAME is for example imagenet100-train:

    NAME-STATE.u8     raw uint8 RGB, (h, w, 3) an image, one after the other. The shorter side is
                      at most 256 pixels; no image is enlarged.
    NAME-STATE.npy    (n, 3) int64, a row an image: its first byte, h and w. h and w are 0 where,
                      with data.on_error=skip, it could not be read. Where this file is, the cache
                      is whole.

STATE is a hash of the files' names, sizes and times, so that a changed folder is cached anew; the
old cache is removed when the new one is whole. While a cache is made its index is called
NAME-STATE.part, and what a build that was killed had finished is gone on from. A folder of caches
may be deleted at any time. Nodes that share the folder share the cache; one with a copy of the
images of its own builds its own. ImageNet at 256 takes about 330 GB (1.28 million images of
256 x 340 x 3 bytes), ImageNet-100 a tenth of that.

We differ from the papers, which crop the image as it is: here a crop is the same share of the image
at 256. One of 0.2 of a photo of 500 x 375 has as many pixels as a square of 132, theirs of 194,
before both are resized to 224. Images that were not shrunk give the very same views. Where
photographs have four times the wanted size or more, the JPEG decoder leaves out details that the
shrinking would remove (see image_files.read_shrunk), and STATE is another one.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import time
from functools import partial

import numpy as np
import torch
from PIL import Image

from engine import distributed
from engine.progress import progress

from .image_files import (
    FolderSet,
    evenly_spaced,
    for_each_file,
    is_reducible,
    open_image,
    printable,
    read_shrunk,
    shrunk_size,
    unreadable,
)
from .loader import default_workers
from .workers import in_workers, shortage

IMAGES_A_JOB = 8  # of a worker
SAMPLED_FILES = 64  # whose sizes are looked at before a build
RECORD_SECONDS = 5  # of work that a kill loses at most
SPACE_MARGIN = 1.1  # the space that is needed is estimated
UNFINISHED = -1  # in the rows of an index in the making
DISK_FULL = errno.ENOSPC, errno.EDQUOT


class BuildRefused(SystemExit):
    """A cache cannot be made as things are, and what was made of it is of no use."""


class CachedSet(FolderSet):
    """A FolderSet whose images lie decoded in a file.

    Args:
        dataset: the FolderSet.
        path: the file.
        index: (n, 3) int64, the first byte, height and width of each image.
        pixels: (bytes,) uint8, the file mapped into memory; None opens it when it is wanted.
    """

    def __init__(self, dataset, path, index, pixels=None):
        super().__init__(dataset.files, dataset.labels, dataset.classes, dataset.mean, dataset.std)
        self.path, self.index, self.pixels = path, index, pixels

    def __getstate__(self):
        # A map cannot be pickled: a worker that was not forked opens its own.
        return {**self.__dict__, "pixels": None}

    def select(self, rows):
        """The images `rows` (m,), in that order, as a CachedSet."""
        index = self.index[np.asarray(rows)]
        return CachedSet(super().select(rows), self.path, index, self.pixels)

    def decode(self, i):
        """Image i as PIL's, RGB, at most as large as was asked for."""
        start, height, width = self.index[i].tolist()
        if height == 0:
            raise unreadable_when_cached(self.files[i])
        pixels = self.open()[start : start + 3 * height * width]
        return Image.fromarray(pixels.reshape(height, width, 3))

    def open(self):
        """All images' bytes, mapped into this process.

        It reads nothing, and stays whole when another run replaces the file.
        """
        if self.pixels is None:
            try:
                self.pixels = np.memmap(self.path, np.uint8, "r")
            except OSError as error:
                raise ValueError(
                    f"{self.path} cannot be read ({error.strerror}): another run found the images "
                    "changed and cached them anew; start this one again"
                ) from error
        return self.pixels


def unreadable_when_cached(file):
    """The ValueError for an image that was skipped by the run that made the cache."""
    return unreadable(file, ValueError("it could not be when the images were cached"))


def cached(dataset, name, size, skip=False, list_file=None):
    """A FolderSet -> the same set as a CachedSet, which is built if it is not there.

    Every process calls it; one of each node looks at the files.

    Args:
        dataset: the FolderSet, all of a part.
        name: of the set and its part, for the files.
        size: of the shorter side, in pixels, at most.
        skip: an image that cannot be read has no pixels; else SystemExit names it.
        list_file: the path of the list that names the images; None where they lie in a folder.

    Raises:
        SystemExit: also where the folder cannot be written, or its disk is too small.
    """
    find = partial(find_base, dataset.files, name, size, skip, list_file)
    base, reduce = distributed.run_on_first(find, per_node=True)
    build = partial(build_if_missing, dataset, name, base, size, skip, reduce)
    # Where nodes share the folder, the second round finds what process 0 has built in the first;
    # a node with a copy of the images of its own builds a cache of its own. The nodes do not build
    # at once, for not every network disk has locks.
    distributed.run_on_first(build, per_node=False)
    distributed.run_on_first(build, per_node=True)
    index = read_index(base)
    if index is None:
        raise SystemExit(f"{base}.npy was written a moment ago and cannot be read now; start again")
    if not skip and not index[:, 1].all():  # a run with skip built it
        file = dataset.files[int(index[:, 1].argmin())]
        raise SystemExit(str(unreadable_when_cached(file)))
    data = CachedSet(dataset, base + ".u8", index)
    data.open()  # before workers are forked, which then share it
    return data


# ------------------------------------------------------------------------------- which cache


def find_base(files, name, size, skip, list_file):
    """Which cache there is, or is to be made.

    Returns:
        The path of its files, less their endings; and whether the JPEG decoder may reduce
        photographs in the making of it.
    """
    state = hash_files(files, skip)
    # Earlier versions took the innermost folder that holds all images. Where that is the only class
    # folder of its part, the cache lies within the part.
    folders = [os.fsdecode(folder) for folder in (files.folder, files.common_folder())]
    if list_file:  # whose images may lie anywhere
        folders = [list_file]
    bases = [f"{os.path.abspath(folder)}.cache{size}/{name}-{state}" for folder in folders]
    for base in bases:
        if read_index(base) is not None:
            return base, False
    if not any(is_reducible(image, size) for image in sampled_images(files)):
        return bases[0], False
    state = hashlib.sha256(f"{state}, reduced by the JPEG decoder".encode()).hexdigest()[:16]
    return f"{os.path.dirname(bases[0])}/{name}-{state}", True


def hash_files(files, skip):
    """A hash of the files' names below the folder that holds them all, their sizes and times."""
    digest = hashlib.sha256()
    names = files.names_below().split(b"\0")
    # The first process of each node comes here.
    statuses = progress(
        for_each_file(size_and_time, files),
        "data.cache: looking for changed image files",
        total=len(files),
        is_shown=True,
    )
    for name, (file, status) in zip(names, statuses):
        if isinstance(status, tuple):
            digest.update(b"%s %d %d\n" % (name, *status))
        elif skip:
            digest.update(b"%s\n" % name)
        else:
            raise SystemExit(str(unreadable(file, ValueError(status))))
    return digest.hexdigest()[:16]


def size_and_time(file):
    """(bytes, nanoseconds) of a file, or in words why they are not known."""
    try:
        status = os.stat(file)
        return status.st_size, status.st_mtime_ns
    except OSError as error:
        return error.strerror


def sampled_images(files):
    """Yield some of the files, evenly spaced, as PIL's images, whose pixels are not read."""
    for row in evenly_spaced(len(files), SAMPLED_FILES):
        with contextlib.suppress(Exception), open_image(files[row]) as image:
            yield image  # of one that cannot be read the build says so


def read_index(base):
    """The index (n, 3) of a whole cache, or None."""
    try:
        index = np.load(base + ".npy")
        is_whole = os.path.getsize(base + ".u8") == end_of(index[-1])
    # It is not there; or half of it, as a copy that was stopped leaves it.
    except (OSError, EOFError, ValueError):
        return None
    return index if is_whole else None


def end_of(row):
    """The first byte after an image, from its row in an index."""
    start, height, width = row.tolist()
    return start + 3 * height * width


# ------------------------------------------------------------------------------- the build


def build_if_missing(dataset, name, base, size, skip, reduce):
    """Build the cache `base`, unless it is there or another run builds it meanwhile."""
    if read_index(base) is not None:
        return
    folder = os.path.dirname(base)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, name + ".lock"), "w") as lock:
            wait_for_lock(lock, folder)
            if read_index(base) is None:
                build(dataset, name, base, Shrunk(dataset, size, skip, reduce))
    except OSError as error:
        raise SystemExit(
            f"data.cache is {size}, but {folder} cannot be written ({error.strerror or error}); "
            "change that, take a data.root of your own with links to the folders of images, or "
            "leave data.cache out"
        ) from error


def wait_for_lock(lock, folder):
    """Until `lock`, an open file, is closed, no other run builds in the folder.

    The system frees the lock of a process that was killed.
    """
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: another run is writing it; waiting", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (ImportError, OSError):  # Windows, some network file systems: do without
        pass


def build(dataset, name, base, shrink):
    """Make the cache `base`, or go on with what there is of it; then remove the old ones.

    Args:
        dataset: the FolderSet.
        name: what the files of this set and part begin with.
        base: the path of the cache, less the endings of its two files.
        shrink: the Shrunk that the workers are to run.
    """
    folder = os.path.dirname(base)
    others = [path for path in list_caches(folder, name) if not path.startswith(base + ".")]
    # Of what was half made of other images nothing can be used.
    unfinished = {os.path.splitext(path)[0] for path in others if path.endswith(".part")}
    outdated = []
    for path in others:
        if os.path.splitext(path)[0] in unfinished:
            os.remove(path)
        else:
            outdated.append(path)
    has_own = os.path.exists(base + ".u8") or os.path.exists(base + ".npy")
    cache = UnfinishedCache(base, len(dataset), shrink.skip)
    say_what_is_built(folder, cache, is_first=not (outdated or has_own))
    try:
        write(dataset, cache, shrink, outdated)
    except BuildRefused:
        cache.remove()
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        cache.remove()
        raise SystemExit(
            f"data.cache is {shrink.size}: the disk of {folder} was full after {cache.done} of "
            f"{len(dataset)} images, and what was made of the cache is removed; make room, lower "
            f"data.cache or leave it out{or_remove(outdated)}"
        ) from error
    finally:
        cache.close()
    cache.finish()
    for path in outdated:
        with contextlib.suppress(OSError):  # Windows keeps what a run has mapped
            os.remove(path)


def list_caches(folder, name):
    """The files of all caches of one set and part, .npy before .u8."""
    names = sorted(os.listdir(folder))
    ours = [file for file in names if file.startswith(name + "-") or file == name + ".part"]
    return [os.path.join(folder, file) for file in ours]


def say_what_is_built(folder, cache, is_first):
    """Print what begins now."""
    n = len(cache.index)
    if cache.done:
        print(f"{folder}: caching {n} images, going on after {cache.done}", flush=True)
    elif is_first:
        print(f"{folder}: caching {n} images once", flush=True)
    else:
        why = "the images have changed, or their cache is not whole"
        print(f"{folder}: {why}; caching {n} images anew", flush=True)


def or_remove(outdated):
    """The way out that a disk has which holds a cache of the images as they were."""
    if not outdated:
        return ""
    size = sum(map(os.path.getsize, outdated))
    return (
        f"; or remove {' and '.join(map(printable, outdated))}, {size / 1e9:.3g} GB, which are of "
        "the images before they changed"
    )


def write(dataset, cache, shrink, outdated):
    """Let workers decode all images that an UnfinishedCache does not have yet, and append them.

    BuildRefused says where the disk is too small for all, where an image cannot be read and may not
    be skipped, and where none can be read.
    """
    n = len(dataset)
    rows = torch.arange(cache.done, n)
    jobs = [part.tolist() for part in rows.split(IMAGES_A_JOB)] if len(rows) else []
    workers = min(default_workers(), len(jobs))
    refuse_small_disk(cache, shrink.size, estimate_bytes(dataset.files, shrink.size), outdated)
    parts = in_workers(shrink, jobs, workers, setting=None)
    # The first process of each node comes here.
    bar = progress(description="caching", total=n, initial=cache.done, unit="images", is_shown=True)
    with bar, contextlib.closing(parts):
        for pixels, shapes, problem in parts:
            if problem:
                raise BuildRefused(problem)
            cache.append(pixels, shapes)
            bar.update(len(shapes))
            if cache.record_is_due():
                cache.record()
                need = cache.written / cache.done * n
                refuse_small_disk(cache, shrink.size, need, outdated)
    if not cache.written:
        raise BuildRefused(
            f"data.cache is {shrink.size}, but none of the {n} images can be read; "
            f"the first is {printable(dataset.files[0])}"
        )
    cache.record()


def estimate_bytes(files, size):
    """How many bytes all images take, by the sizes of some; 0 where none can be read."""
    areas = []
    for image in sampled_images(files):
        width, height = shrunk_size(image.size, size)
        areas.append(width * height)
    return 3 * len(files) * sum(areas) / max(1, len(areas))


def refuse_small_disk(cache, size, need, outdated):
    """BuildRefused where `need` bytes for all images are more than there will be."""
    free = shutil.disk_usage(cache.pixels_path).free
    if need - cache.written <= SPACE_MARGIN * free:
        return
    removed = f", those of {cache.done} images that were made and are removed counted in"
    raise BuildRefused(
        f"data.cache is {size}: the {len(cache.index)} images take about {need / 1e9:.3g} GB in "
        f"{os.path.dirname(cache.pixels_path)}, {(free + cache.written) / 1e9:.3g} GB are free "
        f"there{removed if cache.done else ''}; make room, lower data.cache or leave it out"
        f"{or_remove(outdated)}"
    )


class UnfinishedCache:
    """A cache in the making: BASE.u8, which grows, and BASE.part, which becomes BASE.npy.

    BASE.part has its full size from the start, so that the end of a build needs no space on the
    disk. Its rows are filled in when the pixels of their images are on the disk: what they say is
    true whenever the machine is switched off.

    Args:
        base: the path, less the endings.
        n: how many images there are.
        skip: whether images that cannot be read are left out.

    Attributes:
        index: (n, 3) int64; the rows of images that are not finished hold UNFINISHED.
        done: how many images are finished.
        written: how many bytes they take.
    """

    def __init__(self, base, n, skip):
        self.base = base
        self.pixels_path, self.index_path = base + ".u8", base + ".part"
        self.files = contextlib.ExitStack()  # that are open
        self.index = self.read_unfinished(n, skip)
        if self.index is None:
            self.index = np.full((n, 3), UNFINISHED, np.int64)
            self.begin()
        self.done = count_finished(self.index)
        self.written = end_of(self.index[self.done - 1]) if self.done else 0
        # `close` and `remove` close them.
        self.pixels_file = self.files.enter_context(open(self.pixels_path, "r+b"))  # noqa: SIM115
        self.index_file = self.files.enter_context(open(self.index_path, "r+b"))  # noqa: SIM115
        # Pixels that were written after the last row was filled in.
        self.pixels_file.truncate(self.written)
        self.pixels_file.seek(self.written)
        self.fill_in(self.done, n)

    def read_unfinished(self, n, skip):
        """The index that a build which was killed has left, or None."""
        try:
            index = np.load(self.index_path)
            size = os.path.getsize(self.pixels_path)
        except (OSError, EOFError, ValueError):
            return None
        if index.shape != (n, 3) or index.dtype != np.int64:
            return None
        done = count_finished(index)
        if done and size < end_of(index[done - 1]):
            return None
        if not skip and not index[:done, 1].all():  # a build with skip began it
            done = int(index[:done, 1].argmin())
        index[done:] = UNFINISHED
        return index

    def begin(self):
        """Make both files anew. A run that has mapped the old pixels keeps them."""
        for ending in (".npy", ".u8", ".part"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.base + ending)
        try:
            with open(self.pixels_path, "wb"), open(self.index_path, "wb") as f:
                np.save(f, self.index)
                sync(f)
        except OSError:  # the disk is full already
            self.remove()
            raise

    def append(self, pixels, shapes):
        """Add images: their bytes (uint8), one after the other, and heights and widths (b, 2)."""
        heights, widths = shapes.numpy().T  # (b,), (b,)
        sizes = 3 * heights * widths
        starts = self.written + np.cumsum(sizes) - sizes
        self.pixels_file.write(pixels.numpy())
        stop = self.done + len(shapes)
        self.index[self.done : stop] = np.stack([starts, heights, widths], 1)
        self.done, self.written = stop, self.written + len(pixels)

    def record_is_due(self):
        """Would a kill lose work of more than RECORD_SECONDS?"""
        return time.monotonic() - self.recorded_at >= RECORD_SECONDS

    def record(self):
        """Fill in the rows of the images that were appended, once their pixels are on the disk."""
        sync(self.pixels_file)
        self.fill_in(self.recorded, self.done)

    def fill_in(self, first, stop):
        """Bring the rows first, ..., stop - 1 of the index onto the disk."""
        # The rows are the end of the file.
        self.index_file.seek(-self.index[first:].nbytes, os.SEEK_END)
        self.index_file.write(self.index[first:stop].tobytes())
        sync(self.index_file)
        self.recorded, self.recorded_at = self.done, time.monotonic()

    def close(self):
        """Keep what is finished, whatever ended the build; nothing if it was removed."""
        if not self.pixels_file.closed and self.recorded < self.done:
            self.record()
        self.files.close()

    def finish(self):
        """All images are there: from now on it is a cache."""
        os.replace(self.index_path, self.base + ".npy")

    def remove(self):
        """Leave nothing of it on the disk."""
        with contextlib.suppress(OSError):  # what is still to be written needs space, too
            self.files.close()
        for path in (self.index_path, self.pixels_path):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def count_finished(index):
    """How many rows of an index (n, 3) stand before the first that is not filled in."""
    unfinished = (index < 0).any(1)  # (n,)
    return int(unfinished.argmax()) if unfinished.any() else len(index)


def sync(file):
    """Bring what was written to an open file onto the disk."""
    file.flush()
    os.fsync(file.fileno())


class Shrunk:
    """What a worker does for the images `rows`, a list.

    Args:
        dataset: a FolderSet.
        size: of the shorter side, in pixels, at most.
        skip: an image that cannot be read has height and width 0.
        reduce: see image_files.read_shrunk.
    """

    def __init__(self, dataset, size, skip, reduce):
        self.dataset, self.size = dataset, size
        self.skip, self.reduce = skip, reduce

    def __call__(self, rows):
        """The images' bytes one after the other, heights and widths (b, 2), and None.

        Or (None, None, what is wrong with the first that cannot be read), where none is skipped.
        """
        try:
            images = [self.decode(row) for row in rows]
        except ValueError as error:
            if shortage(error):  # the image may be whole
                raise
            return None, None, str(error)
        shapes = torch.tensor([image.shape[:2] for image in images])
        pixels = np.concatenate([image.ravel() for image in images])
        return torch.from_numpy(pixels), shapes, None

    def decode(self, row):
        """(h, w, 3) uint8, no larger than asked for."""
        try:
            file = self.dataset.files[row]
            return np.array(read_shrunk(file, self.size, self.reduce))
        except ValueError as error:
            if shortage(error) or not self.skip:
                raise
            return np.empty((0, 0, 3), np.uint8)
