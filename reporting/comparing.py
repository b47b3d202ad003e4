"""Which runs may be averaged, and what differs between two of them."""

from data.datasets import FOLDERS, describe_set
from engine import config

from .figures import ELSEWHERE, EVALUATIONS, elsewhere_of, normal_path

# Settings that change no figure of a table but by chance. (data.root, knn.root: not so of a folder
# of one's own, see less_folders.)
FREE = (
    "name",
    "seed",
    "paper",
    "data.root",
    "data.workers",
    "knn.every",
    "knn.root",
    "knn.sample",
    "log",
    "linear.root",
    "detect.data",
    "detect.workers",
)


def alike(items, ignore):
    """Group what may be averaged.

    Args:
        items: tuples of a run, a protocol and whatever else.
        ignore: settings that may differ, as config.difference takes them.

    Returns:
        list of lists of items.
    """
    groups = []
    for item in items:
        group = next((group for group in groups if may_average(group[0], item, ignore)), None)
        if group is None:
            groups.append([item])
        else:
            group.append(item)
    return groups


def may_average(item, other, ignore):
    """May two items be averaged? See alike."""
    (run, protocol, *_), (other_run, other_protocol, *_) = item, other
    return (
        protocol == other_protocol
        and run.done == other_run.done
        and bool(run.weights) == bool(other_run.weights)
        and not differing(run.cfg, other_run.cfg, ignore)
    )


def differing(old, new, ignore=FREE):
    """config.difference, for which two folders of images are two data sets."""
    return config.difference(old, new, less_folders(old, new, ignore))


def less_folders(old, new, ignore):
    """`ignore`, less data.root and knn.root where they say which images they are.

    A set with a name is the same wherever it lies. A folder or list of one's own has no other name
    than its place, however that is written.
    """
    differing_roots = []
    for section, name in (("data", "name"), ("knn", "data")):
        settings = [cfg.get(section, {}) for cfg in (old, new)]
        are_folders = all(part.get(name) in FOLDERS for part in settings)
        if are_folders and len({normal_path(part["root"]) for part in settings}) > 1:
            differing_roots.append(f"{section}.root")
    return [key for key in ignore if key not in differing_roots]


def by_seed(runs):
    """Groups of runs that differ by their seed alone."""
    return [[run for run, _ in group] for group in alike([(run, None) for run in runs], FREE)]


def differences(old, new, ignore=FREE):
    """All settings that differ, as words: ["optim.epochs was 300 and is 10"].

    `auto` in old, the settings of a file, is whatever a run made of it: runs keep numbers.
    """
    found, ignore = [], less_folders(old, new, ignore)
    ignore += [f"data.{key}" for key in ("mean", "std") if old["data"][key] == "auto"]
    if old.get("weights") != new.get("weights") and "weights" not in ignore:
        found.append(beginning(new))
        ignore.append("weights")
    while words := config.difference(old, new, ignore):
        found.append(words.replace(" and is now ", " and is "))
        ignore.append(words.split(" was ")[0])
    return found


def of_no_concern(metric):
    """FREE, and the sections of evaluations that the figure is not of."""
    words = metric.replace("svm", "linear").split(" ")
    sections = ("knn", "linear", "finetune", "detect")
    return [*FREE, *(section for section in sections if section not in (words[0], words[-1]))]


def asked_otherwise(cfg, metric, protocol, file):
    """[words] if a protocol is not the one that the settings cfg of `file` ask for.

    The evaluating scripts can be told other settings than those which the run has saved.
    """
    stem, _, key = metric.partition(" ")
    if stem not in cfg or stem not in EVALUATIONS:
        return []
    words, where = [], ""
    protocol_class = config.import_object(config.SECTIONS[stem][0])
    if "__str__" in vars(protocol_class) and key != "knn":
        words.append(str(config.build(protocol_class, cfg[stem], f"{file}: {stem}")))
    if stem == "linear":
        name = cfg["linear"]["data"] or cfg["data"]["name"]
        root = cfg["linear"]["root"] or cfg["data"]["root"]
        line = {"data": describe_set(name, root), "root": root}
        where = elsewhere_of(line, stem, cfg)
    if stem == "finetune":  # whose own words are not of the images
        words.append(cfg[stem]["list"] or f"{100 * cfg[stem]['labels']:.3g} % of the labels")
    if (
        all(f" {word}" in f" {protocol}" for word in words)
        and protocol.startswith(where)
        and protocol.startswith(ELSEWHERE) == bool(where)
    ):
        return []
    return [f"the file asks for {where}{'; '.join(words) or 'its own data'}"]


def unfinished(run):
    """[words] if a run has not done the epochs of its settings."""
    if run.weights == "none" and not run.log:
        return ["it began from random weights"]
    if run.weights and not run.log:
        return [f"{run.weights} was trained by none of the runs read"]
    epochs = run.cfg["optim"]["epochs"]
    return [f"{run.done} of {epochs} epochs done"] if run.done < epochs else []


def beginning(cfg):
    """What a run began from, in words."""
    weights = cfg.get("weights")
    return "began at random" if weights is None else f"began from {weights}"
