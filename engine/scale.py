"""A scale: what makes a small version of any row of a table, for a machine without a GPU.

A file in yaml/scales/ holds it, by section as in a row's file. A number is the most that a row may
have: a row with less keeps its own, and null, which means all of them, becomes the number. Anything
else replaces the row's. A row gets no key that it does not have.

The version of a row is written down as overrides of the command line, which can be copied.
"""

import contextlib
import copy
import os

from . import config

FOLDER = os.path.join("yaml", "scales")
# Of each section: what says how long it trains, and what is counted in the same unit.
LENGTHS = {
    "optim": ("epochs", ("milestones", "warmup_epochs")),
    "linear": ("epochs", ("milestones",)),
    "finetune": ("epochs", ("milestones",)),
    "detect": ("iterations", ("milestones", "warmup_iterations")),
}
# What losses count in epochs of pre-training.
EPOCHS_OF_LOSSES = "anneal_epochs", "warmup_epochs", "reassign_every"
# MoCHi's numbers of negatives: shares of the queue.
SHARES_OF_QUEUE = "hardest", "mixed", "query_mixed"
IMAGES_OF_CLUSTER = 10
# With one process so many parts of the batch stand for as many processes, as MoCo's rows have them.
BN_SPLITS = 8


def load_scale(name):
    """Read yaml/scales/<name>.yaml.

    Returns:
        {section: {key: the most, or what replaces it}}.

    Raises:
        SystemExit: one sentence, if there is no such file, or a key that no row can have.
    """
    path = os.path.join(FOLDER, f"{name}.yaml")
    scale = config.read_yaml(path)
    config.refuse_unknown_keys(scale, config.SECTIONS, f"{path}:")
    for section, given in scale.items():
        config.require_mapping(given, f"{path}: {section}")
        config.refuse_unknown_keys(given, keys_of_section(section), f"{path}: {section}.")
    return scale


def describe_scale(name, sections):
    """What a scale changes in the sections that rows have, in words."""
    with contextlib.suppress(SystemExit):
        words = [
            f"{section}.{key} {value}"
            for section, given in load_scale(name).items()
            if section in sections
            for key, value in given.items()
        ]
        return (
            f"the scale {name}: each row has at most {', '.join(words)}, and what depends on these "
            "follows in proportion"
        )
    return f"the scale {name}, whose file {FOLDER} does not have"


def keys_of_section(section):
    """All keys that a section can have, whichever host or method it chooses."""
    choice = config.CHOICE.get(section, "")
    names = config.modules(config.PACKAGE[section]) if choice else [""]
    homes = [home.format(**{choice: name}) for home in config.SECTIONS[section] for name in names]
    return dict.fromkeys(key for home in homes for key in config.keys_at(home))


def overrides(row, scale):
    """The overrides `section.key=value` that make a row's small version.

    Args:
        row: its resolved settings.
        scale: as load_scale returns it.
    """
    small = copy.deepcopy(row)
    for section, given in scale.items():
        for settings in config.loss_settings(small.get(section, {})):
            shared = settings.keys() & given.keys()
            settings |= {key: at_most(settings[key], given[key]) for key in shared}
    follow_lengths(row, small)
    follow_memory(row, small)
    if small["model"]["host"] == "moco" and "bn_splits" not in scale.get("model", {}):
        small["model"]["bn_splits"] = BN_SPLITS
    return [
        f"{where}.{key}={config.in_one_line(value)}"
        for where, old, new in zip_sections(row, small)
        for key, value in new.items()
        if value != old[key]
    ]


def at_most(value, most):
    """A setting at a scale that has `most` for it."""
    numbers = int, float
    if type(value) in numbers and type(most) in numbers:
        return min(value, most)
    return most


def follow_lengths(row, small):
    """Let what counts in epochs or iterations keep its share of the training."""
    for section, (length, counts) in LENGTHS.items():
        if section in row:
            share = small[section][length] / row[section][length]
            keep_share(small[section], counts, share)
    share = small["optim"]["epochs"] / row["optim"]["epochs"]
    for loss in config.loss_settings(small["loss"]):
        keep_share(loss, EPOCHS_OF_LOSSES, share)


def follow_memory(row, small):
    """Let losses ask for no more negatives and clusters than the small memory has."""
    images, queue = small["data"]["limit"], small["model"].get("queue_size")
    for loss in config.loss_settings(small["loss"]):
        if queue:
            keep_share(loss, SHARES_OF_QUEUE, queue / row["model"]["queue_size"], least=2)
        memory = queue or images
        if memory and loss.get("n_negatives"):
            loss["n_negatives"] = min(loss["n_negatives"], memory)
        if images and "clusters" in loss:
            share = min(1, images / IMAGES_OF_CLUSTER / max(loss["clusters"]))
            keep_share(loss, ("clusters",), share, least=2)


def keep_share(settings, keys, share, least=1):
    """Multiply whole numbers, and lists of them, by a share; 0 and null stay what they are."""
    for key in keys:
        value = settings.get(key)
        if isinstance(value, list):
            settings[key] = [max(least, round(item * share)) for item in value]
        elif value and share != 1:
            settings[key] = max(least, round(value * share))


def zip_sections(row, small):
    """(where, the row's settings, the small ones) of each section, and of each loss of a list."""
    for section, old in row.items():
        if isinstance(old, list):
            for old_loss, new_loss in zip(old, small[section]):
                yield f"{section}.{old_loss['name']}", old_loss, new_loss
        elif section in config.SECTIONS:
            yield section, old, small[section]
