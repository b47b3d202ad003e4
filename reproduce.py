"""Reproduce a paper's table: whatever is missing of its rows is trained and evaluated.

    python reproduce.py --list                     all tables and rows, and how far each is
    python reproduce.py "Ring, Table 1"            all rows of a table, one job after another
    python reproduce.py "Ring, Table 1" --rows "*CIFAR-10*" --seeds 0 1 2 data.root=PATH
    python reproduce.py "Ring, Table 1" --rows "*CIFAR-10*" --scale cpu    small, for a CPU
    python reproduce.py "JCL, ImageNet" --gpus 0,1,2,3              one job on each GPU
    python reproduce.py "JCL, ImageNet" --nproc_per_node 8          each job on 8 GPUs
    python reproduce.py "JCL, ImageNet" --slurm                     each job by slurm/train.sbatch

A row is a file in yaml/, and its jobs are the commands in the file's header: pre-training, then the
evaluation that `paper.figure` names. A job that was stopped goes on where it was when the same line
is given again, and what is done is not done again; so runs that were begun by hand are taken up.
Each job prints into its run's folder, runs/<name>/train_pretrain.log and the like. A job that fails
does not stop the others. At the end the table is printed, as by report.py. docs/reproduce.md has
more.
"""

import argparse
import fnmatch
import os
import re
import shlex

from engine import config, console, signals


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", help="the title of a table, as --list prints it")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings for every job, e.g. data.root=PATH",
    )
    parser.add_argument("--list", action="store_true", help="print how far each row is, and end")
    parser.add_argument(
        "--rows", metavar="PATTERN", default="*", help='which "row, column", e.g. "*CIFAR-10*"'
    )
    parser.add_argument(
        "--seeds", nargs="+", default=[], metavar="SEED", help="the file's own unless given"
    )
    parser.add_argument("--scale", metavar="NAME", help="a small version: a file in yaml/scales/")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and end")
    parser.add_argument("--gpus", metavar="0,1,...", help="one job at a time on each of these GPUs")
    parser.add_argument(
        "--nproc_per_node", type=int, metavar="N", help="processes, and GPUs, of each job"
    )
    parser.add_argument("--slurm", action="store_true", help="submit each job to SLURM")
    # key=value may stand before and after the options.
    parser.parse_args = parser.parse_intermixed_args
    return parser


def read_command_line():
    """The arguments, checked as far as they do not depend on the tables."""
    args = make_parser().parse_args()
    # What follows --seeds may be settings.
    args.overrides += [word for word in args.seeds if "=" in word]
    args.seeds = [word for word in args.seeds if "=" not in word]
    for seed in args.seeds:
        if not seed.isdecimal():
            raise SystemExit(f"--seeds {seed}: a seed is a whole number, at least 0")
    args.seeds = list(dict.fromkeys(map(int, args.seeds)))
    for word in args.overrides:
        key = word.partition("=")[0]
        if key in ("name", "seed") or key.startswith("paper"):
            raise SystemExit(f"{word}: reproduce.py sets {key} itself, for each run its own")
    if args.gpus and not re.fullmatch(r"\d+(,\d+)*", args.gpus):
        raise SystemExit(f"--gpus {args.gpus}: give the numbers of GPUs, e.g. --gpus 0,1,2,3")
    if args.gpus and (args.slurm or args.nproc_per_node):
        raise SystemExit("--gpus gives each job one GPU; leave it out with --slurm and processes")
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        raise SystemExit(f"--nproc_per_node is {args.nproc_per_node}; it must be at least 1")
    return args


if __name__ == "__main__":  # before torch is imported, which takes seconds
    console.accept_any_character()
    console.show_warnings_plainly()
    signals.listen()
    read_command_line()

from engine import checkpoint
from engine.scale import load_scale
from reporting.comparing import asked_otherwise, differences, of_no_concern, unfinished
from reporting.figures import EARLY, measured
from reporting.runs import read_cells, read_runs
from reporting.tables import make_tables, title_at
from reporting.words import as_text
from training.commands import (
    PRETRAIN,
    RUNS,
    Cell,
    Variant,
    make_job,
    run_name,
    settings_of,
    source_of,
)
from training.jobs import run_jobs, sbatch_command, submit_jobs


