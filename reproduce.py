"""Reproduce a paper's table: whatever is missing of its rows is trained and evaluated.

    python reproduce.py --list                     all tables and rows, and how far each is
    python reproduce.py "Ring, Table 1"            all rows of a table, one job after another
    python reproduce.py "Ring, Table 1" --rows "*CIFAR-10*" --seeds 0 1 2 data.root=PATH
    python reproduce.py "Ring, Table 1" --rows "*CIFAR-10*" --scale cpu    in minutes, on a CPU
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
from typing import NamedTuple

from engine import config, console, signals

if __name__ == "__main__":  # a signal may come while torch is imported
    console.accept_any_character()
    console.show_warnings_plainly()
    signals.listen()

import report
from engine import checkpoint
from engine.scale import load_scale, overrides
from training.jobs import Job, run_jobs, sbatch_command, submit_jobs

RUNS = "runs"
# Which script makes the figures of a file that report.py reads.
SCRIPTS = {
    "linear": "train_linear.py",
    "finetune": "train_finetune.py",
    "detect": "train_detect.py",
}
PRETRAIN = "train_pretrain.py"
# A header's row has shuffled BatchNorm over 8 processes, or 8 parts of the batch in their stead.
BN_SPLITS = 8


class Cell(NamedTuple):
    """A row's file, and where its figure stands."""

    table: str
    row: str
    column: str
    file: str
    cfg: dict  # the file's settings

    @property
    def title(self):
        """E.g. "IR + Ring, CIFAR-10"."""
        return f"{self.row}, {self.column}"

    @property
    def metric(self):
        """Which figure counts, as paper.figure."""
        return self.cfg["paper"].get("figure") or "linear top-1"


class Options(NamedTuple):
    """How all jobs are run."""

    scale: dict | None  # as load_scale returns it
    scale_name: str | None
    processes: int | None  # of each job; None: as the header has it
    overrides: list  # of the user


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


def main():
    """Find out what is missing, run it, and print the table."""
    args = read_command_line()
    cells = read_cells()
    scale = load_scale(args.scale) if args.scale else None
    options = Options(scale, args.scale, processes_of(args), args.overrides)
    if args.list:
        return print_states(choose(cells, args.table, args.rows), args.seeds, options)
    if args.table is None:
        raise SystemExit("name a table: python reproduce.py --list prints their titles")
    chosen = choose(cells, args.table, args.rows)
    jobs = make_jobs(chosen, cells, args.seeds, options)
    if args.dry_run:
        return print_commands(jobs, args.slurm)
    if args.slurm:
        submit_jobs(jobs)
        print("python reproduce.py --list, with the same options, says how far they are")
        return None
    if jobs:
        signals.say_when_stopped(
            lambda: "the jobs were told, too, and the same line goes on where they are"
        )
        run_jobs(jobs, args.gpus.split(",") if args.gpus else ())
    print_table(chosen[0].table, args.scale)
    end_with_summary(jobs)


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


def processes_of(args):
    """How many processes each job has; None: as many as the row's header has."""
    if args.gpus or args.scale:
        return args.nproc_per_node or 1
    return args.nproc_per_node


# -------------------------------------------------------------------------- tables and their rows


def read_cells():
    """All cells of all tables, in the order of the files."""
    left_out = []
    cells = report.read_cells("yaml", left_out)
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


def make_jobs(chosen, cells, seeds, options):
    """What is missing of some cells, as a list of Job in the order in which they can be run.

    A seed is finished for all rows before the next one begins.
    """
    files = {config.default_name(cell.file): cell for cell in cells}
    jobs = {}  # {what it makes: Job}
    for seed in seeds or [None]:
        for cell in chosen:
            add_jobs(jobs, cell, files, seed, options)
    return list(jobs.values())


def add_jobs(jobs, cell, files, seed, options):
    """Add the jobs of a cell that are missing. files: {name of a run: Cell that makes it}."""
    commands = header_commands(cell.file)
    weights = [source for command in commands if (source := weights_of(command))]
    source = cell
    if weights:
        source = files.get(weights[0])
        if source is None:
            raise SystemExit(f"{cell.file}: no file in yaml/ makes runs/{weights[0]}")
    if is_evaluated(cell, source, seed, options):
        return
    name = run_name(source, seed, options)
    if not is_pretrained(source, seed, options) and (name, PRETRAIN) not in jobs:
        command = command_of(source, PRETRAIN)
        jobs[name, PRETRAIN] = make_job(source, command, seed, options)
    script = SCRIPTS.get(cell.metric.split(" ")[0])
    if script:
        job = make_job(cell, command_of(cell, script), seed, options, name if weights else None)
        job.after = jobs.get((name, PRETRAIN))
        jobs[run_name(cell, seed, options), script] = job


