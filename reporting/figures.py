"""What was measured of a run: the lines of its evaluations and its log, each by its protocol."""

import os

from data.datasets import FOLDERS, describe_set
from engine.log import lines

# <this>.jsonl in a run's folder; svm is the `linear` section's.
EVALUATIONS = ("linear", "finetune", "detect", "svm")
# What a protocol is followed by if something was not finished.
EARLY = "; before the end, "
# What a protocol begins with if that is another data set than the encoder's own.
ELSEWHERE = "evaluated on "


def evaluations(run, stem):
    """Read linear.jsonl or its like. A later line of the same replaces the earlier.

    Returns:
        {(weights, protocol, seed): line}. What is special of an evaluation stands in its protocol:
        other data at its beginning, what was not finished at its end.
    """
    found = {}
    for line in lines(os.path.join(run.folder, f"{stem}.jsonl")):
        if isinstance(line, dict):
            protocol = line.get("protocol", "protocol not noted")
            protocol = elsewhere_of(line, stem, run.cfg) + protocol
            found[line.get("weights"), protocol, line.get("seed")] = line
    complete = {}
    for (weights, protocol, seed), line in found.items():
        early = ""
        iteration = line.get("iteration")
        # train_detect.py's eval_every.
        if "iteration" in line and f" {iteration} iterations" not in protocol:
            early = f"{EARLY}at iteration {iteration}"
        # backbone.pt, of a finished run, would have been taken first.
        elif os.path.basename(weights or "") == "last.pt":
            early = f"{EARLY}of last.pt at an epoch that was not noted"
        knn = elsewhere_of(line, stem, run.cfg) + line.get("knn", "kNN") + early
        complete[weights, protocol + early, seed] = line | {"knn": knn}
    return complete


def elsewhere_of(line, stem, cfg):
    """What the protocol of an evaluation begins with; "" if it was on the data of `cfg`.

    Lines name their data (`data`) and, of late, the folder that holds them (`root`). Lines without
    are of the run's own.
    """
    name, root = line.get("data"), line.get("root")
    if stem == "detect":  # its images are others in any case: the section's `data` are its own
        asked = cfg.get("detect", {}).get("data")
        same = root is None or asked is not None and base_name(root) == base_name(asked)
        return "" if same else f"{ELSEWHERE}{base_name(root)}: "
    words = elsewhere(name, cfg)
    own = cfg["data"]
    if words or root is None or own["name"] not in FOLDERS:
        return words
    # Two folders of the same base name print alike, so the whole path is said.
    same = normal_path(root) == normal_path(own["root"])
    return "" if same else f"{ELSEWHERE}{own['name']} {root}: "


def elsewhere(name, cfg):
    """What a protocol begins with; "" if it is on the data of `cfg`.

    name: of the data that an evaluation was on, as train_linear.py writes it; None: the run's own.
    """
    own = cfg["data"]
    same = name in (None, own["name"], describe_set(own["name"], own.get("root")))
    return "" if same else f"{ELSEWHERE}{name}: "


def base_name(path):
    """The last name of a path, with or without a slash at its end."""
    return os.path.basename(os.path.normpath(path))


def figures_of(line, name):
    """{"top-1": 50.0, ...} of one evaluation.

    Older lines of train_linear.py have `rows` alone, where the first learning rate listed is the
    one reported.
    """
    row = line.get("rows", {}).get(name, {})
    figures = {key.split(",")[0]: value for key, value in reversed(row.items())}
    return figures | line.get("figures", {})


def are_weights_of(run, weights):
    """Did the run train an evaluation's weights?

    Its folder may have been moved since, its name stays.
    """
    folder, file = os.path.split(weights or "")
    names = run.cfg["name"], base_name(run.folder)
    if weights in (None, run.weights):
        return True
    return file in ("backbone.pt", "last.pt") and os.path.basename(folder) in names


def measured(run, metric, untrained=False):
    """{protocol: figure} of one run, or of its untrained encoder; empty where not measured.

    metric: as paper.figure.
    """
    stem, _, key = metric.partition(" ")
    if not key:
        return measured_in_training(run, metric, untrained)
    found = {}
    for (weights, protocol, _), line in evaluations(run, stem).items():
        if untrained:
            figures = figures_of({"rows": line.get("rows", {})}, "untrained encoder")
        else:
            figures = figures_of(line, run.cfg["name"])
        of_run = weights == run.weights if run.weights else are_weights_of(run, weights)
        if key in figures and of_run:
            found[line["knn"] if key == "knn" else protocol] = figures[key]
    return found


def measured_in_training(run, metric, untrained):
    """`measured`, of log.jsonl: its last line with the figure."""
    seen = [line for line in run.log if metric in line and (line["epoch"] == 0) == untrained]
    if not seen:
        return {}
    line = seen[-1]
    late = f" at epoch {line['epoch']}" if not untrained and line["epoch"] < run.done else ""
    limit = run.cfg["knn"].get("limit")
    of_images = f", at most {limit} test images" if limit else ""
    settings = knn_settings(run, line)
    protocol = f"weighted kNN, {settings}, on the {run.cfg['knn']['feature']}{of_images}{late}"
    return {protocol: line[metric]}


def knn_settings(run, line):
    """How many vote in kNN, how sharply, and on which set if that is another than the run's own.

    line: of log.jsonl. Older ones lack the number of voters.
    """
    settings = run.cfg["knn"]
    k, name, root = settings["k"], settings["data"], settings["root"]
    words = f"k {int(line.get('knn voters', k))}, T {settings['temperature']:g}"
    if name is not None:
        words += f", labels of {name}"
    if name in FOLDERS:
        words += f" at {normal_path(root)}"
    return words


def normal_path(path):
    """A path written in one way only."""
    return os.path.normpath(os.path.expanduser(path))


def last_figure(run, metric):
    """The figure of the last protocol of a run, or None."""
    return next(reversed(measured(run, metric).values()), None)
