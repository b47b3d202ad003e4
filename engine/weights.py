"""Weights in and out. Nothing that is read can run code.

In: our runs, torchvision's files, and the checkpoints of moco, JCL, PCL, CMC, PyContrast,
SupContrast, SimSiam, DINO, solo-learn and lightly. They are told apart by the names of their
tensors, wherever in a file these lie.
Out: torchvision's names, or detectron2's.
"""

import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from . import checkpoint, config
from .distributed import print_main

# What stands before `conv1.weight`, once every `module.` is gone.
LAYOUTS = {
    "": "a torchvision ResNet",
    "encoder_q.": "a checkpoint of moco, JCL or PCL",
    "backbone.": "one of our last.pt, or of solo-learn or DINO",
    "encoder.": (
        "a checkpoint of SimSiam, PyContrast, SupContrast, CMC's one-stream code or an older "
        "solo-learn"
    ),
    "encoder.l_to_ab.": "CMC, two streams",
    "encoder1.": "PyContrast's CMC, two streams",
    "L.": "our CMC's backbone.pt",
    "backbone.L.": "our CMC's last.pt",
}
# CMC's two networks, of L and of ab.
STREAMS = [
    ("encoder.l_to_ab.", "encoder.ab_to_l."),
    ("encoder1.", "encoder2."),
    ("backbone.L.", "backbone.ab."),
    ("L.", "ab."),
]
# Words for a second network, the average of the first.
AVERAGES = (
    "encoder_k.",
    "momentum",
    "ema",
    "teacher",
    "target",
    "key_encoder",
)
# Where a file holds several ResNets, the one under the first of these keys is taken. DINO's own
# evaluation takes the teacher, though it is an average.
PREFERRED = ("state_dict", "model", "encoder", "teacher", "student")
STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
# lightly's nn.Sequential(*resnet.children()) numbers the parts.
NUMBERED = {
    "0": "conv1",
    "1": "bn1",
    "4": "layer1",
    "5": "layer2",
    "6": "layer3",
    "7": "layer4",
}
# Packages whose objects trainers store beside the weights.
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
)
# What weights_only makes without being told that it may, beside torch's own.
SAFE = (
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.set",
    "builtins.complex",
)
HOW_TO_SAVE = (
    "where it was made, load it and save its weights alone: torch.save(model.state_dict(), FILE)"
)


# ---------------------------------------------------------------------------- reading safely


class Inert:
    """Stands for an object that a checkpoint would like to make: takes anything, does nothing."""

    def __new__(cls, *args, **kwargs):
        """Make an empty object, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def stand_in(name):
    """The class that stands for the class of that name: a dictionary for one filled like it."""
    is_filled = name.endswith(("AttributeDict", "EasyDict"))
    return OrderedDict if is_filled else Inert


def read_safely(path):
    """Read a file of weights, with the settings that trainers store in it as inert objects.

    Raises:
        SystemExit: says in one sentence what the file is instead, and what to do.
    """
    if os.path.isdir(path):
        file = os.path.join(path, "last.pt")
        raise SystemExit(f"{path} is a folder; name a file in it, such as {file}")
    refuse_other_formats(path)
    names = [name for name in pickled_names(path) if name not in SAFE]
    foreign = [name for name in names if name.split(".")[0] not in ("torch", *SETTINGS_OF)]
    networks = [name for name in names if name.startswith("torch.nn.modules.")]
    if networks:
        raise SystemExit(
            f"{path} is not a checkpoint that can be read safely: it holds a whole pickled network "
            f"({shorten([*foreign, *networks][0])}), which may run code; {HOW_TO_SAVE}"
        )
    settings = {name for name in names if name.split(".")[0] in SETTINGS_OF}
    settings.add("argparse.Namespace")
    allowed = [(stand_in(name), name) for name in sorted(settings)]
    try:
        with torch.serialization.safe_globals(allowed):
            return checkpoint.read_checkpoint(path)
    except SystemExit as refusal:
        # torch's own sentence is a page of advice on how to run what the file holds.
        if not isinstance(refusal.__context__, pickle.UnpicklingError):
            raise
        reason = "torch.save did not write it, or it is cut off"
        if foreign:
            reason = f"it asks for {shorten(foreign[0])}, which may run code; {HOW_TO_SAVE}"
        raise SystemExit(f"{path} is not a checkpoint that can be read safely: {reason}") from None


def shorten(name):
    """A name out of a file, quoted, with nothing in it that a terminal would obey."""
    return ascii(name[:80])


def refuse_other_formats(path):
    """End the program if a file is of a well-known kind that is no state dict of torch."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(512)
    except OSError:  # checkpoint.read_checkpoint tells it
        return
    problem = None
    if size == 0:
        problem = "is empty; download or write it anew"
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        problem = (
            "is a web page, not weights: its address shows a page about the file; download the "
            "file itself, by the link of its download button"
        )
    elif head.startswith(b"version https://git-lfs"):
        problem = "is Git LFS's note of where the weights are; fetch them with: git lfs pull"
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        problem = (
            "is of safetensors; save what it holds as torch does: "
            "torch.save(safetensors.torch.load_file(FILE), OTHER_FILE)"
        )
    elif is_torchscript(path):
        problem = (
            "is a TorchScript file, a program with its weights, and programs are not run here; "
            "save its weights alone: torch.save(torch.jit.load(FILE).state_dict(), OTHER_FILE)"
        )
    if problem:
        raise SystemExit(f"{path} {problem}")


