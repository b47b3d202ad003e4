"""Train on: a run goes on for more epochs than it was begun with.

It ends with the bits of a run that had so many epochs from its beginning, or it is refused: no
schedule may silently become another one because training becomes longer.
"""

import inspect
import shlex
import sys

from engine import checkpoint, config
from losses.mochi import default_warmup


def goes_on_longer(path, old, new):
    """Whether a run goes on from a checkpoint of it that was to end earlier.

    Args:
        path: of the checkpoint.
        old: its settings.
        new: those of the run.

    Returns:
        False where optim.epochs was not raised, or where something else differs, too: the
        checkpoint is of another run then.

    Raises:
        SystemExit: says why the run cannot be trained on, and what to do instead.
    """
    epochs, more = old["optim"]["epochs"], new["optim"]["epochs"]
    ignored = (*checkpoint.MAY_CHANGE, "optim.epochs", "loss")
    if more <= epochs or config.difference(old, new, ignored):
        return False
    old_losses, losses = config.loss_settings(old["loss"]), config.loss_settings(new["loss"])
    if len(old_losses) != len(losses):
        return False
    changed = None  # the first method whose schedule would become another one
    for old_loss, loss in zip(old_losses, losses):
        was, becomes = in_epochs(old_loss, epochs), in_epochs(loss, more)
        if was != becomes and old_loss != loss:
            return False
        if was != becomes and changed is None:
            changed = was, becomes

    if new["optim"]["schedule"] == "cosine":
        raise SystemExit(
            f"{path} cannot be trained on from optim.epochs {epochs} to {more}: its learning rate "
            f"follows a cosine that ends at epoch {epochs}; begin another run from it: "
            f"{line_of_another_run(path, new['name'])}"
        )
    if changed:
        refuse_other_schedule(path, new, *changed)
    return True


def in_epochs(loss, epochs):
    """The settings of a method, with what follows the length of training written out.

    Args:
        loss: the settings.
        epochs: the length of training.

    Returns:
        the settings, where a number of epochs that is a share of training is that number, and what
        runs over the whole of training says so in words.
    """
    over_all = f"spread over {epochs} epochs"
    name, written_out = loss["name"], {}
    if name == "ring" and loss.get("anneal_epochs") is None:
        written_out["anneal_epochs"] = epochs / 3
    elif name == "mochi" and loss.get("warmup_epochs") is None:
        written_out["warmup_epochs"] = float(default_warmup(epochs))
    elif name == "jcl" and loss.get("ramp"):
        written_out["ramp"] = over_all
    elif name == "ifnd" and len(set(loss.get("acceptance", []))) > 1:
        written_out["acceptance"] = over_all
    elif name not in ("ring", "mochi", "jcl", "ifnd"):
        # A method of the reader's own may make of the length what it likes.
        parameters = inspect.signature(config.method_class(loss, "loss")).parameters
        if "epochs" in parameters:
            written_out["epochs"] = over_all
    return loss | written_out


def refuse_other_schedule(path, settings, was, becomes):
    """End the program, for a method's schedule follows the length of training.

    Args:
        path: of the checkpoint.
        settings: of the run.
        was: the method's settings as in_epochs gave them.
        becomes: those with more epochs.
    """
    key = next(key for key in was if was[key] != becomes[key])
    section = f"loss.{was['name']}" if isinstance(settings["loss"], list) else "loss"
    if isinstance(was[key], str):  # no setting can keep it
        way_out = f"begin another run from it: {line_of_another_run(path, settings['name'])}"
    else:
        way_out = f"add {section}.{key}={was[key]} to keep it as it was"
    raise SystemExit(
        f"{path} cannot be trained on as it stands: {section}.{key} follows optim.epochs, was "
        f"{was[key]} and would be {becomes[key]}; {way_out}"
    )


def line_of_another_run(path, name):
    """The command line of this process, for a run that begins from a checkpoint."""
    words = [word for word in sys.argv if not word.startswith("name=")]
    return shlex.join(["python", *words, "--weights", path, f"name={name}_on"])
