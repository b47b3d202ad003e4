"""Which images lie in a folder: every script's first look at the disk.

A folder is asked for what it holds, and the system says with each name whether it is a file, a
folder or a link: no file is looked at by itself. A million system calls, one a file, would take ten
minutes and more on a network disk. Only links need one each, to see where they lead.
"""

import os
import unicodedata
from typing import NamedTuple

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from engine.distributed import print_main
from engine.progress import progress

from .image_files import printable
from .paths import Paths

# These are images, too, but none of torchvision's IMG_EXTENSIONS: they are not left out in silence.
OTHER_EXTENSIONS = (".gif", ".jfif", ".jpe", ".heic", ".heif", ".avif", ".jp2", ".jxl")
EXTENSIONS_IN_WORDS = ", ".join(IMG_EXTENSIONS)
QUIET_SECONDS = 2  # of listing, before a progress bar appears
# In sentences.
ROOT_KEY = "data.root (linear.root of a probe's own set, knn.root of kNN's)"

# What systems and programs keep beside people's files, in small letters; and whatever begins with a
# point, as .Trash-1000 and the ._x.jpg of macOS.
SYSTEM_NAMES = {
    "@eadir",
    "@recycle",
    "@tmp",
    "@__thumb",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "__macosx",
    "__pycache__",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}
# Each is recognised in small letters, in capitals, and with a capital in front.
PART_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


class Listing(NamedTuple):
    """The images below a folder.

    Attributes:
        paths: (n,) in order: the folder's own files by name, then those of each folder in it by
            name.
        labels: (n,) int64, or None where the images are not sorted into classes.
        classes: the names of the classes, sorted, or None.
    """

    paths: Paths
    labels: torch.Tensor | None
    classes: list[str] | None


class Folder(NamedTuple):
    """A folder on the way.

    Attributes:
        path: its path.
        top: the class it belongs to, which is the outermost folder below the one that is listed;
            None for that one itself.
        holders: the folders that hold it, itself included, with links resolved.
    """

    path: str
    top: str | None
    holders: tuple[str, ...]


class Content(NamedTuple):
    """What one folder holds, by name, sorted. A link counts as what it leads to.

    Attributes:
        folders: names, and whether each is a link.
        images: everything else that is named as an image. Pipes and broken links may be among
            them; they are refused when they are read.
        others: images of the kinds that we leave out.
        hidden: folders and images that are a system's or hidden, which we leave out.
        dangling: links that lead nowhere, perhaps to a folder of images that was moved.
    """

    folders: list[tuple[str, bool]]
    images: list[str]
    others: list[str]
    hidden: list[str]
    dangling: list[str]


def list_images(path, name, only=None, empty="refuse"):
    """The images below a folder -> a Listing. Every process calls it, each for itself.

    Args:
        path: of the folder.
        name: of the data set, for sentences.
        only: the classes wanted; None takes all.
        empty: what becomes of a class folder without images, "refuse" or "drop".

    Raises:
        SystemExit: names a folder that cannot be listed, a link that leads nowhere or to a folder
            that holds it, or a class without images; and says where there are no images at all.
    """
    prefix = os.path.join(path, "")[:-1]  # the rest of each path begins with a /
    names, others, hidden, counts = [], [], [], {}
    folders = progress(
        walk(path, name, only),
        f"listing {printable(path)}",
        unit="folders",
        delay=QUIET_SECONDS,
    )
    for folder, content in folders:
        below = os.path.join(folder.path, "")
        counts[folder.top] = counts.get(folder.top, 0) + len(content.images)
        names.append("".join(f"{below[len(prefix) :]}{image}\0" for image in content.images))
        others += [below + file for file in content.others]
        hidden += [below + file for file in content.hidden]
    if hidden:
        print_main(
            f"{name}: {len(hidden)} hidden or system folders and files under {path} left out; "
            f"the first: {printable(hidden[0])}"
        )
    if others:
        print_main(
            f"{name}: {len(others)} files under {path} left out, not named {EXTENSIONS_IN_WORDS}; "
            f"the first: {printable(others[0])}"
        )
    if not any(names):
        raise SystemExit(f"{name}: no images ({EXTENSIONS_IN_WORDS}) under {path}")
    paths = Paths(prefix, os.fsencode("".join(names)))
    return Listing(paths, *label_by_folder(path, name, counts, only, empty))


