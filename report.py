"""What was run, beside what the papers report: tables as text and Markdown, and curves.

    python report.py                         all of runs/, and those of the papers' tables in which
                                             a run stands
    python report.py --all                   all of the papers' tables
    python report.py runs /data/runs runs/a  folders of runs, or single runs
    python report.py --markdown report.md --png curves.png
                                             the tables and the curves as files, too
    python report.py --own own.png           what the methods log of themselves: thresholds,
                                             hardness, false negatives
    python report.py --negatives runs/a      a picture instead: which candidates the method of a run
                                             takes and leaves out, in runs/a/negatives.png

The files in yaml/ lay out the tables: each with a `paper` is one cell, (table, row, column), with
the reported figure and that figure's source. A run is of the cell that its own config.yaml names,
and `paper.figure` says which of its figures counts: `linear top-1` unless set, `linear knn`,
`finetune top-1`, `detect box AP`, `svm mAP`, ... (<file> <figure>, of that file's last line of a
protocol), or `knn`, the last of log.jsonl.

Ours is the mean ± the sample standard deviation over n seeds. Runs are averaged only if they agree
in all settings but seed, name and place, in the epochs done and in the protocol. A run of other
settings than the file's, such as fewer epochs, never stands in the row: below it, as "other
settings", with what differs. A run at a scale (paper.scale, see engine/scale.py) stands in a table
of its own.
"""

import argparse
import itertools
import os
import re
import textwrap
from statistics import mean, stdev
from typing import NamedTuple

from data.datasets import FOLDERS, describe_set
from engine import config
from engine.log import lines
from engine.progress import duration
from engine.scale import describe_scale, load_scale, overrides

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
# <this>.jsonl in a run's folder; svm is the `linear` section's.
EVALUATIONS = ("linear", "finetune", "detect", "svm")
# What a protocol is followed by if something was not finished.
EARLY = "; before the end, "
# What a protocol begins with if that is another data set than the encoder's own.
ELSEWHERE = "evaluated on "
# What of the log belongs in one panel of --own, by the words before a comma.
OWN_FIGURES = {
    "similarity to the query": (
        "inner threshold",
        "outer threshold",
        "hardest",
        "nearest N",
        "mixed",
        "query mixed",
    ),
    "of the query's own class, %": (
        "false negatives used %",
        "false negatives left out %",
        "false mixed %",
        "false query mixed %",
    ),
    "pairs of one cluster, %": ("accepted %", "precision %", "recall %"),
    "Var(q k)": ("Var(q k)",),
}
# What --own does not draw beside OWN_FIGURES: what every run logs, and settings over time.
# Whatever else a loss logs has a panel of its own.
NOT_OWN = {
    *("epoch", "loss", "chance", "spread", "K", "positive", "used %", "knn", "knn voters"),
    *("RankMe", "alignment", "uniformity"),
    *("lr", "seconds", "images/s", "data wait", "hardware"),
    *("inner %", "outer %", "lambda", "oracle", "removed %", "attracted %"),
    *("mixed share of partition %", "NMI"),
}
# What runs log without labels, and the words at its axis.
UNLABELLED_FIGURES = {
    "RankMe": "RankMe  (1: collapsed)",
    "alignment": "alignment  (0: views agree)",
    "uniformity": "uniformity  (0: collapsed)",
}
# The papers' order of rows.
HOSTS = ("ir", "cmc", "moco", "simclr")


class Run(NamedTuple):
    """A run, or evaluations of its weights in a folder of their own."""

    label: str  # its name, or its folder where two have that name
    folder: str
    cfg: dict
    log: list  # log.jsonl, a dict a line
    done: int  # epochs
    # Of evaluations: the file that they evaluated; log and done are of the run that trained it.
    weights: str | None = None


class Table(NamedTuple):
    """A table of words, and its footnotes."""

    title: str
    head: list  # (upper, lower) a column
    rows: list  # of lists of words
    notes: list  # footnotes; the first is [1]


