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
    check_draws(n_negatives, n_data, otherwise="all")


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
    require(
        0 <= inner < outer <= 1,
        f"inner {inner} and outer {outer} do not bound a ring; they are shares, "
        "0 <= inner < outer <= 1",
    )
    check_draws(n_negatives, n_data, otherwise="the whole ring")
    if anneal_epochs is None:
        return
    require(
        anneal_epochs >= 0,
        f"anneal_epochs is {anneal_epochs}; it must be at least 0, or null for a third of training",
    )
    if anneal_epochs > epochs:
        warn(
            f"anneal_epochs {anneal_epochs:g} is above epochs {epochs}: the ring does not get "
            f"down to outer {outer:g}; lower anneal_epochs, or make it null"
        )


def check_jcl(temperature: float, lam: float, n_keys: int | None) -> None:
    """Check the settings of losses/jcl.py."""
    require(
        temperature > 0 and lam >= 0,
        f"temperature {temperature} must be above 0 and lam {lam} at least 0",
    )
    require(
        n_keys != 1,
        "jcl wants several keys of each image, and this host with its model.n_views gives one, "
        "which has no variance; raise model.n_views",
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
    require(
        hardest >= 2 and mixed >= 0 and query_mixed >= 0,
        f"hardest {hardest} must be at least 2, mixed {mixed} and query_mixed {query_mixed} at "
        "least 0",
    )
    require(
        warmup_epochs >= 0,
        f"warmup_epochs is {warmup_epochs}; it must be at least 0, or null for a twentieth of "
        "training",
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


def check_oracle(labels: Tensor | None) -> None:
    """Check MoCHi's analysis with true labels."""
    require(labels is not None, "oracle wants the true labels, and this data set has none")
    warn(
        "ORACLE: mochi leaves out negatives by their true labels. This is an analysis, not "
        "self-supervised learning."
    )


def check_ifnd(
    epochs: int,
    n_data: int,
    temperature: float,
    clusters: Sequence[int],
    reassign_every: int,
    acceptance: Sequence[float],
) -> None:
    """Check the settings of losses/ifnd.py."""
    require(
        temperature > 0 and reassign_every >= 1,
        f"temperature {temperature} must be above 0 and reassign_every {reassign_every} at least 1",
    )
    require(
        clusters and 1 <= min(clusters) <= max(clusters) <= n_data,
        f"clusters {clusters} must be one number a level, each from 1 to the {n_data} images "
        "there are",
    )
    require(
        len(acceptance) == 2 and 0 <= acceptance[0] <= acceptance[1] <= 1,
        f"acceptance {acceptance} must be two shares, of the first epoch and, not below it, of "
        "the last",
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
    by_name = dict(zip(names, losses))
    for name, loss_fn in zip(names, losses):
        require(
            hasattr(loss_fn, "select") or hasattr(loss_fn, "objective"),
            f"{name} has neither select() nor objective(), so it cannot stand in a list of losses",
        )
        require(names.count(name) == 1, f"{name} stands in the list twice")
        require(
            name != "nce" or loss_fn.n_negatives is not None,
            "nce in a list changes nothing unless it draws n_negatives; leave it out",
        )
        require(
            loss_fn.t == losses[0].t,
            f"{names[0]} has temperature {losses[0].t} and {name} {loss_fn.t}; there is one "
            "partition function, so give both the same",
        )
    scales = {name: loss_fn.scale for name, loss_fn in by_name.items() if hasattr(loss_fn, "scale")}
    require(
        len(set(scales.values())) <= 1,
        f"the base_temperature of {' and '.join(scales)} differ; the list has one loss, so give "
        "them the same",
    )
    of_positives = [name for name in names if hasattr(by_name[name], "objective")]
    way_out = ", or set ifnd's mode to eliminate" if "ifnd" in of_positives else ""
    require(
        len(of_positives) <= 1,
        f"{' and '.join(of_positives)} both say what the positives are; keep one{way_out}",
    )
    check_order({name: by_name[name] for name in names if name not in of_positives})
    draws = [name for name in names if getattr(by_name[name], "n_negatives", None)]
    require(
        not draws or of_positives != ["ifnd"],
        "ifnd's attract cannot look for its false negatives among the draws of "
        f"{' and '.join(draws)}; set its n_negatives: null",
    )


def check_order(choosing: dict[str, nn.Module]) -> None:
    """Refuse losses that would choose from other things than candidates. choosing: in order."""
    names = list(choosing)
    for name, follower in zip(names, names[1:]):
        require(
            not getattr(choosing[name], "n_negatives", None),
            f"{follower} cannot follow {name}, whose draws are not the candidates to choose from; "
            f"put {name} last or set its n_negatives: null",
        )
        require(
            not hasattr(choosing[name], "synthesize"),
            f"{follower} cannot follow {name}, whose mixed points are not the candidates to choose "
            f"from; put {name} last",
        )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0."""
    require(temperature > 0, f"temperature is {temperature}; it must be above 0")


def check_draws(n_negatives: int | None, n_data: int | None, otherwise: str) -> None:
    """Check a number of draws. otherwise: what is used where it is null."""
    if n_negatives is None:
        return
    require(
        n_negatives >= 1,
        f"n_negatives is {n_negatives}; it must be above 0, or null for {otherwise}",
    )
    if n_data and n_negatives > n_data:
        warn(
            f"n_negatives {n_negatives} is larger than the data set of {n_data} images, so that "
            "each is drawn several times; lower it, or make it null for all"
        )


def require(is_met: bool, sentence: str) -> None:
    """Refuse settings with a sentence, unless a condition is met."""
    if not is_met:
        raise ValueError(sentence)


def warn(sentence: str) -> None:
    """Warn whoever builds a loss."""
    warnings.warn(sentence, stacklevel=4)
