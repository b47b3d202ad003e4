"""What was run, beside what the papers report: their tables as text and Markdown, and curves as a picture.

    python report.py                                           all of runs/, and those of the papers' tables in which a run stands
    python report.py --all                                     all of the papers' tables
    python report.py runs /data/runs runs/one                  folders of runs, or single runs
    python report.py --markdown report.md --png curves.png     the tables and the curves as files, too
    python report.py --own own.png                             what the methods log of themselves: thresholds, hardness, false negatives

The files in yaml/ lay out the tables: each with a `paper` is one cell, (table, row, column), with the reported figure and that figure's source. A run is of
the cell that its own config.yaml names, and `paper.figure` says which of its figures counts: `linear top-1` unless set, `linear knn`, `finetune top-1`,
`detect box AP`, `svm mAP`, ... (<file> <figure>, of that file's last line of a protocol), or `knn`, the last of log.jsonl.

Ours is the mean ± the sample standard deviation over n seeds. Runs are averaged only if they agree in all settings but seed, name and place, in the epochs done
and in the protocol. A run of other settings than the file's, such as fewer epochs, never stands in the row: below it, as "other settings", with what differs.
"""

import argparse
import os
import re
from statistics import mean, stdev
from typing import NamedTuple

from engine import config
from engine.log import lines

# data.root: not so of a folder of one's own, see less_folders.
FREE = (
    "name",
    "seed",
    "paper",
    "data.root",
    "data.workers",
    "knn.every",
    "linear.root",
    "detect.data",
    "detect.workers",
)  # settings that change no figure but by chance
EVALUATIONS = (
    "linear",
    "finetune",
    "detect",
    "svm",
)  # <this>.jsonl in a run's folder; svm is the `linear` section's
EARLY = "; before the end, "  # what a protocol is followed by if something was not finished
ELSEWHERE = "evaluated on "  # what a protocol begins with if that is another data set than the encoder's own
OWN = {  # what of the log belongs in one panel, by the words before a comma
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
# What --own does not draw, beside what is in OWN: what every run logs, and settings over time.
# Whatever else a loss logs has a panel of its own.
NOT_OWN = {
    *("epoch", "loss", "chance", "spread", "K", "positive", "used %", "knn"),
    *("lr", "seconds", "images/s", "data wait", "hardware"),
    *("inner %", "outer %", "lambda", "oracle", "removed %", "attracted %"),
    *("mixed share of partition %", "NMI"),
}
HOSTS = ("ir", "cmc", "moco", "simclr")  # the papers' order of rows


class Run(NamedTuple):
    label: str  # its name, or its folder where two have that name
    folder: str
    cfg: dict
    log: list  # log.jsonl, a dict a line
    done: int  # epochs
    weights: str | None = (
        None  # of an evaluation in a folder of its own: the file that it evaluated; log and done are its run's
    )


class Table(NamedTuple):
    title: str
    head: list  # (upper, lower) a column
    rows: list  # of lists of words
    notes: list  # footnotes; the first is [1]


def main():
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
    args = parser.parse_args()
    for folder in args.folders:
        if not os.path.isdir(folder):
            raise SystemExit(
                f"there is no folder {folder}; train first, e.g. python train_pretrain.py --cfg yaml/quickstart.yaml, or name a folder of runs"
            )
    if not os.path.isdir(args.yaml):
        raise SystemExit(
            f"there is no folder {args.yaml}; name the one whose files lay out the tables, --yaml FOLDER"
        )

    left_out = []  # sentences
    cells = read_cells(args.yaml, left_out)
    runs, strangers = read_runs(args.folders, left_out)
    papers = [run for run in runs if "paper" in run.cfg]
    others = [run for run in runs if "paper" not in run.cfg and not run.weights]
    titles = dict.fromkeys(place[0] for place in [*cells, *(place_of(run.cfg) for run in papers)])
    without_run = [
        title for title in titles if all(place_of(run.cfg)[0] != title for run in papers)
    ]
    hidden = [] if args.all else without_run
    tables = [other_runs(others)] if others else []
    tables += [
        paper_table(
            title,
            {place: cell for place, cell in cells.items() if place[0] == title},
            [run for run in papers if place_of(run.cfg)[0] == title],
        )
        for title in titles
        if title not in hidden
    ]
    tables += [table for table in [other_evaluations(runs, strangers)] if table.rows]

    paragraphs = [as_text(table) for table in tables]
    if left_out:
        paragraphs.append("\n".join(left_out))
    if hidden:
        paragraphs.append(
            f"{len(hidden)} of the papers' {len(titles)} tables have no run yet; --all prints them"
        )
    print("\n\n".join(paragraphs))
    if args.markdown:
        with open(args.markdown, "w") as f:
            f.write("\n\n".join([as_markdown(table) for table in tables] + left_out) + "\n")
    if args.png:
        draw(runs, args.png)
    if args.own:
        draw_own(runs, args.own)


# ---------------------------------------------------------------------------------------------------- reading


def read_cells(folder, left_out):
    """The tables' cells: {(table, row, column): (file, settings)}, in the order of the files."""
    cells, paths = {}, []
    for where, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f != "detectron2"]  # another program's files
        paths += [os.path.join(where, f) for f in files if f.endswith(".yaml")]
    for path in sorted(paths, key=natural):
        try:
            cfg = config.load(path)
        except (
            SystemExit,
            ImportError,
        ) as error:  # ImportError: an evaluation whose library is not installed
            left_out.append(
                f"Left out: {error if isinstance(error, SystemExit) else f'{path}: {error}'}"
            )
            continue
        if "paper" in cfg:
            place = place_of(cfg)
            if None in place:
                left_out.append(f"Left out: {path}: paper lacks one of table, row and column")
            elif place in cells:
                left_out.append(
                    f"Left out: {path}: {', '.join(place)} is already the cell of {cells[place][0]}"
                )
            else:
                cells[place] = path, cfg
    return cells