def is_torchscript(path):
    """Does a file hold code, as torch.jit.save writes it?"""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.partition("/")[2].startswith("code/") for name in names)


def pickled_names(path):
    """The classes and functions that a file of torch.save or pickle asks for, in its order.

    The pickle is looked through and not executed. A file may hide names from this: what is allowed
    to be made is decided by torch.load(weights_only=True) alone.

    Returns:
        list of "module.name"; empty where the file holds no pickle.
    """
    names, words = [], []
    try:
        # A file of before torch 1.6 is five pickles in a row, of which the fourth is the value.
        with open_pickle(path) as stream:
            for _ in range(5):
                for opcode, argument, _ in pickletools.genops(stream):
                    if opcode.name == "GLOBAL":
                        # Up to protocol 2 a module has the name that Python 2 had for it.
                        name = argument.replace(" ", ".")
                        names.append(name.replace("__builtin__.", "builtins."))
                    elif opcode.name == "STACK_GLOBAL":
                        names.append(".".join(words[-2:]))
                    elif isinstance(argument, str):
                        words.append(argument)
    # The end of the file, bytes that are no pickle, a damaged zip: read_checkpoint tells it.
    except Exception:
        pass
    return names


def open_pickle(path):
    """Open the bytes of a file's pickle, which in a zip of torch.save is .../data.pkl."""
    if not zipfile.is_zipfile(path):
        return open(path, "rb")
    with zipfile.ZipFile(path) as archive:
        return archive.open(next(n for n in archive.namelist() if n.endswith("/data.pkl")))


# ---------------------------------------------------------------------------- finding the ResNet


class Candidate(NamedTuple):
    """A dictionary of tensors by name in a file, and the ResNet in it."""

    key: str  # the keys that lead to it: "teacher", "a.b"; "" is the file itself
    tensors: dict
    backbone: dict  # {torchvision's key: tensor}, of CMC with "L." or "ab." before the key
    layout: str


def read_backbone(path):
    """Read the ResNet in a file: find_backbone(path, read_safely(path))."""
    return find_backbone(path, read_safely(path))