def command_line():
    """The arguments of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="FOLDER",
        default=["runs"],
        help="a folder of runs, or a run; runs unless given",
    )
    parser.add_argument(
        "--yaml", metavar="FOLDER", default="yaml", help="the files that lay out the tables"
    )
    parser.add_argument("--all", action="store_true", help="the papers' tables without a run, too")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there as well")
    parser.add_argument("--png", metavar="FILE", help="draw the curves there")
    parser.add_argument("--own", metavar="FILE", help="draw there what each method logs of itself")
    parser.add_argument(
        "--negatives",
        nargs="+",
        metavar=("RUN", "FILE"),
        help="draw which candidates the method of a run takes, into RUN/negatives.png or FILE, "
        "and end",
    )
    return parser


def main():
    """Read, print the tables, write the files.

    The tables are printed whether or not the files can be written, which is asked first.
    """
    args = command_line().parse_args()
    if args.negatives:
        draw_negatives(*args.negatives)
        return
    refuse_missing_folders(args)
    paths = {"--markdown": args.markdown, "--png": args.png, "--own": args.own}
    problems = {
        option: problem
        for option, path in paths.items()
        if path and (problem := why_not_writable(option, path))
    }

    left_out = []  # sentences
    cells = read_cells(args.yaml, left_out)
    runs, strangers = read_runs(args.folders, left_out)
    tables, hint = make_tables(cells, runs, strangers, args.all)
    paragraphs = [as_text(table) for table in tables]
    paragraphs += ["\n".join(left_out)] if left_out else []
    paragraphs += [hint] if hint else []
    print("\n\n".join(paragraphs))

    markdown = "\n\n".join([as_markdown(table) for table in tables] + left_out) + "\n"
    writers = {
        "--markdown": (write_text, markdown),
        "--png": (draw, runs),
        "--own": (draw_own, runs),
    }
    for option, (write, content) in writers.items():
        if paths[option] and option not in problems:
            problem = try_to_write(option, paths[option], write, content)
            problems |= {option: problem} if problem else {}
    if problems:
        raise SystemExit("; ".join(problems.values()))


def refuse_missing_folders(args):
    """End the program where there is nothing to read."""
    for folder in args.folders:
        if not os.path.isdir(folder):
            raise SystemExit(
                f"there is no folder {folder}; train first, e.g. python train_pretrain.py --cfg "
                "yaml/quickstart.yaml, or name a folder of runs"
            )
    if not os.path.isdir(args.yaml):
        raise SystemExit(
            f"there is no folder {args.yaml}; name the one whose files lay out the tables, "
            "--yaml FOLDER"
        )


def make_tables(cells, runs, strangers, show_all):
    """Lay out what was read.

    Returns:
        the tables: own runs, the papers' (with `show_all` those without a run, too), these at
        scales, and what is in none of them; and a sentence on the papers' tables that stay out,
        or None.
    """
    of_papers = [run for run in runs if "paper" in run.cfg and not scale_of(run.cfg)]
    others = [run for run in runs if "paper" not in run.cfg and not run.weights]
    titles = dict.fromkeys([cell[0] for cell in cells] + [cell_of(run.cfg)[0] for run in of_papers])
    titles_with_runs = {cell_of(run.cfg)[0] for run in of_papers}
    hidden = [title for title in titles if not show_all and title not in titles_with_runs]
    tables = [other_runs(others)] if others else []
    for title in titles:
        if title not in hidden:
            cells_of_table = {cell: value for cell, value in cells.items() if cell[0] == title}
            runs_of_table = [run for run in of_papers if cell_of(run.cfg)[0] == title]
            tables.append(paper_table(title, cells_of_table, runs_of_table))
    tables += scaled_tables(cells, runs)
    evaluated = other_evaluations(runs, strangers)
    if evaluated.rows:
        tables.append(evaluated)
    hint = None
    if hidden:
        hint = (
            f"{len(hidden)} of the papers' {len(titles)} tables have no run yet; --all prints them"
        )
    return tables, hint


# ---------------------------------------------------------------------------- files


def why_not_writable(option, path):
    """Why a file cannot be written, in a sentence, or None. It is left as it is."""
    is_new = not os.path.exists(path)
    try:
        with open(path, "a"):
            pass
        if is_new:
            os.remove(path)
    except OSError as error:
        return cannot_be_written(option, path, error)
    return None


def try_to_write(option, path, write, content):
    """Call write(path, content). -> what went wrong, in a sentence, or None."""
    try:
        write(path, content)
    except SystemExit as refusal:
        return str(refusal.code)
    except OSError as error:
        return cannot_be_written(option, path, error)
    return None


def cannot_be_written(option, path, error):
    """The sentence on an OSError."""
    return f"{option} {path} cannot be written: {error.strerror or error}; name another file"


def write_text(path, text):
    """Write a text file."""
    with open(path, "w") as f:
        f.write(text)


# ---------------------------------------------------------------------------- reading


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


# ---------------------------------------------------------------------------- comparing


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


def normal_path(path):
    """A path written in one way only."""
    return os.path.normpath(os.path.expanduser(path))


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


# ---------------------------------------------------------------------------- tables


def scaled_tables(cells, runs):
    """The papers' tables at the scales that runs have, a table for each.

    cells, runs: all that were read.
    """
    runs_of_table = {}
    for run in runs:
        if scale_of(run.cfg):
            key = cell_of(run.cfg)[0], scale_of(run.cfg)
            runs_of_table.setdefault(key, []).append(run)
    return [
        paper_table(title, cells_at(scale, title, cells), scaled, scale)
        for (title, scale), scaled in runs_of_table.items()
    ]


def cells_at(scale, title, cells):
    """The cells of a table with the settings that a scale gives them; none without its file."""
    try:
        given = load_scale(scale)
    except SystemExit:
        return {}
    return {
        cell: (file, config.load(file, overrides(cfg, given)))
        for cell, (file, cfg) in cells.items()
        if cell[0] == title
    }


def title_at(title, scale):
    """The title of a table, or of its small version at a scale."""
    return f"{title}, at the scale {scale}: no figure beside the paper's" if scale else title


def paper_table(title, cells, runs, scale=None):
    """One table as the paper lays it out, each column as reported and as ours.

    Args:
        title: of the table.
        cells: of this table, as read_cells returns them, or cells_at.
        runs: of this table.
        scale: the name of their scale, if they have one. Nothing is reported beside it; the time
            of pre-training is.
    """
    notes, runs_of_cell = [], {}
    sections = {section for _, cfg in cells.values() for section in cfg}
    corner = mark(notes, describe_scale(scale, sections)) if scale else ""
    for run in runs:
        runs_of_cell.setdefault(cell_of(run.cfg), []).append(run)
    # A small version is often of some columns alone, and the others would be empty.
    shown = runs_of_cell if scale else [*cells, *runs_of_cell]
    columns = list(dict.fromkeys(cell[2] for cell in shown))
    rows = []
    for row in order_rows(cells, runs):
        exact, below = [row], {}  # below: {what differs from the file: {column: ours}}
        for column in columns:
            cell = title, row, column
            file, cfg = cells.get(cell, (None, None))
            if not scale:  # its footnote comes first, as it stands to the left
                exact.append(reported(cfg, notes))
            figures = ours_of(runs_of_cell.get(cell, []), file, cfg, notes)
            exact.append(" / ".join(ours for differs, ours in figures if not differs))
            if scale:
                exact.append(training_time(runs_of_cell.get(cell, []), cfg))
            for differs, ours in figures:
                if differs:
                    below.setdefault(tuple(differs), {}).setdefault(column, []).append(ours)
        rows.append(exact)
        for differs, ours in below.items():
            rows.append([f"- other settings {warning(notes, differs)}"])
            for column in columns:
                words = " / ".join(ours.get(column, []))
                rows[-1] += [words, ""] if scale else ["", words]
    words = ("ours", "pre-training") if scale else ("reported", "ours")
    head = [(column, word) for column in columns for word in words]
    return Table(title_at(title, scale), [("", corner), *head], rows, notes)


def order_rows(cells, runs):
    """The rows of a table: by host, and within a host in the order of the files, then the runs."""
    hosts = {}
    settings = [(cell, cfg) for cell, (_, cfg) in cells.items()]
    settings += [(cell_of(run.cfg), run.cfg) for run in runs]
    for (_, row, _), cfg in settings:
        host = cfg["model"]["host"]
        hosts.setdefault(row, HOSTS.index(host) if host in HOSTS else len(HOSTS))
    return sorted(hosts, key=hosts.get)  # a stable sort


def reported(cfg, notes):
    """The paper's figure and a footnote with its source; "" where there is none.

    cfg: of the cell's file. Of a cell that no file lays out (None), the run's own word may be of
    an older recipe.
    """
    paper = cfg["paper"] if cfg else {}
    if paper.get("reported") is None:
        return ""
    note = mark(notes, f"reported: {paper.get('source') or 'no source given'}")
    return f"{paper['reported']} {note}"


def ours_of(runs, file, cfg, notes):
    """What was run of one cell.

    Args:
        runs: of this cell.
        file: that lays out the cell, or None.
        cfg: its settings, or None.
        notes: footnotes, which get new ones.

    Returns:
        list of (what differs from the file's settings, figure and footnote).
    """
    if not runs:
        return []
    metric = (cfg or runs[0].cfg)["paper"].get("figure") or "linear top-1"
    ours, items = [], []
    for run in runs:
        figures = measured(run, metric)
        items += [(run, protocol, value) for protocol, value in figures.items()]
        if not figures:
            epochs = f"{run.done} of {run.cfg['optim']['epochs']} epochs done"
            ours.append(([], mark(notes, f"{run.label} has no {metric} yet; {epochs}")))
    ignore = of_no_concern(metric)
    for group in alike(items, ignore):
        run, protocol, _ = group[0]
        differs = ["no file lays out this cell"]
        if cfg:
            differs = differences(cfg, run.cfg, ignore)
        differs += unfinished(run)
        if cfg:
            differs += asked_otherwise(cfg, metric, protocol, file)
        if EARLY in protocol:
            differs.append(f"evaluated before the end, {protocol.split(EARLY)[1]}")
        warning(notes, differs)  # before the figure's own, as it stands to the left
        ours.append((differs, group_figure(group, metric, notes)))
    return ours


def group_figure(group, metric, notes):
    """The figure of a group of `alike`, and a footnote on its runs."""
    run, protocol, _ = group[0]
    # A seed evaluated twice is one seed.
    seeds = {run.cfg["seed"]: (run, value) for run, _, value in group}
    runs = [run for run, _ in seeds.values()]
    labels = ", ".join(run.label for run in runs) + began_from(run.cfg)
    note = (
        f"{labels}: {metric} after {effort(runs)}; "
        f"protocol {mark(notes, protocol)}{oracle(*config.loss_settings(run.cfg['loss']))}"
    )
    values = [value for _, value in seeds.values()]
    return f"{spread(values)} (n {len(seeds)}) {mark(notes, note)}"


def other_runs(runs):
    """Runs of no paper's cell, a row for those that differ by their seed alone."""
    notes, rows, first_of_look = [], [], {}
    groups = by_seed(runs)
    for group in groups:
        run = group[0]
        epochs = ", ".join(unfinished(run)).removesuffix(" epochs done") or str(run.done)
        columns = [run.cfg["model"]["host"], losses(run.cfg), data(run.cfg), epochs]
        names = ", ".join(run.label for run in group) + began_from(run.cfg)
        twin = first_of_look.setdefault(tuple(columns), run)
        if twin is not run:  # the columns do not tell the two apart: say what does
            differs = "; ".join(differences(twin.cfg, run.cfg))
            names += " " + mark(notes, f"beside {twin.label}: {differs}")
        row = [names, *columns]
        for metric in ("knn", "linear top-1"):
            row.append(figure(group, metric, notes, untrained=True))
            row.append(figure(group, metric, notes, untrained=False))
            row.append(gain(group, groups, metric, notes))
        time = effort(group).split(", ", 1)[1] if run.done else ""
        rows.append([*row, str(len(group)), time])
    head = [("", word) for word in ("run", "host", "loss", "data", "epochs")]
    for metric in ("kNN", "linear top-1"):
        head += [(metric, word) for word in ("untrained", "trained", "- nce")]
    head += [("", "n"), ("", "time a run")]
    return Table("Other runs", head, rows, notes)


def figure(runs, metric, notes, untrained):
    """A group's figure on its own data, and a footnote that says how it was measured.

    Several protocols stand side by side.
    """
    items = [
        (run, protocol, value)
        for run in runs
        for protocol, value in measured(run, metric, untrained).items()
        if not protocol.startswith(ELSEWHERE)
    ]
    words = []
    for group in alike(items, FREE):
        fewer = f" (n {len(group)})" if len(group) < len(runs) else ""
        # The untrained encoder's is its neighbour's.
        note = "" if untrained else f" {mark(notes, group[0][1])}"
        began = began_from(runs[0].cfg)
        if untrained and metric == "knn" and began:
            note = f" {mark(notes, 'before training, but not untrained' + began)}"
        words.append(spread([value for *_, value in group]) + fewer + note)
    return " / ".join(words)


def gain(runs, groups, metric, notes):
    """By how much a group is above plain InfoNCE on the same host, data and optimizer.

    The mean ± deviation of the differences of equal seeds. Seeds have their own images and weights,
    so that these spread less than the figures. A baseline of as many epochs goes before one of
    others.
    """
    if losses(runs[0].cfg) == "nce":
        return ""
    ignore = [*FREE, "optim.epochs"]
    setting = experiment(runs[0].cfg, metric)
    candidates = [
        group
        for group in groups
        if losses(group[0].cfg) == "nce"
        and not differing(experiment(group[0].cfg, metric), setting, ignore)
    ]
    done = runs[0].done
    baseline = min(candidates, key=lambda group: abs(group[0].done - done), default=[])
    differences_of_seeds = []
    for run in runs:
        for other in baseline:
            if run.cfg["seed"] == other.cfg["seed"]:
                ours, theirs = last_figure(run, metric), last_figure(other, metric)
                differences_of_seeds += [ours - theirs] if None not in (ours, theirs) else []
    if not differences_of_seeds:
        return ""
    words = f"{mean(differences_of_seeds):+.1f}"
    if len(differences_of_seeds) > 1:
        words += f" ± {stdev(differences_of_seeds):.1f}"
    if baseline[0].done != done:
        words += f" {mark(notes, f'beside {baseline[0].done} epochs')}"
    return words


def experiment(cfg, metric):
    """The settings that a method and its baseline share: kNN is asked of the same set, too."""
    shared = {section: cfg.get(section) for section in ("data", "optim", "weights")}
    shared["host"] = cfg["model"]["host"]
    if metric == "knn":
        shared["knn"] = {key: cfg["knn"][key] for key in ("data", "root")}
    return shared


def last_figure(run, metric):
    """The figure of the last protocol of a run, or None."""
    return next(reversed(measured(run, metric).values()), None)


def other_evaluations(runs, strangers):
    """What no table above shows of linear.jsonl and its like.

    These are other protocols, transfer, weights from elsewhere.
    """
    found = {}  # {(of which run, evaluation, protocol): {seed: (label, figures)}}
    for group in by_seed(runs) + [[run] for run in strangers]:
        for run in group:
            for stem in EVALUATIONS:
                for (weights, protocol, seed), line in evaluations(run, stem).items():
                    if run.weights and weights != run.weights:
                        continue  # that one is another Run
                    entry = figures_of(line, run.cfg["name"])
                    if run in strangers or not are_weights_of(run, weights):
                        label = f"{run.label} of {weights}"
                        seeds = found.setdefault((label, stem, protocol), {})
                        seeds[seed] = label, entry
                    elif not is_in_a_table(run, stem, protocol):
                        seeds = found.setdefault((group[0].label, stem, protocol), {})
                        seeds[run.cfg["seed"]] = run.label, entry
    notes, rows = [], []
    for (_, stem, protocol), seeds in found.items():
        labels = dict.fromkeys(label for label, _ in seeds.values())
        entries = [figures for _, figures in seeds.values()]
        keys = sorted({key for figures in entries for key in figures})
        words = [
            f"{key} {spread([figures[key] for figures in entries if key in figures])}"
            for key in keys
        ]
        evaluation = f"{stem} {mark(notes, protocol)}"
        rows.append([", ".join(labels), evaluation, ", ".join(words), str(len(seeds))])
    head = [("", word) for word in ("run", "evaluation", "figures", "n")]
    return Table("Other evaluations", head, rows, notes)


def is_in_a_table(run, stem, protocol):
    """Is an evaluation of a run's own weights shown by paper_table or other_runs?"""
    if "paper" in run.cfg:
        metric = run.cfg["paper"].get("figure") or "linear"
        return stem == metric.split(" ")[0]
    return stem == "linear" and not run.weights and not protocol.startswith(ELSEWHERE)


# ---------------------------------------------------------------------------- words


def mark(notes, text):
    """The mark of a footnote that says so, such as "[3]"; a new one if none does yet."""
    if text not in notes:
        notes.append(text)
    return f"[{notes.index(text) + 1}]"


def warning(notes, differs):
    """The mark of a footnote on what differs; "" if nothing does."""
    return mark(notes, "NOT this row's setting: " + "; ".join(differs)) if differs else ""


def spread(values):
    """Mean and sample standard deviation, such as "46.0 ± 0.1"."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def effort(runs):
    """What pre-training took a run, such as "60 epochs, 6 min on 2 CPU cores"."""
    done = runs[0].done
    seconds = mean(training_seconds(run) for run in runs)
    if seconds >= 3600:
        time = f"{seconds / 3600:.1f} h"
    elif seconds >= 60:
        time = f"{seconds / 60:.0f} min"
    else:
        time = f"{seconds:.0f} s"
    hardware = dict.fromkeys(hardware_of(run) for run in runs)
    return f"{done} epoch{'' if done == 1 else 's'}, {time} on {' or '.join(hardware)}"


def training_time(runs, cfg):
    """The mean time of pre-training of the finished runs with the settings cfg, in words, or ""."""
    ignore = [*FREE, "knn", "linear", "finetune", "detect"]
    seconds = [
        training_seconds(run)
        for run in runs
        if cfg and not unfinished(run) and not differing(cfg, run.cfg, ignore)
    ]
    return duration(mean(seconds)) if seconds else ""


def training_seconds(run):
    """What the epochs of a run took, without its evaluations."""
    return sum(line.get("seconds", 0) for line in run.log)


def hardware_of(run):
    """The hardware that a run ended on, in words."""
    noted = [line["hardware"] for line in run.log if "hardware" in line]
    return str(noted[-1]) if noted else "hardware that was not noted"


def losses(cfg):
    """The names of a run's losses."""
    return " + ".join(loss["name"] + oracle(loss) for loss in config.loss_settings(cfg["loss"]))


def beginning(cfg):
    """What a run began from, in words."""
    weights = cfg.get("weights")
    return "began at random" if weights is None else f"began from {weights}"


def began_from(cfg):
    """What a label ends with if a run did not begin at random."""
    return "" if cfg.get("weights") is None else f", {beginning(cfg)}"


def oracle(*losses):
    """A warning, where one of the losses is told true labels."""
    return " (ORACLE: true labels)" if any(loss.get("oracle") for loss in losses) else ""


def data(cfg):
    """What a run was trained on."""
    settings = cfg["data"]
    words = describe_set(settings["name"], settings["root"])
    if settings["split"] != "train":
        words += f" {settings['split']}"
    if settings["limit"]:
        words += f", {settings['limit']} images"
    if settings["classes"]:
        words += f", {settings['classes']} classes"
    return f"{words}, {settings['image_size']} px"


def as_text(table):
    """A table for a terminal, its footnotes below."""
    upper = []
    for i, (word, _) in enumerate(table.head):  # once over its two columns
        upper.append("" if i and word == table.head[i - 1][0] else word)
    rows = [upper] if any(upper) else []
    rows += [[word for _, word in table.head], *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = [table.title]
    for row in rows:
        text.append("  ".join(f"{word:{width}}" for word, width in zip(row, widths)).rstrip())
    return "\n".join(text + numbered(table.notes))


def as_markdown(table):
    """A table in Markdown, its footnotes below."""
    head = [f"{upper}<br>{lower}" if upper else lower for upper, lower in table.head]
    text = [f"### {table.title}\n", markdown_row(head), "|---" * len(head) + "|"]
    text += [markdown_row(row) for row in table.rows]
    if table.notes:
        text.append("\n" + "  \n".join(numbered(table.notes)))
    return "\n".join(text)


def markdown_row(words):
    """A line of a table in Markdown."""
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def numbered(notes):
    """Footnotes, one a line."""
    return [f"[{i}] {note}" for i, note in enumerate(notes, 1)]


# ---------------------------------------------------------------------------- curves


def draw(path, runs):
    """Draw kNN, loss, and what was watched without labels over the epochs into a PNG.

    A line is of runs that differ by their seed alone: their mean, and a band of one standard
    deviation where there are several. There are panels for each data set and kNN setting: curves of
    different ones do not compare.
    """
    Figure, colormaps = matplotlib("--png")
    panels = {}  # {(data, kNN): [group of runs]}
    for group in by_seed(trained(runs)):
        run = group[0]
        asked = next((line for line in run.log if "knn" in line), {})
        knn = f"{knn_settings(run, asked)}, {run.cfg['knn']['feature']}"
        panels.setdefault((data(run.cfg), knn), []).append(group)
    if not panels:
        raise SystemExit(
            f"no run has a log.jsonl with a loss to draw in {path}; train first, or leave --png out"
        )
    # In inches: the legend has a line a group, and the figures without labels a row below.
    heights = [
        max(3.5, 0.5 + 0.2 * len(groups)) + (2.8 if have(groups, "RankMe") else 0)
        for groups in panels.values()
    ]
    page = Figure(figsize=(11, sum(heights)), layout="constrained")
    parts = page.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, ((title, knn), groups) in zip(parts, panels.items()):
        draw_panels(part, groups, title, knn, colormaps)
    # Without `Software` the same runs give the same bytes.
    page.savefig(path, dpi=100, metadata={"Software": None})


def have(groups, key):
    """Has a run of these groups a figure of that name in its log?"""
    return any(key in line for group in groups for run in group for line in run.log)


def draw_panels(part, groups, title, knn, colormaps):
    """Draw kNN, loss, and the legend, and below them what was watched without labels.

    Args:
        part: of the page, a SubFigure.
        groups: of runs.
        title: the data.
        knn: how kNN was asked.
        colormaps: matplotlib's.
    """
    labels_of_axes = {"loss": "loss  (dotted: chance)"}
    layout = [["loss", "loss", "legend"]]
    if have(groups, "knn"):
        labels_of_axes["knn"] = textwrap.fill(f"kNN top-1, %  ({knn})", 48)
        layout = [["knn", "loss", "legend"]]
    if have(groups, "RankMe"):
        labels_of_axes |= UNLABELLED_FIGURES
        layout.append(list(UNLABELLED_FIGURES))
    widths = [1, 1, 0.6 if len(layout) == 1 else 1]
    axes = part.subplot_mosaic(layout, width_ratios=widths)
    colours = colormaps["tab10" if len(groups) <= 10 else "tab20"].colors
    labels = [method(group[0].cfg) for group in groups]
    for i, (group, label) in enumerate(zip(groups, labels)):
        style = {"color": colours[i % len(colours)], "linewidth": 1.6, "markersize": 3}
        style["label"] = legend_label(group, label, labels.count(label) > 1)
        for key in labels_of_axes:
            points = curve(group, key)
            band(axes[key], points, marker="o" if len(points[0]) < 15 else "", **style)
        epochs, chance, *_ = curve(group, "chance")
        axes["loss"].plot(epochs, chance, color=style["color"], linewidth=1, linestyle=":")
    for key, label in labels_of_axes.items():
        axes[key].set(title=title if key in layout[0] else "", xlabel="epoch", ylabel=label)
        axes[key].locator_params(axis="x", integer=True)
        simplify(axes[key])
    axes["legend"].axis("off")
    style = {"loc": "center left", "fontsize": 9, "frameon": False, "borderaxespad": 0}
    axes["legend"].legend(*axes["loss"].get_legend_handles_labels(), **style)


def legend_label(group, label, is_ambiguous):
    """The words of a group in the legend, its label first."""
    if is_ambiguous:
        label += f" ({group[0].label})"
    if len(group) > 1:
        label += f", n {len(group)}"
    return label + "".join(f", {words.removesuffix(' done')}" for words in unfinished(group[0]))


def draw_own(path, runs):
    """Draw what methods log of themselves into a PNG, a panel for each method and OWN_FIGURES.

    The lines are means over the seeds, with a band of one standard deviation.
    """
    Figure, _ = matplotlib("--own")
    panels = []  # (title, family, {key: curve})
    known = NOT_OWN.union(*OWN_FIGURES.values())
    for group in by_seed([run for run in trained(runs) if losses(run.cfg) != "nce"]):
        title = f"{method(group[0].cfg)}, {group[0].done} epochs"
        logged = dict.fromkeys(key for line in group[0].log for key in line)
        others = {name: (name,) for name in map(figure_name, logged) if name not in known}
        for family, names in (OWN_FIGURES | others).items():
            curves = {key: curve(group, key) for key in logged if figure_name(key) in names}
            curves = {key: points for key, points in curves.items() if any(points[1])}
            # A lone share of false negatives is the classes' own.
            at_least = 2 if family.startswith("of the query's") else 1
            if len(curves) >= at_least:
                panels.append((title, family, curves))
    if not panels:
        raise SystemExit(
            f"no run logs anything of its own to draw in {path}; train one with ring, mochi, jcl "
            "or ifnd"
        )
    height = -(-len(panels) // 3)  # rows of three
    page = Figure(figsize=(12, 3.2 * height), layout="constrained")
    axes = page.subplots(height, 3, squeeze=False).flatten()
    for axis, (title, family, curves) in zip(axes, panels):
        for key, points in curves.items():
            band(axis, points, label=key.removesuffix(" %"), linewidth=1.4)
        axis.set(title=title, xlabel="epoch", ylabel=family)
        axis.legend(fontsize=7, frameon=False)
        simplify(axis)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    page.savefig(path, dpi=100, metadata={"Software": None})


def draw_negatives(folder, path=None, *others):
    """Draw what the method of a run does with its candidates."""
    from engine.distributed import init_distributed  # the tables need no device
    from training.pictures import FILE, picture_of_run

    if others:
        raise SystemExit(f"--negatives takes a run and one file, so {others[0]} is too much")
    path = os.path.join(folder, FILE) if path is None else path
    page = picture_of_run(folder, init_distributed())
    problem = why_not_writable("--negatives", path)
    if problem:
        raise SystemExit(problem)
    page.save(path, "PNG")
    print(path)


def figure_name(key):
    """The name of a loss's figure: "precision %" of "ifnd: precision %, k=30"."""
    return key.split(": ")[-1].split(",")[0]


def matplotlib(option):
    """Import Figure and colormaps. option: that wants them."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(
            f"{option} wants matplotlib; pip install -r requirements-dev.txt"
        ) from error
    return Figure, colormaps


def trained(runs):
    """Those that have a loss to draw."""
    return [run for run in runs if not run.weights and any("loss" in line for line in run.log)]


def band(axis, points, **style):
    """Draw what `curve` found: a line, and one standard deviation about it."""
    epochs, middle, low, high = points
    (line,) = axis.plot(epochs, middle, **style)
    axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def simplify(axis):
    """A faint grid, and no frame above and to the right."""
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def curve(runs, key):
    """A figure of the log over the epochs at which all of the runs have it.

    Returns:
        four lists: epochs, mean, mean - std, mean + std.
    """
    values = {}
    for run in runs:
        for line in run.log:
            if key in line:
                values.setdefault(line["epoch"], []).append(line[key])
    values = {epoch: v for epoch, v in sorted(values.items()) if len(v) == len(runs)}
    middle = [mean(v) for v in values.values()]
    deviation = [stdev(v) if len(v) > 1 else 0 for v in values.values()]
    low = [m - s for m, s in zip(middle, deviation)]
    high = [m + s for m, s in zip(middle, deviation)]
    return list(values), middle, low, high


def method(cfg):
    """A run's method: its row in a paper's table, or host and losses."""
    words = f"{cfg['model']['host']}, {losses(cfg)}"
    if "paper" in cfg:
        words = f"{cfg['paper']['row']}{oracle(*config.loss_settings(cfg['loss']))}"
    return words + began_from(cfg)


if __name__ == "__main__":
    main()
