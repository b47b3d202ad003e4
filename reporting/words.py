"""How report.py puts a run, a figure and a table into words."""

from statistics import mean, stdev

from data.datasets import describe_set
from engine import config
from engine.progress import duration

from .comparing import FREE, beginning, differing, unfinished


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


def signed(values):
    """Mean and deviation of differences, such as "+1.1 ± 0.4"."""
    return f"{mean(values):+.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def listed(labels):
    """Names of runs, such as "moco_0, _1, _2": what they share before a last "_" stands once."""
    shared, _, _ = labels[0].rpartition("_")
    others = [label.rpartition("_") for label in labels[1:]]
    if not shared or any(start != shared for start, *_ in others):
        return ", ".join(labels)
    return ", ".join([labels[0], *(f"_{end}" for *_, end in others)])


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
    return " + ".join(
        loss["name"] + average(loss) + oracle(loss) for loss in config.loss_settings(cfg["loss"])
    )


def average(loss):
    """What is said of a jcl that is no JCL but the mean of its keys' InfoNCE losses."""
    return " (average of InfoNCE)" if loss.get("average") else ""


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


def method(cfg):
    """A run's method: its row in a paper's table, or host and losses."""
    words = f"{cfg['model']['host']}, {losses(cfg)}"
    if "paper" in cfg:
        words = f"{cfg['paper']['row']}{oracle(*config.loss_settings(cfg['loss']))}"
    return words + began_from(cfg)
