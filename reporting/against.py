"""Accuracy against a setting that runs differ in: `report.py --against loss.temperature FILE`.

A line is of runs that differ by that setting and their seed alone: the means over the seeds, and a
band of one standard deviation. A method for which the setting has one value, or which has no such
setting, is a dashed line from side to side. Where plain InfoNCE is among the runs, a second row
shows by how much each method is above it, seed by seed: at the same value of the setting, or where
InfoNCE has one line from side to side, above that.
"""

from functools import partial
from typing import NamedTuple

from .comparing import FREE, differing, unfinished
from .curves import band, matplotlib, points_of, simplify
from .figures import last_figure
from .tables import Table
from .words import data, losses, method, signed, spread

METRICS = {"knn": "kNN top-1", "linear top-1": "linear top-1"}
# From this ratio of the largest value to the smallest on, the axis is logarithmic.
WIDE = 8


class Line(NamedTuple):
    """A method's finished runs, by the value of the setting; None where it has none."""

    label: str
    host: str
    loss: str
    runs: dict  # {value: list of runs}

    @property
    def is_level(self):
        """Is it the same whatever the setting?"""
        return len(self.runs) == 1

    def at(self, value):
        """The runs at a value; of a level line, all."""
        return next(iter(self.runs.values())) if self.is_level else self.runs.get(value, [])


def setting(cfg, key):
    """The number that a setting has, also as the only one of a list; else None."""
    value = whole_setting(cfg, key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


def whole_setting(cfg, key):
    """What a setting has, whatever it is; None where there is no such setting."""
    for name in key.split("."):
        cfg = cfg.get(name) if isinstance(cfg, dict) else None
    return cfg


def make_lines(runs, key):
    """The lines of the finished runs. SystemExit where no two runs differ in the setting."""
    groups = []
    for run in runs:
        if run.log and not run.weights and not unfinished(run):
            group = next((group for group in groups if is_of_line(group[0], run, key)), None)
            groups.append([run]) if group is None else group.append(run)
    if not any(len({setting(run.cfg, key) for run in group}) > 1 for group in groups):
        raise SystemExit(
            f"--against {key}: no two finished runs differ in {key} and their seed alone; name "
            "folders of such runs, and a setting that is a number, as loss.temperature"
        )
    labels = [label_of(group[0].cfg, key) for group in groups]
    lines = []
    for group, label in zip(groups, labels):
        cfg, by_value = group[0].cfg, {}
        for run in sorted(group, key=lambda run: setting(run.cfg, key) or 0):
            by_value.setdefault(setting(run.cfg, key), []).append(run)
        if labels.count(label) > 1:
            label += f" ({group[0].label})"
        lines.append(Line(label, cfg["model"]["host"], losses(cfg), by_value))
    return lines


def label_of(cfg, key):
    """A line's method, and the setting where it is a list of several."""
    value = whole_setting(cfg, key)
    is_list = isinstance(value, list) and len(value) > 1
    return method(cfg) + (f", {', '.join(map(str, value))}" if is_list else "")


def is_of_line(run, other, key):
    """Do two runs differ by the setting and their seed alone? One without a number stands apart."""
    numbers = [setting(r.cfg, key) is None for r in (run, other)]
    return numbers[0] == numbers[1] and not differing(run.cfg, other.cfg, [*FREE, key])


def figures_at(line, value, metric):
    """The figure of each run of a line at a value that has one."""
    figures = [last_figure(run, metric) for run in line.at(value)]
    return [figure for figure in figures if figure is not None]


def gains_at(line, value, metric, lines):
    """The differences to plain InfoNCE at a value, seed by seed; none of InfoNCE itself."""
    baseline = baseline_of(line, lines)
    if baseline is None or line is baseline:
        return []
    theirs = {run.cfg["seed"]: last_figure(run, metric) for run in baseline.at(value)}
    pairs = [(last_figure(run, metric), theirs.get(run.cfg["seed"])) for run in line.at(value)]
    return [figure - other for figure, other in pairs if None not in (figure, other)]


def baseline_of(line, lines):
    """The line of plain InfoNCE on the same host; None where there is none, or more than one."""
    found = [other for other in lines if other.loss == "nce" and other.host == line.host]
    return found[0] if len(found) == 1 else None


# ---------------------------------------------------------------------------- the table


def against_table(runs, key):
    """The figures that draw_against draws."""
    lines, rows = make_lines(runs, key), []
    for line in lines:
        for value, group in line.runs.items():
            row = [line.label, "" if value is None else f"{value:g}"]
            for metric in METRICS:
                figures = figures_at(line, value, metric)
                gains = gains_at(line, value, metric, lines)
                row += [spread(figures) if figures else "", signed(gains) if gains else ""]
            rows.append([*row, str(len(group))])
    head = [("", "method"), ("", key)]
    for words in METRICS.values():
        head += [(words, "trained"), (words, "- nce")]
    return Table(f"Against {key}", [*head, ("", "n")], rows, [])


# ---------------------------------------------------------------------------- the picture


def draw_against(path, runs, key):
    """Draw the accuracies, and their differences to plain InfoNCE, against a setting into a PNG."""
    Figure, _ = matplotlib("--against")
    lines = make_lines(runs, key)
    values = sorted({value for line in lines if not line.is_level for value in line.runs})
    metrics = [m for m in METRICS if any(figures_at(line, values[0], m) for line in lines)]
    has_gains = any(gains_at(line, values[0], m, lines) for line in lines for m in metrics)
    page = Figure(figsize=(5.5 * len(metrics), 6.8 if has_gains else 3.4), layout="constrained")
    axes = page.subplots(1 + has_gains, len(metrics), squeeze=False)
    for metric, column in zip(metrics, axes.T):
        column[0].set(ylabel=f"{METRICS[metric]}, %")
        for i, line in enumerate(lines):
            draw_line(column[0], line, values, partial(figures_at, line, metric=metric), f"C{i}")
        if has_gains:
            column[1].set(ylabel=f"{METRICS[metric]} above InfoNCE, points")
            column[1].axhline(0, color="black", linewidth=0.8)
            for i, line in enumerate(lines):
                gains = partial(gains_at, line, metric=metric, lines=lines)
                draw_line(column[1], line, values, gains, f"C{i}")
        for axis in column:
            axis.set(xlabel=key)
            scale_axis(axis, values)
            simplify(axis)
    first = next(iter(lines[0].runs.values()))[0]
    axes[0, 0].set_title(data_of_all(first.cfg, key), loc="left", fontsize=10)
    axes[0, 0].legend(fontsize=8, frameon=False)
    # Without `Software` the same runs give the same bytes.
    page.savefig(path, dpi=100, metadata={"Software": None})


def data_of_all(cfg, key):
    """What all runs were trained on: "n classes" where it is the classes in which they differ."""
    section, _, name = key.partition(".")
    return data({**cfg, "data": {**cfg["data"], name: "n"}} if section == "data" else cfg)


def draw_line(axis, line, values, figures_of_value, colour):
    """Draw a line through the figures of each value, dashed where it is level."""
    figures = {value: figures_of_value(value) for value in values}
    figures = {value: found for value, found in figures.items() if found}
    if figures:
        style = {"linestyle": "--"} if line.is_level else {"marker": "o", "markersize": 4}
        band(axis, points_of(figures), label=line.label, color=colour, **style)


def scale_axis(axis, values):
    """Mark the values that were run, along an axis that is logarithmic where they lie far apart."""
    if values[0] > 0 and values[-1] >= WIDE * values[0]:
        axis.set_xscale("log")
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
