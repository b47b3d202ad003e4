"""Image files as they come: odd, broken, missing.

What can be read is read right; what cannot is named, or with data.on_error=skip replaced and
counted.
"""

import contextlib
import os
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from data import image_files
from data.datasets import ArraySet, load
from data.loader import Loader, ordered_batches
from data.shapes import shapes

CPU = torch.device("cpu")
GREY = np.add.outer(np.arange(40), np.arange(48)).astype(np.uint8) * 2  # 0 to 172
RGB = Image.fromarray(np.stack([GREY, 255 - GREY, GREY // 2], 2))


def animated(path, **options):
    RGB.save(path, save_all=True, append_images=[Image.new("RGB", (48, 40))], **options)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(path, "JPEG", exif=exif, quality=95)


def palette(path, transparency):
    RGB.quantize(64).save(path, "PNG", transparency=transparency)


def png(path, width, height):
    """A few bytes that promise many pixels."""
    put_png(path, width, height, 8, bytes(1000))


def put_png(path, width, height, bits, rows):
    """A PNG of colours whose rows are given as bytes."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    put(path, b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def chunk(kind, data):
    """A part of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def put(path, data):
    with open(path, "wb") as f:
        f.write(data)


def cut(path, share, kind="JPEG"):
    RGB.save(path, kind)
    os.truncate(path, int(os.path.getsize(path) * share))


def linked(path):
    RGB.save(os.path.join(os.path.dirname(path), "target of a link"), "JPEG")
    os.symlink("target of a link", path)


sixteen = Image.fromarray(GREY.astype(np.uint16) * 257)
# name -> (how it is made, what a decoder makes of it: None for RGB, up to JPEG's losses)
GOOD = {
    "jpeg.jpg": (lambda p: RGB.save(p, quality=95), None),
    "progressive.jpeg": (lambda p: RGB.save(p, quality=95, progressive=True), None),
    "capitals.JPEG": (lambda p: RGB.save(p, quality=95), None),
    "png.png": (RGB.save, None),
    "bmp.bmp": (RGB.save, None),
    "ppm.ppm": (RGB.save, None),
    "tiff.tif": (RGB.save, None),
    "webp.webp": (lambda p: RGB.save(p, lossless=True), None),
    "link.jpg": (linked, None),
    "grey.png": (Image.fromarray(GREY).save, GREY),
    "grey.jpg": (lambda p: Image.fromarray(GREY).save(p, quality=95), GREY),
    "pgm.pgm": (Image.fromarray(GREY).save, GREY),
    "grey and alpha.png": (Image.fromarray(GREY).convert("LA").save, GREY),
    "alpha.png": (RGB.convert("RGBA").save, None),
    "one bit.png": (Image.new("1", (48, 40), 1).save, 255),
    "cmyk.jpg": (lambda p: RGB.convert("CMYK").save(p, quality=95), None),
    "cmyk.tif": (RGB.convert("CMYK").save, None),
    "16 bits.png": (sixteen.save, GREY),
    "16 bits.tiff": (sixteen.save, GREY),
    "16 bits.pgm": (sixteen.save, GREY),
    "palette.png": (lambda p: palette(p, None), None),
    "palette, one clear.png": (lambda p: palette(p, 3), None),
    "palette, some clear.png": (lambda p: palette(p, bytes(range(64))), None),
    "animated.webp": (lambda p: animated(p, lossless=True), None),
    "animated gif.png": (lambda p: animated(p, format="GIF"), None),
    "animated.png": (animated, None),
    "pages.tif": (animated, None),
    "mpo.jpg": (lambda p: animated(p, format="MPO", quality=95), None),
    "a png.jpg": (lambda p: RGB.save(p, "PNG"), None),
    "a jpeg.png": (lambda p: RGB.save(p, "JPEG", quality=95), None),
    "rotated by exif.jpg": (rotated, None),
    "one pixel.png": (Image.new("RGB", (1, 1), (9, 9, 9)).save, 9),
    "thin.png": (Image.new("RGB", (1, 900), (9, 9, 9)).save, 9),
    "flat.png": (Image.new("RGB", (900, 1), (9, 9, 9)).save, 9),
    "a\nline.png": (RGB.save, None),
}
# name -> (how it is made, what is said of it; whether its status tells, as data.check_files asks)
BAD = {
    "empty.jpg": (lambda p: put(p, b""), "it is empty", True),
    "no image.jpg": (lambda p: put(p, b"not a picture"), "cannot identify image file", False),
    "random.png": (
        lambda p: put(p, np.random.default_rng(0).bytes(3000)),
        "cannot identify image file",
        False,
    ),
    "zeros.jpg": (lambda p: put(p, bytes(3000)), "cannot identify", False),
    "half.jpg": (lambda p: cut(p, 0.5), "[Tt]runcated", False),
    "half.png": (lambda p: cut(p, 0.5, "PNG"), "truncated", False),
    "half.tif": (lambda p: cut(p, 0.5, "TIFF"), "", False),
    "half.webp": (lambda p: cut(p, 0.5, "WEBP"), "", False),
    "head.jpg": (lambda p: cut(p, 0.1), "", False),
    "half.bmp": (lambda p: cut(p, 0.5, "BMP"), "truncated", False),
    "page.jpg": (
        lambda p: put(p, b"<!DOCTYPE html><html>404 Not Found</html>"),
        "cannot identify",
        False,
    ),
    "eps.jpg": (lambda p: RGB.save(p, "EPS"), "cannot identify", False),
    "bomb.png": (lambda p: png(p, 60000, 60000), "3600000000 pixels. exceeds limit", False),
    "wide.png": (lambda p: png(p, 2**31 - 1, 2**31 - 1), "", False),
    "no size.png": (lambda p: png(p, 0, 0), "", False),
    "float.tif": (Image.fromarray(GREY.astype(np.float32)).save, "32 bits a pixel", False),
    "32 bits.tif": (Image.fromarray(GREY.astype(np.int32)).save, "32 bits a pixel", False),
    "dangling.jpg": (lambda p: os.symlink("nowhere", p), "No such file|not there", True),
    "loop.jpg": (lambda p: os.symlink(os.path.basename(p), p), "symbolic links|not there", True),
    "pipe.jpg": (os.mkfifo, "not a file", True),
}


def loader(dataset, workers=0, batch=4, **settings):
    settings = {"augment": "moco_v2", "image_size": 16, **settings}
    return Loader(dataset, batch, 2, 0, CPU, **settings, workers=workers)


def good(folder, n=7, first=0):
    os.makedirs(folder, exist_ok=True)
    for i in range(n):
        image = Image.fromarray(np.full((20, 24, 3), (30 * i + 10) % 256, np.uint8))
        image.save(os.path.join(folder, f"m{first + i}.png"))
    return str(folder)


def views(ld):
    """-> all views of an epoch, all indices."""
    parts = list(ld.epoch(1))
    return torch.stack([torch.cat(v) for v, _ in parts]), torch.cat([index for _, index in parts])


@pytest.fixture
def classes(tmp_path):
    """train/ and val/, two classes of six images each; train/a/m2.png is broken."""
    for part in ("train", "val"):
        for c in "ab":
            good(tmp_path / part / c, 6)
    put(tmp_path / "train" / "a" / "m2.png", b"not a picture")
    return str(tmp_path)


# -------------------------------------------------- what can be read


def test_every_kind_of_image_is_read_right_with_any_number_of_workers(tmp_path, recwarn):
    for name, (make, _) in GOOD.items():
        make(str(tmp_path / name))
    data = load("pretrain", 0, name="folder", root=str(tmp_path))
    assert len(data) == len(GOOD) == 35
    for i, file in enumerate(data.files):
        image, want = data.decode(i), GOOD[os.path.basename(file)][1]
        got = np.asarray(image).astype(float)
        if want is None:
            want = np.asarray(RGB, float)
        elif np.ndim(want):
            want = np.broadcast_to(np.asarray(want, float)[..., None], got.shape)
        else:
            want = np.full(got.shape, want)
        # EXIF's rotation is not done.
        assert image.mode == "RGB", file
        assert got.shape == want.shape, file
        assert np.abs(got - want).mean() < 5, file
    for backend in ("batched", "pil"):
        (a, i), (b, j) = (views(loader(data, w, 5, augment_backend=backend)) for w in (0, 2))
        assert torch.equal(a, b)
        assert torch.equal(i, j)
        assert len(i) == 35
    cached = load("pretrain", 0, name="folder", root=str(tmp_path), cache=64)
    for i in range(35):
        if min(data.decode(i).size) <= 40:
            assert np.array_equal(np.asarray(data.decode(i)), np.asarray(cached.decode(i)))
    assert not [w for w in recwarn if "PIL" in w.filename]


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_names_that_are_no_text(tmp_path, capsys):
    folder = good(tmp_path / "all")
    try:
        RGB.save(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    except OSError:
        pytest.skip("this disk has text only")
    data = load("pretrain", 0, name="folder", root=folder, cache=16)
    assert len(data) == 8
    assert len(data.fingerprint()) == 16
    assert views(loader(data, 2))[0].isfinite().all()
    put(data.files[0], b"broken")
    data = load("pretrain", 0, name="folder", root=folder, on_error="skip")
    ld = loader(data)
    list(ld.epoch(0))
    print(ld.replaced())  # an encoder refuses what is no text
    assert r"caf\udce9.png' cannot be read" in capsys.readouterr().out


# -------------------------------------------------- what cannot: stop


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named_in_one_sentence(tmp_path, name):
    folder = good(tmp_path / "all")
    make, message, at_once = BAD[name]
    make(os.path.join(folder, name))
    sentence = (
        rf"^{os.path.join(folder, name)} cannot be read as an image "
        rf"\([^\n]*({message})[^\n]*\); remove or replace it$"
    )
    data = load("pretrain", 0, name="folder", root=folder)
    assert len(data) == 8
    for workers in (0, 2):
        with pytest.raises(SystemExit, match=sentence):  # when it is met
            list(loader(data, workers).epoch(0))
    with pytest.raises(SystemExit, match=sentence) if at_once else contextlib.nullcontext():
        assert len(load("pretrain", 0, name="folder", root=folder, check_files=True)) == 8
    with pytest.raises(SystemExit, match=sentence):
        load("pretrain", 0, name="folder", root=folder, cache=16)
    for cache in (None, 16):
        data = load("pretrain", 0, name="folder", root=folder, on_error="skip", cache=cache)
        ld = loader(data, 2 if cache is None and at_once else 0)
        assert len(data) == 8
        assert views(ld)[0].isfinite().all()
        assert ld.replaced().startswith(
            f"1 of 8 images were replaced by those after them; the first: {folder}/{name}"
        )
    # A cache that skip built is no way around stop.
    with pytest.raises(SystemExit, match="cannot be read"):
        load("pretrain", 0, name="folder", root=folder, cache=16)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    folder = good(tmp_path / "all", 8)
    sentence = r"m3.png cannot be read as an image \(Permission denied\)"
    # Root may read all.
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("m3.png"))
    with pytest.raises(SystemExit, match=sentence):
        load("pretrain", 0, name="folder", root=folder, check_files=True)
    monkeypatch.undo()
    data, original = load("pretrain", 0, name="folder", root=folder), Image.open

    def refuse(path, **options):
        if path.endswith("m3.png"):
            raise PermissionError(13, "Permission denied", path)
        return original(path, **options)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(SystemExit, match=sentence):
        list(loader(data).epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_while_training(tmp_path, workers):
    folder = good(tmp_path / "all", 40)
    for on_error, last in (("stop", -1), ("skip", -2)):
        data = load("pretrain", 0, name="folder", root=folder, on_error=on_error)
        ld = loader(data, workers)
        order = torch.cat([index for index, _ in ld.batch_plan(0)])
        victim = data.files[int(order[last])]
        for step, _ in enumerate(steps := ld.epoch(0)):
            if step == 0:
                os.remove(victim)
            if step == 8 and on_error == "stop":
                sentence = f"{victim} cannot be read as an image .it is not there"
                with pytest.raises(SystemExit, match=sentence):
                    next(steps)
                break
        if on_error == "skip":
            assert step == len(ld) - 1
            assert ld.replaced().startswith("1 of 36")


# -------------------------------------------------- what cannot: skip


def test_a_broken_image_is_replaced_by_the_next_whatever_the_workers_and_batches(tmp_path):
    folder = good(tmp_path / "all", 9)
    for i in (2, 3, 8):
        put(os.path.join(folder, f"m{i}.png"), b"not a picture")
    data = load("pretrain", 0, name="folder", root=folder, on_error="skip")
    runs = []
    for workers in (0, 1, 2):
        ld = loader(data, workers, 3)
        runs.append((*views(ld), ld.replaced()))
    first_views, first_index, replaced = runs[0]
    for epoch_views, index, sentence in runs[1:]:
        assert torch.equal(first_views, epoch_views)
        assert torch.equal(first_index, index)
        assert sentence == replaced
    assert sorted(first_index.tolist()) == list(range(9))
    assert replaced.startswith("3 of 9 images were replaced by those after them; the first: ")
    assert "m2.png cannot" in replaced
    # IFND's look at them: the same pixels.
    steps = ordered_batches(data, torch.arange(9), "eval", 8, CPU, workers=0)
    seen = torch.cat([x[:, 0, 0, 0] for x, _ in steps])
    assert seen[2] == seen[3] == seen[4]
    assert seen[8] == seen[0]
    assert len(seen.unique()) == 6
    ld = loader(data, 0, 3)
    list(ld.epoch(0, first_step=2))
    # of a resumed epoch, its own
    assert len(ld.broken) <= 3
    assert ld.examples(4).shape[0] == 16
    whole = loader(
        load("pretrain", 0, name="folder", root=good(tmp_path / "whole"), on_error="skip")
    )
    assert views(whole)[0].shape[0] == 1
    assert whole.replaced() is None


def test_a_disk_that_is_gone_is_no_broken_image(tmp_path):
    folder = good(tmp_path / "all", 5)
    data = load("pretrain", 0, name="folder", root=folder, on_error="skip")
    for file in data.files:
        os.remove(file)
    with pytest.raises(SystemExit) as refusal:
        list(loader(data).epoch(0))
    assert "cannot be" in refusal.value.code
    assert refusal.value.code.endswith(
        ", and so it is with the 4 images after it, which is too much for data.on_error=skip"
    )
    for i in range(3):
        put(os.path.join(folder, f"{i}.png"), b"no")
    with pytest.raises(SystemExit, match="none of the 3 images can be read"):
        load("pretrain", 0, name="folder", root=folder, on_error="skip", cache=16)


@pytest.mark.parametrize("cache", [None, 16])
def test_evaluation_stops_though_training_skips(classes, cache):
    """A replaced image would be another class's under this one's label.

    And figures of fewer images are not the data set's.
    """
    settings = dict(name="folder", root=classes, on_error="skip", cache=cache, limit=12)
    pretrain, train = (load(part, 0, **settings) for part in ("pretrain", "train"))
    ld = loader(pretrain, batch=12)
    assert pretrain.skip
    assert len(views(ld)[1]) == 12
    assert "m2.png" in ld.replaced()
    for workers in (0, 2):
        with pytest.raises(SystemExit, match="m2.png cannot be read"):
            list(ordered_batches(train, torch.arange(12), "eval", 8, CPU, workers=workers))


# -------------------------------------------------- folders


def test_folders_that_are_not_as_they_should_be(classes, monkeypatch, capsys):
    read = partial(load, "pretrain", 0, name="folder", root=classes)
    train = os.path.join(classes, "train")
    good(os.path.join(train, "a"), 6)
    assert len(read()) == 12
    assert not capsys.readouterr().out
    os.makedirs(os.path.join(train, "c", "deeper"))
    empty = f"{train}/c holds no images .*a folder here is a class; fill it or remove it"
    with pytest.raises(SystemExit, match=empty):
        read()
    os.symlink(train, os.path.join(train, "c", "deeper", "up"))
    with pytest.raises(SystemExit, match="deeper/up is a link to .*train, which holds it"):
        read()
    os.remove(os.path.join(train, "c", "deeper", "up"))
    # As torchvision, we follow links.
    elsewhere = os.path.join(classes, "val", "a")
    os.symlink(elsewhere, os.path.join(train, "c", "deeper", "elsewhere"))
    assert len(read()) == 18
    assert read().classes == ["a", "b", "c"]
    os.symlink("nowhere", os.path.join(train, "d"))
    with pytest.raises(SystemExit, match=f"{train}/d is a link to what is not there"):
        read()
    os.remove(os.path.join(train, "d"))
    RGB.save(os.path.join(train, "b", "x.gif"))
    put(os.path.join(train, "b", "notes.txt"), b"of no interest")
    assert len(read()) == 18
    printed = capsys.readouterr().out
    assert "1 files under" in printed
    assert printed.strip().endswith("b/x.gif")
    original = os.scandir

    def refuse(path):
        if path.endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SystemExit, match=f"{train}/b cannot be listed .Permission denied"):
        read()


def test_two_folders_that_link_to_each_other_end(tmp_path):
    for a, b in ("xy", "yx"):
        good(tmp_path / a)
        os.symlink(tmp_path / b, tmp_path / a / "other")
    with pytest.raises(SystemExit, match="which holds it, and so on without end"):
        load("pretrain", 0, name="folder", root=str(tmp_path))


# -------------------------------------------------- the same data set?


def test_fingerprints_know_files_added_removed_renamed_and_not_where_they_lie(classes):

    def read(root=classes, seed=0, **settings):
        return load("pretrain", seed, name="folder", root=root, **settings).fingerprint()

    good(os.path.join(classes, "train", "a"), 6)
    first, file = read(), os.path.join(classes, "train", "b", "m5.png")
    assert first == read() == read(cache=16) == read(on_error="skip")
    assert len({first, read(limit=4), read(seed=1, limit=4)}) == 3
    os.rename(classes, classes + " moved")
    assert read(classes + " moved") == first == read(os.path.relpath(classes + " moved"))
    os.rename(classes + " moved", classes)
    seen = {first}
    for change in (
        lambda: os.rename(file, file[:-4] + "x.png"),
        lambda: os.remove(file[:-4] + "x.png"),
        lambda: RGB.save(file[:-5] + "0a.png"),
    ):
        change()
        seen.add(read())
    assert len(seen) == 4
    images, labels = map(torch.from_numpy, shapes(40))
    sets = (images, labels), (images, None), (images[:39], labels), (images.flip(0), labels)
    prints = [ArraySet(x, y, None, None, None).fingerprint() for x, y in sets]
    # labels are no part of it
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_run_goes_on_with_a_broken_image_replaced_as_its_sentence_advises(classes):
    data = load("pretrain", 0, name="folder", root=classes)
    with pytest.raises(ValueError, match="m2.png cannot be read .*; remove or replace it"):
        data.decode(2)
    RGB.save(data.files[2])
    again = load("pretrain", 0, name="folder", root=classes)
    assert again.fingerprint() == data.fingerprint()
    assert again.decode(2).size == RGB.size


def test_data_check_files_looks_once_at_each_file_and_opens_none(tmp_path, monkeypatch):
    """One stat and one access each, in one process of each node; the first in order is named."""
    files = [str(tmp_path / f"{i:04d}.jpg") for i in range(1200)]
    for file in files:
        put(file, b"x")
    original, stats, accesses, nodes = os.stat, [], [], []

    def run_on_first(function, per_node):
        nodes.append(per_node)
        return function()

    monkeypatch.setattr(image_files.distributed, "run_on_first", run_on_first)
    monkeypatch.setattr(
        os, "stat", lambda path, **options: stats.append(path) or original(path, **options)
    )
    monkeypatch.setattr(os, "access", lambda path, mode: accesses.append(path) or True)
    load("pretrain", 0, name="folder", root=str(tmp_path), check_files=True)
    assert sorted(file for file in stats if file.endswith(".jpg")) == sorted(accesses) == files
    assert nodes == [True]
    monkeypatch.undo()
    os.remove(files[700])
    put(files[1100], b"")
    with pytest.raises(SystemExit, match="0700.jpg cannot be read as an image .it is not there"):
        image_files.check_all_files(files)
    with pytest.raises(SystemExit, match="1100.jpg cannot be read as an image .it is empty"):
        load("pretrain", 0, name="folder", root=str(tmp_path), check_files=True)


# -------------------------------------------------- 16 bits


def sixteen_bits(folder, bits, n=40):
    """n grey images whose values go up to all of that many bits."""
    os.makedirs(folder, exist_ok=True)
    for i in range(n):
        ramp = np.linspace(0, 2**bits - 1 - i, 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(ramp).save(os.path.join(folder, f"{i:02d}.png"))
    return load("pretrain", 0, name="folder", root=str(folder))


def test_few_bits_in_a_file_of_16_are_told_once(tmp_path, capsys, monkeypatch):
    opened, original = [], image_files.open_image
    monkeypatch.setattr(
        image_files, "open_image", lambda file: opened.append(file) or original(file)
    )
    image_files.say_if_dark(sixteen_bits(tmp_path / "12", 12))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert len(opened) == 14  # every third of 40
    assert f"{tmp_path}/12/00.png has 16 bits" in printed
    assert "highest value is 4095 of 65535" in printed
    assert "multiplied by 16\n" in printed
    image_files.say_if_dark(sixteen_bits(tmp_path / "8", 8, 2))
    assert "multiplied by 256\n" in capsys.readouterr().out


def test_nothing_is_told_of_bright_broken_or_8_bit_images(tmp_path, capsys, monkeypatch):
    bright = sixteen_bits(tmp_path / "all", 16, 3)
    put(bright.files[1], b"broken")
    for made in (bright, load("pretrain", 0, name="shapes", limit=12)):
        image_files.say_if_dark(made)
    rgb = load("pretrain", 0, name="folder", root=good(tmp_path / "rgb"))
    monkeypatch.setattr(np, "asarray", None)  # the pixels of 8 bits are not read
    image_files.say_if_dark(rgb)
    assert not capsys.readouterr().out


def rgb_png_of_16_bits(path, value):
    """8 x 8 pixels, all channels of that value; PIL itself writes none."""
    put_png(path, 8, 8, 16, (b"\0" + struct.pack(">H", value) * 24) * 8)


def test_colours_of_16_bits_are_looked_at_too(tmp_path):
    for value in (300, 4000, 65535):
        rgb_png_of_16_bits(tmp_path / "x.png", value)
        assert image_files.highest_of_16_bits(str(tmp_path / "x.png")) == value | 255
