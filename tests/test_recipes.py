"""Recipes that are what they say: what each released code does, against what the rows of yaml/ do.

The facts are typed from the released code and the papers, not from our files. They are compared
with what a row's settings resolve to, and with what its augmentation then draws and its encoder
then has.
"""

import functools
import glob
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import train_linear
from data.augment import Augment
from data.datasets import IMAGENET, STATISTICS, load
from data.loader import Loader
from engine import config
from evaluation.svm import svm
from losses import Contrast
from losses.ifnd import IFND
from losses.nce import NCE
from losses.ring import Ring
from losses.together import Together
from models.cmc import LabEncoder, rgb_to_lab, rgb_to_ycbcr
from models.resnet import Encoder
from models.simclr import SimCLR

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CPU = torch.device("cpu")

# ------------------------------------------------------------------ what the augmentations draw
# crop: the smallest share of the area. jitter: brightness, contrast, saturation, hue, and in how
# many views. grey: in how many. blur: the least and the largest sigma, and in how many.

V1 = {"crop": 0.2, "flip": 0.5, "jitter": (0.4, 0.4, 0.4, 0.4, 1.0), "grey": 0.2}
V2 = {
    "crop": 0.2,
    "flip": 0.5,
    "jitter": (0.4, 0.4, 0.4, 0.1, 0.8),
    "grey": 0.2,
    "blur": (0.1, 2.0, 0.5),
}
SUPCONTRAST_VIEWS = {"crop": 0.2, "flip": 0.5, "jitter": (0.4, 0.4, 0.4, 0.1, 0.8), "grey": 0.2}
NOTEBOOK_VIEWS = {**SUPCONTRAST_VIEWS, "crop": 0.08}
CROP_08 = {"crop": 0.08, "flip": 0.5}
CROP_20 = {"crop": 0.2, "flip": 0.5}

# ------------------------------------------------------------------ normalisation: mean and std

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # moco's notebook, SupContrast
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))  # SupContrast
OWN = None  # the data set's own, as the Ring paper

# ------------------------------------------------------------------ linear probes

RING_PROBE = {
    "epochs": 100,
    "batch_size": 256,
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "schedule": "constant",
    "milestones": [],
}
MOCO_PROBE = {
    "epochs": 100,
    "batch_size": 256,
    "lr": 30.0,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "schedule": "step",
    "milestones": [60, 80],
    "gamma": 0.1,
}
MOCHI_100_PROBE = {
    **MOCO_PROBE,
    "epochs": 60,
    "batch_size": 128,
    "lr": 10.0,
    "milestones": [30, 40, 50],
    "gamma": 0.2,
}
MOCHI_1K_PROBE = {**MOCO_PROBE, "batch_size": 512}
CMC_PROBE = {**MOCO_PROBE, "epochs": 60, "lr": 30.0, "milestones": [30, 40, 50], "gamma": 0.2}
INSDIS_PROBE = {**CMC_PROBE, "lr": 10.0}
SUPCONTRAST_PROBE = {
    **MOCO_PROBE,
    "batch_size": 512,
    "lr": 1.0,
    "milestones": [60, 75, 90],
    "gamma": 0.2,
}

# ------------------------------------------------------------------ recipes: rows, and their facts

RING_OPTIM = {
    "epochs": 300,
    "batch_size": 256,
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "step",
    "milestones": [200, 250],
    "gamma": 0.1,
    "warmup_epochs": 0,
}
MOCO_OPTIM = {
    "epochs": 200,
    "batch_size": 256,
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "milestones": [],
    "warmup_epochs": 0,
}
CMC_OPTIM = {**RING_OPTIM, "epochs": 240, "batch_size": 128, "milestones": [120, 160, 200]}
JCL_OPTIM = {**MOCO_OPTIM, "batch_size": 512, "lr": 0.06}