def read_runs(folders, left_out):
    """-> runs, and strangers: folders without a config.yaml, which may hold evaluations of weights from elsewhere."""
    found, strangers = [], []
    for folder in folders:
        inside = (
            [folder]
            if os.path.exists(os.path.join(folder, "config.yaml"))
            else sorted((f.path for f in os.scandir(folder) if f.is_dir()), key=natural)
        )
        for path in inside:
            file = os.path.join(path, "config.yaml")
            if not os.path.exists(file):
                name = os.path.basename(os.path.normpath(path))
                strangers.append(Run(name, path, {"name": name, "data": {"name": None}}, [], 0))
                continue
            try:
                cfg = config.load(file)  # fills in what an older version did not have yet
            except (SystemExit, ImportError) as error:
                left_out.append(
                    f"Left out: {error if isinstance(error, SystemExit) else f'{file}: {error}'}"
                )
                continue
            if None in place_of(cfg):
                cfg.pop("paper", None)
            log = [
                line
                for line in lines(os.path.join(path, "log.jsonl"))
                if isinstance(line, dict) and "epoch" in line
            ]
            found.append(
                Run(cfg["name"], path, cfg, log, max((line["epoch"] for line in log), default=0))
            )
    names = [run.label for run in found]
    found = [
        run if names.count(run.label) == 1 else run._replace(label=run.folder) for run in found
    ]
    runs = []
    for run in [part for run in found for part in by_weights(run, found)]:
        twin = next(
            (
                r
                for r in runs
                if r.done == run.done
                and r.cfg["seed"] == run.cfg["seed"]
                and not differing(r.cfg, run.cfg)
                and place_of(r.cfg) == place_of(run.cfg)
                and (r.log or r.weights == run.weights)
            ),
            None,
        )
        if twin:  # the same experiment: counted twice it would feign a second seed
            left_out.append(
                f"Left out: {run.folder} has the settings, seed and epochs of {twin.folder}, so it adds no seed"
            )
        else:
            runs.append(run)
    return runs, strangers


