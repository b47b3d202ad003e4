"""Detection: data in COCO's and VOC's layout, AP, and the script, fine-tuning small R-CNNs on real images (coco_mini) where these are there."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import train_detect
import yaml
from data import detection
from models.resnet import ResNet
from processes import ROOT, run
from test_scripts import same
from train_detect import Detect, average_precision, build_model, predictions

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install -r requirements-dev.txt")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own
REAL = os.path.abspath(os.environ.get("DATASETS", "datasets"))
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small gain nothing from more, and on a busy machine their threads wait for each other for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def coco_mini():
    if not os.path.exists(os.path.join(REAL, "coco_mini", "annotations")):
        pytest.skip(f"needs coco_mini in {REAL}")
    return os.path.join(REAL, "coco_mini")


@pytest.fixture(scope="module")
def few(coco_mini, tmp_path_factory):
    """coco_mini with ten training and ten validation images, all with people: quicker to evaluate."""
    folder = tmp_path_factory.mktemp("few")
    os.mkdir(folder / "annotations")
    for name in ("train2017", "val2017"):
        os.symlink(os.path.join(coco_mini, name), folder / name)
        with open(os.path.join(coco_mini, "annotations", f"person_keypoints_{name}.json")) as f:
            keep = sorted(
                {a["image_id"] for a in json.load(f)["annotations"] if a["num_keypoints"]}
            )[:10]
        for kind in ("instances", "person_keypoints"):
            with open(os.path.join(coco_mini, "annotations", f"{kind}_{name}.json")) as f:
                whole = json.load(f)
            whole["images"] = [i for i in whole["images"] if i["id"] in keep]
            whole["annotations"] = [a for a in whole["annotations"] if a["image_id"] in keep]
            (folder / "annotations" / f"{kind}_{name}.json").write_text(json.dumps(whole))
    return str(folder)


@pytest.fixture
def voc_devkit(tmp_path):
    """Two years of four images: a red square (a cat) or a blue one (a dog), one of them difficult, one with a part that is no object."""
    root = tmp_path / "VOCdevkit"
    for year, name in (("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test")):
        for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
            os.makedirs(root / year / folder, exist_ok=True)
        stems = [f"{name}_{i}" for i in range(4)]
        (root / year / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")
        for i, stem in enumerate(stems):
            pixels = np.full((60, 80, 3), 128, np.uint8)
            pixels[10:40, 20:60, 2 * (i % 2)] = (
                255  # x 20 ... 59, y 10 ... 39: in VOC's counting from 1, 21 ... 60 and 11 ... 40
            )
            Image.fromarray(pixels).save(root / year / "JPEGImages" / f"{stem}.jpg")
            part = (
                "<part><name>head</name><bndbox><xmin>30</xmin><ymin>15</ymin><xmax>40</xmax><ymax>20</ymax></bndbox></part>"
                if i == 0
                else ""
            )
            (root / year / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><size><width>80</width><height>60</height><depth>3</depth></size><object><name>{('cat', 'dog')[i % 2]}</name>"
                f"<difficult>{int(i == 3)}</difficult><bndbox><xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>40</ymax></bndbox>{part}</object></annotation>"
            )
    return str(root)


def settings(folder, **detect):
    """A --cfg file in folder with a section detect. -> its path."""
    with open(os.path.join(ROOT, "yaml", "quickstart.yaml")) as f:
        whole = yaml.safe_load(f)
    (folder / "d.yaml").write_text(yaml.safe_dump({**whole, "detect": {**TINY, **detect}}))
    return str(folder / "d.yaml")


def script(monkeypatch, folder, *arguments):
    """train_detect.py in this process, in a folder of its own: importing torch takes longer than it does."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train_detect.py", *MODEL, *arguments])
    train_detect.main()


def lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


# ---------------------------------------------------------------------------------------------------- figures


def points(a):
    """An annotation's keypoints as a detector gives them: a person of whom none is labelled has some too, here in the middle of its box, and COCO ignores them."""
    x, y, w, h = a["bbox"]
    return (
        list(a.get("keypoints", [])) if a.get("num_keypoints") else [x + w / 2, y + h / 2, 1] * 17
    )