RECIPES = {
    "moco's CIFAR notebook": dict(
        rows=["cifar10_moco*_32px"],
        views=NOTEBOOK_VIEWS,
        normalisation=CIFAR10,
        temperature=0.1,
        model={
            "backbone": "resnet18",
            "stem": "cifar",
            "head": "linear",
            "dim": 128,
            "queue_size": 4096,
            "momentum": 0.99,
            "bn_splits": 8,
        },
        optim={**MOCO_OPTIM, "batch_size": 512, "lr": 0.06, "weight_decay": 5e-4},
        knn={"k": 200, "temperature": 0.1, "feature": "output"},
    ),
    "SupContrast, CIFAR-10": dict(
        rows=["ifnd/cifar10_*"],
        views=SUPCONTRAST_VIEWS,
        normalisation=CIFAR10,
        temperature=0.5,
        loss={"base_temperature": 0.07},
        probe=SUPCONTRAST_PROBE,
        probe_views=CROP_20,
        model={
            "host": "simclr",
            "backbone": "resnet50",
            "stem": "cifar",
            "head": "mlp",
            "dim": 128,
        },
        optim={**MOCO_OPTIM, "epochs": 1000, "batch_size": 1024, "lr": 0.5, "warmup_epochs": 10},
    ),
    "SupContrast, CIFAR-100": dict(
        rows=["ifnd/cifar100_*"],
        views=SUPCONTRAST_VIEWS,
        normalisation=CIFAR100,
        temperature=0.5,
        loss={"base_temperature": 0.07},
        probe=SUPCONTRAST_PROBE,
        probe_views=CROP_20,
        model={
            "host": "simclr",
            "backbone": "resnet50",
            "stem": "cifar",
            "head": "mlp",
            "dim": 128,
        },
        optim={**MOCO_OPTIM, "epochs": 1000, "batch_size": 1024, "lr": 0.5, "warmup_epochs": 10},
    ),
    "Ring, IR": dict(
        rows=["*_ir", "*_ring"],
        hosts=["ir"],
        views=V1,
        normalisation=OWN,
        temperature=0.07,
        model={"backbone": "resnet18", "stem": "imagenet", "head": "mlp", "dim": 128},
        loss={"n_negatives": 4095},
        optim=RING_OPTIM,
        probe=RING_PROBE,
        probe_views=V1,
    ),
    "Ring, MoCo": dict(
        rows=["*_moco", "*_moco_ring"],
        hosts=["moco"],
        views=V1,
        normalisation=OWN,
        temperature=0.07,
        model={
            "backbone": "resnet18",
            "stem": "imagenet",
            "head": "mlp",
            "dim": 128,
            "momentum": 0.999,
        },
        loss={"n_negatives": None},
        optim=RING_OPTIM,
        probe=RING_PROBE,
        probe_views=V1,
    ),
    "Ring, ablations and transfer": dict(
        rows=["ring/*"],
        views=V1,
        normalisation=OWN,
        temperature=0.07,
        optim=RING_OPTIM,
        probe=RING_PROBE,
        model={"backbone": "resnet18", "stem": "imagenet", "head": "mlp", "dim": 128},
        probe_views=V1,
    ),
    "Ring, CMC on small sets": dict(
        rows=["cifar*_cmc*", "stl10_cmc*"],
        views=CROP_20,
        normalisation=OWN,
        temperature=0.07,
        model={
            "backbone": "resnet18",
            "stem": "imagenet",
            "head": "mlp",
            "dim": 128,
            "colour_space": "lab",
        },
        loss={"n_negatives": 4095},
        optim={**RING_OPTIM, "batch_size": 128},
        probe=RING_PROBE,
        probe_views=CROP_20,
    ),
    "Ring, CMC on ImageNet": dict(
        rows=["imagenet_cmc*"],
        views=CROP_08,
        normalisation=OWN,
        temperature=0.07,
        model={
            "backbone": "resnet18",
            "stem": "imagenet",
            "head": "mlp",
            "dim": 128,
            "colour_space": "lab",
        },
        loss={"n_negatives": 4095},
        optim={**RING_OPTIM, "batch_size": 128},
        probe=RING_PROBE,
        probe_views=CROP_08,
    ),
    "MoCHi on ImageNet-100": dict(
        rows=["mochi/imagenet100_[1o]*", "mochi/imagenet100_moco"],
        views=V2,
        normalisation=OWN,
        model={
            "backbone": "resnet50",
            "stem": "imagenet",
            "head": "mlp",
            "dim": 128,
            "queue_size": 16384,
            "momentum": 0.999,
        },
        temperature=0.2,
        optim={**MOCO_OPTIM, "batch_size": 128},
        probe=MOCHI_100_PROBE,
        probe_views=CROP_08,
    ),
    "MoCHi on ImageNet-1K": dict(
        rows=["mochi/imagenet_*_200", "mochi/coco_*_200", "mochi/voc_*_200"],
        views=V2,
        normalisation=OWN,
        model={
            "backbone": "resnet50",
            "stem": "imagenet",
            "head": "mlp",
            "dim": 128,
            "queue_size": 65536,
            "momentum": 0.999,
        },
        temperature=0.2,
        optim=MOCO_OPTIM,
        probe=MOCHI_1K_PROBE,
        probe_views=CROP_08,
    ),
    "MoCo v1 in CMC's repository": dict(
        rows=["mochi/imagenet100_moco_v1"],
        views=V1,
        normalisation=OWN,
        temperature=0.07,
        model={
            "host": "moco",
            "backbone": "resnet50",
            "stem": "imagenet",
            "head": "linear",
            "dim": 128,
            "queue_size": 16384,
            "momentum": 0.999,
        },
        loss={"name": "nce", "n_negatives": None},
        optim=CMC_OPTIM,
        probe=INSDIS_PROBE,
        probe_views=V1,
    ),
    "InsDis in CMC's repository": dict(
        rows=["mochi/imagenet100_insdis"],
        views=V1,
        normalisation=OWN,
        temperature=0.07,
        model={
            "host": "ir",
            "backbone": "resnet50",
            "stem": "imagenet",
            "head": "linear",
            "dim": 128,
            "momentum": 0.5,
            "exclude_self": False,
        },
        loss={"name": "nce", "n_negatives": 16384},
        optim=CMC_OPTIM,
        probe=INSDIS_PROBE,
        probe_views=V1,
    ),
    "CMC in its repository": dict(
        rows=["mochi/imagenet100_cmc"],
        views=CROP_20,
        normalisation=OWN,
        temperature=0.07,
        model={
            "host": "cmc",
            "backbone": "resnet50",
            "stem": "imagenet",
            "head": "linear",
            "dim": 128,
            "momentum": 0.5,
            "exclude_self": False,
            "colour_space": "ycbcr",
        },
        loss={"name": "nce", "n_negatives": 4096},
        optim=CMC_OPTIM,
        probe=CMC_PROBE,
        probe_views=CROP_20,
    ),
    "MoCo v2 as moco_align_uniform ran it": dict(
        rows=["mochi/imagenet100_moco_v2_65536"],
        views=V2,
        normalisation=OWN,
        temperature=0.2,
        model={
            "host": "moco",
            "backbone": "resnet50",
            "stem": "imagenet",
            "head": "mlp",
            "dim": 128,
            "queue_size": 65536,
            "momentum": 0.999,
        },
        loss={"name": "nce"},
        optim={**MOCO_OPTIM, "batch_size": 128},
        probe=MOCO_PROBE,
        probe_views=CROP_08,
    ),
    "JCL, the paper's": dict(
        rows=[
            "jcl/imagenet_jcl",
            "jcl/imagenet_average",
            "jcl/imagenet_moco_512",
            "jcl/coco_jcl_*",
        ],
        views=V2,
        normalisation=OWN,
        temperature=0.2,
        optim=JCL_OPTIM,
        probe=MOCO_PROBE,
        probe_views=CROP_08,
        model={
            "backbone": "resnet50",
            "stem": "imagenet",
            "head": "mlp",
            "dim": 128,
            "queue_size": 65536,
            "momentum": 0.999,
        },
    ),
    "MoCo v2 in moco's repository": dict(
        rows=[
            "ifnd/imagenet_*",
            "ifnd/coco_*",
            "ifnd/semi_*",
            "jcl/imagenet_moco",
            "jcl/coco_moco_*",
            "jcl/imagenet_jcl_script",
        ],
        views=V2,
        normalisation=OWN,
        temperature=0.2,
        optim=MOCO_OPTIM,
        probe=MOCO_PROBE,
        probe_views=CROP_08,
        model={
            "backbone": "resnet50",
            "stem": "imagenet",
            "head": "mlp",
            "dim": 128,
            "queue_size": 65536,
            "momentum": 0.999,
        },
    ),
}
# every reported figure, and of what recipe it is
REPORTED = {
    "cifar10_moco_32px": (82.6, "moco's CIFAR notebook"),
    "ifnd/cifar10_simclr": (93.6, "SupContrast, CIFAR-10"),
    "ifnd/cifar100_simclr": (70.7, "SupContrast, CIFAR-100"),
    "ifnd/imagenet_moco": (67.5, "MoCo v2 in moco's repository"),
    "jcl/imagenet_moco": (67.5, "MoCo v2 in moco's repository"),
    "jcl/coco_moco_mask": (35.3, "MoCo v2 in moco's repository"),
    "jcl/coco_moco_keypoint": (66.0, "MoCo v2 in moco's repository"),
    "jcl/imagenet_jcl": (68.7, "JCL, the paper's"),
    "jcl/coco_jcl_mask": (35.6, "JCL, the paper's"),
    "jcl/coco_jcl_keypoint": (66.2, "JCL, the paper's"),
    "mochi/imagenet100_moco_v1": (73.4, "MoCo v1 in CMC's repository"),
    "mochi/imagenet100_insdis": (69.1, "InsDis in CMC's repository"),
    "mochi/imagenet100_cmc": (75.8, "CMC in its repository"),
    "mochi/imagenet100_moco_v2_65536": (77.54, "MoCo v2 as moco_align_uniform ran it"),
}