def by_weights(run, trained):
    """[run], or for a folder that holds evaluations of other runs' weights alone, such as a transfer row, one Run for each of these weights.

    It takes the settings of pre-training, the log and the seed from the run that trained them: no evaluation hides how long that was.
    """
    files = dict.fromkeys(
        weights
        for stem in EVALUATIONS
        for weights, *_ in evaluations(run, stem)
        if not is_own(run, weights)
    )
    if run.log or not files:
        return [run]
    parts = []
    for file in files:
        source = next((r for r in trained if r.log and is_own(r, file)), None)
        if source:
            cfg = run.cfg | {
                key: source.cfg[key] for key in ("seed", "data", "model", "loss", "optim")
            }
            parts.append(
                Run(
                    f"{run.label} of {source.label}", run.folder, cfg, source.log, source.done, file
                )
            )
        else:
            parts.append(run._replace(label=f"{run.label} of {file}", weights=file))
    return parts


def place_of(cfg):
    """(table, row, column), as words; None where one is missing"""
    paper = cfg.get("paper", {})
    return tuple(
        None if paper.get(key) is None else str(paper[key]) for key in ("table", "row", "column")
    )


def natural(path):
    """A sort key: numbers by value, and a.yaml before a_b.yaml."""
    return [
        int(part) if i % 2 else part
        for i, part in enumerate(re.split(r"(\d+)", os.path.splitext(path)[0]))
    ]


def evaluations(run, stem):
    """The lines of linear.jsonl and its like: {(weights, protocol, seed): line}. A later line of the same replaces the earlier."""
    found = {}
    for line in lines(os.path.join(run.folder, f"{stem}.jsonl")):
        if isinstance(line, dict):
            found[
                line.get("weights"),
                elsewhere(line.get("data"), run.cfg) + line.get("protocol", "protocol not noted"),
                line.get("seed"),
            ] = line
    whole = {}
    for (weights, protocol, seed), line in found.items():
        early = ""
        if (
            "iteration" in line and f" {line['iteration']} iterations" not in protocol
        ):  # train_detect.py's eval_every
            early = f"{EARLY}at iteration {line['iteration']}"
        elif (
            os.path.basename(weights or "") == "last.pt"
        ):  # backbone.pt, of a finished run, would have been taken first
            early = f"{EARLY}of last.pt at an epoch that was not noted"
        whole[weights, protocol + early, seed] = line | {
            "knn": elsewhere(line.get("data"), run.cfg) + line.get("knn", "kNN") + early
        }
    return whole


def elsewhere(name, cfg):
    """name: of the data that an evaluation was on, as train_linear.py writes it; None in others' lines, whose data are the run's own."""
    return (
        ""
        if name in (None, cfg["data"]["name"], data_name(cfg["data"]))
        else f"{ELSEWHERE}{name}: "
    )


def data_name(settings):
    """A data set as train_linear.py names it: by its name, or as a folder with its own.

    settings: the data section, or root and name of the data that are probed.
    """
    if settings["name"] != "folder" or not settings.get("root"):
        return settings["name"]
    return f"folder {os.path.basename(os.path.normpath(settings['root']))}"


def figures_of(line, name):
    """{"top-1": 50.0, ...} of one evaluation. Older lines of train_linear.py have `rows` alone, where the first learning rate listed is the one reported."""
    row = line.get("rows", {}).get(name, {})
    return {key.split(",")[0]: value for key, value in reversed(row.items())} | line.get(
        "figures", {}
    )


def is_own(run, weights):
    """Are an evaluation's weights those that the run trained? Its folder may have been moved since, its name stays."""
    folder, file = os.path.split(weights or "")
    names = run.cfg["name"], os.path.basename(os.path.normpath(run.folder))
    return (
        weights in (None, run.weights)
        or file in ("backbone.pt", "last.pt")
        and os.path.basename(folder) in names
    )


def measured(run, what, untrained=False):
    """{protocol: figure} of one run, or of its untrained encoder; `what` as paper.figure. Empty where it was not measured."""
    stem, _, key = what.partition(" ")
    if not key:
        seen = [line for line in run.log if what in line and (line["epoch"] == 0) == untrained]
        k, late = (
            run.cfg["knn"],
            f" at epoch {seen[-1]['epoch']}"
            if seen and not untrained and seen[-1]["epoch"] < run.done
            else "",
        )
        return (
            {
                f"weighted kNN, k {k['k']}, T {k['temperature']:g}, on the {k['feature']}{late}": seen[
                    -1
                ][what]
            }
            if seen
            else {}
        )
    found = {}
    for (weights, protocol, _), line in evaluations(run, stem).items():
        figures = (
            figures_of({"rows": line.get("rows", {})}, "untrained encoder")
            if untrained
            else figures_of(line, run.cfg["name"])
        )
        if key in figures and (weights == run.weights if run.weights else is_own(run, weights)):
            found[line["knn"] if key == "knn" else protocol] = figures[key]
    return found


