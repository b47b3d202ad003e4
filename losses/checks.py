"""Settings without meaning are refused, and of those that do less than they say one is warned.

Each loss makes one call here. A refusal is a ValueError, whose sentence names the setting and the
way out. A warning is one sentence, too.
"""

import warnings
from collections.abc import Sequence

from torch import Tensor, nn


def check_nce(temperature: float, n_negatives: int | None, n_data: int | None) -> None:
    """Check the settings of losses/nce.py."""
    check_temperature(temperature)
    check_draws(n_negatives, n_data, without="all")


def check_ring(
    temperature: float,
    inner: float,
    outer: float,
    anneal_epochs: float | None,
    n_negatives: int | None,
    epochs: int,
    n_data: int | None,
) -> None:
    """Check the settings of losses/ring.py."""
    check_temperature(temperature)
    if not 0 <= inner < outer <= 1:
        raise ValueError(
            f"inner {inner} and outer {outer} do not bound a ring; they are shares, "
            "0 <= inner < outer <= 1"
        )
    check_draws(n_negatives, n_data, without="the whole ring")
    if anneal_epochs is None:
        return
    if anneal_epochs < 0:
        raise ValueError(
            f"anneal_epochs is {anneal_epochs}; it must be at least 0, or null for a third of "
            "training"
        )
    if anneal_epochs > epochs:
        warn(
            f"anneal_epochs {anneal_epochs:g} is above epochs {epochs}: the ring does not get "
            f"down to outer {outer:g}; lower anneal_epochs, or make it null"
        )


def check_jcl(temperature: float, lam: float, n_keys: int | None) -> None:
    """Check the settings of losses/jcl.py."""
    if temperature <= 0 or lam < 0:
        raise ValueError(f"temperature {temperature} must be above 0 and lam {lam} at least 0")
    if n_keys == 1:
        raise ValueError(
            "jcl wants several keys of each image, and this host with its model.n_views gives "
            "one, which has no variance; raise model.n_views"
        )


def check_mochi(
    temperature: float,
    hardest: int,
    mixed: int,
    query_mixed: int,
    warmup_epochs: float,
    epochs: int | None,
) -> None:
    """Check the settings of losses/mochi.py."""
    check_temperature(temperature)
    if hardest < 2 or mixed < 0 or query_mixed < 0:
        raise ValueError(
            f"hardest {hardest} must be at least 2, mixed {mixed} and query_mixed {query_mixed} "
            "at least 0"
        )
    if warmup_epochs < 0:
        raise ValueError(
            f"warmup_epochs is {warmup_epochs}; it must be at least 0, or null for a twentieth "
            "of training"
        )
    if epochs is None:
        return
    if warmup_epochs >= epochs:
        warn(
            f"warmup_epochs {warmup_epochs:g} of mochi leaves nothing of epochs {epochs}: no "
            "negatives are mixed, and it is nce; lower it"
        )
    elif warmup_epochs > 0 and mixed + query_mixed > 0:
        warn(
            f"mochi mixes from epoch {int(warmup_epochs) + 1} of {epochs} on; until then it is "
            "nce (loss.warmup_epochs)"
        )


def check_oracle(oracle: bool, labels: Tensor | None) -> None:
    """Check MoCHi's analysis with true labels."""
    if not oracle:
        return
    if labels is None:
        raise ValueError("oracle wants the true labels, and this data set has none")
    warn(
        "ORACLE: mochi leaves out negatives by their true labels. This is an analysis, not "
        "self-supervised learning."
    )


