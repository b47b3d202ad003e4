"""Weights in and out. In: our runs, torchvision's files, and the checkpoints of moco, JCL, PCL, CMC, PyContrast, SupContrast, SimSiam, solo-learn
and lightly, told apart by their keys. Out: torchvision's keys, or detectron2's names. Nothing that is read can run code.
"""

import os
import pickle
from collections import OrderedDict

import torch
from torch import Tensor

from . import checkpoint, config
from .distributed import say

LAYOUTS = {  # what stands before `conv1.weight`, once every `module.` is gone
    "": "a torchvision ResNet",
    "encoder_q.": "a checkpoint of moco, JCL or PCL",
    "backbone.": "one of our last.pt, or of solo-learn",
    "encoder.": "a checkpoint of SimSiam, PyContrast, SupContrast, CMC's one-stream code or an older solo-learn",
    "encoder.l_to_ab.": "CMC, two streams",
    "encoder1.": "PyContrast's CMC, two streams",
    "L.": "our CMC's backbone.pt",
    "backbone.L.": "our CMC's last.pt",
}
STREAMS = [
    ("encoder.l_to_ab.", "encoder.ab_to_l."),
    ("encoder1.", "encoder2."),
    ("backbone.L.", "backbone.ab."),
    ("L.", "ab."),
]  # of L, of ab
AVERAGES = (
    "encoder_k.",
    "momentum",
    "ema",
    "teacher",
    "target",
    "key_encoder",
)  # a second network, the average of the first
LIGHTLY = {
    "0": "conv1",
    "1": "bn1",
    "4": "layer1",
    "5": "layer2",
    "6": "layer3",
    "7": "layer4",
}  # nn.Sequential(*resnet.children())
SETTINGS_OF = (
    "argparse",
    "omegaconf",
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "numpy",
    "typing",
    "collections",
    "pathlib",
    "enum",
    "yacs",
    "easydict",
)  # packages whose objects trainers store beside the weights


