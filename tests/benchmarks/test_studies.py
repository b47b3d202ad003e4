"""benchmarks/studies.py: what is run, what is kept, and where its tables stand."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import studies
from engine import config
from processes import ROOT

TINY = """
one:
  cfg: {root}/yaml/quickstart.yaml
  settings: data.limit=64 model.width=4 model.queue_size=16 optim.batch_size=16 optim.epochs=1
    linear.epochs=1
  against: loss.temperature
  runs:
    cold: loss.temperature=0.1
    warm: loss.temperature=0.2
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A plan of two runs, in a folder of their own."""
    (tmp_path / "plan.yaml").write_text(TINY.format(root=ROOT))
    monkeypatch.setattr(studies, "PLAN", str(tmp_path / "plan.yaml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["studies.py", *arguments])
    studies.main()


def test_the_list_goes_seed_by_seed_and_says_what_is_done(tiny, monkeypatch, capsys):
    done = tiny / "results" / "one" / "one_warm_0"
    done.mkdir(parents=True)
    (done / "linear.jsonl").write_text("{}")
    call(monkeypatch, "--list")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[4]) for line in lines] == [
        ("missing", "name=one_cold_0"),
        ("done", "name=one_warm_0"),
        ("missing", "name=one_cold_1"),
        ("missing", "name=one_warm_1"),
    ]
    assert lines[0][-1] == "loss.temperature=0.1"


def test_a_study_that_is_not_there_is_said(tiny, monkeypatch):
    with pytest.raises(SystemExit, match="there is no study on; did you mean one.*there are one"):
        call(monkeypatch, "on")


def test_runs_can_be_named_one_by_one(tiny, monkeypatch, capsys):
    call(monkeypatch, "one/warm", "--list", "--seeds", "0", "3")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[4] for line in lines] == ["name=one_warm_0", "name=one_warm_3"]
    with pytest.raises(SystemExit, match="no run of one worm; did you mean warm.*are cold, warm"):
        call(monkeypatch, "one/worm", "--list")


@pytest.mark.parametrize("visible,first", [(None, "0"), ("3", "3"), ("GPU-5a,1", "GPU-5a")])
def test_jobs_get_the_first_gpu_that_the_user_lets_them_see(visible, first, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert studies.first_gpu() == first
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert studies.first_gpu() == ""


def test_a_run_is_kept_once_it_is_probed_and_without_its_place(tiny, monkeypatch):
    (run, _) = studies.runs_of("one", studies.read_plan([]), 0)
    folder = tiny / "runs" / run.name
    folder.mkdir(parents=True)
    cfg = config.load(run.cfg, ["data.root=/home/somebody/images", *run.settings])
    (folder / "config.yaml").write_text(config.to_yaml(cfg))
    (folder / "log.jsonl").write_text("{}\n")
    studies.keep_if_finished(run)
    assert not run.is_kept()
    (folder / "linear.jsonl").write_text('{"data": "cifar10", "root": "/a/place", "seed": 0}\n')
    studies.keep_if_finished(run)
    assert run.is_kept()
    with open(os.path.join(run.folder, "linear.jsonl")) as f:
        assert f.read() == '{"data": "cifar10", "root": "datasets", "seed": 0}\n'
    kept = config.load(os.path.join(run.folder, "config.yaml"))
    assert kept["data"]["root"] == "datasets"
    assert config.difference(cfg, kept, ["data.root"]) is None


def test_a_table_is_put_between_its_marks_and_nowhere_else():
    page = "a\n<!-- one -->\nold\n<!-- end of one -->\nb\n"
    page = studies.put_between_marks(page, "one", "new")
    assert page == "a\n<!-- one -->\nnew\n<!-- end of one -->\nb\n"
    with pytest.raises(SystemExit, match="there are no <!-- two -->"):
        studies.put_between_marks(page, "two", "new")


@pytest.mark.slow
def test_two_runs_side_by_side_then_nothing_is_left_and_a_table_is_made(tiny, monkeypatch):
    script = f"{ROOT}/benchmarks/studies.py"
    program = (
        f"import sys; sys.path.insert(0, {ROOT!r}); from benchmarks import studies; "
        f"studies.PLAN = {studies.PLAN!r}; sys.argv[0] = {script!r}; studies.main()"
    )
    for name in ("train_pretrain.py", "train_linear.py", "report.py", "yaml"):
        os.symlink(f"{ROOT}/{name}", tiny / name)
    (tiny / "RESULTS.md").write_text("<!-- one -->\n<!-- end of one -->\n")
    command = [sys.executable, "-c", program, "--seeds", "0"]
    subprocess.run(command, check=True)
    for name in ("one_cold_0", "one_warm_0"):
        assert sorted(os.listdir(tiny / "results" / "one" / name)) == sorted(studies.KEPT)
        log = (tiny / "results" / "one" / name / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in log] == [0, 1]
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "begun" not in again.stdout + again.stderr
    subprocess.run([*command, "--tables"], check=True)
    assert "| moco, nce | 0.1 |" in (tiny / "RESULTS.md").read_text()
    assert (tiny / "docs" / "studies" / "one.png").exists()