def header_commands(file):
    """The commands in a file's header: lists of words."""
    with open(file, encoding="utf-8") as f:
        lines = [line.lstrip("# ").rstrip() for line in f if line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", "")
    found = re.findall(r"^(?:python|torchrun) .*train_\w+\.py .*$", text, re.MULTILINE)
    return [shlex.split(line) for line in found]


def command_of(cell, script):
    """The command of a script in a cell's header."""
    for command in header_commands(cell.file):
        if script in command:
            return command
    raise SystemExit(f"{cell.file}: its header has no command of {script}, which its row wants")


def weights_of(command):
    """The name of the run whose weights a command evaluates; None: those of its own."""
    if "--weights" not in command:
        return None
    return os.path.basename(os.path.dirname(command[command.index("--weights") + 1]))


def run_name(cell, seed, options):
    """The name of a cell's run: the file's own, with the scale and another seed than the file's."""
    name = config.default_name(cell.file)
    if options.scale_name:
        name += f"_{options.scale_name}"
    if seed not in (None, cell.cfg["seed"]):
        name += f"_seed{seed}"
    return name


def make_job(cell, command, seed, options, weights=None):
    """A header's command as a Job, with what the options change. weights: the name of a run."""
    at = next(i for i, word in enumerate(command) if word.endswith(".py"))
    launcher, (script, *words) = command[:at], command[at:]
    if options.processes is not None:
        launcher = ["python"]
        if options.processes > 1:
            launcher = ["torchrun", "--nproc_per_node", str(options.processes)]
    if weights:
        words[words.index("--weights") + 1] = os.path.join(RUNS, weights, "backbone.pt")
    name = run_name(cell, seed, options)
    settings = settings_of(cell, seed, options)
    config.load(cell.file, settings)  # a refusal comes before the first job
    words += settings
    log = os.path.join(RUNS, name, script.replace(".py", ".log"))
    what = "pre-training" if script == PRETRAIN else "evaluation"
    return Job(f"{name}, {what}", [*launcher, script, *words], log)


def settings_of(cell, seed, options):
    """The overrides of a cell's jobs."""
    name, words = run_name(cell, seed, options), []
    if name != cell.cfg["name"]:
        words.append(f"name={name}")
    if seed not in (None, cell.cfg["seed"]):
        words.append(f"seed={seed}")
    if options.scale_name:
        words.append(f"paper.scale={options.scale_name}")
        words += overrides(cell.cfg, options.scale)
    elif options.processes is not None:
        words += splits(cell, options.processes)
    return words + options.overrides


def splits(cell, processes):
    """MoCo's shuffled BatchNorm, as the headers want it: over processes, or parts of the batch."""
    old = cell.cfg["model"].get("bn_splits")
    new = 1 if processes > 1 else BN_SPLITS
    if cell.cfg["model"]["host"] != "moco" or old == new:
        return []
    return [f"model.bn_splits={new}"]


# ---------------------------------------------------------------------------------- what is there


def find_run(cell, source, seed, options):
    """What was run for a cell, as report.Run; None where nothing was.

    source: the cell whose weights it evaluates, perhaps itself.
    """
    folder = os.path.join(RUNS, run_name(cell, seed, options))
    folders = [folder, os.path.join(RUNS, run_name(source, seed, options))]
    folders = [path for path in folders if os.path.exists(os.path.join(path, "config.yaml"))]
    runs, _ = report.read_runs(dict.fromkeys(folders), [])
    return next((run for run in runs if run.folder == folder), None)


def is_pretrained(cell, seed, options):
    """Are a cell's weights there, of the settings that it asks for?"""
    run = find_run(cell, cell, seed, options)
    if run is None or report.unfinished(run):
        return False
    wanted = config.load(cell.file, settings_of(cell, seed, options))
    differs = config.difference(wanted, run.cfg, checkpoint.MAY_CHANGE)
    return not differs and os.path.exists(os.path.join(run.folder, "backbone.pt"))


def is_evaluated(cell, source, seed, options):
    """Is a cell's figure there, of the settings and the protocol that it asks for?"""
    run = find_run(cell, source, seed, options)
    if run is None or report.unfinished(run):
        return False
    wanted = config.load(cell.file, settings_of(cell, seed, options))
    if report.differences(wanted, run.cfg, report.of_no_concern(cell.metric)):
        return False
    return any(
        report.EARLY not in protocol
        and not report.asked_otherwise(wanted, cell.metric, protocol, cell.file)
        for protocol in report.measured(run, cell.metric)
    )


def state_of(cell, files, seed, options):
    """How far a cell is, in words."""
    weights = [name for command in header_commands(cell.file) if (name := weights_of(command))]
    source = files[weights[0]] if weights else cell
    if is_evaluated(cell, source, seed, options):
        return "done"
    run = find_run(source, source, seed, options)
    if run is None:
        return "not begun"
    if report.unfinished(run):
        return f"at epoch {run.done} of {run.cfg['optim']['epochs']}"
    return f"pre-trained, without {cell.metric}"


# ------------------------------------------------------------------------------- what is printed


def print_states(chosen, seeds, options):
    """Print how far each row of each table is."""
    files = {config.default_name(cell.file): cell for cell in read_cells()}
    width = max(len(cell.title) for cell in chosen)
    for table in dict.fromkeys(cell.table for cell in chosen):
        print(table)
        for cell in (cell for cell in chosen if cell.table == table):
            states = []
            for seed in seeds or [None]:
                state = state_of(cell, files, seed, options)
                number = cell.cfg["seed"] if seed is None else seed
                states.append(f"seed {number}: {state}")
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
    left_out = []
    cells = report.read_cells("yaml", left_out)
    runs, strangers = report.read_runs([RUNS] if os.path.isdir(RUNS) else [], left_out)
    tables, _ = report.make_tables(cells, runs, strangers, show_all=True)
    wanted = report.title_at(title, scale)
    print()
    for table in tables:
        if table.title == wanted:
            print(report.as_text(table))


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