class Inert:
    """Stands for an object that a checkpoint would like to make: takes anything, does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read(path):
    """checkpoint.read, where the settings that trainers store along with the weights come out as empty, inert objects."""
    names = ["argparse.Namespace"]
    try:
        names += [
            n
            for n in torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if n.split(".")[0] in SETTINGS_OF
        ]
    except Exception:  # a file of before torch 1.6, or none at all: checkpoint.read will say
        pass
    stands_for = lambda name: (
        OrderedDict if name.endswith(("AttributeDict", "EasyDict")) else Inert
    )  # those that are filled like a dict
    with torch.serialization.safe_globals([(stands_for(name), name) for name in names]):
        return checkpoint.read(path)


def save_backbone(path, backbone, settings):
    """Write backbone.pt: torchvision's keys and nothing else among them.

    settings: of the run. They are an attribute of the state dict, as torch's own versions of the
    layers are: torch.load brings it along and load_state_dict never looks at it.
    """
    weights = backbone.state_dict()
    weights.settings = settings
    checkpoint.write(path, weights)


def refuse_other_settings(path, saved):
    """End the program if a run's weights are not of the settings in the config.yaml beside them.

    saved: what the file at `path` holds. Older files of ours, and other people's, say nothing of
    their settings and are taken.
    """
    beside = os.path.join(os.path.dirname(path), "config.yaml")
    settings = getattr(saved, "settings", None)  # backbone.pt
    if isinstance(saved, dict) and {"settings", "encoder", "host"} <= set(saved):  # last.pt
        settings = saved["settings"]
    if not isinstance(settings, dict) or not os.path.exists(beside):
        return
    other = config.difference(settings, config.read(beside), checkpoint.MAY_CHANGE)
    if other:
        raise SystemExit(
            f"{path} was not trained with the settings of {beside}: {other}; finish that run, or "
            "move the file to another folder and name it with --weights"
        )


def backbone_of(path):
    """The ResNet in a file of any known layout: {torchvision key: tensor}, of CMC {"L." or "ab." + torchvision key: tensor}; and a sentence."""
    saved = read(path)
    refuse_other_settings(path, saved)
    for key in ("state_dict", "model", "encoder"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
            break
    tensors = (
        {
            k.replace("module.", ""): v
            for k, v in saved.items()
            if isinstance(k, str) and isinstance(v, Tensor)
        }
        if isinstance(saved, dict)
        else {}
    )
    numbered = next(
        (
            k
            for k in tensors
            if k.endswith("4.0.conv1.weight")
            and "layer" not in k
            and not any(a in k for a in AVERAGES)
        ),
        None,
    )
    if numbered:  # lightly's: nn.Sequential numbers the parts
        root = numbered.removesuffix("4.0.conv1.weight")
        parts = {
            k: k.removeprefix(root).split(".", 1)
            for k in tensors
            if k.startswith(root) and "." in k.removeprefix(root)
        }
        found = {
            f"{LIGHTLY[n]}.{rest}": tensors[k] for k, (n, rest) in parts.items() if n in LIGHTLY
        }
        return found, told(path, "a checkpoint of lightly", found, tensors)
    roots = [
        k.removesuffix("conv1.weight")
        for k in tensors
        if k.endswith("conv1.weight") and "layer" not in k
    ]
    roots = [r for r in roots if not any(a in r for a in AVERAGES)]
    two = next(((a, b) for a, b in STREAMS if {a, b} <= set(roots)), None)
    if not two and len(roots) != 1:
        what = (
            f"more than one: under {', '.join(map(repr, roots))}"
            if roots
            else "none, for no key ends with conv1.weight"
            + (
                f"; its first is {next(iter(tensors))!r}"
                if tensors
                else "; it holds no tensors by name"
            )
        )
        raise SystemExit(
            f"{path}: expected one ResNet and found {what}. --weights takes a backbone.pt, a last.pt, a torchvision ResNet's file, or a checkpoint "
            "of moco, JCL, PCL, CMC, PyContrast, SupContrast, SimSiam, solo-learn or lightly"
        )
    found = {}
    for name, root in zip(("L.", "ab.") if two else ("",), two or roots):
        parts = {k.removeprefix(root): v for k, v in tensors.items() if k.startswith(root)}
        found |= {
            name + k.replace("shortcut.", "downsample."): v
            for k, v in parts.items()
            if k.split(".")[0] in ("conv1", "bn1", *LIGHTLY.values())
        }
    return found, told(
        path,
        LAYOUTS.get((two or roots)[0], f"a ResNet under {(two or roots)[0]!r}"),
        found,
        tensors,
    )


def of_run(given, run, file, random=True):
    """The file whose weights a script evaluates: --weights, or else what the run left in its folder. random: `none` may be given instead."""
    found = given or next(
        (
            f
            for f in (os.path.join(run, n) for n in ("backbone.pt", "last.pt"))
            if os.path.exists(f)
        ),
        None,
    )
    if found is None:
        raise SystemExit(
            f"{run} holds no backbone.pt; first run: python train_pretrain.py --cfg {file}, or give --weights FILE"
            + (", or --weights none" if random else "")
        )
    return found


def told(path, what, found, tensors):
    left = len(tensors) - len(found)
    return f"{path}: {what}; {len(found)} tensors of the ResNet taken" + (
        f", {left} others left out (heads, queues, averages)" if left else ""
    )


def load_backbone(path, backbone):
    """A file's ResNet into ours, a models.resnet.ResNet or CMC's two; anything that does not fit ends the program."""
    found, sentence = backbone_of(path)
    want = backbone.state_dict()
    for key in want:
        if key not in found and not key.endswith(
            "num_batches_tracked"
        ):  # which files of before torch 0.4.1 lack
            raise SystemExit(
                f"{path} has no {key}: it is of another network than model.backbone"
                + (" (two streams, of model.host: cmc)" if "L.conv1.weight" in found else "")
            )
        if key in found and found[key].shape != want[key].shape:
            raise SystemExit(
                f"{path}: {key} is {tuple(found[key].shape)}, the network's is {tuple(want[key].shape)}; set model.backbone, "
                "model.stem and model.width to those it was trained with"
            )
    extra = sorted(set(found) - set(want))
    if extra:
        raise SystemExit(
            f"{path} has {extra[0]}, which the network has not: it is of a larger model.backbone"
        )
    backbone.load_state_dict(found, strict=False)
    say(sentence)


def export(kind, path, backbone, source):
    """Backbone's weights as a file. kind: `torchvision`, a state dict; `detectron2`, a pickle with that library's names, as moco's converter makes."""
    weights = {k: v.detach().cpu() for k, v in backbone.state_dict().items()}
    if "conv1.weight" not in weights:
        raise SystemExit(f"--export: {source} is of CMC, two networks; other libraries have one")
    if kind == "torchvision":
        return checkpoint.write(path, weights)
    if weights["conv1.weight"].shape[2] != 7:
        raise SystemExit(
            f"--export detectron2: {source} has the CIFAR stem, 3x3; detectron2's ResNets begin with 7x7 (model.stem: imagenet)"
        )
    aside = path + ".part"
    with open(aside, "wb") as f:
        pickle.dump(
            {
                "model": {detectron2_name(k): v.numpy() for k, v in weights.items()},
                "__author__": source,
                "matching_heuristics": True,
            },
            f,
        )
    os.replace(aside, path)


def detectron2_name(key):
    """layer1.0.bn2.weight -> res2.0.conv2.norm.weight; conv1.weight -> stem.conv1.weight; downsample.0, .1 -> shortcut, shortcut.norm."""
    key = key if key.startswith("layer") else "stem." + key
    for i in range(4, 0, -1):
        key = key.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