@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
def test_the_truth_as_detections_has_ap_100(coco_mini, task):
    _, truth = detection.load("coco", coco_mini, "train2017", "val2017", task)
    mask_tools, size = (
        train_detect.pycocotools()[2],
        {i["id"]: (i["height"], i["width"]) for i in truth["images"]},
    )
    found = []
    for a in truth["annotations"]:
        if not a["iscrowd"]:
            mask = detection.mask(a["segmentation"], *size[a["image_id"]])
            found.append(
                {
                    **{k: a[k] for k in ("image_id", "category_id", "bbox")},
                    "score": 1.0,
                    "keypoints": points(a),
                    "segmentation": mask_tools.encode(np.asfortranarray(mask)),
                }
            )
    figures = average_precision(truth, found, task)
    kinds = ["box"] if task == "box" else ["box", task]
    assert list(figures) == [f"{kind} {what}" for kind in kinds for what in ("AP", "AP50", "AP75")]
    assert all(value == pytest.approx(100, abs=1e-6) for value in figures.values()), figures
    assert average_precision(truth, found, task) == figures  # the truth was not written into
    assert all(v == 0 for v in average_precision(truth, [], task).values())
    wrong = [
        {**d, "bbox": [d["bbox"][0] + d["bbox"][2], *d["bbox"][1:]]} for d in found
    ]  # each box beside its object
    assert average_precision(truth, wrong, task)["box AP"] < 5


def test_targets_through_the_models_own_records_have_ap_100(coco_mini):
    """Training targets, in torchvision's form, written back as detections: boxes, masks, labels and keypoints take no step aside on the way."""
    for task in ("mask", "keypoint"):
        coco, _ = detection.load("coco", coco_mini, "val2017", "val2017", task)
        data = detection.Images(coco, task, training=True)
        found = []
        for row in range(len(data)):
            info, (_, target) = data.images[row], data[row, False]
            output = {
                **target,
                "scores": torch.ones(len(target["labels"])),
                "masks": target.get("masks", torch.zeros(0, 1, 1))[:, None].float(),
            }
            if task == "keypoint":
                for a, k in zip(data.annotations[info["id"]], output["keypoints"]):
                    k[:] = k if a["num_keypoints"] else torch.tensor(points(a)).view(17, 3) + 0.5
            found += train_detect.records(output, info["id"], coco["categories"], task)
        kept = {i["id"] for i in data.images}
        truth = {**coco, "annotations": [a for a in coco["annotations"] if a["image_id"] in kept]}
        figures = average_precision(truth, found, task)
        assert all(value == pytest.approx(100, abs=1e-6) for value in figures.values()), figures


# ---------------------------------------------------------------------------------------------------- data


def test_a_flip_mirrors_and_two_are_none():
    image = torch.arange(3 * 4 * 10).view(3, 4, 10)
    names = ["nose", "left_eye", "right_eye"]
    assert detection.pairs(names) == [0, 2, 1]
    masks = torch.zeros(1, 4, 10, dtype=torch.uint8)
    masks[0, :, 2:5] = 1
    keypoints = torch.tensor([[[3.5, 1.5, 2], [2.5, 0.5, 1], [0, 0, 0]]])
    target = {
        "boxes": torch.tensor([[2.0, 0, 5, 4]]),
        "labels": torch.tensor([1]),
        "masks": masks,
        "keypoints": keypoints,
    }
    mirrored, t = detection.flip(image, target, detection.pairs(names))
    assert torch.equal(mirrored[..., 0], image[..., 9]) and t["boxes"].tolist() == [[5, 0, 8, 4]]
    assert t["masks"][0, 0].tolist() == [
        0,
        0,
        0,
        0,
        0,
        1,
        1,
        1,
        0,
        0,
    ]  # the mask still fills its box
    assert t["keypoints"].tolist() == [
        [[6.5, 1.5, 2], [0, 0, 0], [7.5, 0.5, 1]]
    ]  # the left eye is now the right one; the one unlabelled stays at 0
    again, back = detection.flip(mirrored, t, detection.pairs(names))
    assert torch.equal(again, image) and all(torch.equal(back[k], target[k]) for k in target)