def find_backbone(path, saved):
    """Find the ResNet in what a file of any known layout holds.

    Args:
        path: of the file.
        saved: what it holds, as read_safely returns it.

    Returns:
        {torchvision's key: tensor}, of CMC {"L." or "ab." + torchvision's key: tensor}; a
        sentence; and what the file carries of the images' preprocessing, or None.

    Raises:
        SystemExit: names the file, and what it holds instead of one ResNet.
    """
    refuse_other_settings(path, saved)
    state_dicts = find_state_dicts(saved)
    candidates = [
        Candidate(key, tensors, *backbone)
        for key, tensors in state_dicts
        if (backbone := take_backbone(tensors)) is not None
    ]
    if not candidates:
        raise SystemExit(
            f"{path}: expected one ResNet and found {describe_names(state_dicts)}. --weights takes "
            "a backbone.pt, a last.pt, a torchvision ResNet's file, or a checkpoint of moco, JCL, "
            "PCL, CMC, PyContrast, SupContrast, SimSiam, DINO, solo-learn or lightly"
        )
    chosen = min(candidates, key=preference)
    broken = checkpoint.not_finite(chosen.backbone)
    if broken:
        raise SystemExit(
            f"{path}: {broken} of its ResNet holds a NaN or an infinite number: the training that "
            "wrote it has diverged; take an earlier checkpoint"
        )
    others = [candidate.key for candidate in candidates if candidate is not chosen]
    return chosen.backbone, describe_choice(path, chosen, others), carried_preprocessing(saved)


def find_state_dicts(saved):
    """Every dictionary of tensors by name in nested dictionaries, the outermost first.

    Returns:
        list of (key, {name: tensor}), every `module.` gone from the names.
    """
    queue, seen, state_dicts = [("", saved)], set(), []
    while queue:
        key, value = queue.pop(0)
        # A pickle may hold a dictionary that holds itself.
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        named = {name: inner for name, inner in value.items() if isinstance(name, str)}
        tensors = {
            name.replace("module.", ""): inner
            for name, inner in named.items()
            if isinstance(inner, Tensor)
        }
        if tensors:
            state_dicts.append((key, tensors))
        queue += [(f"{key}.{name}".lstrip("."), inner) for name, inner in named.items()]
    return state_dicts


def take_backbone(tensors):
    """The one ResNet, or CMC's two, among tensors {name: tensor}.

    Returns:
        ({torchvision's key: tensor}, whose layout it is), or None where there is none, or several.
    """
    numbered = [
        name.removesuffix("4.0.conv1.weight")
        for name in tensors
        if name.endswith("4.0.conv1.weight") and "layer" not in name and not is_average(name)
    ]
    if numbered:
        parts = (
            (name.removeprefix(numbered[0]).partition("."), tensor)
            for name, tensor in tensors.items()
            if name.startswith(numbered[0])
        )
        backbone = {
            f"{NUMBERED[number]}.{rest}": tensor
            for (number, _, rest), tensor in parts
            if number in NUMBERED
        }
        return backbone, "a checkpoint of lightly"

    roots = find_roots(tensors)
    streams = next((pair for pair in STREAMS if set(pair) <= set(roots)), None)
    if streams is None and len(roots) != 1:
        return None
    backbone = {}
    for new_root, root in zip(("L.", "ab.") if streams else ("",), streams or roots):
        for name, tensor in tensors.items():
            part = name.removeprefix(root)
            if name.startswith(root) and part.split(".")[0] in STAGES:
                backbone[new_root + part.replace("shortcut.", "downsample.")] = tensor
    root = (streams or roots)[0]
    return backbone, LAYOUTS.get(root, f"a ResNet under {root!r}")


def find_roots(tensors):
    """What stands before `conv1.weight` of each ResNet in {name: tensor}, averages left out."""
    roots = [
        name.removesuffix("conv1.weight")
        for name in tensors
        if name.endswith("conv1.weight") and "layer" not in name
    ]
    return [root for root in roots if not is_average(root)]


def is_average(name):
    """Does a name say that a network is the average of another?"""
    return any(word in name for word in AVERAGES)


