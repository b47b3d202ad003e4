"""What was run, beside what the papers report: tables as text and Markdown, and curves.

    python report.py                         all of runs/, and those of the papers' tables in which
                                             a run stands
    python report.py --all                   all of the papers' tables
    python report.py runs /data/runs runs/a  folders of runs, or single runs
    python report.py --markdown report.md --png curves.png
                                             the tables and the curves as files, too
    python report.py --own own.png           what the methods log of themselves: thresholds,
                                             hardness, false negatives
    python report.py runs --against loss.temperature t.png
                                             accuracy against a setting that the runs differ in
    python report.py --negatives runs/a      a picture instead: which candidates the method of a run
                                             takes and leaves out, in runs/a/negatives.png

The files in yaml/ lay out the tables: each with a `paper` is one cell, (table, row, column), with
the reported figure and that figure's source. A run is of the cell that its own config.yaml names,
and `paper.figure` says which of its figures counts: `linear top-1` unless set, `linear knn`,
`finetune top-1`, `detect box AP`, `svm mAP`, ... (<file> <figure>, of that file's last line of a
protocol), or `knn`, the last of log.jsonl.

Ours is the mean ± the sample standard deviation over n seeds. Runs are averaged only if they agree
in all settings but seed, name and place, in the epochs done and in the protocol. A run of other
settings than the file's, such as fewer epochs, never stands in the row: below it, as "other
settings", with what differs. A run at a scale (paper.scale, see engine/scale.py) stands in a table
of its own.
"""

import argparse
import os
from functools import partial

from engine import console


def command_line():
    """The arguments of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="FOLDER",
        default=["runs"],
        help="a folder of runs, or a run; runs unless given",
    )
    parser.add_argument(
        "--yaml", metavar="FOLDER", default="yaml", help="the files that lay out the tables"
    )
    parser.add_argument("--all", action="store_true", help="the papers' tables without a run, too")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there as well")
    parser.add_argument("--png", metavar="FILE", help="draw the curves there")
    parser.add_argument("--own", metavar="FILE", help="draw there what each method logs of itself")
    parser.add_argument(
        "--against",
        nargs=2,
        metavar=("KEY", "FILE"),
        help="draw there the accuracy against a setting that runs differ in, as loss.temperature",
    )
    parser.add_argument(
        "--negatives",
        nargs="+",
        metavar=("RUN", "FILE"),
        help="draw which candidates the method of a run takes, into RUN/negatives.png or FILE, "
        "and end",
    )
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    console.accept_any_character()
    command_line().parse_args()

from reporting.against import against_table, draw_against
from reporting.curves import draw, draw_own
from reporting.runs import read_cells, read_runs
from reporting.tables import make_tables
from reporting.words import as_markdown, as_text


def main():
    """Read, print the tables, write the files.

    The tables are printed whether or not the files can be written, which is asked first.
    """
    args = command_line().parse_args()
    if args.negatives:
        draw_negatives(*args.negatives)
        return
    refuse_missing_folders(args)
    key, against = args.against or (None, None)
    paths = {
        "--markdown": args.markdown,
        "--png": args.png,
        "--own": args.own,
        "--against": against,
    }
    problems = {
        option: problem
        for option, path in paths.items()
        if path and (problem := why_not_writable(option, path))
    }

    left_out = []  # sentences
    cells = read_cells(args.yaml, left_out)
    runs, strangers = read_runs(args.folders, left_out)
    tables, hint = make_tables(cells, runs, strangers, args.all)
    if key:
        table, problem = try_to_compare(runs, key)
        tables += [table] if table else []
        problems |= {"--against": problem} if problem else {}
    paragraphs = [as_text(table) for table in tables]
    paragraphs += ["\n".join(left_out)] if left_out else []
    paragraphs += [hint] if hint else []
    print("\n\n".join(paragraphs))

    markdown = "\n\n".join([as_markdown(table) for table in tables] + left_out) + "\n"
    writers = {
        "--markdown": (write_text, markdown),
        "--png": (draw, runs),
        "--own": (draw_own, runs),
        "--against": (partial(draw_against, key=key), runs),
    }
    for option, (write, content) in writers.items():
        if paths[option] and option not in problems:
            problem = try_to_write(option, paths[option], write, content)
            problems |= {option: problem} if problem else {}
    if problems:
        raise SystemExit("; ".join(problems.values()))


def try_to_compare(runs, key):
    """The table against a setting, or None and what is wrong with it, in a sentence."""
    try:
        return against_table(runs, key), None
    except SystemExit as refusal:
        return None, str(refusal.code)


def refuse_missing_folders(args):
    """End the program where there is nothing to read."""
    for folder in args.folders:
        if not os.path.isdir(folder):
            raise SystemExit(
                f"there is no folder {folder}; train first, e.g. python train_pretrain.py --cfg "
                "yaml/quickstart.yaml, or name a folder of runs"
            )
    if not os.path.isdir(args.yaml):
        raise SystemExit(
            f"there is no folder {args.yaml}; name the one whose files lay out the tables, "
            "--yaml FOLDER"
        )


def draw_negatives(folder, path=None, *others):
    """Draw what the method of a run does with its candidates."""
    from engine.distributed import init_distributed  # the tables need no device
    from training.pictures import FILE, picture_of_run

    if others:
        raise SystemExit(f"--negatives takes a run and one file, so {others[0]} is too much")
    path = os.path.join(folder, FILE) if path is None else path
    page = picture_of_run(folder, init_distributed())
    problem = why_not_writable("--negatives", path)
    if problem:
        raise SystemExit(problem)
    page.save(path, "PNG")
    print(path)


# ------------------------------------------------------------------------------ what is written


def why_not_writable(option, path):
    """Why a file cannot be written, in a sentence, or None. It is left as it is."""
    is_new = not os.path.exists(path)
    try:
        with open(path, "a"):
            pass
        if is_new:
            os.remove(path)
    except OSError as error:
        return cannot_be_written(option, path, error)
    return None


def try_to_write(option, path, write, content):
    """Call write(path, content). -> what went wrong, in a sentence, or None."""
    try:
        write(path, content)
    except SystemExit as refusal:
        return str(refusal.code)
    except OSError as error:
        return cannot_be_written(option, path, error)
    return None


def cannot_be_written(option, path, error):
    """The sentence on an OSError."""
    return f"{option} {path} cannot be written: {error.strerror or error}; name another file"


def write_text(path, text):
    """Write a text file."""
    with open(path, "w") as f:
        f.write(text)


if __name__ == "__main__":
    main()
