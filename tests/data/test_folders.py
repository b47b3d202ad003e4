"""Listing a folder of images: the order and labels of torchvision's ImageFolder, and no system call
a file."""

import os

import pytest
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.datasets import load
from data.folders import list_images


def make_files(root, *names):
    """Files that no one reads here; folders where a name ends in /."""
    for name in names:
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not name.endswith("/"):
            with open(path, "wb") as f:
                f.write(b"no image")


def read(root, **settings):
    return load("pretrain", 0, name="folder", root=str(root), **settings)


def listed_as_before(path):
    """(paths, classes' indices) by os.walk, as the first versions of this repository had it."""
    files, tops = [], []
    for place, folders, names in os.walk(path, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS):
                files.append(os.path.join(place, name))
                tops.append(os.path.relpath(place, path).split(os.sep)[0])
    classes = sorted(set(tops))
    return files, None if "." in classes else [classes.index(top) for top in tops]


@pytest.fixture
def nested(tmp_path):
    """Three classes, with folders in them, links, capitals, and what is no image."""
    make_files(
        tmp_path / "set",
        "b/10.JPG",
        "b/9.jpeg",
        "b/é.png",
        "b/sub/1.jpg",
        "b/a.webp",
        "b/sub/deeper/x.bmp",
        "B/z.ppm",
        "B/notes.txt",
        "a/0.tif",
        "a/sub/",
        "a/other/0.pgm",
    )
    make_files(tmp_path / "elsewhere", "in a folder/7.png", "8.png")
    os.symlink(tmp_path / "elsewhere" / "in a folder", tmp_path / "set" / "a" / "linked")
    os.symlink(tmp_path / "elsewhere" / "8.png", tmp_path / "set" / "a" / "linked.png")
    return tmp_path / "set"


def test_order_and_labels_are_those_of_image_folder_and_of_before(nested):
    data, other = read(nested), ImageFolder(nested)
    assert list(data.files) == [file for file, _ in other.samples]
    assert len(data) == 11
    assert data.classes == other.classes == ["B", "a", "b"]
    assert data.labels.tolist() == other.targets
    assert (list(data.files), data.labels.tolist()) == listed_as_before(str(nested))
    # ImageFolder sorts whole paths, and a space comes before a separator; we stay with each folder
    make_files(nested, "b/sub/y.jpg", "b/sub /y.jpg", "b/sub-1/y.jpg")
    data = read(nested)
    assert (list(data.files), data.labels.tolist()) == listed_as_before(str(nested))


@pytest.mark.parametrize("root", ["set", "set/", "set//", "./set", "../{}/set"])
def test_paths_are_written_as_the_root_is(nested, monkeypatch, root):
    monkeypatch.chdir(nested.parent)
    root = root.format(nested.parent.name)
    assert list(read(root).files) == listed_as_before(root)[0]
    assert read(root).fingerprint() == read(nested).fingerprint() or root == "set//"


def test_flat_folders_and_images_beside_the_classes_have_no_labels(nested):
    make_files(nested, "0.jpg")
    data = read(nested)
    assert data.labels is None
    assert data.classes is None
    assert list(data.files) == listed_as_before(str(nested))[0]
    assert data.files[0].endswith("/0.jpg")
    assert read(nested / "a" / "other").labels is None
    assert read(nested / "B").labels is None


def test_names_that_are_no_text_or_hold_line_feeds(tmp_path):
    make_files(tmp_path, "a/two\nlines.png", "b/x.png")
    try:
        make_files(tmp_path, os.fsdecode(b"b/caf\xe9.png"), os.fsdecode(b"\xff/\xfe.png"))
    except OSError:
        pytest.skip("this disk has text only")
    data = read(tmp_path)
    assert (list(data.files), data.labels.tolist()) == listed_as_before(str(tmp_path))
    assert all(os.path.exists(file) for file in data.files)
    assert len(data) == 4