def preference(candidate):
    """A sort key, the lowest is taken: no average, a well-known key, the largest ResNet."""
    keys = candidate.key.split(".") if candidate.key else []
    unknown = [key for key in keys if key not in PREFERRED]
    ranks = [PREFERRED.index(key) for key in keys if key in PREFERRED]
    rank = min(ranks, default=len(PREFERRED) if keys else -1)
    return any(map(is_average, unknown)), rank, -len(candidate.backbone)


def describe_names(state_dicts):
    """What there is instead of one ResNet, in words."""
    for _, tensors in state_dicts:
        roots = find_roots(tensors)
        if roots:
            return f"more than one: under {', '.join(map(repr, roots))}"
    none = "none, for no key ends with conv1.weight"
    if not state_dicts:
        return f"{none}; it holds no tensors by name"
    key, tensors = max(state_dicts, key=lambda pair: len(pair[1]))
    where = f" under {key!r}" if key else ""
    return f"{none}; its first{where} is {next(iter(tensors))!r}"


def describe_choice(path, chosen, others):
    """What is taken of a file, in words. others: the keys of the candidates that are not."""
    words = f"{path}: {chosen.layout}"
    if chosen.key:
        words += f", under the key {chosen.key!r}"
    words += f"; {len(chosen.backbone)} tensors of the ResNet taken"
    left = len(chosen.tensors) - len(chosen.backbone)
    if left:
        words += f", {left} others left out (heads, queues, averages)"
    if others:
        names = " and ".join(repr(key) if key else "the file itself" for key in others[:3])
        words += f"; {names} {'hold' if len(others) > 1 else 'holds'} a ResNet too, left out"
    return words


def load_backbone(path, backbone):
    """Load a file's ResNet into ours.

    Args:
        path: the file.
        backbone: a models.resnet.ResNet, or CMC's two.

    Returns:
        what the file carries of the images' preprocessing (see preprocessing_of), or None.

    Raises:
        SystemExit: names a tensor that does not fit.
    """
    loaded, sentence, preprocessing = read_backbone(path)
    fill_backbone(path, backbone, loaded)
    print_main(sentence)
    return preprocessing


def fill_backbone(path, backbone, loaded):
    """Put a file's ResNet, as find_backbone returns it, into ours.

    Raises:
        SystemExit: names a tensor that does not fit.
    """
    expected = backbone.state_dict()
    for key, tensor in expected.items():
        # Files of before torch 0.4.1 lack num_batches_tracked.
        if key not in loaded and not key.endswith("num_batches_tracked"):
            streams = ""
            if "L.conv1.weight" in loaded:
                streams = " (two streams, of model.host: cmc)"
            elif "L.conv1.weight" in expected:
                streams = " (one network, and model.host: cmc has two)"
            raise SystemExit(
                f"{path} has no {key}: it is of another network than model.backbone{streams}"
            )
        if key not in loaded:
            continue
        if loaded[key].shape != tensor.shape:
            raise SystemExit(
                f"{path}: {key} is {tuple(loaded[key].shape)}, the network's is "
                f"{tuple(tensor.shape)}; set model.backbone, model.stem and model.width to those "
                "it was trained with"
            )
        if tensor.is_floating_point() and not loaded[key].is_floating_point():
            raise SystemExit(
                f"{path}: {key} is of {loaded[key].dtype}, quantised; take the weights as floats"
            )
    extra = sorted(set(loaded) - set(expected))
    if extra:
        raise SystemExit(
            f"{path} has {extra[0]}, which the network has not: it is of a larger model.backbone"
        )
    backbone.load_state_dict(loaded, strict=False)


# ---------------------------------------------------------------------------- a run's own


def save_backbone(path, backbone, settings, preprocessing=None):
    """Write backbone.pt, torchvision's keys and nothing else among them, and what goes with it.

    `settings` and `preprocessing` are attributes of the state dict, as torch's own versions of the
    layers are: torch.load brings them along and load_state_dict never looks at them.
    `preprocessing` can also be read in the file beside it (write_preprocessing).

    Args:
        path: of the file.
        backbone: the network.
        settings: of the run.
        preprocessing: of the images; see preprocessing_of.
    """
    weights = backbone.state_dict()
    weights.settings = settings
    if preprocessing is not None:
        weights.preprocessing = preprocessing
        write_preprocessing(path, preprocessing)
    checkpoint.write(path, weights)