def test_a_real_persons_pairs(coco_mini):
    coco, _ = detection.load("coco", coco_mini, "train2017", "val2017", "keypoint")
    p, names = (
        detection.pairs(coco["categories"][0]["keypoints"]),
        coco["categories"][0]["keypoints"],
    )
    assert [p[i] for i in p] == list(range(17)) and p[0] == 0 and p[1] == 2
    assert all(
        names[i][-3:] == name[-3:] and (names[i] != name) == ("_" in name)
        for i, name in zip(p, names)
    )


def test_training_leaves_out_what_cannot_be_learned_from(coco_mini):
    coco, truth = detection.load("coco", coco_mini, "train2017", "val2017", "mask")
    crowd = {a["id"] for a in coco["annotations"] if a["iscrowd"]}
    train, val = detection.Images(coco, "mask", training=True), detection.Images(truth, "mask")
    assert crowd and not crowd & {a["id"] for some in train.annotations.values() for a in some}
    assert (
        len(val) == len(truth["images"])
        and len(detection.Images(coco, "mask", training=True, limit=7)) == 7
    )
    people, truth = detection.load("coco", coco_mini, "train2017", "val2017", "keypoint")
    some, val = (
        detection.Images(people, "keypoint", training=True),
        detection.Images(truth, "keypoint"),
    )
    assert 0 < len(some) < len(train) and all(
        any(a["num_keypoints"] for a in some.annotations[i["id"]]) for i in some.images
    )
    assert (
        len(val) == len(truth["images"]) > len({a["image_id"] for a in truth["annotations"]})
    )  # images without people are evaluated too
    image, target = train[0, True]
    n = len(target["labels"])
    assert (
        image.dtype == torch.uint8
        and target["masks"].shape == (n, *image.shape[1:])
        and target["boxes"].shape == (n, 4)
    )
    for mask, (x1, y1, x2, y2) in zip(
        target["masks"], target["boxes"].tolist()
    ):  # a mask lies in its box, mirrored like it
        where = mask.nonzero()
        assert (
            where[:, 1].min() >= x1 - 1.5
            and where[:, 1].max() <= x2 + 1.5
            and where[:, 0].min() >= y1 - 1.5
            and where[:, 0].max() <= y2 + 1.5
        )


def test_the_plan_depends_on_seed_and_epoch_alone(monkeypatch):
    whole = list(detection.plan(10, 4, 0, 0, 6))  # two steps an epoch
    assert whole == list(detection.plan(10, 4, 0, 0, 3)) + list(
        detection.plan(10, 4, 0, 3, 6)
    ) and whole != list(detection.plan(10, 4, 1, 0, 6))
    for epoch in range(3):
        assert len({row for step in whole[2 * epoch : 2 * epoch + 2] for row, _ in step}) == 8
    assert {flipped for step in whole for _, flipped in step} == {True, False} and whole[
        0
    ] != whole[2]
    monkeypatch.setattr(detection.distributed, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(detection.distributed, "rank", lambda: rank)
        parts.append(list(detection.plan(10, 4, 0, 0, 6)))
    assert [a + b for a, b in zip(*parts)] == whole


def test_vocs_files_become_cocos_form(voc_devkit):
    train, val = detection.load(
        "voc", voc_devkit, ["VOC2007/trainval", "VOC2012/trainval"], ["VOC2007/test"], "box"
    )
    assert [c["name"] for c in train["categories"]] == ["cat", "dog"] and train[
        "categories"
    ] == val["categories"]  # a part is no object
    assert len(train["images"]) == 8 and len(val["images"]) == 4 and len(train["annotations"]) == 8
    assert all(a["bbox"] == [20, 10, 40, 30] and a["area"] == 1200 for a in train["annotations"])
    assert [a["category_id"] for a in val["annotations"]] == [1, 2, 1, 2]
    assert not any(a["iscrowd"] for a in train["annotations"]) and [
        a["iscrowd"] for a in val["annotations"]
    ] == [0, 0, 0, 1]  # difficult ones
    image, target = detection.Images(train, "box", training=True)[0, False]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert (
        image[0, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].min() > 200
        and image[0, : y1 - 3].max() < 160 > image[0, y2 + 3 :].max()
    )  # holds the red square
    found = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 1.0,
        }
        for a in val["annotations"]
    ]
    assert (
        average_precision(val, found, "box")["box AP"]
        == pytest.approx(100)
        == average_precision(val, found[:3], "box")["box AP"]
    )