def test_no_system_call_looks_at_a_regular_file(nested, monkeypatch):
    """Only at links; each folder is listed once."""
    calls, listed, scandir = [], [], os.scandir

    def counted(function):
        def call(path, *args, **settings):
            calls.append(os.fspath(path))
            return function(path, *args, **settings)

        return call

    for name in ("stat", "lstat", "access", "open", "readlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    data = read(nested)
    monkeypatch.undo()
    assert len(calls) > 0
    assert len(listed) == len(set(listed)) == 9
    assert len(data) == 11
    files = [os.path.join(place, name) for place, _, names in os.walk(nested) for name in names]
    assert not {file for file in files if not os.path.islink(file)} & set(calls)


def test_pipes_are_not_opened_and_not_waited_for(tmp_path):
    """One that is named as an image is refused when it is met, or by data.check_files."""
    make_files(tmp_path, "a/1.png", "b/1.png")
    os.mkfifo(tmp_path / "a" / "pipe")
    assert len(read(tmp_path)) == 2
    os.mkfifo(tmp_path / "a" / "2.png")
    with pytest.raises(ValueError, match="2.png cannot be read as an image .it is not a file"):
        read(tmp_path).decode(1)
    with pytest.raises(SystemExit, match="2.png cannot be read as an image .it is not a file"):
        read(tmp_path, check_files=True)


def test_a_selection_of_classes_looks_into_no_other(tmp_path):
    make_files(tmp_path, "a/1.png", "b/a/1.png", "c/1.png", "d/")
    os.symlink(tmp_path, tmp_path / "d" / "up")  # a loop, in a class that is not wanted
    listing = list_images(str(tmp_path), "some", ["b", "c"])
    assert listing.classes == ["b", "c"]
    assert listing.labels.tolist() == [0, 1]
    assert list(listing.paths) == [f"{tmp_path}/b/a/1.png", f"{tmp_path}/c/1.png"]
    with pytest.raises(SystemExit, match="some: 1 of its 2 classes are not under .*is x"):
        list_images(str(tmp_path), "some", ["b", "x"])


# -------------------------------------------------- the parts' names


def images_of(root, part="pretrain"):
    """The paths below root of a part's images, or None."""
    data = load(part, 0, name="folder", root=str(root))
    return None if data is None else [os.path.relpath(file, root) for file in data.files]


@pytest.mark.parametrize(
    "train,val",
    [
        ("train", "val"),
        ("Train", "Val"),
        ("TRAIN", "VALID"),
        ("training", "validation"),
        ("Training", "Test"),
        ("train", "testing"),
    ],
)
def test_parts_by_other_names(tmp_path, capsys, train, val):
    make_files(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{val}/a/3.png", f"{val}/b/4.png")
    assert images_of(tmp_path) == [f"{train}/a/1.png", f"{train}/b/2.png"]
    printed = capsys.readouterr().out
    assert images_of(tmp_path, "test") == [f"{val}/a/3.png", f"{val}/b/4.png"]
    assert capsys.readouterr().out == ""  # it was said of the training part
    for name, right in ((train, ("train",)), (val, ("val", "test"))):
        assert (f"{name} is taken as its part" in printed) == (name not in right)


def test_two_folders_for_one_part_are_refused_and_links_are_not(tmp_path):
    make_files(tmp_path, "train/1.png", "val/1.png", "Valid/1.png")
    for part in ("pretrain", "test"):
        with pytest.raises(SystemExit, match="holds val and Valid, and only one .* named val, and"):
            images_of(tmp_path, part)
    os.rename(tmp_path / "Valid" / "1.png", tmp_path / "2.png")
    os.rmdir(tmp_path / "Valid")
    os.symlink("val", tmp_path / "Valid")
    assert images_of(tmp_path, "test") == ["val/1.png"]


def test_validation_images_are_not_trained_on_without_a_word(tmp_path, capsys):
    make_files(tmp_path, "pictures/1.png", "Valid/2.png")
    assert len(images_of(tmp_path)) == 2
    assert images_of(tmp_path, "test") is None
    assert "holds Valid and no train, so all of it is trained on" in capsys.readouterr().out


def test_a_cache_beside_train_is_no_class(tmp_path, capsys):
    for name in ("Train", "train"):
        make_files(tmp_path / name, f"{name}/a/1.png", f"{name}/b/2.png", f"{name}.cache64/x.u8")
        assert images_of(tmp_path / name) == [f"{name}/a/1.png", f"{name}/b/2.png"]
    assert "left out" not in capsys.readouterr().out


def test_folders_beside_train_are_named_and_train_may_be_a_class(tmp_path, capsys):
    make_files(tmp_path, "train/1.png", "held out/2.png")
    assert images_of(tmp_path) == ["train/1.png"]
    printed = capsys.readouterr().out
    assert "train alone is trained on; left out are 1 folders" in printed
    assert "is held out;" in printed
    os.rename(tmp_path / "train", tmp_path / "Train")
    os.rename(tmp_path / "held out", tmp_path / "Car")
    assert load("pretrain", 0, name="folder", root=str(tmp_path)).classes == ["Car", "Train"]
    assert "Train is taken as a class, as Car beside it; if" in capsys.readouterr().out


# -------------------------------------------------- hidden and system folders


HIDDEN = (
    ".ipynb_checkpoints",
    "@eaDir",
    ".AppleDouble",
    "__MACOSX",
    "$RECYCLE.BIN",
    "lost+found",
    "System Volume Information",
    ".Trash-1000",
    "#recycle",
    ".git",
)


def test_hidden_and_system_folders_and_files_are_left_out_and_counted_once(tmp_path, capsys):
    make_files(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    visible_only = read(tmp_path)
    assert capsys.readouterr().out == ""
    make_files(
        tmp_path,
        *(f"train/{name}/x/1.png" for name in HIDDEN),
        "train/a/._1.png",
        "train/a/@eaDir/1.png/THUMB_M.png",
        "train/a/.DS_Store",
        "train/.empty/",
    )
    data = read(tmp_path)
    printed = capsys.readouterr().out
    assert f"{len(HIDDEN) + 3} hidden or system folders and files under" in printed
    assert printed.count("\n") == 1
    assert list(data.files) == list(visible_only.files)
    assert data.classes == visible_only.classes == ["a", "b"]
    assert data.labels.tolist() == [0, 1]
    assert data.fingerprint() == visible_only.fingerprint()


def test_a_hidden_folder_may_hold_the_data_set_itself(tmp_path):
    make_files(tmp_path, ".cache/lost+found/a/1.png", ".cache/lost+found/b/2.png")
    assert len(read(tmp_path / ".cache" / "lost+found")) == 2
    with pytest.raises(SystemExit, match="no images"):
        read(tmp_path)


def test_hidden_links_without_end_are_no_fault(tmp_path):
    make_files(tmp_path, "a/1.png", "b/2.png")
    os.symlink(tmp_path, tmp_path / ".snapshot")
    os.symlink("nowhere", tmp_path / ".lock")
    assert len(read(tmp_path)) == 2
