"""A list of images in a CSV file: `data.name: list` with `data.root: FILE.csv`.

    path,label,part
    photos/1.jpg,cat,train
    "photos/2, large.jpg",dog,val

Paths are relative to the file's own folder, or absolute. Labels may be left empty, in all rows.
Without the column `part` all images are for training. Other columns do not count.
"""

import contextlib
import csv
import os
from array import array
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from engine import distributed
from engine.progress import progress

from .folders import QUIET_SECONDS, ROOT_KEY, Listing, first_lookalikes
from .image_files import printable
from .paths import Paths

PARTS = "train", "val"


class Columns(NamedTuple):
    """The positions of the columns in a row; `part` is None where there is no such column."""

    path: int
    label: int
    part: int | None


def read_list(file, part):
    """One part of a list of images, in the order of its rows. Every process calls it for itself.

    It looks at no image. Beside what it returns it keeps 8 bytes a row.

    Args:
        file: the path of the CSV file.
        part: "pretrain", "train" or "test".

    Returns:
        A Listing; its labels and classes are None where no image is labelled, or all are of one
        class. None where no row is of part val, and that is wanted.

    Raises:
        SystemExit: names the file, and the line that is wrong.
    """
    wanted = "val" if part == "test" else "train"
    names, labels, hashes = bytearray(), array("l"), array("q")
    numbers, first_lines = {}, []  # of the labels, in the order in which they appear
    is_relative = True
    for line, path, label, row_part in read_rows(file):
        hashes.append(hash(path))
        if label not in numbers:
            numbers[label] = len(numbers)
            first_lines.append(line)
        if row_part == wanted:
            names += os.fsencode(path) + b"\0"
            labels.append(numbers[label])
            is_relative = is_relative and not os.path.isabs(path)
    refuse_unfit_labels(file, list(numbers), first_lines)
    refuse_duplicate(file, hashes)
    if not hashes:
        raise SystemExit(f"{file} names no images below its first line; add a row for each image")
    if not labels and wanted == "val":
        return None
    if not labels:
        raise SystemExit(f"{file} has no row whose part is train; there is nothing to train on")
    paths = join_folder(file, bytes(names), is_relative)
    return Listing(paths, *sort_classes(list(numbers), labels))


def read_rows(file):
    """Yield (line, path, label, part) of each row. SystemExit names a line that is wrong."""
    with refuse_unreadable(file), open(file, encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, strict=True, skipinitialspace=True)
        header = next(reader, None)
        columns = find_columns(file, header)
        for row in reader:
            if not row:  # a blank line
                continue
            problem = problem_of_row(row, header, columns)
            if problem:
                raise SystemExit(f"{file}: line {reader.line_num} {problem}")
            row_part = "train" if columns.part is None else row[columns.part]
            yield reader.line_num, row[columns.path], row[columns.label], row_part


@contextlib.contextmanager
def refuse_unreadable(file):
    """SystemExit where the file cannot be read as CSV of UTF-8."""
    try:
        yield
    except FileNotFoundError:
        raise SystemExit(
            f"list: there is no file {file}; set {ROOT_KEY} to a CSV file with the columns "
            "path and label"
        ) from None
    except IsADirectoryError:
        raise SystemExit(
            f"list: {file} is a folder; set {ROOT_KEY} to a CSV file, or take the name folder"
        ) from None
    except OSError as error:
        raise SystemExit(f"list: {file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise SystemExit(
            f"{file} is not UTF-8, for it holds the byte 0x{byte:02x}; save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise SystemExit(
            f"{file} is no CSV file ({error}); is there a quotation mark that is not closed?"
        ) from None


def find_columns(file, header):
    """The Columns that the first line of a file names."""
    if not header:
        raise SystemExit(f"{file} is empty; its first line must name the columns path and label")
    names = [name.strip() for name in header]
    shown = printable(",".join(header))
    for name in ("path", "label"):
        if name not in names:
            raise SystemExit(
                f"{file} has no column {name}, for its first line is {shown}; it must name the "
                "columns path and label, with a comma between them, and labels may be left empty"
            )
    for name in ("path", "label", "part"):
        if names.count(name) > 1:
            raise SystemExit(f"{file} has the column {name} twice; keep one")
    part = names.index("part") if "part" in names else None
    return Columns(names.index("path"), names.index("label"), part)