# ---------------------------------------------------------------------------------------------------- comparing


def alike(items, ignore):
    """Groups of those that may be averaged. items: (run, protocol, ...); ignore: settings that may differ, as config.difference takes them."""
    groups = []
    for item in items:
        for group in groups:
            (a, how, *_), (b, how_b, *_) = group[0], item
            if (
                how == how_b
                and a.done == b.done
                and bool(a.weights) == bool(b.weights)
                and not differing(a.cfg, b.cfg, ignore)
            ):
                group.append(item)
                break
        else:
            groups.append([item])
    return groups


def differing(old, new, ignore=FREE):
    """config.difference, for which two folders of images are two data sets."""
    return config.difference(old, new, less_folders(old, new, ignore))


def less_folders(old, new, ignore):
    """`ignore`, less data.root where it says which images they are.

    A set with a name is the same wherever it lies. A folder of one's own (data.name: folder) has no
    other name than its place, however that is written.
    """
    a, b = (cfg.get("data", {}) for cfg in (old, new))
    same = (
        a.get("name") != "folder"
        or b.get("name") != "folder"
        or normal_path(a["root"]) == normal_path(b["root"])
    )
    return [key for key in ignore if same or key != "data.root"]


def normal_path(path):
    return os.path.normpath(os.path.expanduser(path))


def by_seed(runs):
    """Groups of runs that differ by their seed alone."""
    return [[run for run, _ in group] for group in alike([(run, None) for run in runs], FREE)]


def differences(old, new, ignore=FREE):
    """All settings that differ, as words: ["optim.epochs was 300 and is 10"]"""
    found, ignore = [], less_folders(old, new, ignore)
    while words := config.difference(old, new, ignore):
        found.append(words.replace(" and is now ", " and is "))
        ignore.append(words.split(" was ")[0])
    return found


def of_no_concern(what):
    """FREE, and the sections of evaluations that the figure is not of."""
    return [
        *FREE,
        *{"knn", "linear", "finetune", "detect"}
        - {what.split(" ")[0].replace("svm", "linear"), what.split(" ")[-1]},
    ]


def asked_otherwise(cfg, what, protocol, file):
    """[words] if a protocol is not the one that cfg asks for: the evaluating scripts can be told other settings than those which the run has saved."""
    stem, _, key = what.partition(" ")
    if stem not in cfg or stem not in EVALUATIONS:
        return []
    how = config.find(config.SECTIONS[stem][0])
    words = (
        [str(config.build(how, cfg[stem], f"{file}: {stem}"))]
        if "__str__" in vars(how) and key != "knn"
        else []
    )
    name, root = (
        (cfg["linear"]["data"], cfg["linear"]["root"]) if stem == "linear" else (None, None)
    )  # detect's `data` is a place
    where = elsewhere(data_name({"name": name, "root": root or cfg["data"]["root"]}), cfg)
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
    if run.weights and not run.log:
        return [
            "it began from random weights"
            if run.weights == "none"
            else f"{run.weights} was trained by none of the runs read"
        ]
    return (
        []
        if run.done >= run.cfg["optim"]["epochs"]
        else [f"{run.done} of {run.cfg['optim']['epochs']} epochs done"]
    )


# ---------------------------------------------------------------------------------------------------- tables