def label_by_folder(path, name, counts, only, empty):
    """The labels and classes of a Listing.

    Args:
        path: see list_images.
        name: likewise.
        counts: class -> its number of images, in the order of the images; None -> those in none.
        only: see list_images.
        empty: likewise.
    """
    loose = counts.pop(None)
    classes = [top for top, count in counts.items() if count]
    missing = sorted(set(only or ()) - set(classes))
    if missing:
        raise SystemExit(
            f"{name}: {len(missing)} of its {len(only)} classes are not under {path}; "
            f"the first is {missing[0]}"
        )
    if loose or len(classes) < 2:
        return None, None
    # A cache that an earlier version made of one class folder lies beside that folder.
    unfilled = [top for top, count in counts.items() if not count and not is_cache(top, counts)]
    if unfilled and empty == "refuse":
        raise SystemExit(
            f"{name}: {printable(os.path.join(path, unfilled[0]))} holds no images "
            f"({EXTENSIONS_IN_WORDS}), and a folder here is a class; fill it or "
            "remove it"
        )
    sizes = torch.tensor([counts[top] for top in classes])
    return torch.arange(len(classes)).repeat_interleave(sizes), classes


def first_lookalikes(names):
    """The first two of some names that print alike, as a pair; None where there are none.

    é is one letter, or e and an accent; and a space at the end is not seen.
    """
    earlier = {}
    for name in names:
        printed = unicodedata.normalize("NFC", name).strip()
        if printed in earlier:
            return earlier[printed], name
        earlier[printed] = name
    return None


def is_cache(folder, others):
    """Whether a folder's name is that of a data.cache of one of the others."""
    owner, _, size = folder.rpartition(".cache")
    return owner in others and size.isdecimal()


def walk(path, name, only):
    """Yield each folder below `path`, that one first, as (Folder, Content), sorted by name."""
    pending = [Folder(path, None, (os.path.realpath(path),))]
    while pending:
        folder = pending.pop()
        content = list_folder(folder.path, name)
        inner_folders = []
        for inner, is_link in content.folders:
            if only is None or folder.top is not None or inner in only:
                inner_folders.append(inner_folder(folder, name, inner, is_link))
        if content.dangling:
            link = printable(os.path.join(folder.path, content.dangling[0]))
            raise SystemExit(f"{name}: {link} is a link to what is not there; remove or mend it")
        yield folder, content
        pending += reversed(inner_folders)


def list_folder(path, name):
    """What a folder holds -> its Content. SystemExit where it cannot be listed."""
    content = Content([], [], [], [], [])
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                sort_entry(entry, content)
    except OSError as error:
        where = printable(error.filename or path)
        raise SystemExit(f"{name}: {where} cannot be listed ({error.strerror})") from error
    return Content(*map(sorted, content))


def sort_entry(entry, content):
    """Add a DirEntry to the list of a Content that it belongs to, if there is one."""
    name = entry.name
    lower = name.lower()
    if is_hidden(name):
        if is_folder(entry) or lower.endswith(IMG_EXTENSIONS):
            content.hidden.append(name)
    elif is_folder(entry):
        content.folders.append((name, entry.is_symlink()))
    elif lower.endswith(IMG_EXTENSIONS):
        content.images.append(name)
    elif lower.endswith(OTHER_EXTENSIONS):
        content.others.append(name)
    elif entry.is_symlink() and not os.path.exists(entry.path):
        content.dangling.append(name)


def is_hidden(name):
    """Whether a file or folder of that name is a system's own, or meant not to be seen."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_folder(entry):
    """Whether a DirEntry is a folder or a link to one. Only a link costs a system call."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for one
        return False


