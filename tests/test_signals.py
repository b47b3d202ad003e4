"""Told to stop at any moment: it ends with one sentence and 75, and the end is as if undisturbed.

FULL=1: every signal at every moment, where each moment has one signal otherwise.
"""

import functools
import itertools
import os
import signal
import sys
import time

import pytest

import test_faults
import training.build
from engine import checkpoint, signals
from evaluation.features import KNN
from losses.ifnd import IFND
from test_faults import assert_equal, at, images, run, send, two, undisturbed  # noqa: F401

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
SETTINGS = [
    "data.name=shapes",
    "data.limit=100",
    "model.host=moco",
    "loss.name=ifnd",
    "loss.clusters=[4]",
    "loss.reassign_every=1",
    "model.queue_size=24",
    "knn.every=1",
    "finetune.labels=0.3",
    "finetune.batch_size=10",
    "finetune.epochs=2",
    "linear.epochs=2",
    "linear.batch_size=20",
    "linear.features=augmented",
]


def call(owner, name, count, act):
    """Let act() happen at the count-th call of a function, before it."""
    plain, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(plain)
    def wrapper(*args, **kwargs):
        if next(calls) == count:
            act()
        return plain(*args, **kwargs)

    setattr(owner, name, wrapper)


# moment -> (where the signal comes, what the sentence tells)
MOMENTS = {
    "start-up": ((training.build, "load", 1), "nothing was saved yet"),
    "untrained kNN": ((KNN, "__call__", 1), "nothing was saved yet"),
    "first step": ((0, 0), "after step 1 of 8 of epoch 1"),
    "mid-epoch": ((1, 3), "after step 4 of 8 of epoch 2"),
    "kNN of epoch 2": ((KNN, "__call__", 3), "after epoch 2 of 3"),
    "clustering": ((IFND, "before_epoch", 2), "after epoch 1 of 3"),
    "save": ((checkpoint, "save", 2), "after epoch 2 of 3"),
    "kNN of the last epoch": ((KNN, "__call__", 4), "after epoch 3 of 3"),
}


def told_at(moment, number):
    """Before the program runs: let the signal come at that moment.

    A shell that runs tests in the background lets them ignore Ctrl-C; a user's does not.
    """
    signal.signal(number, signal.SIG_DFL)
    where, _ = MOMENTS[moment]
    act = functools.partial(send, number)
    if len(where) == 2:
        at(*where, act)
    else:
        call(*where, act)


def told_in_an_epoch():
    at(1, 2, functools.partial(send, signal.SIGTERM))


def cases():
    """(moment, signal): one signal a moment in turn, or with FULL all of them."""
    for i, moment in enumerate(MOMENTS):
        numbers = NUMBERS if "FULL" in os.environ else [NUMBERS[i % len(NUMBERS)]]
        for number in numbers:
            yield pytest.param(moment, number, id=f"{moment}, {number.name}")


def assert_one_sentence(said, words):
    """The last line, and the only one that speaks of stopping."""
    lines = [line for line in said.splitlines() if "told to stop" in line]
    assert lines == said.splitlines()[-1:], said
    assert words in lines[0], said
    assert "Traceback" not in said


@pytest.mark.parametrize(("moment", "number"), list(cases()))
def test_one_process_stops_and_goes_on(moment, number, undisturbed, images, tmp_path):  # noqa: F811
    whole, _ = undisturbed(*SETTINGS)
    fault, words = functools.partial(told_at, moment, number), MOMENTS[moment][1]
    said = run(tmp_path, "cut", images, *SETTINGS, fault=fault, code=signals.EXIT_CODE)
    assert_one_sentence(said, words)
    run(tmp_path, "cut", images, *SETTINGS)
    assert_equal(tmp_path, "cut", whole)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "number"), list(cases()))