def preprocessing_of(image_size, mean, std):
    """How evaluation makes the encoder's input of an image: data/augment.py's recipe `eval`.

    Args:
        image_size: S, the side of the encoder's input in pixels.
        mean: of each channel, of RGB images in [0, 1].
        std: likewise.

    Returns:
        dict. The shorter side of an image is resized to `resize` pixels, antialiased, and the
        central square of `image_size` pixels cut out (an image of that size already stays as it
        is); then each channel is normalised: (x - mean) / std.
    """
    return {
        "resize": round(image_size * 256 / 224),
        "image_size": image_size,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
    }


def write_preprocessing(path, preprocessing):
    """Write, beside weights FILE.pt, FILE.preprocessing.yaml for people and other programs."""
    beside = os.path.splitext(path)[0] + ".preprocessing.yaml"
    lines = [
        f"# How an image becomes the input of {os.path.basename(path)}: RGB in [0, 1], the shorter",
        "# side resized to `resize` pixels (bilinear, antialiased), the central square of",
        "# `image_size` pixels cut out (an image of that size already stays as it is), then",
        "# (x - mean) / std, channel by channel. CMC's networks make Lab of the RGB image first.",
        *(f"{key}: {value}" for key, value in preprocessing.items()),
    ]
    with checkpoint.writing(beside), open(beside, "w") as f:
        f.write("\n".join(lines) + "\n")


def carried_preprocessing(saved):
    """What a file says of its images, as preprocessing_of; or None: it may be anybody's file.

    A backbone.pt says it. A last.pt has the settings of its run, and says it where they hold
    numbers, not null for the mean and std of the data set.
    """
    preprocessing = getattr(saved, "preprocessing", None)
    if isinstance(preprocessing, dict):
        return preprocessing
    data = saved["settings"].get("data", {}) if is_last(saved) else {}
    if isinstance(data.get("mean"), list) and isinstance(data.get("std"), list):
        return preprocessing_of(data["image_size"], data["mean"], data["std"])
    return None


def carried_statistics(path):
    """{"mean", "std"} of the images that a run's weights were trained with; None where unknown."""
    known = carried_preprocessing(read_safely(path)) or {}
    return {key: known.get(key) for key in ("mean", "std")}


def refuse_other_settings(path, saved):
    """End the program if a run's weights are not of the settings in the config.yaml beside them.

    saved: what the file at `path` holds. Older files of ours, and other people's, say nothing of
    their settings and are taken.
    """
    beside = os.path.join(os.path.dirname(path), "config.yaml")
    settings = getattr(saved, "settings", None)  # backbone.pt
    if is_last(saved):
        settings = saved["settings"]
    if not isinstance(settings, dict) or not os.path.exists(beside):
        return
    other = config.difference(settings, config.read_yaml(beside), checkpoint.MAY_CHANGE)
    if other:
        raise SystemExit(
            f"{path} was not trained with the settings of {beside}: {other}; finish that run, or "
            "move the file to another folder and name it with --weights"
        )


def is_last(saved):
    """Is what a file holds one of our last.pt of pre-training?"""
    is_ours = isinstance(saved, dict) and {"settings", "encoder", "host"} <= set(saved)
    return is_ours and isinstance(saved["settings"], dict)


def of_run(given, run, file, random=True):
    """The file whose weights a script evaluates: --weights, or else what the run left.

    Args:
        given: what --weights says, or None.
        run: the run's folder.
        file: what --cfg says, for the sentence.
        random: may `none`, for random weights, be given instead?
    """
    paths = [given] if given else [os.path.join(run, name) for name in ("backbone.pt", "last.pt")]
    path = next((path for path in paths if given or os.path.exists(path)), None)
    if path is None:
        raise SystemExit(
            f"{run} holds no backbone.pt; first run: python train_pretrain.py --cfg {file}, or "
            f"give --weights FILE{', or --weights none' if random else ''}"
        )
    return path