def row_name(path):
    return os.path.relpath(path, os.path.join(ROOT, "yaml")).removesuffix(".yaml")


@functools.cache
def settings_of(name):
    return config.load(os.path.join(ROOT, "yaml", f"{name}.yaml"))


def rows_of(facts):
    """The rows of a recipe, by name."""
    paths = [
        path
        for pattern in facts["rows"]
        for path in sorted(glob.glob(os.path.join(ROOT, "yaml", f"{pattern}.yaml")))
    ]
    names = [row_name(path) for path in paths]
    return [
        name
        for name in names
        if "hosts" not in facts or settings_of(name)["model"]["host"] in facts["hosts"]
    ]


def loss_settings(cfg):
    return config.loss_settings(cfg["loss"])


@functools.cache
def drawn_views(recipe):
    """What 10,000 draws of a recipe are: the facts of `views`, measured."""
    n, side = 10_000, 1000
    augment = Augment(recipe, 32)
    drawn = augment.sample_parameters(n, torch.Generator().manual_seed(0))
    _, _, height, width = augment.box(drawn, side, side).T
    area = height * width / side**2
    assert area.max() > 0.95, "the largest crop is nearly the whole image"
    statistics = {"crop": area.min().item()}
    for name in ("flip", "grey"):
        if name in drawn:
            statistics[name] = drawn[name]["apply"].float().mean().item()
    if "jitter" in drawn:
        factors = drawn["jitter"]["factors"]  # (n, 4)
        reach = torch.cat([(factors[:, :3] - 1).abs().amax(0), factors[:, 3:].abs().amax(0)])
        statistics["jitter"] = (*reach.tolist(), drawn["jitter"]["apply"].float().mean().item())
    if "blur" in drawn:
        sigma = drawn["blur"]["sigma"]
        share = drawn["blur"]["apply"].float().mean().item()
        statistics["blur"] = (sigma.min().item(), sigma.max().item(), share)
    return statistics


