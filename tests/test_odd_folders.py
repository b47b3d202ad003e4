"""Folders of images as people have them, through the scripts: what trains, and what is said."""

import os
import shutil
import subprocess
import sys
import textwrap
import unicodedata

import numpy as np
import pytest
from PIL import Image, features

import train_linear
import train_pretrain
from data.datasets import find_obstacle, load
from data.image_files import foreign_format
from processes import run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUICK = os.path.join(ROOT, "yaml", "quickstart.yaml")
TINY = [
    "data.name=folder",
    "data.limit=null",
    "data.image_size=8",
    "data.workers=0",
    "optim.batch_size=8",
    "optim.epochs=1",
    "model.width=8",
    "model.precision=fp32",
    "model.queue_size=16",
    "linear.epochs=1",
    "linear.batch_size=8",
    "name=a",
]


def put_images(folder, n=8, side=8, seed=0):
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(os.path.join(folder, f"{i}.png"))


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """start(script, *settings): run a script's main() on tmp_path/data -> what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    def run(script, *settings):
        arguments = [script.__name__, "--cfg", QUICK, *TINY, "data.root=data", *settings]
        monkeypatch.setattr(sys, "argv", arguments)
        script.main()
        return capsys.readouterr().out

    return run


def test_validation_images_without_class_folders(start):
    """As ILSVRC2012 and tiny-imagenet unpack."""
    for folder in ("train/a", "train/b", "val/images"):
        put_images(f"data/{folder}")
    out = start(train_pretrain)
    reason = "the validation images in data/val/images are not in two or more class folders; move"
    assert f"no kNN: {reason} each" in out
    assert "epoch   1/1" in out
    assert "linear.data=folder linear.root=PATH\n      where PATH holds train/<class>/" in out
    with pytest.raises(SystemExit) as refusal:
        start(train_linear)
    assert f"no linear probe on folder at data: {reason}" in refusal.value.code
    assert "\n" not in refusal.value.code
    for part in ("train", "val"):  # the way out works
        for name in "ab":
            put_images(f"probe/{part}/{name}")
    assert "raw pixels" in start(train_linear, "linear.data=folder", "linear.root=probe")


def test_a_class_that_one_part_lacks_does_not_stop_training(start):
    for folder in ("train/a", "train/b", "train/c", "val/a", "val/b"):
        put_images(f"data/{folder}")
    os.mkdir("data/val/c")  # empty, it is no class either
    out = start(train_pretrain)
    reason = "class c is among the training images and not among the validation images"
    assert f"no kNN: {reason}" in out
    assert "epoch   1/1" in out
    with pytest.raises(SystemExit, match=f"no linear probe on folder at data: {reason}"):
        start(train_linear)


def test_a_flat_folder_is_told_of_a_probe_that_can_run(start):
    put_images("data")
    out = start(train_pretrain, "linear.data=cifar10")
    assert "no kNN: there are no validation images" in out
    assert "linear.root=PATH" not in out
    out = start(train_pretrain, "name=b")
    command = out[out.index("next: ") :].splitlines()[0]
    assert command.endswith("name=b linear.data=folder linear.root=PATH")


def test_skipping_says_before_training_that_knn_does_not(start, capsys):
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        put_images(f"data/{folder}")
    with open("data/val/b/3.png", "wb") as f:
        f.write(b"broken")
    with pytest.raises(SystemExit, match="val/b/3.png cannot be read .*nothing was saved yet"):
        start(train_pretrain, "data.on_error=skip")
    out = capsys.readouterr().out
    assert "kNN stops the run at the first image that cannot be read" in out
    assert "epoch   1/1" in start(train_pretrain, "data.on_error=skip", "knn.every=0")


# -------------------------------------------------- find_obstacle


def obstacle(root):
    train, test = (load(part, 0, name="folder", root=str(root)) for part in ("train", "test"))
    return find_obstacle(train, test)


def test_names_that_print_alike_are_told_apart(tmp_path):
    for part, form in (("train", "NFD"), ("val", "NFC")):
        put_images(tmp_path / part / unicodedata.normalize(form, "caf\u00e9"), 1)
        put_images(tmp_path / part / "tea", 1)
    sentence = obstacle(tmp_path)
    assert (
        r"class 'cafe\u0301' (beside 'caf\xe9', which prints alike) is among the train" in sentence
    )
    for part, form in (("train", "NFC"), ("val", "NFD")):  # now both parts have both
        put_images(tmp_path / part / unicodedata.normalize(form, "caf\u00e9"), 1)
    assert obstacle(tmp_path) == (
        r"the classes 'cafe\u0301' and 'caf\xe9' print alike; put their images into one class"
    )


def test_obstacles_of_either_part(tmp_path):
    for folder in ("train/a", "train/b", "val/a", "val/b", "val/c", "val/d"):
        put_images(tmp_path / folder, 1)
    assert obstacle(tmp_path).startswith("class c and 1 more are among the validation images and")
    for name in "cd":
        shutil.rmtree(tmp_path / "val" / name)
    assert obstacle(tmp_path) is None
    shutil.rmtree(tmp_path / "train" / "b")
    assert obstacle(tmp_path).startswith(f"the training images in {tmp_path}/train/a are not in")
    shutil.rmtree(tmp_path / "val")
    assert obstacle(tmp_path).startswith("there are no validation images")
    shapes = load("train", 0, name="shapes", limit=12)
    assert find_obstacle(shapes, load("test", 0, name="shapes")) is None


def test_tiny_imagenet_is_told_how_to_sort_its_validation_images(start):
    """As it unpacks: val/images, and a list that says the class of each."""
    for folder in ("train/a/images", "train/b/images", "val/images"):
        put_images(f"data/{folder}", 4)
    with open("data/val/val_annotations.txt", "w") as f:
        f.writelines(f"{i}.png\t{'ab'[i % 2]}\t0\t0\t8\t8\n" for i in range(4))
    os.rename("data", "of Tiny's")
    command = obstacle("of Tiny's").partition("as val_annotations.txt says: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert obstacle("of Tiny's") is None
    assert sorted(os.listdir("of Tiny's/val")) == ["a", "b", "val_annotations.txt"]


# -------------------------------------------------- roots and files


def test_a_home_folder_may_be_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put_images(tmp_path / "photos", 3)
    data = load("pretrain", 0, name="folder", root="~/photos", cache=8)
    assert data.files[0] == f"{tmp_path}/photos/0.png"
    assert data.path.startswith(f"{tmp_path}/photos.cache8/")


def test_a_probe_on_data_in_the_home_folder(start, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put_images("data")
    start(train_pretrain)
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        put_images(tmp_path / "probe" / folder)
    assert "raw pixels" in start(train_linear, "linear.data=folder", "linear.root=~/probe")


FOREIGN = {
    "an AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1",
    "a HEIC": b"\0\0\0\x24ftypheic\0\0\0\0mif1heic",
    "a JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 ",
    "a JPEG XL": b"\xff\x0a\xfa\x7f\x01\x90\x08\x06\x01\x00\x10\x00",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_format_named_jpg_is_told_as_what_it_is(tmp_path, kind):
    put_images(tmp_path / "all", 2)
    (tmp_path / "all" / "2.jpg").write_bytes(FOREIGN[kind] + bytes(100))
    data = load("pretrain", 0, name="folder", root=str(tmp_path / "all"))
    with pytest.raises(ValueError, match="convert it to one of these.; remove or") as error:
        data.decode(2)
    assert f"2.jpg cannot be read as an image (it is {kind} image, whatever" in str(error.value)


@pytest.mark.skipif(not features.check("avif"), reason="this PIL writes no AVIF")
def test_a_real_avif_is_recognised(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.avif")
    assert foreign_format(str(tmp_path / "a.avif")) == "an AVIF image"


def test_pils_warnings_stay_off_the_screen(tmp_path):
    """Of damaged EXIF, of a palette's transparency, and of many pixels, below PIL's limit."""
    put_images(tmp_path / "all", 1)
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    image.save(tmp_path / "all" / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01")
    clear = bytes(range(64))
    image.quantize(64).save(tmp_path / "all" / "palette.png", transparency=clear)
    (tmp_path / "job.py").write_text(
        textwrap.dedent("""
        import sys
        import warnings
        from PIL import Image
        Image.MAX_IMAGE_PIXELS = 1000          # PIL warns above it, and refuses above twice that
        if sys.argv[1] == "ours":
            from data.datasets import load
            data = load("pretrain", 0, name="folder", root="all", cache=16)
            print(len(data), [data.decode(i).size for i in range(3)])
        else:
            warnings.resetwarnings()
            for name in ("exif.jpg", "palette.png"):
                Image.open("all/" + name).convert("RGB")
    """)
    )
    done = run(tmp_path, tmp_path / "job.py", "ours")
    assert done.stderr == ""
    assert "3 [(8, 8), (21, 16), (21, 16)]" in done.stdout
    plain = run(tmp_path, tmp_path / "job.py", "PIL")
    for warning in ("DecompressionBombWarning", "EXIF", "Transparency"):
        assert warning in plain.stderr