# ---------------------------------------------------------------------------- for other libraries


def export(kind, path, backbone, source, preprocessing=None):
    """Write a network's weights for another library, and how its images are made, beside them.

    Args:
        kind: `torchvision`, a state dict; or `detectron2`, a pickle with that library's names, as
            moco's converter makes.
        path: of the new file.
        backbone: the network, a models.resnet.ResNet.
        source: the file that it was loaded from, for the sentences.
        preprocessing: of the images; see preprocessing_of. None where the source does not say.

    Returns:
        a sentence: what was written, and into what it loads.
    """
    weights = {key: tensor.detach().cpu() for key, tensor in backbone.state_dict().items()}
    if "conv1.weight" not in weights:
        raise SystemExit(f"--export: {source} is of CMC, two networks; other libraries have one")
    if kind == "torchvision":
        state_dict = OrderedDict(weights)
        if preprocessing is not None:
            state_dict.preprocessing = preprocessing
        checkpoint.write(path, state_dict)
    else:
        write_detectron2(path, weights, source)
    sentence = f"{path}: {source}, for {kind}"
    if kind == "torchvision":
        sentence += f"; {where_it_loads(weights)}"
    if preprocessing is None:
        return f"{sentence}; {source} does not say how its images were resized and normalised"
    write_preprocessing(path, preprocessing)
    return sentence


def where_it_loads(weights):
    """Into which network weights {torchvision's key: tensor} load, and how, in words."""
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    for name in ("resnet18", "resnet34", "resnet50"):
        with torch.device("meta"):
            network = getattr(torchvision.models, name)().state_dict()
        if shapes == {k: v.shape for k, v in network.items() if not k.startswith("fc.")}:
            return f"torchvision.models.{name}() takes it by load_state_dict(..., strict=False)"
    channels, _, kernel, _ = shapes["conv1.weight"]
    width = shapes["layer1.0.conv1.weight"][0]
    stem = "imagenet" if kernel == 7 else "cifar"
    differences = [f"a {kernel}x{kernel} stem"] if stem == "cifar" else []
    differences += [f"{width} channels and not 64"] if width != 64 else []
    words = (
        f"its names are torchvision's, but no network there has its shapes "
        f"({' and '.join(differences) or 'its number of layers'}): build "
        f"models.resnet.ResNet(BACKBONE, {stem!r}, {width}) of this repository, BACKBONE as in "
        "model.backbone, which takes it by load_state_dict"
    )
    if stem == "cifar" and width == channels == 64:
        words += (
            ", or give torchvision's this stem: conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, "
            "bias=False) and maxpool = torch.nn.Identity()"
        )
    return words


def write_detectron2(path, weights, source):
    """Write weights {torchvision's key: tensor} as detectron2 reads them, arrays in a pickle."""
    if weights["conv1.weight"].shape[2] != 7:
        raise SystemExit(
            f"--export detectron2: {source} has the CIFAR stem, 3x3; detectron2's ResNets begin "
            "with 7x7 (model.stem: imagenet)"
        )
    model = {detectron2_name(key): tensor.numpy() for key, tensor in weights.items()}
    value = {"model": model, "__author__": source, "matching_heuristics": True}
    aside = path + ".part"
    with checkpoint.writing(path):
        with open(aside, "wb") as f:
            pickle.dump(value, f)
        os.replace(aside, path)


def detectron2_name(key):
    """Translate one of torchvision's keys.

    layer1.0.bn2.weight -> res2.0.conv2.norm.weight; conv1.weight -> stem.conv1.weight;
    downsample.0, .1 -> shortcut, shortcut.norm.
    """
    key = key if key.startswith("layer") else "stem." + key
    for i in range(4, 0, -1):
        key = key.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