def assert_views(recipe, views):
    drawn = drawn_views(recipe)
    assert drawn.keys() == views.keys(), recipe
    assert views["crop"] - 1e-3 <= drawn["crop"] <= views["crop"] + 0.01, (recipe, drawn["crop"])
    for name in drawn.keys() - {"crop"}:
        assert drawn[name] == pytest.approx(views[name], abs=0.02), (recipe, name)


def normalisation_of(cfg):
    """What a row's images are normalised by."""
    of_set = STATISTICS.get(cfg["data"]["name"], IMAGENET)
    settings = cfg["data"]["mean"], cfg["data"]["std"]
    return tuple(tuple(ours if key is None else key) for ours, key in zip(of_set, settings))


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_follow_the_released_code(recipe):
    facts = RECIPES[recipe]
    names = rows_of(facts)
    assert names, "the recipe has rows"
    for name in names:
        cfg = settings_of(name)
        assert_views(cfg["data"]["augment"], facts["views"])
        of_set = STATISTICS.get(cfg["data"]["name"], IMAGENET)
        assert normalisation_of(cfg) == (facts["normalisation"] or of_set), name
        assert cfg["model"].items() >= facts["model"].items(), name
        assert cfg["optim"].items() >= facts["optim"].items(), name
        assert cfg["knn"].items() >= facts.get("knn", {}).items(), name
        for loss in loss_settings(cfg):
            if "_t0" not in name:  # JCL's ablation of it
                assert loss.get("temperature", facts["temperature"]) == facts["temperature"], name
            assert loss.items() >= facts.get("loss", {}).items(), name
        if "probe" in facts and cfg["linear"]["classifier"] == "sgd":
            assert cfg["linear"].items() >= facts["probe"].items(), name
            assert cfg["linear"]["features"] == "augmented", name
            assert not cfg["linear"]["standardize"], name
            assert_views(cfg["linear"]["augment"], facts["probe_views"])


