"""data.mean and data.std `auto`, measured once and kept; and folders of grey images."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import real

import train_finetune
import train_linear
import train_pretrain
import yaml
from data.augment import hue, saturation
from data.datasets import STATISTICS, load
from data.statistics import say_if_grey
from engine import config
from engine.weights import carried_statistics
from processes import run
from test_odd_folders import QUICK, TINY, put_images, start  # noqa: F401

AUTO = {"mean": "auto", "std": "auto"}
LINE = ["data.mean=auto", "data.std=auto"]


def put_grey(folder, modes=("L", "LA", "1", "I;16", "JPEG"), names="abcdefghij"):
    """Grey images of several modes, ten of them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        mode = modes[i % len(modes)]
        if mode == "I;16":
            pixels = rng.integers(0, 2**16, (9, 9), dtype=np.uint16)
            Image.fromarray(pixels).save(folder / f"{name}.png")
            continue
        image = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8))
        if mode == "JPEG":
            image.save(folder / f"{name}.jpg")
        else:
            image.convert(mode).save(folder / f"{name}.png")


def literal(images):
    """Of images (n, 3, H, W) uint8: the mean and std of each channel, of 4 digits, as a list."""
    x = images.numpy() / 255
    return [[float(f"{value:.4g}") for value in f(axis=(0, 2, 3))] for f in (x.mean, x.std)]


def test_auto_is_the_mean_and_std_over_all_pixels(capsys):
    data = load("pretrain", 0, 32, name="shapes", limit=100, **AUTO)
    mean, std = literal(data.images)
    assert (list(data.mean), list(data.std)) == (mean, std)
    assert capsys.readouterr().out == (
        f"auto: data.mean={mean} data.std={std}, measured on 100 of 100 training images; the "
        "numbers may be written into the file\n"
    )
    one = load("train", 0, 32, name="shapes", limit=100, mean="auto", std=[0.1, 0.2, 0.3])
    assert (list(one.mean), list(one.std)) == (mean, [0.1, 0.2, 0.3])
    assert "data.std" not in capsys.readouterr().out
    other = load("train", 0, 32, name="shapes", limit=100, std="auto")
    assert (other.mean, list(other.std)) == (STATISTICS["shapes"][0], std)


def test_real_cifar10():
    root = os.path.dirname(real("cifar-10-batches-py"))
    data = load("pretrain", 0, 32, name="cifar10", root=root, **AUTO)
    for values, expected in zip((data.mean, data.std), STATISTICS["cifar10"]):
        assert values == pytest.approx(expected, abs=0.015)


def test_auto_sees_folders_as_evaluation_does(tmp_path):
    """Images of any size, cached or not, by workers or without; a broken one may be skipped."""
    put_images(tmp_path / "all", 6)
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "all" / "6.png")
    given = {"name": "folder", "root": str(tmp_path / "all"), **AUTO}
    first = load("pretrain", 0, 8, **given)
    for workers, cache in ((0, None), (2, None), (0, 30)):
        data = load("pretrain", 0, 8, workers, **given, cache=cache)
        assert (data.mean, data.std) == (first.mean, first.std)
    for seed in (0, 1):  # the numbers are the whole folder's, so that seeds share them
        assert load("pretrain", seed, 8, 0, **given, limit=2).mean == first.mean
    (tmp_path / "all" / "7.png").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="7.png cannot be read as an image"):
        load("pretrain", 0, 8, 0, **given)
    assert load("pretrain", 0, 8, 0, **given, on_error="skip").mean != first.mean


@pytest.mark.parametrize("cache", [None, 8])
def test_grey_files_have_three_equal_channels_and_statistics(tmp_path, capsys, cache):
    put_grey(tmp_path / "grey")
    given = {"name": "folder", "root": str(tmp_path / "grey"), "cache": cache}
    data = load("pretrain", 0, 8, 0, **given, **AUTO)
    for values in (data.mean, data.std):
        assert len(set(values)) == 1
        assert 0.1 < values[0] < 0.6
    for row in range(10):
        pixels = np.asarray(data.decode(row))
        assert pixels.shape[2] == 3
        assert (pixels == pixels[..., :1]).all()
    capsys.readouterr()
    say_if_grey(data, augment="moco_v2")
    assert capsys.readouterr().out == (
        "all 10 images that were looked at are grey: of data.augment=moco_v2 hue and saturation "
        "change nothing in them, brightness and contrast do\n"
    )
    say_if_grey(data, augment="crop_flip")
    put_images(tmp_path / "grey" / "colours", 1)
    say_if_grey(load("pretrain", 0, 8, 0, **given), augment="moco_v2")
    (tmp_path / "grey" / "a.png").write_bytes(b"broken")
    say_if_grey(load("pretrain", 0, **given | {"cache": None}), augment="moco_v2")
    assert "looked at are grey" not in capsys.readouterr().out


