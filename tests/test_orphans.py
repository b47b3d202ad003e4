"""torchrun is killed (SIGKILL): its processes end as if they had been told to stop."""

import os
import signal
import subprocess
import sys
import time

import pytest

from engine import orphans
from processes import ROOT, free_port
from test_faults import wait_until_a_run_waits
from test_scripts import QUICK, TINY

pytestmark = pytest.mark.skipif(not hasattr(os, "getppid"), reason="no parents here")

# Each process writes down its number, and tells in the second step of an epoch that it trains.
SCRIPT = """
import os
import runpy
import sys
import time

sys.path[:0] = [{root!r}, {tests!r}]
rank = os.environ["RANK"]
with open("process" + rank, "w") as f:
    f.write(str(os.getpid()))
import test_faults

def tell_that_it_trains():
    with open("fifo" + rank, "w") as fifo:
        fifo.write("it trains")
    time.sleep({pause})

test_faults.at(0, 1, tell_that_it_trains)
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def is_running(process):
    """Is the process there, and does it not only wait for init to take its exit code?"""
    try:
        with open(f"/proc/{process}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_the_processes_of_a_killed_torchrun_save_and_end(processes, tmp_path):
    script = os.path.join(ROOT, "train_pretrain.py")
    tests = os.path.dirname(os.path.abspath(__file__))
    text = SCRIPT.format(root=ROOT, tests=tests, script=script, pause=3)
    (tmp_path / "job.py").write_text(text)
    for rank in range(processes):
        os.mkfifo(tmp_path / f"fifo{rank}")
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc_per_node", str(processes), "--master_port", str(free_port())]
    command += ["job.py", "--cfg", QUICK, *TINY, "knn.every=0", "optim.epochs=1000", "name=a"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "output", "w") as output:
        torchrun = subprocess.Popen(
            command, cwd=tmp_path, stdout=output, stderr=output, env=environment
        )
    for rank in range(processes):
        wait_until_a_run_waits(tmp_path / f"fifo{rank}")
    torchrun.send_signal(signal.SIGKILL)
    torchrun.wait()
    numbers = [(tmp_path / f"process{rank}").read_text() for rank in range(processes)]
    ended = wait_until(lambda: not any(map(is_running, numbers)))
    printed = (tmp_path / "output").read_text()
    for number in filter(is_running, numbers):
        os.kill(int(number), signal.SIGKILL)
    assert ended, printed
    assert "told to stop: runs/a/last.pt holds the state after step" in printed, printed
    assert "Traceback" not in printed, printed


def test_it_is_told_when_it_has_another_parent(monkeypatch):
    parents, told = iter([7, 7, 1]), []
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda *given: told.append(given))
    monkeypatch.setattr(orphans.time, "sleep", lambda seconds: None)
    orphans.watch(42, 7)
    assert told == [(42, signal.SIGTERM)]
    assert next(parents, "all asked") == "all asked"


@pytest.mark.parametrize("launcher", ["torchrun", "reproduce.py", None])
def test_only_what_a_launcher_started_is_watched(launcher, monkeypatch):
    started = []
    monkeypatch.setattr(orphans.threading.Thread, "start", lambda self: started.append(self._args))
    monkeypatch.setattr(os, "getppid", lambda: 7)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv(orphans.STARTED_BY, raising=False)
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv(orphans.STARTED_BY, "5")  # of which torchrun is the child
    elif launcher:
        # It was killed before its job looked: the job has another parent, and is told at once.
        monkeypatch.setenv(orphans.STARTED_BY, "5")
    orphans.end_with_launcher()
    parents = {"torchrun": [7], "reproduce.py": [5], None: []}[launcher]
    assert [parent for _, parent in started] == parents