def test_a_reported_figure_stands_beside_its_own_recipe_alone():
    figures = {}
    for path in glob.glob(os.path.join(ROOT, "yaml", "**", "*.yaml"), recursive=True):
        if "detectron2" not in path and "scales" not in path:
            reported = settings_of(row_name(path)).get("paper", {}).get("reported")
            if reported is not None:
                figures[row_name(path)] = reported
    assert figures == {name: figure for name, (figure, _) in REPORTED.items()}
    for name, (_, recipe) in REPORTED.items():
        assert name in rows_of(RECIPES[recipe]), f"{name} follows {recipe}"


# ------------------------------------------------------------------ by value


def test_the_normalisation_is_that_of_the_settings():
    """data.mean and data.std reach the images; what is not given is the set's own."""
    cfg = settings_of("cifar10_moco_32px")
    data = config.build(
        load, {**cfg["data"], "name": "shapes", "limit": 8}, "", part="pretrain", seed=0
    )
    loader = config.build(
        Loader, cfg["data"], "", dataset=data, batch_size=8, n_views=2, seed=0, device=CPU
    )
    for value in (0.0, 1.0):
        x = loader.augment.normalise(torch.full((1, 3, 1, 1), value)).flatten()
        assert torch.allclose(x, (value - torch.tensor(CIFAR10[0])) / torch.tensor(CIFAR10[1]))
    assert (
        load("pretrain", 0, name="shapes", limit=8, std=[1.0, 2.0, 3.0]).mean
        == STATISTICS["shapes"][0]
    )
    for wrong in ({"mean": [0.5]}, {"std": [0.2, 0.0, 0.2]}):
        with pytest.raises(SystemExit, match="it must be three numbers"):
            load("pretrain", 0, name="shapes", limit=8, **wrong)


