"""The curves of report.py: kNN and loss over the epochs, and what methods log of themselves."""

import textwrap
from statistics import mean, stdev

from .comparing import by_seed, unfinished
from .figures import knn_settings
from .words import data, losses, method

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
        axis.legend(fontsize=7, edgecolor="none")  # a pale ground, where it lies on lines
        simplify(axis)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    page.savefig(path, dpi=100, metadata={"Software": None})


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
    return points_of({epoch: v for epoch, v in sorted(values.items()) if len(v) == len(runs)})


def points_of(values):
    """{x: figures} -> what `band` draws: four lists, x, mean, mean - std, mean + std."""
    middle = [mean(v) for v in values.values()]
    deviation = [stdev(v) if len(v) > 1 else 0 for v in values.values()]
    low = [m - s for m, s in zip(middle, deviation)]
    high = [m + s for m, s in zip(middle, deviation)]
    return list(values), middle, low, high
