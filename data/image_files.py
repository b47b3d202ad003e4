"""Images that lie in files, each read when it is wanted; and sentences on those that cannot be.

PIL reads them as torchvision's ImageFolder does: of an animation the first frame, transparency
dropped, as stored, whatever EXIF says of its rotation.
"""

import contextlib
import hashlib
import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import numpy as np
from PIL import Image

from engine import distributed
from engine.progress import progress

from .paths import Paths
from .workers import shortage

# PIL knows these by their first bytes, whatever the name. For others, such as EPS, it starts
# programs.
FORMATS = "JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP"
# What files are that cameras and browsers name .jpg, by their first bytes.
FOREIGN_FORMATS = {
    b"....ftypavi": "an AVIF image",
    b"....ftyphei": "a HEIC image",
    b"....ftyphev": "a HEIC image",
    b"....ftypmif1": "a HEIC image",
    b"....jP  \r\n": "a JPEG 2000 image",
    b"\xffO\xffQ": "a JPEG 2000 image",
    b"....JXL \r\n": "a JPEG XL image",
    b"\xff\n": "a JPEG XL image",
}
THREADS = 16  # files whose status is asked for side by side
FILES_A_TASK = 500  # of such a thread
SAMPLED_FILES = 16  # in which `say_if_dark` looks
BRIGHT_ENOUGH = 2**14  # below it, 8 bits are below 64
MAX_REPLACED = 100  # unreadable images in a row; where there are more, the disk is gone
BILINEAR = Image.Resampling.BILINEAR  # it antialiases

# PIL warns of EXIF and other data beside the pixels, which nobody here reads; of a palette's
# transparency, which is dropped; and of more than 89 million pixels, which only take long: above
# 179 million it refuses the image, and that is told.
warnings.filterwarnings("ignore", module=r"PIL\.")


class FolderSet:
    """n images in files.

    Args:
        files: their paths, a list of str or Paths; it is kept as Paths.
        labels: (n,) int64, or None where not every image has one.
        classes: the names of the classes, or None.
        mean: of each channel, of the training images in [0, 1].
        std: likewise.

    Attributes:
        skip: whether another image takes the place of one that cannot be read.
        list_file: the path of the list that names the images; None where they lie in a folder.
    """

    skip, list_file = False, None

    def __init__(self, files, labels, classes, mean, std):
        self.files = files if isinstance(files, Paths) else Paths.of(files)
        self.labels, self.classes = labels, classes
        self.mean, self.std = mean, std

    def __len__(self):
        return len(self.files)

    def select(self, rows):
        """The images `rows` (m,), in that order, as a FolderSet."""
        files = self.files.select(rows)
        labels = None if self.labels is None else self.labels[rows]
        return FolderSet(files, labels, self.classes, self.mean, self.std)

    def to(self, device):
        """The set itself: its images are decoded on the CPU, whatever the device."""
        return self

    def decode(self, i):
        """Image i as PIL's, RGB. ValueError names a file that is no image."""
        return read_rgb(self.files[i])

    def decode_or_replace(self, i, broken):
        """Image i; or with `skip`, where it cannot be read, the next one that can.

        The replacement depends on i alone, so that a row of a memory bank stays one image's.

        Args:
            i: the image's row.
            broken: a dict, in which broken[i] then says why image i cannot be read.
        """
        tries = min(len(self), MAX_REPLACED)
        for offset in range(tries):
            try:
                return self.decode((i + offset) % len(self))
            except ValueError as error:
                if not self.skip:
                    raise
                broken.setdefault(i, str(error))
        raise ValueError(
            f"{broken.pop(i)}, and so it is with the {tries - 1} images after it, "
            "which is too much for data.on_error=skip"
        )

    def fingerprint(self):
        """A hash of the images' names below the folder that holds them all, in order.

        It tells which row is which image. No file is read, and none is asked for its size: a broken
        one may be replaced by a good one of its name, as our sentences advise, and the run goes on.
        """
        return hashlib.sha256(self.files.names_below()).hexdigest()[:16]


# ------------------------------------------------------------------------------- one image


def read_rgb(file):
    """The image in a file as PIL's, RGB. ValueError names a file that is no image.

    Other than in ImageFolder, 16 bits become 8 by their upper half (PIL's convert makes all above
    255 white), and 32 bits a pixel, whose range nobody knows, are refused. PIL refuses above 179
    million pixels (0.7 GB).
    """
    with open_or_name(file) as image:
        return to_rgb(image)


def read_shrunk(file, shorter_side, reduce=False):
    """read_rgb, and the shorter side is at most so many pixels. No image is enlarged.

    Args:
        file: its path.
        shorter_side: in pixels.
        reduce: let the JPEG decoder leave out the finest detail of large photographs: it decodes a
            half, a quarter or an eighth of their width and height (PIL's draft mode), as long as
            twice the wanted size is left for the antialiased resize after it. That is nearly twice
            as fast, and the pixels differ by 0.2 of 255 on average.
    """
    with open_or_name(file) as image:
        size = shrunk_size(image.size, shorter_side)
        if size == image.size:
            return to_rgb(image)
        box = None
        if reduce and is_reducible(image, shorter_side):
            drafted = image.draft(None, (2 * size[0], 2 * size[1]))
            box = drafted and drafted[1]  # what the image's own pixels are in the smaller one
        return to_rgb(image).resize(size, BILINEAR, box)