def check_ifnd(
    epochs: int,
    n_data: int,
    temperature: float,
    clusters: list[int],
    reassign_every: int,
    acceptance: list[float],
) -> None:
    """Check the settings of losses/ifnd.py."""
    if temperature <= 0 or reassign_every < 1:
        raise ValueError(
            f"temperature {temperature} must be above 0 and reassign_every {reassign_every} at "
            "least 1"
        )
    if not clusters or not 1 <= min(clusters) <= max(clusters) <= n_data:
        raise ValueError(
            f"clusters {clusters} must be one number a level, each from 1 to the {n_data} images "
            "there are"
        )
    if len(acceptance) != 2 or not 0 <= acceptance[0] <= acceptance[1] <= 1:
        raise ValueError(
            f"acceptance {acceptance} must be two shares, of the first epoch and, not below it, "
            "of the last"
        )
    if 1 in clusters:
        warn(
            f"clusters {clusters} has a level of 1, whose one cluster leaves no negatives once "
            "all labels are accepted; take 2 or more"
        )
    if reassign_every >= epochs:
        warn(
            f"reassign_every {reassign_every} leaves no clustering before the end, epochs "
            f"{epochs}: no false negative is found, and ifnd is nce; lower it"
        )


def check_list(names: Sequence[str], losses: Sequence[nn.Module]) -> None:
    """Check losses/together.py's list of losses. names: of their classes, in small letters."""
    for name, loss_fn in zip(names, losses):
        check_member(name, loss_fn)
        if names.count(name) > 1:
            raise ValueError(f"{name} stands in the list twice")
        if loss_fn.t != losses[0].t:
            raise ValueError(
                f"{names[0]} has temperature {losses[0].t} and {name} {loss_fn.t}; there is one "
                "partition function, so give both the same"
            )
    scales = {name: loss.scale for name, loss in zip(names, losses) if hasattr(loss, "scale")}
    if len(set(scales.values())) > 1:
        raise ValueError(
            f"the base_temperature of {' and '.join(scales)} differ; the list has one loss, so "
            "give them the same"
        )
    check_order(names, losses)


def check_member(name: str, loss_fn: nn.Module) -> None:
    """Refuse a loss that cannot stand in a list, or changes nothing there."""
    if not hasattr(loss_fn, "select") and not hasattr(loss_fn, "objective"):
        raise ValueError(
            f"{name} has neither select() nor objective(), so it cannot stand in a list of losses"
        )
    if name == "nce" and loss_fn.n_negatives is None:
        raise ValueError("nce in a list changes nothing unless it draws n_negatives; leave it out")


def check_order(names: Sequence[str], losses: Sequence[nn.Module]) -> None:
    """Refuse a second formula, and whatever would choose from other things than candidates."""
    of_positives = [name for name, loss in zip(names, losses) if hasattr(loss, "objective")]
    if len(of_positives) > 1:
        way_out = ", or set ifnd's mode to eliminate" if "ifnd" in of_positives else ""
        raise ValueError(
            f"{' and '.join(of_positives)} both say what the positives are; keep one{way_out}"
        )
    by_name = dict(zip(names, losses))
    choosing = [name for name in names if name not in of_positives]
    draws = [name for name in choosing if getattr(by_name[name], "n_negatives", None)]
    for name, follower in zip(choosing, choosing[1:]):
        if name in draws:
            raise ValueError(
                f"{follower} cannot follow {name}, whose draws are not the candidates to choose "
                f"from; put {name} last or set its n_negatives: null"
            )
        if hasattr(by_name[name], "synthesize"):
            raise ValueError(
                f"{follower} cannot follow {name}, whose mixed points are not the candidates to "
                f"choose from; put {name} last"
            )
    if draws and of_positives == ["ifnd"]:
        raise ValueError(
            "ifnd's attract cannot look for its false negatives among the draws of "
            f"{draws[0]}; set its n_negatives: null"
        )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")


def check_draws(n_negatives: int | None, n_data: int | None, without: str) -> None:
    """Check a number of draws. without: what is used where it is null."""
    if n_negatives is None:
        return
    if n_negatives < 1:
        raise ValueError(f"n_negatives is {n_negatives}; it must be above 0, or null for {without}")
    if n_data and n_negatives > n_data:
        warn(
            f"n_negatives {n_negatives} is larger than the data set of {n_data} images, so that "
            "each is drawn several times; lower it, or make it null for all"
        )


def warn(sentence: str) -> None:
    """Warn whoever builds a loss."""
    warnings.warn(sentence, stacklevel=4)
