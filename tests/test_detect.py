"""The script train_detect.py, fine-tuning small R-CNNs on drawn images and on real ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_detect
import yaml
from data import detection
from data.coco_results import average_precision
from detection_data import (
    PARTS,
    VOC_TRAIN,
    VOC_VAL,
    coco_mini_folder,
    make_coco,
    make_voc,
    read_json,
    write_json,
)
from models.rcnn import build_rcnn
from models.resnet import ResNet
from processes import ROOT, run
from test_scripts import same
from train_detect import Detect, predictions

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install -r requirements-dev.txt")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own
MODEL = ["model.backbone=resnet10", "model.stem=imagenet", "model.width=8"]
TINY = {
    "batch_size": 2,
    "lr": 0.01,
    "warmup_iterations": 5,
    "milestones": [],
    "min_size": [96],
    "max_size": 160,
    "proposals": 32,
    "channels": 32,
    "detections": 20,
    "norm": "batch",
    "workers": 0,
}
VOC = {"task": "box", "layout": "voc", "train": VOC_TRAIN, "val": VOC_VAL}
RANDOM = ["--weights", "none"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small gain nothing from more, and on a busy machine their threads wait for each
    other for minutes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """coco_mini with ten training and ten validation images, all with people.

    It is quicker to evaluate.
    """
    source = coco_mini_folder()
    folder = str(tmp_path_factory.mktemp("few"))
    for part in PARTS:
        people = read_json(source, "annotations", f"person_keypoints_{part}.json")
        keep = sorted({a["image_id"] for a in people["annotations"] if a["num_keypoints"]})[:10]
        copy_part(source, folder, part, keep)
    return folder


def copy_part(source, folder, part, keep):
    """A part of a data set in COCO's layout, with the images of some ids alone."""
    os.makedirs(os.path.join(folder, "annotations"), exist_ok=True)
    os.symlink(os.path.realpath(os.path.join(source, part)), os.path.join(folder, part))
    for kind in ("instances", "person_keypoints"):
        name = f"{kind}_{part}.json"
        whole = read_json(source, "annotations", name)
        whole["images"] = [image for image in whole["images"] if image["id"] in keep]
        whole["annotations"] = [a for a in whole["annotations"] if a["image_id"] in keep]
        write_json(whole, folder, "annotations", name)


@pytest.fixture
def voc_devkit(tmp_path):
    return make_voc(tmp_path)


def settings(folder, **detect):
    """Write a --cfg file with a section detect. Returns its path."""
    whole = yaml.safe_load((Path(ROOT) / "yaml" / "quickstart.yaml").read_text())
    (folder / "d.yaml").write_text(yaml.safe_dump({**whole, "detect": {**TINY, **detect}}))
    return str(folder / "d.yaml")


