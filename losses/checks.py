"""Settings that make no sense are refused; of those that do less than they say one is warned.

Each check is one call in the `__init__` of its loss. It raises a ValueError whose sentence names
the setting and the way out.
"""

import warnings


def above_zero(**settings: float) -> None:
    """Refuse settings that are 0 or negative."""
    for name, value in settings.items():
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")


def check_draws(n_negatives: int | None, n_data: int | None, otherwise: str) -> None:
    """Check a number of random draws; otherwise: what null stands for."""
    if n_negatives is None:
        return
    if n_negatives < 1:
        raise ValueError(
            f"n_negatives is {n_negatives}; it must be above 0, or null for {otherwise}"
        )
    if n_data and n_negatives > n_data:
        warnings.warn(
            f"n_negatives {n_negatives} is larger than the data set of {n_data} images, so that "
            "each is drawn several times; lower it, or make it null for all",
            stacklevel=4,
        )


def check_nce(temperature: float, n_negatives: int | None, n_data: int | None) -> None:
    """Check the settings of losses/nce.py."""
    above_zero(temperature=temperature)
    check_draws(n_negatives, n_data, otherwise="all")
