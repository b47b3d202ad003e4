"""What was run, and the cells of the papers' tables that the files in yaml/ lay out."""

import itertools
import os
import re
from typing import NamedTuple

from engine import config
from engine.log import lines

from .comparing import differing
from .figures import EVALUATIONS, are_weights_of, evaluations


class Run(NamedTuple):
    """A run, or evaluations of its weights in a folder of their own."""

    label: str  # its name, or its folder where two have that name
    folder: str
    cfg: dict
    log: list  # log.jsonl, a dict a line
    done: int  # epochs
    # Of evaluations: the file that they evaluated; log and done are of the run that trained it.
    weights: str | None = None


def read_cells(folder, left_out):
    """Read the tables' cells from the files in a folder.

    Args:
        folder: of YAML files.
        left_out: gets a sentence on each file that is no cell.

    Returns:
        {(table, row, column): (file, settings)}, in the order of the files.
    """
    cells, paths = {}, []
    for subfolder, folders, files in os.walk(folder):
        # Another program's files, and files that are no rows.
        folders[:] = [name for name in folders if name not in ("detectron2", "scales")]
        paths += [os.path.join(subfolder, name) for name in files if name.endswith(".yaml")]
    for path in sorted(paths, key=natural_order):
        cfg = load_settings(path, left_out)
        if cfg is None or "paper" not in cfg:
            continue
        cell = cell_of(cfg)
        if None in cell:
            left_out.append(f"Left out: {path}: paper lacks one of table, row and column")
        elif cell in cells:
            left_out.append(
                f"Left out: {path}: {', '.join(cell)} is already the cell of {cells[cell][0]}"
            )
        else:
            cells[cell] = path, cfg
    return cells


def load_settings(path, left_out):
    """The settings of a file, with what an older version did not have filled in.

    None where they cannot be loaded, and a sentence in `left_out`.
    """
    try:
        return config.load(path)
    except SystemExit as refusal:
        left_out.append(f"Left out: {refusal}")
    except ImportError as error:  # an evaluation whose library is not installed
        left_out.append(f"Left out: {path}: {error}")
    return None


def read_runs(folders, left_out):
    """Read runs from folders of runs, or from their own folders.

    Args:
        folders: their paths.
        left_out: gets a sentence on each run that is not read, or is there twice.

    Returns:
        runs, and strangers: folders without a config.yaml, which may hold evaluations of weights
        from elsewhere.
    """
    trained, strangers = [], []
    for path in run_folders(folders):
        file = os.path.join(path, "config.yaml")
        if not os.path.exists(file):
            name = os.path.basename(os.path.normpath(path))
            strangers.append(Run(name, path, {"name": name, "data": {"name": None}}, [], 0))
            continue
        cfg = load_settings(file, left_out)
        if cfg is None:
            continue
        if None in cell_of(cfg):
            cfg.pop("paper", None)
        log = lines(os.path.join(path, "log.jsonl"))
        log = [line for line in log if isinstance(line, dict) and "epoch" in line]
        done = max((line["epoch"] for line in log), default=0)
        trained.append(Run(cfg["name"], path, cfg, log, done))
    names = [run.label for run in trained]
    trained = [
        run if names.count(run.label) == 1 else run._replace(label=run.folder) for run in trained
    ]
    runs = []
    parts = (by_weights(run, trained) for run in trained)
    for run in itertools.chain.from_iterable(parts):
        twin = next((other for other in runs if is_same_experiment(other, run)), None)
        if twin:  # counted twice it would feign a second seed
            left_out.append(
                f"Left out: {run.folder} has the settings, seed and epochs of {twin.folder}, so it "
                "adds no seed"
            )
        else:
            runs.append(run)
    return runs, strangers


def run_folders(folders):
    """The folders that may be runs: these themselves, or all in them."""
    paths = []
    for folder in folders:
        if os.path.exists(os.path.join(folder, "config.yaml")):
            paths.append(folder)
        else:
            inside = (entry.path for entry in os.scandir(folder) if entry.is_dir())
            paths += sorted(inside, key=natural_order)
    return paths


def is_same_experiment(run, other):
    """Are two runs equal in settings, seed, cell and epochs?"""
    return (
        run.done == other.done
        and run.cfg["seed"] == other.cfg["seed"]
        and not differing(run.cfg, other.cfg)
        and cell_of(run.cfg) == cell_of(other.cfg)
        and bool(run.log or run.weights == other.weights)
    )


def by_weights(run, trained):
    """Split a folder of evaluations of other runs' weights, such as a transfer row.

    Each part takes the settings of pre-training, the log and the seed from the run that trained
    its weights: no evaluation hides how long that was.

    Args:
        run: with its folder.
        trained: all runs, among which those that trained the weights are looked for.

    Returns:
        [run], or a Run for each of the weights where it has no log of its own.
    """
    files = dict.fromkeys(
        weights
        for stem in EVALUATIONS
        for weights, *_ in evaluations(run, stem)
        if not are_weights_of(run, weights)
    )
    if run.log or not files:
        return [run]
    parts = []
    for file in files:
        source = next((r for r in trained if r.log and are_weights_of(r, file)), None)
        if source is None:
            parts.append(run._replace(label=f"{run.label} of {file}", weights=file))
            continue
        sections = ("seed", "data", "model", "loss", "optim")
        cfg = run.cfg | {section: source.cfg[section] for section in sections}
        cfg["weights"] = source.cfg.get("weights")
        label = f"{run.label} of {source.label}"
        parts.append(Run(label, run.folder, cfg, source.log, source.done, file))
    return parts


def cell_of(cfg):
    """(table, row, column), as words; None where one is missing."""
    paper = cfg.get("paper", {})
    words = (paper.get(key) for key in ("table", "row", "column"))
    return tuple(None if word is None else str(word) for word in words)


def scale_of(cfg):
    """The name of the scale at which a run is a small version of its row; None: it is the row."""
    return cfg.get("paper", {}).get("scale")


def natural_order(path):
    """A sort key: numbers by value, and a.yaml before a_b.yaml."""
    parts = re.split(r"(\d+)", os.path.splitext(path)[0])
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