def main():
    """Find out what is missing, run it, and print the table."""
    args = read_command_line()
    cells = all_cells()
    chosen = choose(cells, args.table, args.rows)
    variants = make_variants(args)
    if args.list:
        return print_states(chosen, cells, variants)
    if args.table is None:
        raise SystemExit("name a table: python reproduce.py --list prints their titles")
    jobs = make_jobs(chosen, cells, variants)
    if args.dry_run:
        return print_commands(jobs, args.slurm)
    if args.slurm:
        submit_jobs(jobs)
        print("python reproduce.py --list, with the same options, says how far they are")
        return None
    if not jobs:
        print("nothing is missing")
    run_jobs(jobs, args.gpus.split(",") if args.gpus else ())
    print_table(args.table, args.scale)
    end_with_summary(jobs)
    return None


def make_variants(args):
    """A Variant for each seed; --list shows those that have a run, unless they are given."""
    seeds = args.seeds or [None]
    if args.list and not args.seeds and os.path.isdir(RUNS):
        named = (re.search(r"_seed(\d+)$", name) for name in os.listdir(RUNS))
        seeds += sorted({int(match[1]) for match in named if match})
    scale = load_scale(args.scale) if args.scale else None
    processes = args.nproc_per_node
    if processes is None and (args.gpus or args.scale):
        processes = 1
    return [Variant(seed, args.scale, scale, processes, args.overrides) for seed in seeds]


# -------------------------------------------------------------------------- tables and their rows


def all_cells():
    """All cells of all tables, in the order of the files."""
    left_out = []
    cells = read_cells("yaml", left_out)
    if left_out:
        print("\n".join(left_out))
    return [Cell(*cell, file, cfg) for cell, (file, cfg) in cells.items()]


def choose(cells, table, pattern):
    """The cells of a table (None: of all) whose "row, column" the pattern matches."""
    titles = list(dict.fromkeys(cell.table for cell in cells))
    if table is not None and table not in titles:
        guess = config.did_you_mean(table, titles)
        raise SystemExit(f"there is no table {table!r}{guess}; python reproduce.py --list has all")
    of_table = [cell for cell in cells if table in (None, cell.table)]
    chosen = [cell for cell in of_table if matches(cell.title, pattern)]
    if not chosen:
        guess = config.did_you_mean(pattern.strip("*"), [cell.title for cell in of_table])
        raise SystemExit(f"--rows {pattern!r} matches no row{guess}; --list has them")
    return chosen


def matches(text, pattern):
    """fnmatch, for which numbers are whole: "*CIFAR-10*" does not match "IR, CIFAR-100"."""
    text, pattern = (re.sub(r"\d+", "\\g<0>\0", words) for words in (text, pattern))
    return fnmatch.fnmatchcase(text, pattern)


# ------------------------------------------------------------------------------------------- jobs


def make_jobs(chosen, cells, variants):
    """What is missing of some cells, as a list of Job in the order in which they can be run.

    Args:
        chosen: the cells.
        cells: all that there are, for the weights of some are made by others.
        variants: a Variant for each seed; all cells are run for one before the next one begins.
    """
    jobs = {}  # {(name of the run, script): Job}
    for variant in variants:
        for cell in chosen:
            source = source_of(cell, cells)
            if not is_evaluated(cell, source, variant):
                add_jobs(jobs, cell, source, variant)
    return list(jobs.values())


def add_jobs(jobs, cell, source, variant):
    """Add the jobs of a cell that are missing. source: the cell that makes its weights."""
    weights = run_name(source, variant)
    if not is_pretrained(source, variant) and (weights, PRETRAIN) not in jobs:
        jobs[weights, PRETRAIN] = make_job(source, PRETRAIN, variant)
    if cell.script:
        job = make_job(cell, cell.script, variant, None if source is cell else weights)
        job.after = jobs.get((weights, PRETRAIN))
        jobs[run_name(cell, variant), cell.script] = job


# ---------------------------------------------------------------------------------- what is there