def paper_table(title, cells, runs):
    """One table as the paper lays it out, each column as reported and as ours. cells, runs: those of this table."""
    notes, mine = [], {}
    for run in runs:
        mine.setdefault(place_of(run.cfg), []).append(run)
    hosts = {}
    for place, cfg in [
        *((place, cfg) for place, (_, cfg) in cells.items()),
        *((place_of(run.cfg), run.cfg) for run in runs),
    ]:
        hosts.setdefault(
            place[1],
            HOSTS.index(cfg["model"]["host"]) if cfg["model"]["host"] in HOSTS else len(HOSTS),
        )
    columns = list(dict.fromkeys(place[2] for place in [*cells, *mine]))
    rows = []
    for row in sorted(hosts, key=hosts.get):  # a stable sort: within a host, the order of the files
        line, below = [row], {}  # below: {what differs from the file: {column: ours}}
        for column in columns:
            place = title, row, column
            file, cfg = cells.get(place, (None, None))
            paper = (cfg or mine[place][0].cfg)["paper"] if cfg or place in mine else {}
            # Of a cell that no file lays out, the run's own word may be of an older recipe.
            reported = paper.get("reported") if cfg else None
            if reported is not None:
                reported = f"{reported} " + mark(
                    notes, f"reported: {paper.get('source') or 'no source given'}"
                )
            exact = []
            for differs, ours in ours_of(
                mine.get(place, []), paper.get("figure") or "linear top-1", file, cfg, notes
            ):
                if differs:
                    below.setdefault(tuple(differs), {}).setdefault(column, []).append(ours)
                else:
                    exact.append(ours)
            line += [reported or "", " / ".join(exact)]
        rows.append(line)
        for differs, ours in below.items():
            rows.append([f"- other settings {warning(notes, differs)}"])
            for column in columns:
                rows[-1] += ["", " / ".join(ours.get(column, []))]
    return Table(
        title,
        [
            ("", ""),
            *(head for column in columns for head in ((column, "reported"), (column, "ours"))),
        ],
        rows,
        notes,
    )


def ours_of(runs, what, file, cfg, notes):
    """What was run of one cell: [(what differs from the file's settings, figure and footnote)]"""
    found = []
    for run in runs:
        if not measured(run, what):
            found.append(
                (
                    [],
                    mark(
                        notes,
                        f"{run.label} has no {what} yet; {run.done} of {run.cfg['optim']['epochs']} epochs done",
                    ),
                )
            )
    for group in alike(
        [(run, protocol, value) for run in runs for protocol, value in measured(run, what).items()],
        of_no_concern(what),
    ):
        run, protocol, _ = group[0]
        differs = (
            differences(cfg, run.cfg, of_no_concern(what))
            if cfg
            else ["no file lays out this cell"]
        )
        differs += unfinished(run)
        differs += asked_otherwise(cfg, what, protocol, file) if cfg else []
        differs += (
            [f"evaluated before the end, {protocol.split(EARLY)[1]}"] if EARLY in protocol else []
        )
        seeds = {
            r.cfg["seed"]: (r, value) for r, _, value in group
        }  # a seed evaluated twice is one seed
        warning(notes, differs)  # before the figure's own, as it stands to the left
        note = f"{', '.join(r.label for r, _ in seeds.values())}: {what} after {effort([r for r, _ in seeds.values()])}; protocol {mark(notes, protocol)}"
        note += oracle(*config.several(run.cfg["loss"]))
        found.append(
            (
                differs,
                f"{spread([value for _, value in seeds.values()])} (n {len(seeds)}) {mark(notes, note)}",
            )
        )
    return found


def other_runs(runs):
    """Runs of no paper's cell, a row for those that differ by their seed alone."""
    notes, rows, first = [], [], {}
    groups = by_seed(runs)
    for group in groups:
        cfg, epochs = (
            group[0].cfg,
            ", ".join(unfinished(group[0])).removesuffix(" epochs done") or str(group[0].done),
        )
        shown = [cfg["model"]["host"], losses(cfg), data(cfg), epochs]
        names = ", ".join(run.label for run in group)
        twin = first.setdefault(tuple(shown), group[0])
        if twin is not group[0]:  # the columns do not tell the two apart: say what does
            names += " " + mark(
                notes, f"beside {twin.label}: {'; '.join(differences(twin.cfg, cfg))}"
            )
        row = [names, *shown]
        for what in ("knn", "linear top-1"):
            row += [
                figure(group, what, notes, True),
                figure(group, what, notes, False),
                gain(group, groups, what, notes),
            ]
        rows.append(
            [*row, str(len(group)), effort(group).split(", ", 1)[1] if group[0].done else ""]
        )
    return Table(
        "Other runs",
        [
            *(("", word) for word in ("run", "host", "loss", "data", "epochs")),
            *(
                (what, word)
                for what in ("kNN", "linear top-1")
                for word in ("untrained", "trained", "- nce")
            ),
            ("", "n"),
            ("", "time a run"),
        ],
        rows,
        notes,
    )


