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
THREADS = 16  # files that are looked at side by side
LOOKED_AT = 16  # files in which `say_if_dark` looks
BRIGHT_ENOUGH = 2**14  # below it, 8 bits are below 64


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
        """Image i as PIL's, RGB. ValueError names a file that is no image."""
        return read_rgb(self.files[i])

    def instead(self, i, broken):
        """Image i; or with `skip`, where it cannot be read, the next one that can, and broken[i]
        says why. It depends on i alone: a row of a bank stays one image's.
        """
        for ahead in range(min(len(self), 100)):  # more in a row: the disk is gone
            try:
                return self.decode((i + ahead) % len(self))
            except ValueError as error:
                if not self.skip:
                    raise
                broken.setdefault(i, str(error))
        raise ValueError(
            f"{broken.pop(i)}, and so it is with the {ahead} images after it, "
            "which is too much for data.on_error=skip"
        )

    def fingerprint(self):
        """A hash of the images' names below the folder that holds them all, in order: which row
        is which image. No file is read, and none is asked for its size: a broken one may be
        replaced by a good one of its name, as our sentences advise, and the run goes on.
        """
        return hashlib.sha256(self.files.names_below()).hexdigest()[:16]


def read_rgb(file):
    """The image in a file as PIL's, RGB. ValueError names a file that is no image.

    Other than in ImageFolder, 16 bits become 8 by their upper half (PIL's convert makes all above
    255 white), and 32 bits a pixel, whose range nobody knows, are refused. PIL refuses above 179
    million pixels (0.7 GB).
    """
    try:
        with open_image(file) as image:
            return to_rgb(image)
    except Exception as error:  # PIL raises many kinds
        if shortage(error):  # the image may be whole
            raise
        raise unreadable(file, error)


def open_image(file):
    """A file as PIL's image, whose pixels are not read yet. Many kinds of error."""
    problem = problem_of(file)  # a pipe would be waited for
    if problem:
        raise ValueError(problem)
    return Image.open(file, formats=FORMATS)


def to_rgb(image):
    """An image of PIL's, of any mode -> of mode RGB, 8 bits a channel."""
    if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
        raise ValueError("it has 32 bits a pixel; store it with 8 or 16")
    if image.mode.startswith("I"):  # I;16, I;16B; or I, PIL's for 16-bit PGM
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB is the same, and warns
    return image.convert("RGB")


def say_if_dark(dataset):
    """Say so where files of 16 bits a value use the lower bits alone, as those of microscopes and
    X-ray do: by their upper 8 bits they are nearly black.

    dataset: one with `files`; of others nothing is said. Every process may call it; one of them
    looks, at LOOKED_AT files at most, evenly spaced.
    """
    files = getattr(dataset, "files", ())
    if not files or not distributed.is_main():
        return
    every = -(-len(files) // LOOKED_AT)
    highest = {files[row]: highest_of_16_bits(files[row]) for row in range(0, len(files), every)}
    highest = {file: value for file, value in highest.items() if value is not None}
    file = max(highest, key=highest.get, default=None)
    if file is None or not 0 < highest[file] < BRIGHT_ENOUGH:
        return
    factor = 2 ** (16 - highest[file].bit_length())
    distributed.say(
        f"WARNING: {printable(file)} has 16 bits a value, of which the upper 8 are "
        f"taken, but its highest value is {highest[file]} of 65535, the highest in "
        f"{len(highest)} such images that were looked at: they come out nearly black; "
        f"store them anew, multiplied by {factor}"
    )


def highest_of_16_bits(file):
    """The highest value in an image of 16 bits a value, of 65535; in one of several channels, of
    which PIL gives the upper 8 bits alone, at most that.

    None for any other image, whose pixels are not read, and for one that cannot be read.
    """
    try:
        with open_image(file) as image:
            if image.mode.startswith("I;16") or image.mode == "I" and image.format != "TIFF":
                return int(np.asarray(image).max())
            if image.format in ("PNG", "TIFF") and ";16" in str(image.tile):
                return int(np.asarray(image.convert("RGB")).max()) << 8 | 255
    except Exception:  # it is told when the image is wanted
        pass
    return None


def printable(path):
    """A path in a sentence: as it is, if it is one line of text."""
    return path if path.isprintable() else repr(path)  # not UTF-8; a line feed


def unreadable(file, error):
    """The ValueError that names an image file and says, by `error`, why it cannot be read."""
    why = getattr(error, "strerror", None) or str(error).replace(f" {file!r}", "")
    return ValueError(
        f"{printable(file)} cannot be read as an image "
        f"({why or type(error).__name__}); remove or replace it"
    )


def check(files):
    """Look at the status of every file, not at its contents. Every process calls it; one of each
    node looks. SystemExit names the first that is missing, empty, or may not be read.
    """

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
    finally:  # the one who asked may have seen enough
        pool.shutdown(cancel_futures=True)
