"""docs/use-a-loss.md: its programs run where there is losses/ alone, and their losses fall."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from engine import config
from processes import ROOT

# One interpreter runs all programs, for it takes seconds to import torch.
RUN_ALL = """
import runpy, sys
for program in sys.argv[1:]:
    print("program", program, flush=True)
    runpy.run_path(program)
"""


def programs():
    """The page's blocks of Python, in order."""
    with open(os.path.join(ROOT, "docs", "use-a-loss.md"), encoding="utf-8") as page:
        return re.findall(r"^```python\n(.*?)^```", page.read(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each program prints, run in a folder that holds it and losses/ and nothing else."""
    folder = tmp_path_factory.mktemp("host")
    shutil.copytree(os.path.join(ROOT, "losses"), folder / "losses")
    names = [f"program{number}.py" for number in range(len(programs()))]
    for name, program in zip(names, programs()):
        (folder / name).write_text(program)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *names],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.split("program program")[1:]


@pytest.mark.parametrize("number", range(len(programs())))
def test_a_programs_losses_fall(printed, number):
    by_name = {}
    for name, loss in re.findall(r"^(.*)epoch \d+ loss (.+)$", printed[number], re.MULTILINE):
        by_name.setdefault(name, []).append(float(loss))
    assert by_name
    for losses in by_name.values():
        assert losses[-1] < 0.9 * losses[0]


def test_each_loss_stands_in_a_program():
    imported = re.findall(r"^from losses\.(\w+) import", "".join(programs()), re.MULTILINE)
    assert sorted(imported) == sorted(config.modules("losses"))