def inner_folder(folder, name, inner, is_link):
    """The Folder of the name `inner` in a Folder. SystemExit where it is a link without end."""
    path = os.path.join(folder.path, inner)
    real = os.path.realpath(path) if is_link else os.path.join(folder.holders[-1], inner)
    if real in folder.holders:
        raise SystemExit(
            f"{name}: {printable(path)} is a link to {printable(real)}, which holds it, and so on "
            "without end; remove the link"
        )
    top = inner if folder.top is None else folder.top
    return Folder(path, top, (*folder.holders, real))


def folder_of_part(path, name, part):
    """The folder below `path` that holds a part of a set, or None where none does.

    Without a folder of training images all of `path` is trained on.

    Args:
        path: of the set.
        name: of the set: `folder`, or one that must have both parts.
        part: "pretrain", "train" or "test".

    Raises:
        SystemExit: where there is no such folder, and where two folders could be one part.
    """
    if not os.path.isdir(path):
        way_out = (
            f"set {ROOT_KEY} to a folder of images"
            if name == "folder"
            else f"put train/<class>/*.JPEG and val/<class>/*.JPEG there, or set {ROOT_KEY}"
        )
        if os.path.isfile(path):
            way_out += "; a list of images in a CSV file is the set list"
        raise SystemExit(f"{name}: there is no folder {path}; {way_out}")
    parts = find_parts(path, name)
    if name != "folder" and not {"train", "val"} <= set(parts):
        raise SystemExit(f"{name}: {path} must hold train/<class>/*.JPEG and val/<class>/*.JPEG")
    parts, note = choose_parts(path, name, parts)
    if part == "test":
        return parts.get("val", parts.get("test")) if "train" in parts else None
    if note:
        print_main(f"{name}: {note}")
    return parts.get("train", path)


def find_parts(path, name):
    """{"train": folder, "val": folder, "test": folder} below `path`, those that are there.

    The names are tried, for to list a flat folder of a million images takes long on a network disk.
    SystemExit names two folders that could be one part.
    """
    parts = {}
    for part, names in PART_NAMES.items():
        spellings = []
        for word in names:
            spellings += [word, word.capitalize(), word.upper()]
        folders = existing_folders(path, spellings)
        if len(folders) > 1:
            both = " and ".join(map(os.path.basename, folders))
            raise SystemExit(
                f"{name}: {path} holds {both}, and only one of them can be its part "
                f"{part}; keep that one, named {part}, and move the rest elsewhere"
            )
        if folders:
            parts[part] = folders[0]
    return parts


def existing_folders(path, names):
    """The folders of these names below `path`, each once."""
    folders = []
    for name in names:
        folder = os.path.join(path, name)
        # A disk that knows no capitals finds one folder by all of its spellings.
        if os.path.isdir(folder) and not any(os.path.samefile(folder, f) for f in folders):
            folders.append(folder)
    return folders


def choose_parts(path, name, parts):
    """Which of the folders that `find_parts` gave count.

    Returns:
        {part: folder}, and a sentence on it, or None where nothing is odd.
    """
    if not parts:
        return parts, None
    if "train" not in parts:
        held = " and ".join(map(os.path.basename, parts.values()))
        return parts, (
            f"{path} holds {held} and no train, so all of it is trained on, {held} "
            "included; name the folder of the training images train to keep them apart"
        )
    odd = {part: folder for part, folder in parts.items() if os.path.basename(folder) != part}
    if len(parts) == 1:
        beside = folders_beside(path, name, parts["train"])
        if beside and odd:  # Train, Car and Plane may be classes
            return {}, (
                f"{odd['train']} is taken as a class, as {printable(beside[0])} beside it; "
                "if it holds the training images, name it train"
            )
        if beside:
            return parts, (
                f"{parts['train']} alone is trained on; left out are {len(beside)} "
                f"folders beside it, the first is {printable(beside[0])}; name the one "
                "with validation images val"
            )
    if not odd:
        return parts, None
    note = ", ".join(f"{folder} is taken as its part {part}" for part, folder in odd.items())
    return parts, f"{note}; the README's names are train and val"


def folders_beside(path, name, folder):
    """The names of the other folders in `path`, less the caches of this one (data/cache.py)."""
    own = os.path.basename(folder)
    names = [other for other, _ in list_folder(path, name).folders]
    return [other for other in names if other != own and not other.startswith(f"{own}.cache")]