def supcon_loss(z, temperature, base_temperature):
    """SupContrast's loss without labels, one anchor at a time. z: (n, V, D), float64."""
    n, V, _ = z.shape
    views = z.flatten(0, 1)  # (n V, D)
    total = 0
    for anchor in range(n * V):
        others = [j for j in range(n * V) if j != anchor]
        logits = views @ views[anchor] / temperature
        log_total = torch.logsumexp(logits[others], 0)
        positives = [j for j in others if j // V == anchor // V]
        mean_log_probability = sum(logits[j] - log_total for j in positives) / len(positives)
        total = total - temperature / base_temperature * mean_log_probability
    return total / (n * V)


@pytest.mark.parametrize("temperature,base_temperature", [(0.5, 0.07), (0.1, 0.07), (0.5, 0.5)])
@pytest.mark.parametrize(
    "make",
    [
        lambda **keys: NCE(**keys),
        lambda **keys: IFND(epochs=4, n_data=6, clusters=[2], **keys),
        lambda **keys: IFND(epochs=4, n_data=6, clusters=[2], mode="attract", **keys),
        lambda **keys: Together(
            [
                IFND(epochs=4, n_data=6, clusters=[2], **keys),
                Ring(epochs=4, temperature=keys["temperature"], inner=0.0, outer=1.0),
            ]
        ),
    ],
    ids=["nce", "ifnd", "ifnd, attract", "a list"],
)
def test_the_scaled_loss_is_supcontrasts(make, temperature, base_temperature):
    """Value and gradient on the host simclr, in float64. IFND, without labels yet, removes none."""
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(
        torch.randn(6, 2, 8, generator=generator, dtype=torch.float64), dim=2
    ).requires_grad_()
    host = SimCLR(encoder=None)
    (contrast,) = host(lambda x: x, z.unbind(1), torch.arange(6))
    loss_fn = make(temperature=temperature, base_temperature=base_temperature)
    loss = loss_fn(contrast, 0.0).loss
    expected = supcon_loss(z, temperature, base_temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, z)
    (expected_gradient,) = torch.autograd.grad(expected, z)
    assert (gradient - expected_gradient).abs().max() < 1e-12


def test_the_scale_is_a_learning_rate_and_a_weight_decay():
    """SupContrast's lr 0.5 and decay 1e-4 are 3.571 and 1.4e-5 on the plain loss."""

    def trained(base_temperature, lr, decay):
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(8, 4, generator=generator, dtype=torch.float64).requires_grad_()
        x = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        optimizer = torch.optim.SGD([weight], lr, momentum=0.9, weight_decay=decay)
        loss_fn = NCE(temperature=0.5, base_temperature=base_temperature)
        for _ in range(20):
            z = F.normalize(x @ weight, dim=1)
            k = z.detach()
            queries = Contrast(z[:6], k[:6, None], k[6:], torch.arange(6), torch.arange(6, 12))
            optimizer.zero_grad()
            loss_fn(queries, 0.0)[0].backward()
            optimizer.step()
        return weight.detach()

    scale = 0.5 / 0.07
    assert torch.allclose(
        trained(0.07, 0.05, 1e-3), trained(None, 0.05 * scale, 1e-3 / scale), atol=1e-10
    )


def test_a_list_of_losses_has_one_base_temperature():
    ifnd = IFND(epochs=4, n_data=6, clusters=[2], temperature=0.5, base_temperature=0.07)
    draws = NCE(temperature=0.5, n_negatives=3)
    with pytest.raises(ValueError, match="base_temperature of ifnd and nce differ"):
        Together([ifnd, draws])
    assert Together([ifnd, Ring(epochs=4, temperature=0.5)]).scale == pytest.approx(0.5 / 0.07)
    with pytest.raises(ValueError, match="base_temperature is 0"):
        NCE(base_temperature=0.0)


def pcl_average_precision(scores, labels):
    """As PCL's code: precision, made monotone from the right, summed over the steps of recall."""
    order = np.argsort(-scores, kind="stable")
    right = labels[order] > 0
    precision = np.append(np.cumsum(right) / np.arange(1, len(right) + 1), 0)
    recall = np.concatenate([[0], np.cumsum(right) / right.sum(), [1]])
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i + 1] - recall[i]) * precision[i] for i in range(len(right)))