def figure(runs, what, notes, untrained):
    """A group's figure on its own data, and a footnote that says how it was measured. Several protocols stand side by side."""
    words = []
    items = [
        (run, protocol, value)
        for run in runs
        for protocol, value in measured(run, what, untrained).items()
        if not protocol.startswith(ELSEWHERE)
    ]
    for group in alike(items, FREE):
        fewer = f" (n {len(group)})" if len(group) < len(runs) else ""
        note = (
            "" if untrained else " " + mark(notes, group[0][1])
        )  # the baseline's is its neighbour's
        words.append(spread([value for *_, value in group]) + fewer + note)
    return " / ".join(words)


def gain(runs, groups, what, notes):
    """By how much a group is above plain InfoNCE on the same host, data and optimizer: the mean ± deviation of the differences of equal seeds. Seeds have
    their own images and weights, so that these spread less than the figures. A baseline of as many epochs goes before one of others.
    """
    if losses(runs[0].cfg) == "nce":
        return ""
    last = lambda run: list(measured(run, what).values())[-1:]
    shared = lambda cfg: {"host": cfg["model"]["host"], "data": cfg["data"], "optim": cfg["optim"]}
    base = [
        other
        for other in groups
        if losses(other[0].cfg) == "nce"
        and not differing(shared(other[0].cfg), shared(runs[0].cfg), [*FREE, "optim.epochs"])
    ]
    base = min(base, key=lambda other: abs(other[0].done - runs[0].done), default=[])
    pairs = [
        a - b
        for run in runs
        for other in base
        if run.cfg["seed"] == other.cfg["seed"]
        for a in last(run)
        for b in last(other)
    ]
    if not pairs:
        return ""
    beside = (
        f" {mark(notes, f'beside {base[0].done} epochs')}" if base[0].done != runs[0].done else ""
    )
    return f"{mean(pairs):+.1f}" + (f" ± {stdev(pairs):.1f}" if len(pairs) > 1 else "") + beside


def other_evaluations(runs, strangers):
    """What no table above shows of linear.jsonl and its like: other protocols, transfer, weights from elsewhere."""
    notes, found = [], {}  # {(of whom, evaluation, protocol): {seed: (label, figures)}}
    for group in by_seed(runs) + [[run] for run in strangers]:
        for run in group:
            for stem in EVALUATIONS:
                for (weights, protocol, seed), line in evaluations(run, stem).items():
                    if run.weights and weights != run.weights:
                        continue  # that one is another Run
                    if "paper" in run.cfg:
                        shown = stem == (run.cfg["paper"].get("figure") or "linear").split(" ")[0]
                    else:
                        shown = (
                            stem == "linear"
                            and not run.weights
                            and not protocol.startswith(ELSEWHERE)
                        )
                    if run in strangers or not is_own(run, weights):
                        label = f"{run.label} of {weights}"
                        found.setdefault((label, stem, protocol), {})[seed] = (
                            label,
                            figures_of(line, run.cfg["name"]),
                        )
                    elif not shown:
                        found.setdefault((group[0].label, stem, protocol), {})[run.cfg["seed"]] = (
                            run.label,
                            figures_of(line, run.cfg["name"]),
                        )
    rows = []
    for (_, stem, protocol), seeds in found.items():
        labels, figures = (
            dict.fromkeys(label for label, _ in seeds.values()),
            [figures for _, figures in seeds.values()],
        )
        values = {
            key: [f[key] for f in figures if key in f]
            for key in sorted({key for f in figures for key in f})
        }
        rows.append(
            [
                ", ".join(labels),
                f"{stem} {mark(notes, protocol)}",
                ", ".join(f"{key} {spread(v)}" for key, v in values.items()),
                str(len(seeds)),
            ]
        )
    return Table(
        "Other evaluations",
        [("", word) for word in ("run", "evaluation", "figures", "n")],
        rows,
        notes,
    )


# ---------------------------------------------------------------------------------------------------- words


def mark(notes, text):
    """ "[3]", the footnote that says so; a new one if none does yet"""
    if text not in notes:
        notes.append(text)
    return f"[{notes.index(text) + 1}]"


