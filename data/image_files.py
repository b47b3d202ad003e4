"""Images that lie in files, each read when it is wanted; and what is said of those that cannot be.

PIL reads them as torchvision's ImageFolder does: of an animation the first frame, transparency
dropped, as stored, whatever EXIF says of its rotation.
"""
import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image

from engine import distributed

from .paths import Paths
from .workers import shortage

# PIL knows these by their first bytes, whatever the name; for others, such as EPS, it starts
# programs.
FORMATS = "JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP"
THREADS = 16                                               # files that are looked at side by side


class FolderSet:
    """n images in files.

    files: their paths, a list of str or Paths; it is kept as Paths.
    labels: (n,) int64, or None where not every image has one.
    classes: the names of the classes, or None.
    mean, std: of each channel, of the training images in [0, 1].
    skip: see `instead`.
    """

    skip = False

    def __init__(self, files, labels, classes, mean, std):
        self.files = files if isinstance(files, Paths) else Paths.of(files)
        self.labels, self.classes, self.mean, self.std = labels, classes, mean, std

    def __len__(self):
        return len(self.files)

    def select(self, rows):
        labels = None if self.labels is None else self.labels[rows]
        return FolderSet(self.files.select(rows), labels, self.classes, self.mean, self.std)

    def to(self, device):
        return self

    def decode(self, i):
        """Image i as PIL's, RGB. ValueError names a file that is no image.

        Other than in ImageFolder, 16 bits become 8 by their upper half (PIL's convert makes all
        above 255 white), and 32 bits a pixel, whose range nobody knows, are refused. PIL refuses
        above 179 million pixels (0.7 GB).
        """
        file = self.files[i]
        try:
            problem = problem_of(file)                     # a pipe would be waited for
            if problem:
                raise ValueError(problem)
            with Image.open(file, formats=FORMATS) as image:
                return to_rgb(image)
        except Exception as error:                         # PIL raises many kinds
            if shortage(error):                            # the image may be whole
                raise
            raise unreadable(file, error)

    def instead(self, i, broken):
        """Image i; or with `skip`, where it cannot be read, the next one that can, and broken[i]
        says why. It depends on i alone: a row of a bank stays one image's."""
        for ahead in range(min(len(self), 100)):           # more in a row: the disk is gone
            try:
                return self.decode((i + ahead) % len(self))
            except ValueError as error:
                if not self.skip:
                    raise
                broken.setdefault(i, str(error))
        raise ValueError(f"{broken.pop(i)}, and so it is with the {ahead} images after it, "
                         "which is too much for data.on_error=skip")

    def fingerprint(self):
        """A hash of the images' names below the folder that holds them all, in order: which row
        is which image. No file is read."""
        return hashlib.sha256(self.files.names_below()).hexdigest()[:16]


def to_rgb(image):
    """An image of PIL's, of any mode -> of mode RGB, 8 bits a channel."""
    if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
        raise ValueError("it has 32 bits a pixel; store it with 8 or 16")
    if image.mode.startswith("I"):                         # I;16, I;16B; or I, PIL's for 16-bit PGM
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")                      # straight to RGB is the same, and warns
    return image.convert("RGB")


def printable(path):
    """A path in a sentence: as it is, if it is one line of text."""
    return path if path.isprintable() else repr(path)      # not UTF-8; a line feed


def unreadable(file, error):
    """The ValueError that names an image file and says, by `error`, why it cannot be read."""
    why = getattr(error, "strerror", None) or str(error).replace(f" {file!r}", "")
    return ValueError(f"{printable(file)} cannot be read as an image "
                      f"({why or type(error).__name__}); remove or replace it")


def check(files):
    """Look at the status of every file, not at its contents. Every process calls it; one of each
    node looks. SystemExit names the first that is missing, empty, or may not be read."""

    def problem_or_permission(file):
        problem = problem_of(file)
        return problem or (None if os.access(file, os.R_OK) else "Permission denied")

    def look():
        for file, problem in for_each_file(problem_or_permission, files):
            if problem:
                raise SystemExit(str(unreadable(file, ValueError(problem))))

    distributed.run_on_first(look, per_node=True)


def problem_of(file):
    """What the status of a file says against it, or None."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return "it is not there"
    except OSError as error:
        return error.strerror
    if not stat.S_ISREG(status.st_mode):
        return "it is not a file"
    return "it is empty" if status.st_size == 0 else None


def for_each_file(look, files):
    """Yield (file, look(file)) of every file, in order.

    Threads overlap the round trips of a network disk: with half a millisecond each, 16 threads
    took a fourteenth of the time of one, and on a local disk no more.
    """
    def look_at_some(some):
        return [(file, look(file)) for file in some]

    files = iter(files)
    parts = iter(lambda: list(islice(files, 500)), [])
    pool = ThreadPoolExecutor(THREADS)
    try:
        for part in pool.map(look_at_some, parts):
            yield from part
    finally:                                               # the one who asked may have seen enough
        pool.shutdown(cancel_futures=True)