def script(monkeypatch, folder, *arguments):
    """train_detect.py in this process, as importing torch takes longer than it does."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train_detect.py", *MODEL, *arguments])
    train_detect.main()


def refusal(monkeypatch, folder, *arguments):
    """The sentence with which the script ends."""
    with pytest.raises(SystemExit) as error:
        script(monkeypatch, folder, *arguments)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def read_checkpoint(folder, name):
    path = folder / "runs" / name / "detect" / "last.pt"
    return torch.load(path, weights_only=True)


def save_backbone(path, seed=0):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    torch.manual_seed(seed)
    torch.save(ResNet("resnet10", "imagenet", 8).state_dict(), path)


# ------------------------------------------------------------------------------ training


def test_the_schedule():
    detect = Detect(lr=0.02, warmup_iterations=1000, milestones=[60000, 80000])
    rates = [detect.learning_rate(i) for i in (0, 499, 999, 1000, 59999, 60000, 80000)]
    assert rates == pytest.approx([2e-5, 0.01, 0.02, 0.02, 0.02, 2e-3, 2e-4])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mask", "keypoint"])
def test_fine_tuning_on_real_images(few, tmp_path, monkeypatch, capsys, task):
    cfg = settings(tmp_path, task=task, data=few, iterations=51, eval_every=50)
    parent = tmp_path / "runs" / "a"
    save_backbone(parent / "backbone.pt")
    script(monkeypatch, tmp_path, "--cfg", cfg, "name=a")
    folder = parent / "detect"
    files = os.listdir(folder)
    assert {"last.pt", "log.jsonl", "detections.png"} <= set(files)
    assert any(file.startswith("events") for file in files)
    log = lines(folder / "log.jsonl")
    assert [line["epoch"] for line in log] == [1, 21, 41, 50, 51]
    for part in ("loss", "loss_classifier", "loss_objectness", f"loss_{task}"):
        assert log[3][part] < log[0][part]
    assert "loss_box_reg" in log[0]

    one, two = lines(parent / "detect.jsonl")
    assert [one["iteration"], two["iteration"]] == [50, 51]
    assert two["weights"] == os.path.join("runs", "a", "backbone.pt")
    assert two["dataset"] == {"layout": "coco", "root": few, "train": PARTS[0], "val": PARTS[1]}
    assert two["seed"] == 0
    assert two["seconds"] > 0
    assert log[4]["box AP"] == pytest.approx(two["figures"]["box AP"])
    assert set(two["figures"]) == {
        f"{kind} {figure}" for kind in ("box", task) for figure in ("AP", "AP50", "AP75")
    }
    assert all(0 <= value <= 100 for value in two["figures"].values())
    words = "R-CNN, FPN of 32 channels, all layers fine-tuned on train2017"
    assert words in two["protocol"]
    assert Image.open(folder / "detections.png").size[0] > 1600
    assert "AP75" in capsys.readouterr().out

    script(monkeypatch, tmp_path, "--cfg", cfg, "name=a")  # started again: it is finished
    assert "nothing is left to do" in capsys.readouterr().out
    assert len(lines(parent / "detect.jsonl")) == 2


def test_voc_through_the_script(voc_devkit, tmp_path, monkeypatch):
    cfg = settings(tmp_path, **VOC, data=voc_devkit, iterations=60, lr=0.02)
    script(monkeypatch, tmp_path, "--cfg", cfg, *RANDOM, "name=a")
    line = lines(tmp_path / "runs" / "a" / "detect.jsonl")[0]
    log = lines(tmp_path / "runs" / "a" / "detect" / "log.jsonl")
    assert "VOC2007/trainval+VOC2012/trainval" in line["protocol"]
    dataset = {"layout": "voc", "root": voc_devkit, "train": VOC_TRAIN, "val": VOC_VAL}
    assert line["dataset"] == dataset
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert line["figures"]["box AP50"] > 20  # red or blue, always at one place


JOB_THAT_NOTES_IMAGES = """
import json
import os

import train_detect

seen = []
plain_records = train_detect.records

def records(output, image_id, *more):
    seen.append(image_id)
    return plain_records(output, image_id, *more)

train_detect.records = records
train_detect.main()
with open(f"seen{os.environ['RANK']}.json", "w") as f:
    json.dump(seen, f)
"""


@pytest.mark.slow
def test_two_processes_share_the_images_out(few, tmp_path):
    """Three training steps in two gloo processes.

    Then which images each of them looked at, of nine validation images.
    """
    root = str(tmp_path / "nine")
    for part, n in zip(PARTS, (10, 9)):
        whole = read_json(few, "annotations", f"instances_{part}.json")
        copy_part(few, root, part, [image["id"] for image in whole["images"][:n]])
    truth = read_json(root, "annotations", f"instances_{PARTS[1]}.json")
    cfg = settings(tmp_path, task="box", data=root, iterations=3, norm="sync")
    (tmp_path / "job.py").write_text(JOB_THAT_NOTES_IMAGES)
    arguments = ["--cfg", cfg, *MODEL, *RANDOM]
    run(tmp_path, tmp_path / "job.py", *arguments, "name=a", processes=2)
    seen = [read_json(tmp_path, f"seen{rank}.json") for rank in (0, 1)]
    assert [len(of_process) for of_process in seen] == [5, 4]
    assert sorted(seen[0] + seen[1]) == sorted(image["id"] for image in truth["images"])
    saved = read_checkpoint(tmp_path, "a")
    assert len(saved["rng"]) == 2
    assert not torch.equal(saved["rng"][0]["cpu"], saved["rng"][1]["cpu"])

    # The same weights in one process have the same figures.
    _, val = detection.load("coco", root, *PARTS, "box")
    model = build_rcnn(ResNet("resnet10", width=8), 80, Detect(**TINY, task="box"))
    model.load_state_dict(saved["model"])
    images = detection.Images(val, "box")
    found = predictions(model, images, "box", torch.device("cpu"), workers=0)
    detections = [record for of_image in found.values() for record in of_image]
    two = lines(tmp_path / "runs" / "a" / "detect.jsonl")[0]
    assert average_precision(val, detections, "box") == two["figures"]
    assert "BatchNorm over 1 images" in two["protocol"]

    arguments += ["detect.batch_size=3"]
    done = run(tmp_path, "train_detect.py", *arguments, processes=2, check=False)
    assert done.returncode != 0
    assert "batch_size 3 does not divide by 2 processes" in done.stderr


@pytest.mark.slow
def test_two_processes_say_a_refusal_once(tmp_path):
    root = make_coco(tmp_path / "coco", "box", lambda whole: whole["images"][0].update(width=-1))
    cfg = settings(tmp_path, task="box", data=root, train="train", val="val", iterations=3)
    arguments = ["--cfg", cfg, *MODEL, *RANDOM]
    done = run(tmp_path, "train_detect.py", *arguments, processes=2, check=False)
    assert done.returncode == 1
    sentences = done.stderr + (tmp_path / "said1.err").read_text()
    assert sentences.count("image 1: its width is -1") == 1
    assert sentences.count("\n") == 1


# ------------------------------------------------------------------------------ going on


JOB_THAT_IS_KILLED = f"""
import os
import signal
import sys

