"""The runs behind RESULTS.md: all of CIFAR-10, and small studies of where each method helps.

    python benchmarks/studies.py --list               how far each run is
    python benchmarks/studies.py full --seeds 0 1     what is missing of one study
    python benchmarks/studies.py full/moco_ring       one of its runs alone
    python benchmarks/studies.py --jobs 12            more at a time, as on a GPU
    python benchmarks/studies.py --tables             make tables and pictures of RESULTS.md

benchmarks/studies.yaml lists them. A run is pre-trained and probed in runs/, each job with one
thread. Then its settings and logs are copied to results/<study>/, and what is there is not run
again. Stopped or killed, the same line goes on.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from typing import NamedTuple

import yaml

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from engine import config, signals

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PLAN = os.path.join(ROOT, "benchmarks", "studies.yaml")
RESULTS = "results"
PICTURES = "docs/studies"
PAGE = "RESULTS.md"
FIRST_PAGE = "README.md"
KEPT = "config.yaml", "log.jsonl", "linear.jsonl"


class StudyRun(NamedTuple):
    """One run of a study."""

    study: str
    label: str  # its name within the study, without its seed
    seed: int
    cfg: str
    settings: list  # of this run, as on a command line

    @property
    def name(self):
        """The name of its folders in runs/ and in results/<study>/."""
        return f"{self.study}_{self.label}_{self.seed}"

    @property
    def folder(self):
        """Where its settings and logs are kept."""
        return os.path.join(RESULTS, self.study, self.name)

    def is_kept(self):
        """Is it trained, probed and copied?"""
        return os.path.exists(os.path.join(self.folder, KEPT[-1]))

    def arguments(self, root):
        """What follows a script on its command line. root: of the data sets; None: the default."""
        words = ["--cfg", self.cfg, f"name={self.name}", f"seed={self.seed}", *self.settings]
        return words + ([] if root is None else [f"data.root={root}"])


def main():
    """Do what the command line asks for."""
    args = command_line()
    plan = read_plan(args.studies)
    # Seed by seed, so that each study has all of its runs once before it has some of them twice.
    runs = [
        run
        for seed in args.seeds
        for study in plan
        for run in runs_of(study, plan, seed)
        if is_asked_for(run, args.studies)
    ]
    for run in runs:
        keep_if_finished(run)
    if args.tables:
        make_tables(plan)
    elif args.list:
        print_states(runs)
    else:
        try:
            run_missing(runs, args)
        finally:
            for run in runs:
                keep_if_finished(run)


def command_line():
    """The arguments of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY[/RUN]", help="all unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--datasets", metavar="FOLDER", help="data.root of all runs")
    parser.add_argument("--list", action="store_true", help="print how far each run is")
    parser.add_argument(
        "--tables", action="store_true", help="make the tables and pictures of RESULTS.md"
    )
    return parser.parse_args()


def read_plan(names):
    """{study: what PLAN says of it}; of all studies unless some are named, or runs of some."""
    with open(PLAN, encoding="utf-8") as f:
        plan = yaml.safe_load(f)
    for name in names:
        study, _, label = name.partition("/")
        refuse_unknown(study, plan, "study")
        if label:
            refuse_unknown(label, plan[study]["runs"], f"run of {study}")
    studies = dict.fromkeys(name.partition("/")[0] for name in names or plan)
    return {study: plan[study] for study in studies}


def refuse_unknown(name, known, what):
    """End the program where there is no study or run of a name."""
    if name not in known:
        guess = config.did_you_mean(name, known)
        raise SystemExit(f"there is no {what} {name}{guess}; there are {', '.join(known)}")


def is_asked_for(run, names):
    """Do the words of the command line name a run, or its study? If there are none, they do."""
    return not names or run.study in names or f"{run.study}/{run.label}" in names


def runs_of(study, plan, seed):
    """The runs of a study with one seed."""
    common = shlex.split(plan[study].get("settings") or "")
    return [
        StudyRun(study, label, seed, plan[study]["cfg"], common + shlex.split(settings or ""))
        for label, settings in plan[study]["runs"].items()
    ]


def keep_if_finished(run):
    """Copy the settings and logs of a run that was probed; its data lie in `datasets` there."""
    source = os.path.join("runs", run.name)
    if run.is_kept() or not os.path.exists(os.path.join(source, KEPT[-1])):
        return
    os.makedirs(run.folder, exist_ok=True)
    for file in KEPT:  # the last one says that the run is kept, so that it comes last
        with open(os.path.join(source, file), encoding="utf-8") as f:
            text = without_place(f.read())
        with open(os.path.join(run.folder, file), "w", encoding="utf-8") as f:
            f.write(text)


def without_place(text):
    """A file of a run, with `datasets` for the folder where its machine has the data sets."""
    text = re.sub(r"(\bdata: \{.*?\broot: )[^,}]+", r"\1datasets", text)  # config.yaml
    return re.sub(r'("root": )"[^"]*"', r'\1"datasets"', text)  # linear.jsonl