def find_run(cell, source, variant):
    """What was run for a cell, as reporting.runs.Run; None where nothing was.

    source: the cell that makes its weights.
    """
    names = run_name(cell, variant), run_name(source, variant)
    folders = [os.path.join(RUNS, name) for name in dict.fromkeys(names)]
    there = [path for path in folders if os.path.exists(os.path.join(path, "config.yaml"))]
    for run in read_runs(there, [])[0]:
        weights = os.path.dirname(run.weights or "")
        if run.folder == folders[0] and os.path.basename(weights) in ("", names[1]):
            return run
    return None


def other_settings(cell, run, variant):
    """Which settings of a pre-training are not those that a cell asks for, in words."""
    wanted = config.load(cell.file, settings_of(cell, variant))
    return differences(wanted, run.cfg, checkpoint.MAY_CHANGE)


def is_pretrained(cell, variant):
    """Are a cell's weights there, of the settings that it asks for?"""
    run = find_run(cell, cell, variant)
    if run is None or unfinished(run) or other_settings(cell, run, variant):
        return False
    return os.path.exists(os.path.join(run.folder, "backbone.pt"))


def is_evaluated(cell, source, variant):
    """Is a cell's figure there, of the settings and the protocol that it asks for?"""
    run = find_run(cell, source, variant)
    if run is None or unfinished(run):
        return False
    wanted = config.load(cell.file, settings_of(cell, variant))
    if differences(wanted, run.cfg, of_no_concern(cell.metric)):
        return False
    return any(
        EARLY not in protocol and not asked_otherwise(wanted, cell.metric, protocol, cell.file)
        for protocol in measured(run, cell.metric)
    )


def state_of(cell, source, variant):
    """How far a cell is, in words."""
    if is_evaluated(cell, source, variant):
        return "done"
    run = find_run(source, source, variant)
    if run is None:
        return "not begun"
    if other := other_settings(source, run, variant):
        return f"in {run.folder} are other settings: {other[0]}"
    if unfinished(run):
        return f"at epoch {run.done} of {run.cfg['optim']['epochs']}"
    return f"pre-trained, without {cell.metric}"


# ------------------------------------------------------------------------------- what is printed


def print_states(chosen, cells, variants):
    """Print how far each row of each table is."""
    width = max(len(cell.title) for cell in chosen)
    tables = {}
    for cell in chosen:
        tables.setdefault(cell.table, []).append(cell)
    for table, rows in tables.items():
        print(table)
        for cell in rows:
            source, states = source_of(cell, cells), []
            for variant in variants:
                seed = cell.cfg["seed"] if variant.seed is None else variant.seed
                states.append(f"seed {seed}: {state_of(cell, source, variant)}")
            print(f"  {cell.title:{width}}  {'; '.join(states)}")


def print_commands(jobs, by_slurm):
    """Print the command of each job that is missing."""
    for job in jobs:
        command = job.command
        if by_slurm:
            command = sbatch_command(job, "ID" if job.after else None)
        print(shlex.join(command))


def print_table(title, scale):
    """Print a table, as report.py does."""
    cells = read_cells("yaml", [])
    runs, strangers = read_runs([RUNS], []) if os.path.isdir(RUNS) else ([], [])
    tables, _ = make_tables(cells, runs, strangers, show_all=True)
    for table in tables:
        if table.title == title_at(title, scale):
            print(f"\n{as_text(table)}")


def end_with_summary(jobs):
    """Say which jobs failed, each with its command and its last lines; then end with status 1."""
    failed = [job for job in jobs if job.state == "failed"]
    left_out = [job for job in jobs if job.state == "left out"]
    for job in failed:
        print(f"\nfailed: {shlex.join(job.command)}\n{job.reason}\n(the whole of it: {job.log})")
    if left_out:
        names = "; ".join(job.title for job in left_out)
        print(f"\nleft out, for what they need has failed: {names}")
    if failed:
        print(f"\n{len(failed)} of {len(jobs)} jobs failed; the same line tries them again")
        raise SystemExit(1)


if __name__ == "__main__":
    signals.run(main)