def test_difficult_images_are_negatives_as_in_pcls_code():
    LinearSVC = pytest.importorskip("sklearn.svm").LinearSVC
    for name in ("ifnd/voc07_ifnd", "ifnd/voc07_moco"):
        assert settings_of(name)["linear"]["difficult"] == "negative"
        assert settings_of(name)["linear"]["C"] == 0.5
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 6, generator=generator)
    y = torch.where(x[:, :2] + torch.randn(160, 2, generator=generator) > 0.5, 1, -1)
    y[torch.rand(160, 2, generator=generator) < 0.2] = 0  # difficult
    train, test = (x[:100], y[:100]), (x[100:], y[100:])
    expected = {}
    for rule in ("negative", "ignore"):
        precisions = []
        for c in range(2):
            (a, labels), (b, truth) = (
                (F.normalize(v, dim=1).numpy(), w[:, c].numpy()) for v, w in (train, test)
            )
            if rule == "negative":
                labels, truth = np.where(labels == 0, -1, labels), np.where(truth == 0, -1, truth)
            a, labels, b, truth = (
                a[labels != 0],
                labels[labels != 0],
                b[truth != 0],
                truth[truth != 0],
            )
            machine = LinearSVC(
                C=0.5,
                class_weight={1: 2, -1: 1},
                dual=True,
                tol=1e-4,
                max_iter=2000,
                random_state=0,
            )
            scores = machine.fit(a, labels).decision_function(b)
            precisions.append(pcl_average_precision(scores, truth))
        expected[rule] = 100 * np.mean(precisions)
        assert svm(*train, *test, 0.5, ["a", "b"], rule) == pytest.approx(expected[rule], abs=1e-3)
    assert svm(*train, *test, 0.5, ["a", "b"]) == pytest.approx(expected["negative"], abs=1e-3)
    assert expected["ignore"] > expected["negative"] + 1


def built(name, **changes):
    """The encoder of a row."""
    cfg = settings_of(name)
    kind = getattr(config.method_class(cfg["model"], "model"), "Encoder", Encoder)
    return config.build(
        kind, {**cfg["model"], **changes}, name, device=CPU, mean=(0.0,) * 3, std=(1.0,) * 3
    )


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_each_head_has_the_parameters_of_the_released_one():
    mlp, linear = 512 * 512 + 512 + 512 * 128 + 128, 512 * 128 + 128
    for name in (
        "cifar10_ir",
        "cifar10_moco_ring",
        "imagenet_ring",
        "stl10_moco",
        "ring/cifar10_u050",
    ):
        assert count(built(name).head) == mlp == 328_320, name
    assert count(built("cifar10_moco_32px").head) == linear
    half = 256 * 256 + 256 + 256 * 128 + 128  # each stream has its own
    assert count(built("cifar10_cmc").head) == count(built("imagenet_cmc_ring").head) == 2 * half
    settings = dict(backbone="resnet50", precision="fp32")
    assert count(Encoder(head="linear", **settings).head) == 2048 * 128 + 128  # MoCo v1, InsDis
    assert count(Encoder(head="mlp", **settings).head) == 2048 * 2049 + 2048 * 128 + 128


def test_cmcs_half_width_networks_have_a_stem_of_64_channels():
    pair = built("cifar10_cmc", head="linear")  # as released
    assert count(pair) == 5_686_336
    assert count(built("cifar10_cmc").backbone) == 5_686_336 - 2 * (256 * 128 + 128)
    for stream, channels in ((pair.backbone.L, 1), (pair.backbone.ab, 2)):
        assert stream.conv1.weight.shape == (64, channels, 7, 7)
        assert stream.layer1[0].conv1.weight.shape == (32, 64, 3, 3)
        assert stream.layer1[0].downsample[0].weight.shape == (32, 64, 1, 1)
        assert stream.layer4[1].bn2.weight.shape == (256,)