def warning(notes, differs):
    return mark(notes, "NOT this row's setting: " + "; ".join(differs)) if differs else ""


def spread(values):
    """ "46.0 ± 0.1": mean and sample standard deviation"""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def effort(runs):
    """ "60 epochs, 6 min on 2 CPU cores": of pre-training, a run"""
    seconds, done = (
        mean(sum(line.get("seconds", 0) for line in run.log) for run in runs),
        runs[0].done,
    )
    time = (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.0f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )
    hardware = dict.fromkeys(
        str(
            next(
                (line["hardware"] for line in reversed(run.log) if "hardware" in line),
                "hardware that was not noted",
            )
        )
        for run in runs
    )
    return f"{done} epoch{'' if done == 1 else 's'}, {time} on {' or '.join(hardware)}"


def losses(cfg):
    return " + ".join(one["name"] + oracle(one) for one in config.several(cfg["loss"]))


def oracle(*losses):
    return " (ORACLE: true labels)" * any(one.get("oracle", False) for one in losses)


def data(cfg):
    d = cfg["data"]
    return (
        data_name(d)
        + (f" {d['split']}" if d["split"] != "train" else "")
        + (f", {d['limit']} images" if d["limit"] else "")
        + f", {d['image_size']} px"
    )


def as_text(table):
    upper = [
        word if i == 0 or word != table.head[i - 1][0] else ""
        for i, (word, _) in enumerate(table.head)
    ]  # once over its two columns
    whole = [*([upper] if any(upper) else []), [word for _, word in table.head], *table.rows]
    widths = [max(map(len, column)) for column in zip(*whole)]
    return "\n".join(
        [
            table.title,
            *(
                "  ".join(f"{word:{width}}" for word, width in zip(row, widths)).rstrip()
                for row in whole
            ),
            *(f"[{i + 1}] {note}" for i, note in enumerate(table.notes)),
        ]
    )


def as_markdown(table):
    row = lambda words: "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"
    head = [f"{upper}<br>{lower}" if upper else lower for upper, lower in table.head]
    notes = [f"[{i + 1}] {note}" for i, note in enumerate(table.notes)]
    return "\n".join(
        [f"### {table.title}\n", row(head), "|---" * len(head) + "|", *map(row, table.rows)]
        + (["\n" + "  \n".join(notes)] if notes else [])
    )


# ---------------------------------------------------------------------------------------------------- curves


def draw(runs, path):
    """KNN and loss over the epochs, a line for runs that differ by their seed alone: their mean, and a band of one standard deviation where there are several.

    A row of panels for each data set and kNN setting: curves of different ones do not compare.
    """
    Figure, colormaps = matplotlib("--png")
    panels = {}  # {(data, kNN): [group of runs]}
    for group in trained(runs):
        k = group[0].cfg["knn"]
        panels.setdefault(
            (data(group[0].cfg), f"k {k['k']}, T {k['temperature']:g}, {k['feature']}"), []
        ).append(group)
    if not panels:
        raise SystemExit(
            f"no run has a log.jsonl with a loss to draw in {path}; train first, or leave --png out"
        )

    heights = [
        max(3.5, 0.5 + 0.2 * len(groups)) for groups in panels.values()
    ]  # inches: the legend has a line a group
    page = Figure(figsize=(11, sum(heights)), layout="constrained")
    axes = page.subplots(
        len(panels),
        3,
        squeeze=False,
        gridspec_kw={"width_ratios": [1, 1, 0.6], "height_ratios": heights},
    )
    for (knn_axis, loss_axis, legend), ((what, knn), groups) in zip(axes, panels.items()):
        colours = colormaps["tab10" if len(groups) <= 10 else "tab20"].colors
        labels = [method(group[0].cfg) for group in groups]
        for i, group in enumerate(groups):
            colour, label = colours[i % len(colours)], labels[i]
            label += f" ({group[0].label})" if labels.count(label) > 1 else ""
            label += f", n {len(group)}" if len(group) > 1 else ""
            label += "".join(f", {words.removesuffix(' done')}" for words in unfinished(group[0]))
            for axis, key in ((knn_axis, "knn"), (loss_axis, "loss")):
                found = curve(group, key)
                band(
                    axis,
                    found,
                    color=colour,
                    label=label,
                    linewidth=1.6,
                    marker="o" if len(found[0]) < 15 else "",
                    markersize=3,
                )
            x, chance, *_ = curve(group, "chance")
            loss_axis.plot(x, chance, color=colour, linewidth=1, linestyle=":")
        knn_axis.set(title=what, xlabel="epoch", ylabel=f"kNN top-1, %  ({knn})")
        loss_axis.set(title=what, xlabel="epoch", ylabel="loss  (dotted: chance)")
        for axis in (knn_axis, loss_axis):
            axis.locator_params(axis="x", integer=True)
            plain(axis)
        legend.axis("off")
        legend.legend(
            *loss_axis.get_legend_handles_labels(),
            loc="center left",
            fontsize=9,
            frameon=False,
            borderaxespad=0,
        )
    page.savefig(
        path, dpi=100, metadata={"Software": None}
    )  # None: the same runs give the same bytes