sys.path.insert(0, {ROOT!r})
import train_detect

plain_save = train_detect.checkpoint.save

def save(path, settings, epoch, **parts):
    if epoch == 3:
        plain_save(path, settings, epoch, **parts)
    else:
        os.killpg(0, signal.SIGKILL)  # the whole group, the worker included

train_detect.checkpoint.save = save
train_detect.main()
"""


@pytest.mark.slow
def test_killed_and_resumed_ends_as_if_undisturbed(few, tmp_path, monkeypatch):
    """SIGKILL instead of the second checkpoint, inside an epoch.

    Sizes and proposals are drawn by chance, order and flips by the epoch.
    """
    changes = {"iterations": 9, "save_every": 3, "min_size": [64, 96], "workers": 1}
    cfg = settings(tmp_path, task="keypoint", data=few, **changes)
    common = ["--cfg", cfg, *RANDOM]
    script(monkeypatch, tmp_path, *common, "name=whole")
    (tmp_path / "job.py").write_text(JOB_THAT_IS_KILLED)
    done = subprocess.run(
        [sys.executable, "job.py", *MODEL, *common, "name=cut"],
        cwd=tmp_path,
        capture_output=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_checkpoint(tmp_path, "cut")["epoch"] == 3
    script(monkeypatch, tmp_path, *common, "name=cut")
    whole, cut = (read_checkpoint(tmp_path, name) for name in ("whole", "cut"))
    assert whole["epoch"] == 9
    for part in ("epoch", "model", "optimizer", "rng"):
        assert same(whole[part], cut[part])
    figures = [
        lines(tmp_path / "runs" / name / "detect.jsonl")[-1]["figures"] for name in ("whole", "cut")
    ]
    assert figures[0] == figures[1]
    with pytest.raises(
        SystemExit,
        match="is of another run: detect.lr was 0.01 and is now 0.5; choose another name=..., or "
        "start this one over with --fresh",
    ):
        script(monkeypatch, tmp_path, *common, "name=cut", "detect.lr=0.5")
    fresh = ["--fresh", "detect.lr=0.02", "detect.iterations=1"]
    script(monkeypatch, tmp_path, *common, "name=cut", *fresh)


def log_of(folder, name):
    """What a run leaves in its log, without the figures that depend on time."""
    log = lines(folder / "runs" / name / "detect" / "log.jsonl")
    return [{key: value for key, value in line.items() if key != "images/s"} for line in log]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class KilledWhen:
    """A function within which the program is killed, when its argument at a position is a value."""

    def __init__(self, function, position, value):
        self.function, self.position, self.value = function, position, value

    def __call__(self, *arguments, **named):
        if arguments[self.position] == self.value:
            raise Killed
        return self.function(*arguments, **named)


@pytest.mark.parametrize("killed_at", [2, 3])
def test_a_kill_within_an_evaluation_loses_nothing(
    voc_devkit, tmp_path, monkeypatch, capsys, killed_at
):
    """The checkpoint is there before; the next start evaluates first, and then goes on."""
    cfg = settings(tmp_path, **VOC, data=voc_devkit, iterations=3, eval_every=2)
    common = ["--cfg", cfg, *RANDOM]
    script(monkeypatch, tmp_path, *common, "name=whole")

    plain_after_step, trained = train_detect.Run.after_step, []

    def after_step(run, done, *more):
        trained.append(done)
        plain_after_step(run, done, *more)

    monkeypatch.setattr(train_detect.Run, "after_step", after_step)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed = KilledWhen(train_detect.evaluate, 4, killed_at)
        patch.setattr(train_detect, "evaluate", killed)
        script(patch, tmp_path, *common, "name=cut")
    saved = read_checkpoint(tmp_path, "cut")
    assert saved["epoch"] == killed_at
    trained.clear()
    capsys.readouterr()
    script(monkeypatch, tmp_path, *common, "name=cut")
    assert (
        f"last.pt is at iteration {killed_at}, which is evaluated first" in capsys.readouterr().out
    )
    assert trained == list(range(killed_at + 1, 4))
    assert log_of(tmp_path, "cut") == log_of(tmp_path, "whole")
    whole, cut = (lines(tmp_path / "runs" / name / "detect.jsonl") for name in ("whole", "cut"))
    assert [line["iteration"] for line in cut] == [2, 3]
    assert [line["figures"] for line in cut] == [line["figures"] for line in whole]
    assert same(*(read_checkpoint(tmp_path, name)["model"] for name in ("whole", "cut")))

    script(monkeypatch, tmp_path, *common, "name=cut")  # and once more: it is finished
    assert "nothing is left to do" in capsys.readouterr().out
    assert len(lines(tmp_path / "runs" / "cut" / "detect.jsonl")) == 2


def test_a_save_after_an_evaluation_asks_for_no_other(voc_devkit, tmp_path, monkeypatch, capsys):
    cfg = settings(tmp_path, **VOC, data=voc_devkit, iterations=4, eval_every=2, save_every=3)
    common = ["--cfg", cfg, *RANDOM, "name=a"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed = KilledWhen(train_detect.checkpoint.save, 2, 4)
        patch.setattr(train_detect.checkpoint, "save", killed)
        script(patch, tmp_path, *common)
    script(monkeypatch, tmp_path, *common)
    printed = capsys.readouterr().out
    assert "going on from runs/a/detect/last.pt after iteration 3 of 4" in printed
    assert "evaluated first" not in printed


def test_weights_are_compared_by_what_they_are(voc_devkit, tmp_path, monkeypatch):
    """Under another name the same file goes on; another one under the same name does not."""
    cfg = settings(tmp_path, **VOC, data=voc_devkit, iterations=1, warmup_iterations=0)
    save_backbone(tmp_path / "one" / "w.pt")
    save_backbone(tmp_path / "two" / "w.pt", seed=1)
    common = ["--cfg", cfg, "name=a"]
    script(monkeypatch, tmp_path, *common, "--weights", "one/w.pt")
    shutil.copy(tmp_path / "one" / "w.pt", tmp_path / "again.pt")
    common += ["detect.iterations=2"]
    script(monkeypatch, tmp_path, *common, "--weights", "again.pt")
    assert read_checkpoint(tmp_path, "a")["epoch"] == 2
    shutil.copy(tmp_path / "two" / "w.pt", tmp_path / "one" / "w.pt")
    sentence = refusal(monkeypatch, tmp_path, *common, "--weights", "one/w.pt")
    assert "is of another run: weights was 'sha256 " in sentence


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "runs/d holds no backbone.pt; first run: python train_pretrain.py --cfg"),
        (["--weights", "nowhere.pt"], "nowhere.pt does not exist"),
        ([*RANDOM, "model.host=cmc"], "CMC's two-stream encoder takes no RGB image"),
        (
            [*RANDOM, "detect.norm=frozen"],
            "detect.norm frozen keeps BatchNorm as pre-trained, and --weights none has no such",
        ),
        (
            [*RANDOM, "detect.data=elsewhere"],
            "detect.data is 'elsewhere', and there is no such folder",
        ),
        ([*RANDOM, "detect.train=[VOC2007/nope]"], "nope.txt does not exist; with layout voc"),
        ([*RANDOM, "detect.val=[]"], "detect.train or detect.val is an empty list"),
        (
            [*RANDOM, "detect.layout=coco", "detect.train=train2017", "detect.val=val2017"],
            "instances_train2017.json does not exist; detect.data is",
        ),
        (
            [*RANDOM, "detect.task=mask"],
            "detect: layout voc has boxes only; task mask wants layout coco",
        ),
        (
            [*RANDOM, "detect.batch_size=100"],
            "detect.batch_size 100 is larger than the 8 training images with annotations",
        ),
        ([*RANDOM, "detect.min_size=[2000]"], "min_size 2000 is above max_size 160"),
        ([*RANDOM, "detect.lr=0"], "lr is 0.0; it must be above 0, and finite"),
        (
            [*RANDOM, "detect.iteration=5"],
            "detect.iteration is not a setting; did you mean iterations?",
        ),
        ([*RANDOM, "detect.lr=1e20", "detect.warmup_iterations=0"], "the loss is "),
    ],
)
def test_bad_input_is_one_sentence(voc_devkit, tmp_path, monkeypatch, arguments, message):
    cfg = settings(tmp_path, **VOC, data=voc_devkit, iterations=20)
    assert message in refusal(monkeypatch, tmp_path, "--cfg", cfg, *arguments)


def swap_sides_of_a_photograph(root):
    exif = Image.Exif()
    exif[detection.EXIF_ORIENTATION] = 6
    Image.new("RGB", (6, 8)).save(os.path.join(root, "val", "b.jpg"), exif=exif)


def no_masks(whole):
    for annotation in whole["annotations"]:
        annotation["segmentation"] = []


def first_image_twice(whole):
    whole["images"].append(whole["images"][0])


@pytest.mark.parametrize(
    "change_train,change_val,change_files,message",
    [
        (None, lambda whole: whole["annotations"].clear(), None, "has no annotation to compute"),
        (None, first_image_twice, None, "the id 1 stands twice among the images"),
        (no_masks, no_masks, None, "detect.task=box needs none"),
        (None, lambda whole: whole["categories"][0].pop("name"), None, "'name' is missing"),
        (None, None, swap_sides_of_a_photograph, "its EXIF data turn it"),
    ],
)
def test_what_is_wrong_with_coco_files_is_said_before_training(
    tmp_path, monkeypatch, change_train, change_val, change_files, message
):
    root = make_coco(tmp_path / "coco", "mask", change_train, change_val)
    if change_files:
        change_files(root)
    cfg = settings(tmp_path, task="mask", data=root, train="train", val="val", iterations=20)
    monkeypatch.setattr(train_detect, "build_model", None)  # which comes next
    assert message in refusal(monkeypatch, tmp_path, "--cfg", cfg, *RANDOM)


def test_boxes_of_negative_width_are_left_out_and_drawn_nowhere(tmp_path, monkeypatch, capsys):
    def change(whole):
        whole["annotations"][0]["bbox"][2] = -5

    root = make_coco(tmp_path / "coco", "mask", change, change)
    changes = {"train": "train", "val": "val", "iterations": 2, "batch_size": 1}
    cfg = settings(tmp_path, task="mask", data=root, warmup_iterations=0, **changes)
    script(monkeypatch, tmp_path, "--cfg", cfg, *RANDOM, "name=a")
    assert capsys.readouterr().out.count("1 of its 2 boxes have no area inside their image") == 2
    assert (tmp_path / "runs" / "a" / "detect" / "detections.png").exists()


# ------------------------------------------------------------------------------ detectron2


def test_detectron2s_files_are_whole():
    folder = os.path.join(ROOT, "yaml", "detectron2")
    for name in os.listdir(folder):
        with open(os.path.join(folder, name)) as f:
            text = f.read()
        whole = yaml.safe_load(text)
        assert "--export detectron2 detectron2.pkl" in text
        assert f"--config-file yaml/detectron2/{name}" in text
        model, solver = whole["MODEL"], whole["SOLVER"]
        assert model["WEIGHTS"] == "detectron2.pkl"
        assert model["BACKBONE"]["FREEZE_AT"] == 0
        assert model["RESNETS"]["NORM"] == "naiveSyncBN"
        assert not model["RESNETS"]["STRIDE_IN_1X1"]
        assert whole["INPUT"]["FORMAT"] == "RGB"
        assert solver["IMS_PER_BATCH"] == 16
        assert max(solver["STEPS"]) < solver["MAX_ITER"]