def shrunk_size(size, shorter_side):
    """(width, height) after the shorter side has become `shorter_side`, if it was longer."""
    shorter, longer = sorted(size)
    if shorter <= shorter_side:
        return size
    longer = int(shorter_side * longer / shorter)
    width, height = size
    return (shorter_side, longer) if width <= height else (longer, shorter_side)


def is_reducible(image, shorter_side):
    """Can the JPEG decoder halve this image, and leave twice the wanted size?"""
    return image.format in ("JPEG", "MPO") and min(image.size) >= 4 * shorter_side


@contextlib.contextmanager
def open_or_name(file):
    """A context with the file as PIL's image. Whatever goes wrong in it names the file."""
    try:
        with open_image(file) as image:
            yield image
    except Exception as error:  # PIL raises many kinds
        if shortage(error):  # the image may be whole
            raise
        raise unreadable(file, error) from error


def open_image(file):
    """A file as PIL's image, whose pixels are not read yet. Many kinds of error."""
    problem = problem_of(file)  # a pipe would be waited for
    if problem:
        raise ValueError(problem)
    try:
        return Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        kind = foreign_format(file)
        if kind is None:
            raise
        raise ValueError(
            f"it is {kind}, whatever its name says, and none of {', '.join(FORMATS)}; "
            "convert it to one of these"
        ) from None


def foreign_format(file):
    """The kind of image that a file is by its first bytes, if it is one we do not read."""
    with open(file, "rb") as f:
        start = f.read(16)
    for pattern, kind in FOREIGN_FORMATS.items():
        skipped = len(pattern) - len(pattern.lstrip(b"."))  # four bytes say a length
        if start[skipped : len(pattern)] == pattern[skipped:]:
            return kind
    return None


def to_rgb(image):
    """An image of PIL's, of any mode -> of mode RGB, 8 bits a channel."""
    if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
        raise ValueError("it has 32 bits a pixel; store it with 8 or 16")
    if image.mode.startswith("I"):  # I;16, I;16B; or I, PIL's for 16-bit PGM
        upper = np.asarray(image) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB is the same, and warns
    return image.convert("RGB")


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


# ------------------------------------------------------------------------------- 16 bits a value


def say_if_dark(dataset):
    """Say so where images of 16 bits a value use the lower bits alone.

    Those of microscopes and X-ray do: by their upper 8 bits they are nearly black. Every process
    may call it; one of them looks, at SAMPLED_FILES files at most, evenly spaced.

    Args:
        dataset: one with `files`; of others nothing is said.
    """
    files = getattr(dataset, "files", ())
    if not files or not distributed.is_main():
        return
    highest = {}
    for row in evenly_spaced(len(files), SAMPLED_FILES):
        value = highest_of_16_bits(files[row])
        if value is not None:
            highest[files[row]] = value
    file = max(highest, key=highest.get, default=None)
    if file is None or not 0 < highest[file] < BRIGHT_ENOUGH:
        return
    factor = 2 ** (16 - highest[file].bit_length())
    distributed.print_main(
        f"WARNING: {printable(file)} has 16 bits a value, of which the upper 8 are "
        f"taken, but its highest value is {highest[file]} of 65535, the highest in "
        f"{len(highest)} such images that were looked at: they come out nearly black; "
        f"store them anew, multiplied by {factor}"
    )


def evenly_spaced(n, count):
    """The first of n rows and some more, equally far apart, `count` at most."""
    step = -(-n // count)
    return range(0, n, step)


def highest_of_16_bits(file):
    """The highest value in an image of 16 bits a value, of 65535.

    In an image of several channels, of which PIL gives the upper 8 bits alone, it is at most that.
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


# ------------------------------------------------------------------------------- all files


def check_all_files(files):
    """Look at the status of every file, not at its contents.

    Every process calls it; one of each node looks. SystemExit names the first that is missing,
    empty, or may not be read.
    """
    distributed.run_on_first(partial(refuse_first_problem, files), per_node=True)


def refuse_first_problem(files):
    """SystemExit for the first file whose status or permission says that it cannot be read."""
    # The first process of each node comes here.
    statuses = progress(
        for_each_file(problem_or_permission, files),
        "data.check_files: looking at all image files",
        total=len(files),
        is_shown=True,
    )
    for file, problem in statuses:
        if problem:
            raise SystemExit(str(unreadable(file, ValueError(problem))))


def problem_or_permission(file):
    """What the status of a file and its permissions say against it, or None."""
    problem = problem_of(file)
    if problem is None and not os.access(file, os.R_OK):
        return "Permission denied"
    return problem


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
    files = iter(files)
    tasks = iter(lambda: list(islice(files, FILES_A_TASK)), [])
    pool = ThreadPoolExecutor(THREADS)
    try:
        for pairs in pool.map(partial(look_at_each, look), tasks):
            yield from pairs
    finally:  # the one who asked may have seen enough
        pool.shutdown(cancel_futures=True)


def look_at_each(look, files):
    """[(file, look(file))] of some files."""
    return [(file, look(file)) for file in files]