def test_two_processes_stop_and_go_on(moment, number, undisturbed, images, tmp_path):  # noqa: F811
    """Both are told, as torchrun tells them. A step's end is looked at together, at the 21st."""
    whole, _ = undisturbed(*SETTINGS, processes=2)
    fault, words = functools.partial(told_at, moment, number), MOMENTS[moment][1]
    codes, said = two(tmp_path, "cut", images, *SETTINGS, faults=(fault, fault))
    # The second may see that the first has gone before its own signal comes.
    assert codes[0] == signals.EXIT_CODE and codes[1] in (signals.EXIT_CODE, 1), said
    assert_one_sentence(said, words if "step" not in words else "runs/cut/last.pt holds")
    codes, said = two(tmp_path, "cut", images, *SETTINGS)
    assert codes == [0, 0], said
    assert_equal(tmp_path, "cut", whole)


SCRIPTS = {
    "train_finetune.py": ("finetune/last.pt", "finetune.jsonl"),
    "train_linear.py": ("linear/last.pt", "linear.jsonl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("processes", [1, 2])
def test_other_scripts_stop_and_go_on(script, processes, images, tmp_path):  # noqa: F811
    """In the middle of their second epoch; what comes out is what an undisturbed one finds."""
    checkpoint, figures = SCRIPTS[script]
    run(tmp_path, "run", images, *SETTINGS)
    start = functools.partial(several, tmp_path, images, script, processes)
    codes, said = start(None)
    assert not any(codes), said
    whole = last_figures(tmp_path / "runs" / "run" / figures)
    codes, said = start(told_in_an_epoch)
    assert set(codes) == {signals.EXIT_CODE}, said
    assert_one_sentence(said, f"runs/run/{checkpoint} holds the state after step")
    codes, said = start(None, resumed=True)
    assert not any(codes) and "going on after step" in said, said
    assert last_figures(tmp_path / "runs" / "run" / figures) == whole


def several(folder, images, script, processes, fault, resumed=False):  # noqa: F811
    """Run a script by one process or two. Returns their exit codes, and what the first printed."""
    fresh = [] if resumed else ["--fresh"]
    given = {"script": script}
    if processes == 2:
        return two(folder, "run", images, *SETTINGS, *fresh, faults=(fault, fault), **given)
    process = test_faults.start(folder, "run", images, *SETTINGS, *fresh, fault=fault, **given)
    process.join()
    texts = [(folder / f"run.{kind}").read_text() for kind in ("out", "err")]
    return [process.exitcode], "".join(texts)


def last_figures(path):
    """The figures of the last line of a JSON-lines file, as text."""
    line = path.read_text().splitlines()[-1]
    return line[line.index('"figures"') :]


# ------------------------------------------------------------------------- a process that hangs


def hang(twice):
    """The main thread waits in C for ever, in a training step; then one signal comes, or two."""
    signals.PATIENCE = 0.3
    signals.listen()
    with signals.deferred(patience=1000 if twice else 0.3):
        send(signal.SIGTERM)
        if twice:
            while not signals.stop_requested():
                time.sleep(0.01)
            send(signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
        while True:
            time.sleep(60)


def child(folder, twice):
    os.chdir(folder)
    os.environ.pop("RANK", None)
    os.dup2(os.open("out", os.O_WRONLY | os.O_CREAT), 1)
    signals.say_when_stopped(lambda: "last.pt holds the state after epoch 3")
    hang(twice)


@pytest.mark.parametrize(
    ("twice", "words"),
    [(False, "s in which no step was finished: last.pt holds"), (True, "told to stop twice")],
    ids=["once", "twice"],
)
def test_a_hung_step_ends_all_the_same(twice, words, tmp_path):
    process = test_faults.SERVER.Process(target=child, args=(str(tmp_path), twice))
    process.start()
    process.join()
    assert process.exitcode == signals.EXIT_CODE
    said = (tmp_path / "out").read_text()
    assert words in said and said.count("\n") == 1


def test_what_the_parent_ignored_stays_ignored():
    """As nohup does with SIGHUP."""
    code = (
        "import os, signal; from engine import signals; signals.listen();"
        "os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    )
    command = f"trap '' HUP; exec {sys.executable} -c \"{code}\""
    process = test_faults.subprocess.run(
        ["sh", "-c", command], cwd=test_faults.ROOT, capture_output=True, text=True
    )
    assert process.stdout == "alive\n", process.stderr
