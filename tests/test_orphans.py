"""torchrun is killed (SIGKILL): its processes end as if they had been told to stop."""

import os
import signal
import subprocess
import sys
import time

import pytest

from engine import orphans
from processes import ROOT, free_port
from test_faults import there
from test_scripts import QUICK, TINY

pytestmark = pytest.mark.skipif(not hasattr(os, "getppid"), reason="no parents here")

# Each process writes its number, and rank 0 says that it trains, in the second step of an epoch.
SCRIPT = """
import os, runpy, sys
sys.path[:0] = [{root!r}, {tests!r}]
open("process" + os.environ["RANK"], "w").write(str(os.getpid()))
import test_faults
def say_so():
    with open("fifo" + os.environ["RANK"], "w") as fifo:
        fifo.write("it trains")
    import time
    time.sleep({pause})
test_faults.at(0, 1, say_so)
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def is_running(process):
    """Is it there, and not only waiting for init to take its exit code?"""
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
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)),
        *("--master_port", str(free_port()), "job.py", "--cfg", QUICK, *TINY),
        *("knn.every=0", "optim.epochs=1000", "name=a"),
    ]
    with open(tmp_path / "said", "w") as said:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        torchrun = subprocess.Popen(
            command, cwd=tmp_path, stdout=said, stderr=said, env=environment
        )
    for rank in range(processes):
        there(tmp_path / f"fifo{rank}")
    torchrun.send_signal(signal.SIGKILL)
    torchrun.wait()
    numbers = [(tmp_path / f"process{rank}").read_text() for rank in range(processes)]
    ended = wait_until(lambda: not any(map(is_running, numbers)))
    words = (tmp_path / "said").read_text()
    for number in filter(is_running, numbers):
        os.kill(int(number), signal.SIGKILL)
    assert ended, words
    assert "told to stop: runs/a/last.pt holds the state after step" in words, words
    assert "Traceback" not in words, words


def test_it_is_told_when_it_has_another_parent(monkeypatch):
    parents, told = iter([7, 7, 1]), []
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda *given: told.append(given))
    monkeypatch.setattr(orphans.time, "sleep", lambda seconds: None)
    orphans.watch(42, 7)
    assert told == [(42, signal.SIGTERM)]
    assert next(parents, "all asked") == "all asked"


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_only_what_torchrun_started_is_watched(by_torchrun, monkeypatch):
    started = []
    monkeypatch.setattr(orphans.threading.Thread, "start", lambda self: started.append(self.name))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    orphans.end_with_torchrun()
    assert started == ["torchrun's end"] * by_torchrun