# ---------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "task,theirs", [("box", "fasterrcnn"), ("mask", "maskrcnn"), ("keypoint", "keypointrcnn")]
)
def test_the_default_model_is_torchvisions(task, theirs):
    """Names and shapes of every weight, with our ResNet-50 inside."""
    classes = 2 if task == "keypoint" else 91
    want = getattr(torchvision.models.detection, f"{theirs}_resnet50_fpn")(
        weights=None, weights_backbone=None, num_classes=classes
    ).state_dict()
    have = build_model(
        ResNet("resnet50"), classes - 1, Detect(task=task, norm="frozen")
    ).state_dict()
    shapes = lambda state: {
        k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")
    }
    assert shapes(have) == shapes(want)


def test_frozen_keeps_the_backbones_statistics_and_batch_trains_new_ones():
    net = ResNet("resnet10", width=8)
    net.bn1.running_mean.fill_(0.3), net.bn1.weight.data.fill_(0.7)
    for norm in ("frozen", "batch"):
        detect = Detect(**{**TINY, "task": "mask", "norm": norm})
        twin = ResNet("resnet10", width=8)
        twin.load_state_dict(net.state_dict())
        model = build_model(twin, 3, detect)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        target = {
            "boxes": torch.tensor([[10.0, 10, 60, 60]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, 96, 96, dtype=torch.uint8),
        }
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        sum(model([torch.rand(3, 96, 96)], [target]).values()).backward()
        assert all(p.grad is not None for p in model.parameters())  # every layer is fine-tuned
        optimizer.step()
        after = model.state_dict()
        moved = [
            not torch.equal(before[f"backbone.body.bn1.{k}"], after[f"backbone.body.bn1.{k}"])
            for k in ("running_mean", "weight")
        ]
        assert moved == [norm == "batch"] * 2 and before["backbone.body.bn1.weight"][
            0
        ] == pytest.approx(0.7)
        assert [
            any(part in k and k.endswith("running_mean") for k in after)
            for part in (".fpn.", ".mask_head.")
        ] == [norm == "batch"] * 2
        assert not any("box_head" in k and k.endswith("running_mean") for k in after)
        assert not torch.equal(
            before["backbone.body.conv1.weight"], after["backbone.body.conv1.weight"]
        )


def test_the_schedule():
    detect = Detect(lr=0.02, warmup_iterations=1000, milestones=[60000, 80000])
    assert [detect.rate(i) for i in (0, 499, 999, 1000, 59999, 60000, 80000)] == pytest.approx(
        [2e-5, 0.01, 0.02, 0.02, 0.02, 2e-3, 2e-4]
    )


# ---------------------------------------------------------------------------------------------------- the script


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mask", "keypoint"])
def test_fine_tuning_on_real_images(few, tmp_path, monkeypatch, capsys, task):
    cfg = settings(tmp_path, task=task, data=few, iterations=51, eval_every=50)
    os.makedirs(tmp_path / "runs" / "a")
    torch.manual_seed(0)
    torch.save(
        ResNet("resnet10", "imagenet", 8).state_dict(), tmp_path / "runs" / "a" / "backbone.pt"
    )
    script(monkeypatch, tmp_path, "--cfg", cfg, "name=a")
    folder = tmp_path / "runs" / "a" / "detect"
    assert {"last.pt", "log.jsonl", "detections.png"} <= set(os.listdir(folder)) and any(
        f.startswith("events") for f in os.listdir(folder)
    )
    log = lines(folder / "log.jsonl")
    assert [line["epoch"] for line in log] == [1, 21, 41, 50, 51]
    assert (
        all(
            log[3][part] < log[0][part]
            for part in ("loss", "loss_classifier", "loss_objectness", f"loss_{task}")
        )
        and "loss_box_reg" in log[0]
    )
    one, two = lines(tmp_path / "runs" / "a" / "detect.jsonl")
    assert (
        one["iteration"] == 50
        and two["iteration"] == 51
        and two["weights"] == os.path.join("runs", "a", "backbone.pt")
    )
    assert (
        two["seed"] == 0
        and two["seconds"] > 0
        and log[4]["box AP"] == pytest.approx(two["figures"]["box AP"])
    )
    assert set(two["figures"]) == {
        f"{kind} {what}" for kind in ("box", task) for what in ("AP", "AP50", "AP75")
    }
    assert (
        all(0 <= v <= 100 for v in two["figures"].values())
        and "R-CNN, FPN of 32 channels, all layers fine-tuned on train2017" in two["protocol"]
    )
    assert Image.open(folder / "detections.png").size[0] > 1600
    assert "AP75" in capsys.readouterr().out
    script(monkeypatch, tmp_path, "--cfg", cfg, "name=a")  # started again: it is finished
    assert (
        "nothing is left to do" in capsys.readouterr().out
        and len(lines(tmp_path / "runs" / "a" / "detect.jsonl")) == 2
    )


@pytest.mark.slow
def test_killed_and_resumed_ends_as_if_undisturbed(few, tmp_path, monkeypatch):
    """SIGKILL instead of the second checkpoint, inside an epoch; sizes and proposals are drawn by chance, order and flips by the epoch."""
    cfg = settings(
        tmp_path,
        task="keypoint",
        data=few,
        iterations=9,
        save_every=3,
        min_size=[64, 96],
        workers=1,
    )
    common = ["--cfg", cfg, "--weights", "none"]
    script(monkeypatch, tmp_path, *common, "name=whole")
    (tmp_path / "job.py").write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {ROOT!r})
        import train_detect
        plain = train_detect.checkpoint.save
        def save(path, settings, epoch, **parts):
            plain(path, settings, epoch, **parts) if epoch == 3 else os.killpg(0, signal.SIGKILL)      # the group, its worker included
        train_detect.checkpoint.save = save
        train_detect.main()
    """)
    )
    done = subprocess.run(
        [sys.executable, "job.py", *MODEL, *common, "name=cut"],
        cwd=tmp_path,
        capture_output=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (
        torch.load(tmp_path / "runs" / "cut" / "detect" / "last.pt", weights_only=True)["epoch"]
        == 3
    )
    script(monkeypatch, tmp_path, *common, "name=cut")
    a, b = (
        torch.load(tmp_path / "runs" / name / "detect" / "last.pt", weights_only=True)
        for name in ("whole", "cut")
    )
    assert a["epoch"] == 9 and all(
        same(a[part], b[part]) for part in ("epoch", "model", "optimizer", "rng")
    )
    whole, cut = (
        lines(tmp_path / "runs" / name / "detect.jsonl")[-1]["figures"] for name in ("whole", "cut")
    )
    assert whole == cut
    with pytest.raises(
        SystemExit,
        match="is of another run: detect.lr was 0.01 and is now 0.5; choose another name=..., or start this one over with --fresh",
    ):
        script(monkeypatch, tmp_path, *common, "name=cut", "detect.lr=0.5")
    script(
        monkeypatch,
        tmp_path,
        *common,
        "name=cut",
        "detect.lr=0.02",
        "--fresh",
        "detect.iterations=1",
    )


def test_voc_through_the_script(voc_devkit, tmp_path, monkeypatch):
    cfg = settings(
        tmp_path,
        task="box",
        data=voc_devkit,
        layout="voc",
        train=["VOC2007/trainval", "VOC2012/trainval"],
        val=["VOC2007/test"],
        iterations=60,
        lr=0.02,
    )
    script(monkeypatch, tmp_path, "--cfg", cfg, "--weights", "none", "name=a")
    line, log = (
        lines(tmp_path / "runs" / "a" / "detect.jsonl")[0],
        lines(tmp_path / "runs" / "a" / "detect" / "log.jsonl"),
    )
    assert (
        "VOC2007/trainval+VOC2012/trainval" in line["protocol"]
        and log[-1]["loss"] < 0.7 * log[0]["loss"]
    )
    assert line["figures"]["box AP50"] > 20  # red or blue, always at one place


@pytest.mark.slow
def test_two_processes_share_the_images_out(few, tmp_path):
    """Three training steps in two gloo processes; then which images each of them looked at, of nine validation images."""
    with open(os.path.join(few, "annotations", "instances_val2017.json")) as f:
        truth = json.load(f)
    truth["images"] = truth["images"][:9]
    truth["annotations"] = [
        a for a in truth["annotations"] if a["image_id"] in {i["id"] for i in truth["images"]}
    ]
    root = tmp_path / "nine"
    os.makedirs(root / "annotations")
    for name in ("train2017", "val2017"):
        os.symlink(os.path.realpath(os.path.join(few, name)), root / name)
    os.symlink(
        os.path.join(few, "annotations", "instances_train2017.json"),
        root / "annotations" / "instances_train2017.json",
    )
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(truth))
    cfg = settings(tmp_path, task="box", data=str(root), iterations=3, norm="sync")
    (tmp_path / "job.py").write_text(
        textwrap.dedent("""
        import json, sys
        import train_detect
        seen, real = [], train_detect.records
        train_detect.records = lambda output, image_id, *more: seen.append(image_id) or real(output, image_id, *more)
        train_detect.main()
        import os
        json.dump(seen, open(f"seen{os.environ['RANK']}.json", "w"))
    """)
    )
    run(
        tmp_path,
        tmp_path / "job.py",
        "--cfg",
        cfg,
        *MODEL,
        "--weights",
        "none",
        "name=a",
        processes=2,
    )
    seen = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(s) for s in seen] == [5, 4] and sorted(seen[0] + seen[1]) == sorted(
        i["id"] for i in truth["images"]
    )
    saved = torch.load(tmp_path / "runs" / "a" / "detect" / "last.pt", weights_only=True)
    assert len(saved["rng"]) == 2 and not torch.equal(
        saved["rng"][0]["cpu"], saved["rng"][1]["cpu"]
    )
    _, val = detection.load(
        "coco", str(root), "train2017", "val2017", "box"
    )  # the same weights in one process: the same figures
    model = build_model(ResNet("resnet10", width=8), 80, Detect(**{**TINY, "task": "box"}))
    model.load_state_dict(saved["model"])
    found = predictions(
        model,
        detection.Images(val, "box"),
        val["categories"],
        "box",
        torch.device("cpu"),
        workers=0,
    )
    two = lines(tmp_path / "runs" / "a" / "detect.jsonl")[0]
    assert (
        average_precision(val, [d for one in found.values() for d in one], "box") == two["figures"]
        and "BatchNorm over 1 images" in two["protocol"]
    )
    done = run(
        tmp_path,
        "train_detect.py",
        "--cfg",
        cfg,
        *MODEL,
        "--weights",
        "none",
        "detect.batch_size=3",
        processes=2,
        check=False,
    )
    assert done.returncode != 0 and "batch_size 3 does not divide by 2 processes" in done.stderr


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "runs/d holds no backbone.pt; first run: python train_pretrain.py --cfg"),
        (["--weights", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--weights", "none", "model.host=cmc"], "CMC's two-stream encoder takes no RGB image"),
        (
            ["--weights", "none", "detect.norm=frozen"],
            "detect.norm frozen keeps BatchNorm as pre-trained, and --weights none has no such",
        ),
        (
            ["--weights", "none", "detect.data=elsewhere"],
            "detect.data is 'elsewhere', and there is no such folder",
        ),
        (
            ["--weights", "none", "detect.train=[VOC2007/nope]"],
            "nope.txt does not exist; with layout voc",
        ),
        (["--weights", "none", "detect.val=[]"], "detect.train or detect.val is an empty list"),
        (
            [
                "--weights",
                "none",
                "detect.layout=coco",
                "detect.train=train2017",
                "detect.val=val2017",
            ],
            "instances_train2017.json does not exist; detect.data is",
        ),
        (
            ["--weights", "none", "detect.task=mask"],
            "detect: layout voc has boxes only; task mask wants layout coco",
        ),
        (
            ["--weights", "none", "detect.batch_size=100"],
            "detect.batch_size 100 is larger than the 8 training images with annotations",
        ),
        (["--weights", "none", "detect.min_size=[2000]"], "min_size 2000 is above max_size 160"),
        (["--weights", "none", "detect.lr=0"], "lr is 0.0; it must be above 0, and finite"),
        (
            ["--weights", "none", "detect.iteration=5"],
            "detect.iteration is not a setting; did you mean iterations?",
        ),
        (["--weights", "none", "detect.lr=1e20", "detect.warmup_iterations=0"], "the loss is "),
    ],
)
def test_bad_input_is_one_sentence(voc_devkit, tmp_path, monkeypatch, arguments, message):
    cfg = settings(
        tmp_path,
        task="box",
        data=voc_devkit,
        layout="voc",
        train=["VOC2007/trainval", "VOC2012/trainval"],
        val=["VOC2007/test"],
        iterations=20,
    )
    with pytest.raises(SystemExit) as error:
        script(monkeypatch, tmp_path, "--cfg", cfg, *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file,content,message",
    [
        (
            "Annotations/trainval_1.xml",
            "<annotation><size>",
            "trainval_1.xml is not an annotation of VOC: ",
        ),
        ("Annotations/trainval_1.xml", None, "trainval_1.xml does not exist, and "),
        (
            "JPEGImages/trainval_1.jpg",
            None,
            "trainval_1.jpg does not exist, and VOC2007/trainval names it",
        ),
        ("JPEGImages/trainval_1.jpg", "no image", "trainval_1.jpg cannot be read as an image"),
        (
            "JPEGImages/trainval_1.jpg",
            (50, 60),
            "trainval_1.jpg is 50 x 60, and its annotations are for 80 x 60",
        ),
    ],
)
def test_broken_files_are_named(voc_devkit, file, content, message):
    path = os.path.join(voc_devkit, "VOC2007", file)
    os.remove(path)
    if isinstance(content, str):
        with open(path, "w") as f:
            f.write(content)
    elif content:
        Image.new("RGB", content).save(path)
    with pytest.raises(SystemExit) as error:
        coco, _ = detection.load("voc", voc_devkit, ["VOC2007/trainval"], ["VOC2007/test"], "box")
        list(
            detection.batches(
                detection.Images(coco, "box", training=True),
                detection.plan(4, 2, 0, 0, 2),
                torch.device("cpu"),
                workers=1,
            )
        )
    assert message in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


def test_boxes_without_area_neither_train_nor_are_evaluated(voc_devkit, capsys):
    """xmax below xmin, or beside the image; of one pixel's width it is a box."""
    for stem, xmin, xmax in (
        ("trainval_0", 60, 21),
        ("test_0", 60, 21),
        ("test_1", 90, 99),
        ("test_2", 21, 21),
    ):
        path = os.path.join(voc_devkit, "VOC2007", "Annotations", f"{stem}.xml")
        with open(path) as f:
            text = (
                f.read()
                .replace("<xmin>21<", f"<xmin>{xmin}<")
                .replace("<xmax>60<", f"<xmax>{xmax}<")
            )
        with open(path, "w") as f:
            f.write(text)
    train, val = detection.load("voc", voc_devkit, ["VOC2007/trainval"], ["VOC2007/test"], "box")
    first, second = capsys.readouterr().out.splitlines()
    assert (
        first.startswith("VOC2007/trainval: 1 boxes have no area")
        and "trainval_0.jpg: x, y, width, height 59, 10, -38, 30" in first
    )
    assert second.startswith("VOC2007/test: 2 boxes have no area")
    assert (
        len(detection.Images(train, "box", training=True)) == 3
        and len(detection.Images(val, "box")) == 4
    )
    assert [a["image_id"] for a in val["annotations"]] == [3, 4] and val["annotations"][0]["bbox"][
        2
    ] == 1
    found = [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 1.0}
        for a in val["annotations"]
    ]
    assert average_precision(val, found, "box")["box AP"] == pytest.approx(100)


