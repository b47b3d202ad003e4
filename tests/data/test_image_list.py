"""Lists of images in CSV files: what is read of them, and what is refused."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import data.image_list as image_list
import train_finetune
import train_linear
import train_pretrain
from data.datasets import find_obstacle, load
from data.loader import ordered_batches
from test_odd_folders import start  # noqa: F401


@pytest.fixture
def photos(tmp_path):
    """Eight images in two folders that are no classes."""
    rng = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "photos" / f"{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def write(folder, text, encoding="utf-8"):
    """A list in a folder -> its path."""
    path = folder / "list.csv"
    path.write_bytes(text.encode(encoding))
    return str(path)


def rows(labels="abababab", parts=("train",) * 8):
    """The list of the eight photos."""
    lines = [
        f"photos/{i % 2}/{i}.png,{label},{part}\n"
        for i, (label, part) in enumerate(zip(labels, parts))
    ]
    return "".join(["path,label,part\n", *lines])


def read(file, part="pretrain", **settings):
    return load(part, 0, name="list", root=file, **settings)


TWO_PARTS = ("train",) * 5 + ("val",) * 3


def test_a_list_has_parts_and_sorted_classes_in_the_order_of_its_rows(photos):
    file = write(photos, rows("cabbacab", TWO_PARTS))
    train, test = read(file), read(file, "test")
    assert list(train.files) == [f"{photos}/photos/{i % 2}/{i}.png" for i in range(5)]
    assert (train.classes, train.labels.tolist()) == (["a", "b", "c"], [2, 0, 1, 1, 0])
    assert (test.classes, test.labels.tolist()) == (["a", "b", "c"], [2, 0, 1])
    assert train.labels.dtype == torch.int64
    assert find_obstacle(train, test) is None
    few = read(file, limit=2)
    assert len(few) == 2
    assert few.select([0]).labels.tolist() == few.labels[:1].tolist()
    with pytest.raises(SystemExit, match="data.limit is 9; list has 5 images"):
        read(file, limit=9)


def test_absolute_paths_spaces_quotes_blank_lines_and_other_columns(photos):
    """As spreadsheets write them, with a mark of their encoding at the beginning."""
    os.rename(photos / "photos/1/1.png", photos / "photos/1/one, two\n.png")
    text = (
        f'id, label ,path\r\n1,b,{photos}/photos/0/0.png\r\n\r\n2, a, "photos/1/one, two\n.png"\r\n'
    )
    data = read(write(photos, text, "utf-8-sig"))
    assert list(data.files) == [f"{photos}/photos/0/0.png", f"{photos}/photos/1/one, two\n.png"]
    assert (data.classes, data.labels.tolist()) == (["a", "b"], [1, 0])
    assert data.decode(1).size == (12, 10)
    assert read(str(photos / "list.csv"), "test") is None


def test_a_list_beside_the_program(photos, monkeypatch):
    write(photos, rows())
    monkeypatch.chdir(photos)
    data = read("list.csv", check_files=True)
    assert data.files[3] == "photos/1/3.png"
    assert data.fingerprint() == read(f"{photos}/list.csv").fingerprint()


def test_lists_without_labels_or_with_one_class(photos):
    file = write(photos, rows(" " * 8, TWO_PARTS))
    train, test = read(file), read(file, "test")
    assert train.labels is train.classes is None
    sentence = f"the training images in {file} have no labels of two or more classes"
    assert find_obstacle(train, test) == sentence
    file = write(photos, rows("ababaaaa", TWO_PARTS))
    sentence = f"the validation images in {file} have no labels of two or more classes"
    assert find_obstacle(read(file), read(file, "test")) == sentence
    file = write(photos, rows("abcabaca", TWO_PARTS))
    assert find_obstacle(read(file), read(file, "test")).startswith("class b is among the training")
    file = write(photos, rows())
    assert find_obstacle(read(file), None) == (
        f"there are no validation images; {file} has no row whose part is val"
    )


def test_a_list_is_cached_beside_it(photos):
    file = write(photos, rows(parts=TWO_PARTS))
    plain, cached = read(file), read(file, cache=8)
    assert cached.path.startswith(f"{file}.cache8/list-train-")
    assert read(file, "test", cache=8).path.startswith(f"{file}.cache8/list-test-")
    assert cached.decode(0).size == (9, 8)
    assert cached.labels.tolist() == plain.labels.tolist()
    views, _ = next(ordered_batches(cached, torch.arange(5), "eval", 8, torch.device("cpu")))
    assert views.shape == (5, 3, 8, 8)


HEADER = "path,label,part\n"
BAD = {
    "": "is empty; its first line must name the columns path and label",
    HEADER: "names no images below its first line",
    "path,class\na,b\n": "has no column label, for its first line is path,class; it must",
    "path;label\na;b\n": "has no column path, for its first line is path;label",
    "path,label,label\n": "has the column label twice",
    HEADER + "a.png\n": "line 2 has 1 fields and the first line 3",
    HEADER + "\na, b.png,c,train\n": "line 3 has 4 fields .* needs quotation marks",
    HEADER + ",a,train\n": "line 2 holds no path of an image",
    HEADER + "a\0.png,a,train\n": "line 2 holds a zero byte",
    HEADER + "a.png,a,test\n": "line 2 has the part 'test'; it must be train or val",
    HEADER + "a.png,a,val\n": "has no row whose part is train",
    HEADER + "a.png,,train\nb.png,a,train\n": "line 3 has a label and line 2 has none",
    HEADER + "a.png,caf\u00e9,train\nb.png,cafe\u0301,val\n": (
        r"the classes 'caf\\xe9' \(line 2\) and 'cafe\\u0301' \(line 3\) print alike"
    ),
    HEADER + "a.png,a,train\nb.png,a,train\na.png,b,val\n": (
        "names a.png twice, in line 2 and in line 4"
    ),
    HEADER + '"a.png,a,train\n': "is no CSV file .unexpected end of data.; is there a quotation",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_lists_are_refused_in_a_sentence(tmp_path, text):
    with pytest.raises(SystemExit, match=BAD[text]) as refusal:
        read(write(tmp_path, text))
    assert "list.csv" in refusal.value.code
    assert "\n" not in refusal.value.code


def test_lists_that_are_no_files_or_no_text(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="list: there is no file .*nowhere.csv; set data.root"):
        read(str(tmp_path / "nowhere.csv"))
    with pytest.raises(SystemExit, match="is a folder; set data.root .* or take the name folder"):
        read(str(tmp_path))
    with pytest.raises(SystemExit, match="is not UTF-8, for it holds the byte 0xe9; save it"):
        read(write(tmp_path, "path,label\ncaf\u00e9.png,a\n", "latin-1"))
    monkeypatch.setattr(image_list, "open", refuse_to_open, raising=False)
    with pytest.raises(SystemExit, match=r"list.csv cannot be read \(Permission denied\)"):
        read(str(tmp_path / "list.csv"))


def test_a_list_that_is_taken_for_a_folder_names_the_set(photos):
    file = write(photos, rows())
    with pytest.raises(SystemExit, match="there is no folder .*list.csv; .* is the set list$"):
        load("pretrain", 0, name="folder", root=file)


def refuse_to_open(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_images_that_are_not_there_are_counted_and_the_first_is_named(photos, capsys):
    file = write(photos, rows())
    os.remove(photos / "photos/1/3.png")
    os.remove(photos / "photos/0/6.png")
    sentence = "list.csv names 8 images, of which 2 are not there, the first is .*/photos/1/3.png;"
    with pytest.raises(SystemExit, match=sentence):
        read(file)
    data = read(file, on_error="skip")
    assert "WARNING: " in capsys.readouterr().out
    broken = {}
    assert data.decode_or_replace(3, broken).size == (12, 10)
    assert "3.png cannot be read" in broken[3]


def test_each_folder_of_a_list_is_listed_once_and_no_image_looked_at(photos, monkeypatch):
    file, listed, listdir = write(photos, rows()), [], os.listdir
    monkeypatch.setattr(os.path, "exists", None)
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listdir(path))
    data = read(file)
    monkeypatch.undo()
    assert listed == [f"{photos}/photos/0", f"{photos}/photos/1"]
    assert data.files.names.nbytes == 8 * len("photos/0/0.png ")


def test_pretraining_probe_and_fine_tuning_on_a_list(start, photos):  # noqa: F811
    write(photos, rows("aabbaabb", ["train"] * 4 + ["val"] * 4))
    settings = ["data.name=list", "data.root=list.csv", "optim.batch_size=4"]
    out = start(train_pretrain, *settings)
    assert "untrained: kNN" in out
    assert "epoch   1/1" in out
    line = ["linear.batch_size=2", "linear.data=list", "linear.root=list.csv"]
    assert "on list list.csv: 4 training and 4 test images" in start(train_linear, *settings, *line)
    share = ["finetune.batch_size=2", "finetune.epochs=1", "finetune.labels=1.0"]
    assert "on list: " in start(train_finetune, *settings, *share)
