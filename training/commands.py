"""The commands of a table's row: as the header of its file has them, for a seed, at a scale."""

import os
import re
import shlex
from typing import NamedTuple

from engine import config
from engine.scale import BN_SPLITS, overrides

from .jobs import Job

RUNS = "runs"
PRETRAIN = "train_pretrain.py"
# Which script makes the figures that paper.figure names by its first word.
SCRIPTS = {
    "linear": "train_linear.py",
    "finetune": "train_finetune.py",
    "detect": "train_detect.py",
}


class Cell(NamedTuple):
    """Where a figure stands, and the file that lays it out."""

    table: str
    row: str
    column: str
    file: str
    cfg: dict  # the file's settings

    @property
    def title(self):
        """E.g. "IR + Ring, CIFAR-10"."""
        return f"{self.row}, {self.column}"

    @property
    def metric(self):
        """Which figure counts, as paper.figure."""
        return self.cfg["paper"].get("figure") or "linear top-1"

    @property
    def script(self):
        """Which script makes the figure; None if pre-training itself does."""
        return SCRIPTS.get(self.metric.split(" ")[0])


class Variant(NamedTuple):
    """How cells are run."""

    seed: int | None = None  # None: the file's own
    scale_name: str | None = None
    scale: dict | None = None  # as engine/scale.py reads it
    processes: int | None = None  # of each job; None: as the header has it
    overrides: list = []  # the user's, for all jobs


def header_commands(file):
    """The commands in a file's header: lists of words."""
    with open(file, encoding="utf-8") as f:
        lines = [line.lstrip("# ").rstrip() for line in f if line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", "")
    commands = re.findall(r"^(?:python|torchrun) .*train_\w+\.py .*$", text, re.MULTILINE)
    return [shlex.split(line) for line in commands]


def command_of(cell, script):
    """The command of a script in the header of a cell's file."""
    for command in header_commands(cell.file):
        if script in command:
            return command
    raise SystemExit(f"{cell.file}: its header has no command of {script}, which its row wants")


def source_of(cell, cells):
    """The cell whose pre-training a cell evaluates: itself, or another that --weights names."""
    command = command_of(cell, cell.script or PRETRAIN)
    if "--weights" not in command:
        return cell
    weights = command[command.index("--weights") + 1]
    name = os.path.basename(os.path.dirname(weights))
    for source in cells:
        if config.default_name(source.file) == name:
            return source
    raise SystemExit(f"{cell.file}: no file in yaml/ makes {weights}")


def run_name(cell, variant):
    """The name of a run: the file's own, the scale, and the seed if it is not the file's."""
    name = config.default_name(cell.file)
    if variant.scale_name:
        name += f"_{variant.scale_name}"
    if variant.seed not in (None, cell.cfg["seed"]):
        name += f"_seed{variant.seed}"
    return name


def settings_of(cell, variant):
    """The overrides of a cell's jobs."""
    name, words = run_name(cell, variant), []
    if name != cell.cfg["name"]:
        words.append(f"name={name}")
    if variant.seed not in (None, cell.cfg["seed"]):
        words.append(f"seed={variant.seed}")
    if variant.scale_name:
        words.append(f"paper.scale={variant.scale_name}")
        words += overrides(cell.cfg, variant.scale)
    elif variant.processes is not None:
        words += batch_norm_of(cell, variant.processes)
    return words + variant.overrides


def batch_norm_of(cell, processes):
    """The override for MoCo's shuffled BatchNorm: over processes, or else parts of the batch."""
    splits = 1 if processes > 1 else BN_SPLITS
    model = cell.cfg["model"]
    is_right = model["host"] != "moco" or model["bn_splits"] == splits
    return [] if is_right else [f"model.bn_splits={splits}"]


def make_job(cell, script, variant, weights=None):
    """The header's command of a script as a Job. weights: the name of the run that left them."""
    command = command_of(cell, script)
    at = command.index(script)
    launcher, words = command[:at], command[at + 1 :]
    if variant.processes is not None:
        launcher = ["python"]
        if variant.processes > 1:
            launcher = ["torchrun", "--nproc_per_node", str(variant.processes)]
    if weights:
        words[words.index("--weights") + 1] = f"{RUNS}/{weights}/backbone.pt"
    settings = settings_of(cell, variant)
    config.load(cell.file, settings)  # a refusal comes before the first job
    name = run_name(cell, variant)
    kind = "pre-training" if script == PRETRAIN else "evaluation"
    log = os.path.join(RUNS, name, script.replace(".py", ".log"))
    return Job(f"{name}, {kind}", [*launcher, script, *words, *settings], log)