def draw_own(runs, path):
    """A panel for each method and family of OWN, and for each other figure that a method logs.

    Drawn are the mean over the seeds, and a band of one standard deviation.
    """
    Figure, _ = matplotlib("--own")
    known = NOT_OWN.union(*OWN.values())
    panels = []  # (title, family, {key: curve})
    for group in trained(run for run in runs if losses(run.cfg) != "nce"):
        logged = dict.fromkeys(key for line in group[0].log for key in line)
        others = {name: (name,) for name in map(figure_name, logged) if name not in known}
        for family, names in (OWN | others).items():
            keys = [key for key in logged if figure_name(key) in names]
            curves = {key: found for key in keys if any((found := curve(group, key))[1])}
            if len(curves) > family.startswith(
                "of the query's"
            ):  # a lone share of false negatives is the classes' own
                panels.append((f"{method(group[0].cfg)}, {group[0].done} epochs", family, curves))
    if not panels:
        raise SystemExit(
            f"no run logs anything of its own to draw in {path}; train one with ring, mochi, jcl or ifnd"
        )
    height = -(-len(panels) // 3)  # rows of three
    page = Figure(figsize=(12, 3.2 * height), layout="constrained")
    axes = page.subplots(height, 3, squeeze=False).flatten()
    for axis, (title, family, curves) in zip(axes, panels):
        for key, found in curves.items():
            band(axis, found, label=key.removesuffix(" %"), linewidth=1.4)
        axis.set(title=title, xlabel="epoch", ylabel=family)
        axis.legend(fontsize=7, frameon=False)
        plain(axis)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    page.savefig(path, dpi=100, metadata={"Software": None})


def figure_name(key):
    """The name of a loss's figure: "precision %" of "ifnd: precision %, k=30"."""
    return key.split(": ")[-1].split(",")[0]


def matplotlib(option):
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit(f"{option} wants matplotlib; pip install -r requirements-dev.txt")
    return Figure, colormaps


def trained(runs):
    """by_seed, of those that have a loss to draw."""
    return by_seed(
        [run for run in runs if not run.weights and any("loss" in line for line in run.log)]
    )


def band(axis, found, **style):
    """What `curve` found: a line, and one standard deviation about it."""
    x, middle, low, high = found
    (line,) = axis.plot(x, middle, **style)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def plain(axis):
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def curve(runs, key):
    """-> epochs, mean, mean - std, mean + std of a figure of the log, at the epochs where all of the runs have it"""
    values = {}
    for run in runs:
        for line in run.log:
            if key in line:
                values.setdefault(line["epoch"], []).append(line[key])
    points = [
        (epoch, mean(v), stdev(v) if len(v) > 1 else 0)
        for epoch, v in sorted(values.items())
        if len(v) == len(runs)
    ]
    return (
        [e for e, *_ in points],
        [m for _, m, _ in points],
        [m - s for _, m, s in points],
        [m + s for _, m, s in points],
    )


def method(cfg):
    return (
        f"{cfg['paper']['row']}{oracle(*config.several(cfg['loss']))}"
        if "paper" in cfg
        else f"{cfg['model']['host']}, {losses(cfg)}"
    )


if __name__ == "__main__":
    main()
