"""Every row of every table: it loads, is honest about itself, and takes a step on tiny data."""

import collections
import glob
import json
import os
import re

import pytest
import torch

from data.datasets import load
from data.loader import Loader
from engine import config
from engine.schedule import Schedule, sgd
from losses.diagnostics import step_diagnostics
from losses.together import Together
from models.resnet import Encoder
from train_detect import Detect
from train_finetune import Finetune
from train_linear import Probe

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = sorted(
    path
    for path in glob.glob(os.path.join(ROOT, "yaml", "**", "*.yaml"), recursive=True)
    if "detectron2" not in path and "scales" not in path
)
ROWS = {
    "Ring, Table 1": 24,
    "Ring, ablations": 11,
    "Ring, transfer": 28,
    "MoCHi, ImageNet-100": 10,
    "MoCHi, ImageNet-1K": 12,
    "MoCHi, detection": 5,
    "JCL, ImageNet": 5,
    "JCL, ablations": 18,
    "JCL, COCO": 6,
    "IFND, ImageNet": 3,
    "IFND, CIFAR": 6,
    "IFND, ablations": 9,
    "IFND, semi-supervised": 4,
    "IFND, transfer": 8,
}


def short(path):
    return os.path.relpath(path, ROOT)


@pytest.mark.parametrize("path", FILES, ids=short)
def test_it_resolves_and_its_header_is_honest(path):
    cfg = config.load(path)
    with open(path) as f:
        head = [line for line in f.read().splitlines() if line.startswith("#")]
    assert head, "the header says how to run it"
    assert any(f"--cfg {short(path)}" in line for line in head), "the header says how to run it"
    assert cfg["name"] == short(path).removeprefix("yaml" + os.sep).removesuffix(".yaml").replace(
        os.sep, "_"
    )
    if short(path).count(os.sep) > 1:
        assert "paper" in cfg
    if "paper" in cfg:
        assert cfg["paper"]["table"]
        assert cfg["paper"]["row"]
        assert cfg["paper"]["column"]
        assert cfg["paper"].get("reported") is None or cfg["paper"].get("source"), (
            "a reported number needs its source"
        )
    for kind, section in ((Probe, "linear"), (Finetune, "finetune"), (Detect, "detect")):
        if section in cfg:
            config.build(kind, cfg[section], path)
    for line in head:  # weights that another row's run would leave
        if "--weights runs/" in line:
            name = line.split("--weights runs/")[1].split("/")[0]
            assert any(name == config.default_name(other) for other in FILES), name


@pytest.mark.parametrize("path", FILES, ids=short)
def test_its_header_says_of_every_setting_where_it_comes_from(path):
    """Each section that the file itself has is named in the header, with [P], [C], [T] or [O]; or
    the header names the file whose header does so. No line is wider than 100 columns."""
    with open(path) as f:
        lines = f.read().splitlines()
    assert max(map(len, lines)) <= 100
    head = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    assert re.search(r"\[[PCTO]\b", head)
    if "every setting is our choice [O]" in head:
        return
    referred = re.search(r"(?:All else is as in|Pre-training is that of|as in) (\S+\.yaml)", head)
    if referred:
        folder = ROOT if referred[1].startswith("yaml/") else os.path.dirname(path)
        assert os.path.exists(os.path.join(folder, referred[1]))
    own = {line.split(":")[0] for line in lines if re.match("[a-z]+:", line)} - {
        "base",
        "paper",
        "knn",
    }
    for section in own:
        named = re.search(rf"\b{section}(?:, [a-z]+)*: ", head)
        assert named or referred and "All else" in head, f"the header says nothing of {section}"


def test_no_row_is_missing_and_no_two_are_one_cell():
    cells = collections.Counter()
    for path in FILES:
        paper = config.load(path).get("paper")
        if paper and paper["table"] in ROWS:
            cells[paper["table"], paper["row"], paper["column"]] += 1
    assert max(cells.values()) == 1
    assert collections.Counter(table for table, _, _ in cells) == ROWS


def tiny(path):
    """The row's own settings, on 40 images of 16 pixels and a network of width 4.

    There are more queries than the log looks at.
    """
    cfg = config.load(path)
    overrides = [
        "data.name=shapes",
        "data.split=train",
        "data.limit=40",
        "data.image_size=16",
        "model.width=4",
        "model.precision=fp32",
        "optim.batch_size=36",
        "model.bn_splits=1",
    ]
    if cfg["model"]["host"] == "moco":
        overrides.append("model.queue_size=32")
    methods = config.loss_settings(cfg["loss"])
    for method in methods:
        if method["name"] == "ifnd":
            section = "loss.ifnd" if len(methods) > 1 else "loss"
            overrides.append(f"{section}.clusters={[2, 3, 4][: len(method['clusters'])]}")
    return config.load(path, overrides)


def distinct():
    """One file for each distinct pre-training (rows of transfer share theirs)."""
    seen = {}
    for path in FILES:
        cfg = tiny(path)
        seen.setdefault(
            json.dumps([cfg["data"], cfg["model"], cfg["loss"], cfg["optim"]], sort_keys=True), path
        )
    return list(seen.values())


@pytest.mark.parametrize("path", distinct(), ids=short)
def test_it_takes_a_step(path):
    """With everything switched on: after warm-ups, with labels assigned."""
    cfg, device = tiny(path), torch.device("cpu")
    torch.manual_seed(0)
    data = config.build(load, cfg["data"], path, part="pretrain", seed=0)
    Host = config.method_class(cfg["model"], "model")
    encoder = config.build(
        getattr(Host, "Encoder", Encoder),
        cfg["model"],
        path,
        device=device,
        mean=data.mean,
        std=data.std,
    )
    host = config.build(Host, cfg["model"], path, encoder=encoder, n_data=len(data))
    schedule = config.build(Schedule, cfg["optim"], path)
    losses = [
        config.build(
            config.method_class(method, "loss"),
            method,
            path,
            epochs=schedule.epochs,
            n_data=len(data),
            n_keys=host.n_keys,
            labels=data.labels,
        )
        for method in config.loss_settings(cfg["loss"])
    ]
    loss_fn = losses[0] if len(losses) == 1 else Together(losses)
    loader = config.build(
        Loader,
        cfg["data"],
        path,
        dataset=data,
        batch_size=36,
        n_views=host.n_views,
        seed=0,
        device=device,
    )
    now = schedule.epochs // 2
    if hasattr(loss_fn, "before_epoch"):
        ifnd = next(method for method in losses if hasattr(method, "reassign_every"))
        loss_fn.before_epoch(
            now // ifnd.reassign_every * ifnd.reassign_every,
            lambda: torch.nn.functional.normalize(torch.randn(40, encoder.dim), dim=1),
        )
    before = [p.clone() for p in encoder.parameters()]
    optimizer = config.build(
        sgd, cfg["optim"], path, parameters=encoder.parameters(), lr=schedule(now)
    )
    views, index = next(iter(loader.epoch(0)))
    contrasts = host(encoder, views, index)
    outputs = [loss_fn(contrast, now) for contrast in contrasts]
    loss = sum(output.loss for output in outputs)
    figures = step_diagnostics(loss_fn, contrasts, outputs, data.labels, now)
    loss.backward()
    optimizer.step()
    host.update_memory()
    assert loss.isfinite()
    assert figures["K"] > 0
    assert any(not torch.equal(p, b) for p, b in zip(encoder.parameters(), before))
    assert all(p.isfinite().all() for p in encoder.parameters())