def problem_of_row(row, header, columns):
    """What is wrong with a row, in words; or None."""
    if len(row) != len(header):
        return (
            f"has {len(row)} fields and the first line {len(header)}; a name with a comma in it "
            "needs quotation marks"
        )
    path = row[columns.path]
    if not path or "\0" in path:
        return "holds no path of an image" if not path else "holds a zero byte; remove it"
    if columns.part is not None and row[columns.part] not in PARTS:
        return f"has the part {row[columns.part]!r}; it must be train or val"
    return None


def refuse_unfit_labels(file, labels, first_lines):
    """SystemExit where labels are given for some images only, or two of them print alike.

    Args:
        file: the list.
        labels: each once, in the order in which they appear; "" is none.
        first_lines: where each appears first.
    """
    lines = dict(zip(labels, first_lines))
    if "" in lines and len(lines) > 1:
        labelled = next(line for label, line in lines.items() if label)
        raise SystemExit(
            f"{file}: line {labelled} has a label and line {lines['']} has none; label all images, "
            "or none"
        )
    twins = first_lookalikes(labels)
    if twins:
        label, other = sorted(twins, key=lines.get)
        raise SystemExit(
            f"{file}: the classes {ascii(label)} (line {lines[label]}) and {ascii(other)} (line "
            f"{lines[other]}) print alike; write both in the same way"
        )


def refuse_duplicate(file, hashes):
    """SystemExit where a path stands twice. hashes: of the paths of all rows."""
    ordered = np.sort(np.frombuffer(hashes, np.int64))
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    first_lines = {}
    for line, path, _, _ in read_rows(file):
        if hash(path) in repeated and first_lines.setdefault(path, line) != line:
            raise SystemExit(
                f"{file} names {printable(path)} twice, in line {first_lines[path]} and in line "
                f"{line}; keep one"
            )


def join_folder(file, names, is_relative):
    """The Paths of a list's names, which are relative to the list's folder or absolute.

    Args:
        file: the list.
        names: bytes, each with a zero byte behind it.
        is_relative: whether all of them are relative.
    """
    folder = os.path.dirname(file)
    folder = os.path.join(folder, "") if folder else ""
    if is_relative:
        return Paths(folder, names)
    joined = (os.path.join(folder, name) + "\0" for name in Paths("", names))
    return Paths("", b"".join(map(os.fsencode, joined)))


def sort_classes(names, numbers):
    """The labels (n,) int64 and the sorted classes of a part; None, None for less than two classes.

    Args:
        names: of all classes of the list.
        numbers: (n,), for each image the position of its class in them.
    """
    present, labels = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
    if len(present) < 2:
        return None, None
    classes = [names[number] for number in present]
    order = sorted(range(len(classes)), key=classes.__getitem__)
    return torch.from_numpy(np.argsort(order)[labels]), [classes[i] for i in order]


# ------------------------------------------------------------------------------- missing images


def check_list(file, paths, skip):
    """SystemExit says how many images of a list are not there; with `skip` that is a warning.

    Every process calls it; one of each node looks, and at folders alone: see data/folders.py.
    """
    describe = partial(describe_missing, file, paths)
    problem = distributed.run_on_first(describe, per_node=True)
    distributed.exit_all_ranks(None if skip else problem)
    if problem:
        distributed.print_main(f"WARNING: {problem}")


def describe_missing(file, paths):
    """How many images are not there, in words; None where all are."""
    missing = find_missing(paths)
    if not missing:
        return None
    return (
        f"{file} names {len(paths)} images, of which {len(missing)} are not there, the first is "
        f"{printable(paths[missing[0]])}; correct the list, whose paths are relative to its folder"
    )


def find_missing(paths):
    """The rows of those paths that are not there. Each folder is listed once."""
    missing, names_in = [], {}
    bar = progress(paths, "looking for the images of the list", delay=QUIET_SECONDS, is_shown=True)
    # The first process of each node comes here.
    for row, path in enumerate(bar):
        folder, _, name = path.rpartition(os.sep)
        if folder not in names_in:
            names_in[folder] = list_names(folder)
        # Some disks know a name in other spellings, too.
        if name not in names_in[folder] and not os.path.exists(path):
            missing.append(row)
    return missing


def list_names(folder):
    """The set of the names in a folder; empty where it cannot be listed."""
    try:
        return set(os.listdir(folder or os.curdir))
    except OSError:
        return set()
