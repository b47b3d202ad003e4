"""The tables of report.py: the papers' own, these at a scale, other runs, other evaluations."""

from typing import NamedTuple

from engine import config
from engine.scale import describe_scale, load_scale, overrides

from .comparing import (
    FREE,
    alike,
    asked_otherwise,
    by_seed,
    differences,
    differing,
    of_no_concern,
    unfinished,
)
from .figures import (
    EARLY,
    ELSEWHERE,
    EVALUATIONS,
    are_weights_of,
    evaluations,
    figures_of,
    last_figure,
    measured,
)
from .runs import cell_of, scale_of
from .words import (
    began_from,
    data,
    effort,
    listed,
    losses,
    mark,
    oracle,
    signed,
    spread,
    training_time,
    warning,
)

# The papers' order of rows.
HOSTS = ("ir", "cmc", "moco", "simclr")


class Table(NamedTuple):
    """A table of words, and its footnotes."""

    title: str
    head: list  # (upper, lower) a column
    rows: list  # of lists of words
    notes: list  # footnotes; the first is [1]


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
        names = listed([run.label for run in group]) + began_from(run.cfg)
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
    words = signed(differences_of_seeds)
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