def print_states(runs):
    """Print how far each run is, and the command of what is missing."""
    for run in runs:
        state = "done" if run.is_kept() else "missing"
        print(f"{state:8}{shlex.join(['train_pretrain.py', *run.arguments(None)])}")


def run_missing(runs, args):
    """Pre-train and probe what is not kept yet, so many at a time."""
    from training.jobs import Job, run_jobs

    jobs = []
    for run in runs:
        if not run.is_kept():
            words = run.arguments(args.datasets)
            log = os.path.join("runs", run.name, "output.log")
            pretrain = Job(f"{run.name}, training", ["python", "train_pretrain.py", *words], log)
            probe = Job(f"{run.name}, probe", ["python", "train_linear.py", *words], log)
            probe.after = pretrain
            # A probe goes before the next training, so that each run is kept as soon as may be.
            jobs += [pretrain, probe]
    # Jobs side by side share a GPU where there is one, and the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    run_jobs(jobs, [first_gpu()] * args.jobs)
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        print(f"{job.title} failed: {job.reason}")
    if failed:
        raise SystemExit(1)


def first_gpu():
    """The first GPU that this program may use, as CUDA_VISIBLE_DEVICES names it; "" for none."""
    import torch

    if not torch.cuda.is_available():
        return ""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def make_tables(plan):
    """Put the table of each study that has runs into RESULTS.md, and draw its picture."""
    os.makedirs(PICTURES, exist_ok=True)
    for study, description in plan.items():
        if os.path.isdir(os.path.join(RESULTS, study)):
            put_into_page(PAGE, study, table_of(study, description))
            if "titles" in description:
                put_into_page(FIRST_PAGE, study, short_table(study, description["titles"]))


def put_into_page(path, study, table):
    """Replace the table of a study in a Markdown file."""
    with open(path, encoding="utf-8") as f:
        page = put_between_marks(f.read(), study, table)
    with open(path, "w", encoding="utf-8") as f:
        f.write(page)


def table_of(study, description):
    """Let report.py draw a study's picture. -> the table that belongs to it, in Markdown."""
    picture = os.path.join(PICTURES, study)
    folders = [os.path.join(RESULTS, study), *shared_folders(description)]
    command = [sys.executable, "report.py", *folders]
    if "against" in description:
        command += ["--against", description["against"], f"{picture}.png"]
    else:
        command += ["--png", f"{picture}.png", "--own", f"{picture}_own.png"]
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "tables.md")
        subprocess.run([*command, "--markdown", file], check=True, stdout=subprocess.DEVNULL)
        with open(file, encoding="utf-8") as f:
            return table_in(f.read(), description)


def table_in(markdown, description):
    """A study's own table of all that report.py writes, without its title."""
    key = description.get("against")
    title = f"### Against {key}\n" if key else "### Other runs\n"
    after = markdown[markdown.index(title) + len(title) :]
    return after.split("\n###")[0].strip()


def short_table(study, titles):
    """A row for each title {label: title} that has runs: its accuracies and gains, in Markdown."""
    from reporting.runs import read_runs
    from reporting.tables import other_runs
    from reporting.words import markdown_row

    runs, _ = read_runs([os.path.join(RESULTS, study)], [])
    rows = {}
    for names, *_, knn, knn_gain, _, linear, linear_gain, seeds, _ in other_runs(runs).rows:
        label = re.match(rf"{study}_(\w+)_\d+", names)[1]
        words = [linear, linear_gain, knn, knn_gain, seeds]
        rows[label] = [re.sub(r" \[\d+\]", "", word) for word in words]  # without footnotes
    head = ["", "linear top-1", "above InfoNCE", "kNN top-1", "above InfoNCE", "seeds"]
    lines = [markdown_row(head), "|---" * len(head) + "|"]
    lines += [markdown_row([titles[label], *rows[label]]) for label in titles if label in rows]
    return "\n".join(lines)


def put_between_marks(page, study, table):
    """Replace what stands between the comments that name a study."""
    first, last = f"<!-- {study} -->\n", f"<!-- end of {study} -->\n"
    if first not in page or last not in page:
        raise SystemExit(f"there are no {first.strip()} and {last.strip()} to put a table between")
    before, _, rest = page.partition(first)
    return f"{before}{first}{table}\n{last}{rest.partition(last)[2]}"


def shared_folders(description):
    """The folders in results/ of the runs of other studies that belong to a study."""
    folders = []
    for name in (description.get("also") or "").split():
        study, label = name.split("/")
        there = os.listdir(os.path.join(RESULTS, study))
        matching = [run for run in there if re.fullmatch(rf"{study}_{label}_\d+", run)]
        folders += [os.path.join(RESULTS, study, run) for run in sorted(matching)]
    return folders


if __name__ == "__main__":
    os.chdir(ROOT)
    signals.run(main)
