"""Progress without a terminal: lines for long work, none for short; a bar on a terminal."""

import re
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from engine import distributed
from engine.progress import duration, progress
from training.build import clustering_progress

ROOT = Path(__file__).parents[2]


class Clock:
    """Time that goes on when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    return Clock()


def work(clock, seconds, pieces, **options):
    """Pieces of work that take so many seconds each."""
    items = []
    for item in progress(range(pieces), "work", clock=clock, **options):
        clock.now += seconds
        items.append(item)
    assert items == list(range(pieces))


def test_short_work_prints_nothing(clock, capsys):
    work(clock, 1, 50)
    assert capsys.readouterr().out == ""


def test_long_work_prints_a_line_soon_and_one_a_minute(clock, capsys):
    work(clock, 1, 180, unit="images")
    assert capsys.readouterr().out.splitlines() == [
        "work: 5 of 180 images (2 %), 1 a second, 3 min left",
        "work: 65 of 180 images (36 %), 1 a second, 2 min left",
        "work: 125 of 180 images (69 %), 1 a second, 55 s left",
    ]


def test_a_rate_is_a_number_that_can_be_read(clock, capsys):
    with progress(None, "work", total=300_000, unit="images", clock=clock) as bar:
        clock.now += 10
        bar.update(12_345)
    assert "images (4 %), 1234 a second, 4 min left" in capsys.readouterr().out
    work(clock, 100, 3, unit="jobs")
    assert "work: 1 of 3 jobs (33 %), 0.6 a minute, 3 min left" in capsys.readouterr().out


def test_pieces_that_take_long_print_a_line_each(clock, capsys):
    work(clock, 100, 3)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_what_was_done_before_does_not_count_for_the_rate(clock, capsys):
    for _ in progress(range(100), "work", total=1100, initial=1000, clock=clock):
        clock.now += 1
    assert capsys.readouterr().out.splitlines()[0] == (
        "work: 1005 of 1100 it (91 %), 1 a second, 95 s left"
    )


def test_of_unknown_length_there_is_a_line_a_minute(clock, capsys):
    for _ in progress(iter(range(70)), "work", clock=clock):
        clock.now += 1
    assert capsys.readouterr().out == "work: 60 it, 1 a second\n"


def test_the_caller_counts_and_adds_figures(clock, capsys):
    with progress(description="work", total=1000, clock=clock) as bar:
        bar.set_postfix(loss="6.321", refresh=False)
        clock.now += 10
        bar.update(100)
    assert capsys.readouterr().out == (
        "work: 100 of 1000 it (10 %), 10 a second, 90 s left, loss=6.321\n"
    )


def test_the_other_processes_print_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work(clock, 100, 3)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = progress(range(3), "work", unit="images")
    assert isinstance(bar, tqdm)
    assert list(bar) == [0, 1, 2]
    assert "work" in capsys.readouterr().err


def test_seconds_in_words():
    given = (0.4, 99.4, 100, 5940, 6000, 12000)
    assert [duration(s) for s in given] == [
        "0 s",
        "99 s",
        "2 min",
        "99 min",
        "1 h 40 min",
        "3 h 20 min",
    ]


def test_a_bar_may_appear_late(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress(range(3), "work", delay=60)) == [0, 1, 2]
    assert "work" not in capsys.readouterr().err


def test_another_process_shows_it_where_it_works_for_its_node(clock, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    work(clock, 100, 3, is_shown=True)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_clustering_prints_lines_too(clock, capsys):
    with clustering_progress(total=105, desc="10 clusters") as bar:
        bar.clock = clock
        clock.now = bar.began + 100
        bar.update()
    assert capsys.readouterr().out.startswith("10 clusters: 1 of 105 it (0 %)")


def test_all_long_work_shows_its_progress_this_way():
    """tqdm itself prints nothing where there is no terminal."""
    files = list(ROOT.glob("*.py"))
    for folder in ("benchmarks", "data", "engine", "evaluation", "losses", "models", "training"):
        files += (ROOT / folder).rglob("*.py")
    assert len(files) > 50
    importers = [path.name for path in files if re.search(r"(from|import) tqdm", path.read_text())]
    assert importers == ["progress.py"]