def test_hue_and_saturation_leave_grey_as_it_is():
    x = torch.rand(4, 1, 8, 8).expand(-1, 3, -1, -1)
    value = torch.tensor([-0.4, -0.1, 0.2, 0.4]).view(4, 1, 1, 1)
    assert torch.allclose(hue(x.clone(), value), x, atol=1e-6)
    assert torch.allclose(saturation(x.clone(), 1 + value), x, atol=1e-6)


def test_what_auto_cannot_be_is_refused(tmp_path):
    Image.new("L", (8, 8), 7).save(tmp_path / "0.png")
    given = {"name": "folder", "root": str(tmp_path)}
    with pytest.raises(SystemExit, match="data.std is auto, but a channel has one value in all 1"):
        load("pretrain", 0, 8, 0, **given, **AUTO)
    assert load("pretrain", 0, 8, 0, **given, mean="auto").mean == (0.02745,) * 3
    with pytest.raises(SystemExit, match="data.mean is auto, which is measured on training images"):
        load("test", 0, **given, mean="auto")
    for wrong in ("data.mean=autp", "data.std=0.5"):
        with pytest.raises(SystemExit, match="must be a list of numbers or auto or null"):
            config.load(QUICK, [wrong])


# -------------------------------------------------- the numbers of a run are kept


def settings_of(folder):
    with open(os.path.join(folder, "config.yaml")) as f:
        data = yaml.safe_load(f)["data"]
    return {key: data[key] for key in ("mean", "std")}


def test_a_run_goes_on_and_is_evaluated_with_its_own_numbers(start, monkeypatch):  # noqa: F811
    """Though all of its images were replaced by others meanwhile."""
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        put_images(f"data/{folder}")
    out = start(train_pretrain, *LINE)
    kept = settings_of("runs/a")
    assert f"auto: data.mean={kept['mean']} data.std={kept['std']}, measured on 16 of 16" in out
    with open("runs/a/backbone.preprocessing.yaml") as f:
        assert yaml.safe_load(f).items() >= kept.items()
    assert carried_statistics("runs/a/backbone.pt") == kept
    assert carried_statistics("runs/a/last.pt") == kept

    for folder in ("train/a", "train/b", "val/a", "val/b"):
        for i in range(8):
            Image.effect_noise((8, 8), 9).convert("RGB").save(f"data/{folder}/{i}.png")
    assert "measured" not in start(train_pretrain, *LINE)
    assert settings_of("runs/a") == kept
    written = [f"data.{key}={values}" for key, values in kept.items()]
    assert "epoch   1/1" not in start(train_pretrain, *written)
    tiny = "finetune.batch_size=2", "finetune.epochs=1"
    for script in (train_linear, train_finetune):
        out = start(script, *LINE, *tiny)
        said = f"{' '.join(written)}, with which runs/a/backbone.pt was trained"
        assert said in out
    out = start(train_finetune, *LINE, "--weights", "none", "--fresh", *tiny)
    assert "measured on 16 of 16 training images" in out
    assert settings_of("runs/a") == kept
    start(train_pretrain, *LINE, "--fresh")
    assert settings_of("runs/a") != kept


def test_two_processes_read_one_list_and_measure_what_one_measures(tmp_path):
    put_images(tmp_path / "data", 8)
    files = [f"data/{i}.png" for i in range(8)]
    (tmp_path / "a.csv").write_text("path,label\n" + "".join(f"{file},\n" for file in files))
    images = [np.asarray(Image.open(tmp_path / file)) for file in files]
    mean, std = literal(torch.tensor(np.stack(images)).permute(0, 3, 1, 2))
    line = ["--cfg", QUICK, *TINY, *LINE, "data.name=list", "data.root=a.csv", "knn.every=0"]
    done = run(tmp_path, "train_pretrain.py", *line, processes=2)
    assert settings_of(tmp_path / "runs" / "a") == {"mean": mean, "std": std}
    assert done.stdout.count("measured on 8 of 8 training images") == 1
    os.remove(tmp_path / "data" / "5.png")
    done = run(tmp_path, "train_pretrain.py", *line, processes=2, check=False)
    assert done.returncode == 1
    assert "a.csv names 8 images, of which 1 are not there, the first is data/5.png" in done.stderr


def test_weights_from_elsewhere_say_nothing(tmp_path):
    for saved in ({"settings": 3}, {"settings": {"data": []}}, {"mean": [1.0]}):
        torch.save(saved, tmp_path / "a.pt")
        assert carried_statistics(str(tmp_path / "a.pt")) == {"mean": None, "std": None}
