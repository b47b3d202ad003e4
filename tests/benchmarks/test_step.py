"""benchmarks/step.py on few images: train_pretrain.py's loop runs in it, and its tables stand."""

import pytest

from processes import run

pytestmark = pytest.mark.slow


def run_smallest(folder, *arguments, **options):
    smallest = "--batch", 4, "--size", 16, "--queue", 16, "--rounds", 1
    return run(folder, "benchmarks/step.py", *smallest, *arguments, **options).stdout


def test_it_prints_its_tables_and_draws_the_profile(tmp_path):
    out = run_smallest(tmp_path, "--profile", "step.png")
    for row in ("fp32  networks alone", "fp32  ours, whole step", "      augmentation alone"):
        assert row in out
    assert "of our fp32 step: augmentation" in out and "Self CPU" in out
    # The run of the loop has no folder.
    assert [path.name for path in tmp_path.glob("*.p*")] == ["step.png"]


def test_two_processes_print_what_each_sends(tmp_path):
    out = run_smallest(tmp_path, processes=2)
    assert "no rows of lightly: they are for one process" in out
    assert "KiB to collectives, and" in out
