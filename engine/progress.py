"""How far long work is: a bar on a terminal, and elsewhere a line now and then."""

import sys
import time

from tqdm import tqdm

from . import distributed

FIRST_LOOK_SECONDS = 5  # when it can be said how long the work will take
SECONDS_BETWEEN_LINES = 60


def progress(
    iterable=None,
    description="",
    total=None,
    initial=0,
    unit="it",
    delay=0,
    is_shown=None,
    clock=time.monotonic,
):
    """Show the progress of work, on the first process alone unless told otherwise.

    On a terminal that is tqdm's bar, which goes when the work is done. Elsewhere (a file, a SLURM
    job) work that takes more than a minute gets a line soon after its beginning and one a minute;
    what ends sooner gets none.

    Args:
        iterable: gives an item for each piece of work; None where the caller calls `update`.
        description: what is done, e.g. "epoch 3/200".
        total: the number of pieces; left out: the iterable's length, if it has one.
        initial: how many of them were done before.
        unit: what a piece is, e.g. "images".
        delay: the seconds until the bar appears on a terminal.
        is_shown: whether this process shows it; left out: whether it is the first.
        clock: the time in seconds.

    Returns:
        An iterable of the same items, and a context manager, with `update(n)`, `write(line)` and
        `set_postfix(name=value)`, as tqdm's.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if is_shown is None:
        is_shown = distributed.is_main()
    if not is_shown:
        return Lines(iterable, description, total, initial, unit, clock, is_silent=True)
    if not sys.stderr.isatty():
        return Lines(iterable, description, total, initial, unit, clock)
    unit = unit if unit == "it" else f" {unit}"
    options = {"leave": False, "initial": initial, "unit": unit, "delay": delay}
    return tqdm(iterable, description, total, **options)


class Lines:
    """The progress of work in lines. The arguments are those of `progress`.

    is_silent: print nothing.
    """

    def __init__(self, iterable, description, total, initial, unit, clock, is_silent=False):
        self.iterable = iterable
        self.description = description
        self.total = total
        self.initial = initial
        self.done = initial
        self.unit = unit
        self.clock = clock
        self.is_silent = is_silent
        self.postfix = ""
        self.began = clock()
        self.next_look = self.began + FIRST_LOOK_SECONDS
        self.next_line = self.began + SECONDS_BETWEEN_LINES

    def __iter__(self):
        for item in self.iterable:
            yield item
            # The caller has done its work with the item.
            self.update()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, n=1):
        """Count n pieces as done, and print a line if it is time for one."""
        self.done += n
        now = self.clock()
        if self.is_silent or now < min(self.next_look, self.next_line):
            return
        is_first_look = now >= self.next_look
        self.next_look = float("inf")
        left = self.seconds_left(now)
        will_be_long = left is not None and now - self.began + left > SECONDS_BETWEEN_LINES
        if now >= self.next_line or is_first_look and will_be_long:
            print(self.line(now), flush=True)
            self.next_line = now + SECONDS_BETWEEN_LINES

    def write(self, line):
        """Print a line beside the progress, as tqdm's `write`, which keeps its bar below it."""
        if not self.is_silent:
            print(line, flush=True)

    def set_postfix(self, refresh=True, **values):
        """Set what stands at the end of a line, as name=value. refresh: tqdm's, of no meaning."""
        self.postfix = "".join(f", {name}={value}" for name, value in values.items())

    def seconds_left(self, now):
        """An estimate, by the mean rate so far; None where the total is not known."""
        done_here = self.done - self.initial
        if self.total is None or done_here <= 0:
            return None
        return (self.total - self.done) * (now - self.began) / done_here

    def line(self, now):
        """E.g. `epoch 3/200: 120 of 391 it (31 %), 2.1 a second, 2 min left, loss=6.321`."""
        rate = (self.done - self.initial) / max(now - self.began, 1e-9)
        line = f"{self.description}: {self.done} {self.unit}"
        if self.total:
            share = 100 * self.done // self.total
            line = f"{self.description}: {self.done} of {self.total} {self.unit} ({share} %)"
        line += f", {rate_in_words(rate)}"
        left = self.seconds_left(now)
        if left is not None:
            line += f", {duration(left)} left"
        return line + self.postfix


def rate_in_words(rate):
    """Pieces a second in words: 1234 a second, 2.1 a second, 4.5 a minute."""
    if rate < 0.1:
        return f"{60 * rate:.2g} a minute"
    return f"{rate:.3g} a second" if rate < 1000 else f"{rate:.0f} a second"


def duration(seconds):
    """Seconds in words: 45 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