def test_one_decoder_for_detection_and_folders(voc_devkit):
    """A ramp of 16 bits is read by its upper half, and a float TIFF is refused."""
    coco, _ = detection.load("voc", voc_devkit, ["VOC2007/trainval"], ["VOC2007/test"], "box")
    images = detection.Images(coco, "box", training=True)
    ramp = np.linspace(0, 65535, 60 * 80).astype(np.uint16).reshape(60, 80)
    Image.fromarray(ramp).save(images.files[0], "PNG")
    Image.fromarray(ramp.astype(np.float32)).save(images.files[1], "TIFF")
    read, _ = images[0, False]
    assert torch.equal(read, torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1))
    with pytest.raises(
        SystemExit, match="trainval_1.jpg cannot be .*it has 32 bits a pixel; store"
    ):
        images[1, False]


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: c.pop("images"), "is not in COCO's form: 'images' is missing"),
        (lambda c: c["annotations"][0].pop("bbox"), "is not in COCO's form: 'bbox' is missing"),
        (
            lambda c: c["annotations"][0].update(image_id=99),
            "an annotation is of image 99 and category 1, which are not both in the file",
        ),
        (lambda c: c["images"][0].update(file_name="b.jpg"), "b.jpg does not exist"),
        (lambda c: c["images"].clear() or c["annotations"].clear(), "lists no image"),
        (
            lambda c: c["categories"].append({"id": 2, "name": "dog"}),
            "the categories of instances_a.json are not those of instances_b.json",
        ),
    ],
)
def test_broken_coco_files_are_named(tmp_path, change, message):
    good = lambda: {
        "images": [{"id": 1, "height": 8, "width": 8, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
    }
    bad = good()
    change(bad)
    os.mkdir(tmp_path / "annotations")
    for name, content in (("a", bad), ("b", good())):
        os.mkdir(tmp_path / name)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.jpg")
        (tmp_path / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as error:
        detection.load("coco", str(tmp_path), "a", "b", "box")
    assert message in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "annotations" / "instances_a.json").write_text("{")
    with pytest.raises(SystemExit, match="instances_a.json cannot be read as JSON"):
        detection.load("coco", str(tmp_path), "a", "b", "box")


def test_a_missing_pycocotools_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(
        SystemExit, match="pycocotools.* is not installed.*pip install -r requirements-dev.txt"
    ):
        train_detect.pycocotools()


# ---------------------------------------------------------------------------------------------------- detectron2


def test_detectron2s_files_are_whole():
    folder = os.path.join(ROOT, "yaml", "detectron2")
    for name in os.listdir(folder):
        with open(os.path.join(folder, name)) as f:
            text = f.read()
        whole = yaml.safe_load(text)
        assert (
            "--export detectron2 detectron2.pkl" in text
            and whole["MODEL"]["WEIGHTS"] == "detectron2.pkl"
            and f"--config-file yaml/detectron2/{name}" in text
        )
        assert (
            whole["MODEL"]["BACKBONE"]["FREEZE_AT"] == 0
            and whole["MODEL"]["RESNETS"]["NORM"] == "naiveSyncBN"
            and not whole["MODEL"]["RESNETS"]["STRIDE_IN_1X1"]
        )
        assert (
            whole["INPUT"]["FORMAT"] == "RGB"
            and whole["SOLVER"]["IMS_PER_BATCH"] == 16
            and max(whole["SOLVER"]["STEPS"]) < whole["SOLVER"]["MAX_ITER"]
        )
