"""benchmarks/gpu.sh: the plan, with a program in python's place; and all of it on the CPU, tiny."""

import json
import os
import signal
import subprocess
import sys
import tarfile

import pytest

from processes import ROOT

BENCHMARKS = ["tests", "step", "losses", "input", "kmeans"]
RUNS = ["moco", "probe", "ring", "mochi", "ifnd", "jcl"]
ALL = BENCHMARKS + RUNS
# In python's place: losses.py fails until there is a file `mended`; the first training goes on
# until it is told to stop, as one that saves does.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
-c*torch*) echo "${GPU:-a GPU}" ;;
-c*pytest*) exit "${NO_PYTEST:-0}" ;;
*losses.py*) [ -e mended ] || { echo no room; exit 3; } ;;
*train_pretrain.py*)
    if [ ! -e stopped ]; then
        trap 'touch stopped; kill $!; exit 75' TERM
        sleep 600 & wait
    fi
    echo "epoch 200/200  loss 1.0  kNN 82.0 %" ;;
esac
"""


def environment(folder, **variables):
    path = os.path.dirname(sys.executable)
    kept = {name: value for name, value in os.environ.items() if name != "TEST_DEVICE"}
    return {**kept, "GPU_FOLDER": str(folder), "PATH": f"{path}:{os.environ['PATH']}", **variables}


@pytest.fixture
def plan(tmp_path):
    """plan(*pieces, **variables) runs gpu.sh with the stand-in. -> exit status, output."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(STAND_IN)
    (tmp_path / "bin" / "python3").chmod(0o755)

    def call(*pieces, **variables):
        variables = environment(tmp_path / "gpu", **variables)
        variables["PATH"] = f"{tmp_path / 'bin'}:{variables['PATH']}"
        command = ["bash", f"{ROOT}/benchmarks/gpu.sh", *pieces]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return call


def begun(output):
    """The pieces that were begun, in their order."""
    starts = [line for line in output.splitlines() if ": python3 " in line]
    return [line.removeprefix("== ").split(":")[0] for line in starts]


def test_what_cannot_be_done_is_said_in_a_sentence(plan):
    assert plan("sleep") == (2, f"gpu.sh has no piece sleep; it has {' '.join(ALL)}\n")
    status, output = plan(GPU="False")
    assert status == 1
    assert output == "there is no GPU; TINY=1 rehearses all of this on the CPU\n"
    status, output = plan("tests", "step", NO_PYTEST="1")
    assert status == 0
    assert "tests: pytest is not installed here, so they are not run" in output
    assert begun(output) == ["step"]


@pytest.mark.slow  # it waits for the time limit of a call
def test_the_plan_stops_goes_on_and_tells_what_failed(plan, tmp_path):
    status, output = plan("step", "losses", "moco", "ring", SECONDS_A_CALL="4")
    assert status == 1
    assert begun(output) == ["step", "losses", "moco"]
    assert "losses FAILED; the end of" in output
    assert "\n    no room\n" in output
    assert "== left, for the same line again: moco ring" in output
    status, output = plan("step", "losses", "moco", "ring")
    assert status == 1
    assert begun(output) == ["moco", "ring", "losses"]  # what failed keeps nobody waiting
    assert "s; epoch 200/200  loss 1.0  kNN 82.0 %" in output
    assert "left" not in output
    (tmp_path / "gpu" / "mended").touch()
    status, output = plan("step", "losses", "moco", "ring")
    assert status == 0
    assert begun(output) == ["losses"]
    with tarfile.open(tmp_path / "gpu" / "results.tar.gz") as archive:
        assert {"done.txt", "moco.log", "step.log"} <= set(archive.getnames())


@pytest.mark.slow
def test_all_of_it_on_the_cpu_with_a_stop_in_a_run(tmp_path):
    """The run is told to stop after its first epoch, and goes on to the end."""
    command = ["bash", f"{ROOT}/benchmarks/gpu.sh"]
    variables = environment(tmp_path, TINY="1", SECONDS_A_CALL="3000", OMP_NUM_THREADS="1")
    options = {"env": variables, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as program:
        for line in program.stdout:
            if line.startswith("epoch   1/3"):
                owner = (tmp_path / "runs" / "cifar10_moco_32px" / "lock").read_text()
                os.kill(int(owner.split()[1]), signal.SIGTERM)
    assert program.returncode == 75
    assert line == f"== left, for the same line again: {' '.join(RUNS)}\n"
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout
    assert begun(done.stdout) == RUNS
    assert "going on after" in (tmp_path / "moco.log").read_text()
    log = (tmp_path / "runs" / "cifar10_moco_32px" / "log.jsonl").read_text()
    assert [json.loads(line)["epoch"] for line in log.splitlines()] == [0, 1, 2, 3]
    lines = (tmp_path / "done.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ALL
    assert " passed" in lines[0]
    assert "top-1" in lines[ALL.index("probe")]