@pytest.mark.parametrize(
    "colour_space,mean,std",
    [
        (
            "lab",
            (50, (98.233 - 86.183) / 2, (94.478 - 107.857) / 2),
            (50, (98.233 + 86.183) / 2, (94.478 + 107.857) / 2),
        ),
        ("ycbcr", (116.151, 121.080, 132.342), (109.500, 111.855, 111.964)),
    ],
)
def test_cmcs_streams_see_the_released_colours(colour_space, mean, std):
    """What reaches the streams: Lab, tested elsewhere, or YCbCr by BT.601; normalised."""
    net = LabEncoder(
        (0.3, 0.4, 0.5),
        (0.1, 0.2, 0.3),
        backbone="resnet10",
        width=4,
        precision="fp32",
        colour_space=colour_space,
    )
    seen = []
    net.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    rgb = torch.rand(2, 3, 8, 8)
    net.eval()((rgb - net.mean) / net.std)
    if colour_space == "lab":
        converted = rgb_to_lab(rgb)
    else:
        r, g, b = rgb.double().unbind(1)
        converted = torch.stack(
            [
                16 + 65.481 * r + 128.553 * g + 24.966 * b,
                128 - 37.797 * r - 74.203 * g + 112.0 * b,
                128 + 112.0 * r - 93.786 * g - 18.214 * b,
            ],
            1,
        )
    expected = (converted.double() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    assert (seen[0] - expected).abs().max() < 1e-4


def test_ycbcr_of_white_black_and_red():
    known = {
        (1, 1, 1): (235, 128, 128),
        (0, 0, 0): (16, 128, 128),
        (1, 0, 0): (81.481, 90.203, 240),
    }
    for rgb, expected in known.items():
        ycbcr = rgb_to_ycbcr(torch.tensor(rgb).float().view(1, 3, 1, 1)).flatten().tolist()
        assert ycbcr == pytest.approx(expected, abs=1e-3)


# ------------------------------------------------------------------ the last, smaller batch


CFG = """
data: {name: shapes, augment: shapes, image_size: 16, limit: 40, workers: 0, std: [0.3, 0.4, 0.5]}
model: {host: ir, backbone: resnet10, stem: cifar, width: 4, dim: 8, precision: fp32}
loss: {name: nce}
optim: {epochs: 1, batch_size: 16, lr: 0.03}
linear: {epochs: 1, batch_size: 16, lr: 0.1, features: augmented, augment: crop_flip}
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A function that runs train_linear.py on a.yaml with overrides, and gives the sizes of the
    batches and the mean and std by which they were normalised."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/a")
    with open("a.yaml", "w") as f:
        f.write(CFG)
    encoder = config.build(Encoder, config.load("a.yaml")["model"], "a.yaml", device=CPU)
    torch.save(encoder.backbone.state_dict(), "runs/a/backbone.pt")
    batch_plan = Loader.batch_plan

    def run(*overrides):
        sizes, normalisation = [], []

        def recorded(self, *arguments):
            normalisation.append((self.augment.mean, self.augment.std))
            steps = batch_plan(self, *arguments)
            sizes.extend(len(index) for index, _ in steps)
            return steps

        monkeypatch.setattr(Loader, "batch_plan", recorded)
        monkeypatch.setattr(
            sys, "argv", ["train_linear.py", "--cfg", "a.yaml", "--no-baselines", *overrides]
        )
        train_linear.main()
        return sizes, normalisation[0]

    return run


def test_an_augmenting_probe_keeps_the_last_batch(probe):
    """40 images in batches of 16: 16, 16 and 8; pre-training, by the same Loader, drops the 8."""
    sizes, normalisation = probe()
    assert sizes == [16, 16, 8]
    assert normalisation == (STATISTICS["shapes"][0], (0.3, 0.4, 0.5))
    settings = config.load("a.yaml")
    data = config.build(load, settings["data"], "a.yaml", part="pretrain", seed=0)
    pretraining = config.build(
        Loader,
        settings["data"],
        "a.yaml",
        dataset=data,
        batch_size=16,
        n_views=1,
        seed=0,
        device=CPU,
    )
    assert len(pretraining) == 2


def test_a_set_for_transfer_has_its_own_normalisation(probe):
    for part in ("train", "val"):
        for name in ("a", "b"):
            os.makedirs(f"f/{part}/{name}")
            for i in range(3):
                Image.new("RGB", (16, 16), (80 * i, 40, 40)).save(f"f/{part}/{name}/{i}.png")
    sizes, normalisation = probe("linear.data=folder", "linear.root=f", "linear.batch_size=4")
    assert sizes == [4, 2]
    assert normalisation == IMAGENET
