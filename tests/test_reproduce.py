"""reproduce.py: which commands it runs, in which order, and what it does when one of them fails.

The jobs are stand-ins for the scripts, which leave what these leave.
"""

import json
import os
import shlex
import shutil
import sys

import pytest
import torch

import reproduce
import yaml
from engine import config, scale, signals
from engine.log import lines
from engine.schedule import Schedule
from train_detect import Detect
from train_finetune import Finetune
from train_linear import Probe
from training import commands, jobs
from training.build import Builder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROW = {
    "data": {"name": "shapes", "augment": "shapes", "image_size": 32},
    "model": {"host": "ir", "backbone": "resnet10", "dim": 8},
    "loss": {"name": "nce"},
    "optim": {"epochs": 4, "batch_size": 8, "lr": 0.1},
    "linear": {"epochs": 2, "lr": 0.1},
}
# What both stand-ins begin with. A script fails where a file "fails" has the name of its run.
STAND_IN = f"""
import json, os, sys
sys.path.insert(0, {ROOT!r})
from engine import config

words = sys.argv[1:]
weights = words.pop(words.index("--weights") + 1) if "--weights" in words else None
cfg = config.load(words[1], [word for word in words if "=" in word])
folder = os.path.join("runs", cfg["name"])
with open("calls", "a") as f:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    f.write(f"{{os.path.basename(sys.argv[0])}} {{cfg['name']}} {{gpu}}\\n")
if os.path.exists("fails") and cfg["name"] in open("fails").read().split():
    sys.exit("the disk is full\\nask for room")
config.save_if_missing(cfg, folder)
"""
PRETRAIN = """
with open(f"{folder}/log.jsonl", "a") as f:
    for epoch in range(1, cfg["optim"]["epochs"] + 1):
        f.write(json.dumps({"epoch": epoch, "loss": 1.0, "seconds": 60, "hardware": "toy"}) + "\\n")
open(f"{folder}/backbone.pt", "w").close()
"""
LINEAR = """
weights = weights or f"{folder}/backbone.pt"
assert os.path.exists(weights)
line = {"weights": weights, "seed": cfg["seed"], "protocol": open("protocol").read()}
with open(f"{folder}/linear.jsonl", "a") as f:
    f.write(json.dumps(line | {"figures": {"top-1": 50.0 + cfg["seed"]}}) + "\\n")
"""


def write_row(name, row, command=None, **paper):
    """yaml/<name>.yaml, a row of table T."""
    command = command or "python train_pretrain.py --cfg {0}\n# python train_linear.py --cfg {0}"
    settings = ROW | {"paper": {"table": "T", "row": row, "column": "c", **paper}}
    with open(f"yaml/{name}.yaml", "w") as f:
        f.write("# " + command.format(f"yaml/{name}.yaml") + "\n")
        yaml.safe_dump(settings, f)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two rows, a third whose weights are the first one's, and the stand-ins."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("yaml/scales")
    write_row("a", "A")
    write_row("b", "B")
    transfer = "python train_linear.py --cfg {0} \\\n#   --weights runs/a/backbone.pt"
    write_row("c", "C", transfer)
    with open("yaml/scales/small.yaml", "w") as f:
        f.write("optim: {epochs: 2}\n")
    (tmp_path / "train_pretrain.py").write_text(STAND_IN + PRETRAIN)
    (tmp_path / "train_linear.py").write_text(STAND_IN + LINEAR)
    (tmp_path / "protocol").write_text(str(Probe(epochs=2, lr=0.1)))
    shutil.copytree(os.path.join(ROOT, "slurm"), "slurm")
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_LOOKS", 0.01)
    return tmp_path


@pytest.fixture
def out(capsys, monkeypatch):
    """out(*arguments) -> what reproduce.py prints, and its exit status or its sentence."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
        status = 0
        try:
            reproduce.main()
        except SystemExit as end:
            status = end.code
        return capsys.readouterr().out, status

    return run


def calls():
    """What was run so far: (script, run, GPU), in the order of the starts."""
    with open("calls") as f:
        lines = f.read().splitlines()
    os.remove("calls")
    return [tuple(line.split()) for line in lines]


# --------------------------------------------------------------------------- the tables in yaml/


@pytest.fixture(scope="module")
def cells():
    before = os.getcwd()
    os.chdir(ROOT)
    yield reproduce.all_cells()
    os.chdir(before)


def all_jobs(cells, variant):
    """The jobs of all tables, none of which has a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "find_run", lambda *given: None)
        return reproduce.make_jobs(cells, cells, [variant])


def test_without_options_the_commands_are_those_of_the_headers(cells):
    made = all_jobs(cells, commands.Variant())
    headers = [words for cell in cells for words in commands.header_commands(cell.file)]
    assert len(made) > 200
    assert all(job.command in headers for job in made)
    for job in made:
        if "--weights" in job.command:
            weights = job.command[job.command.index("--weights") + 1]
            assert job.after.log.startswith(os.path.dirname(weights) + os.sep)


def test_a_scale_makes_commands_of_all_tables_that_are_accepted(cells, monkeypatch):
    load, loaded = config.load, {}

    def load_and_note(path, overrides=()):
        loaded[path] = load(path, overrides)
        return loaded[path]

    monkeypatch.setattr(config, "load", load_and_note)
    made = all_jobs(cells, commands.Variant(1, "cpu", scale.load_scale("cpu"), 1))
    for job in made:
        program, script, _, file, *_ = job.command
        cfg = loaded[file]
        assert program == "python"
        assert (cfg["seed"], cfg["paper"]["scale"]) == (1, "cpu")
        assert cfg["name"] == f"{config.default_name(file)}_cpu_seed1"
        assert cfg["optim"]["epochs"] == 40
        config.build(Schedule, cfg["optim"], file)
        for kind, section in ((Probe, "linear"), (Finetune, "finetune"), (Detect, "detect")):
            if section in cfg:
                config.build(kind, cfg[section], file)


def test_what_depends_on_the_epochs_and_the_memory_keeps_its_share():
    given = scale.load_scale("cpu")
    row = config.load(os.path.join(ROOT, "yaml", "mochi", "imagenet100_1024_1024_128.yaml"))
    words = scale.overrides(row, given)
    assert {"loss.hardest=128", "loss.mixed=128", "loss.query_mixed=16"} <= set(words)
    row = config.load(os.path.join(ROOT, "yaml", "cifar10_moco_ring.yaml"))
    words = scale.overrides(row, given)
    assert {"loss.anneal_epochs=13", "optim.milestones=[27, 33]", "data.limit=5000"} <= set(words)
    row = config.load(os.path.join(ROOT, "yaml", "ifnd", "imagenet_ifnd.yaml"))
    assert "loss.clusters=[50, 150, 500]" in scale.overrides(row, given)
    row = config.load(os.path.join(ROOT, "yaml", "cifar10_ir.yaml"))
    small = scale.overrides(row, given | {"data": {"limit": 100}})
    assert "loss.n_negatives=100" in small
    assert not any(word.startswith(("model.momentum", "model.queue")) for word in small)


class Images:
    """As many images as the scale leaves, of which only what the checks ask for is there."""

    labels, mean, std = torch.zeros(5000, dtype=torch.long), (0.5,) * 3, (0.25,) * 3

    def __len__(self):
        return 5000


def test_hosts_and_losses_of_all_tables_can_be_built_at_the_scale(cells, recwarn):
    given, device = scale.load_scale("cpu"), torch.device("cpu")
    first_of_table = {(cell.table, str(cell.cfg["loss"])): cell for cell in cells}
    for cell in first_of_table.values():
        cfg = config.load(cell.file, scale.overrides(cell.cfg, given))
        build = Builder(cfg, cell.file)
        _, host = build.host(Images(), device)
        build.loss(Images(), host, device)
    assert not [str(w.message) for w in recwarn if "lower" in str(w.message)]


def test_several_processes_have_the_batch_norm_that_the_headers_want(cells):
    files = {cell.file: cell for cell in cells}
    moco, jcl = files["yaml/cifar10_moco.yaml"], files["yaml/jcl/imagenet_jcl.yaml"]
    job = commands.make_job(moco, commands.PRETRAIN, commands.Variant(processes=8))
    assert shlex.join(job.command) == (
        "torchrun --nproc_per_node 8 train_pretrain.py --cfg yaml/cifar10_moco.yaml "
        "model.bn_splits=1"
    )
    one = commands.Variant(processes=1)
    assert commands.settings_of(jcl, one) == ["model.bn_splits=8"]
    assert commands.settings_of(moco, one) == []
    small = commands.Variant(scale_name="cpu", scale=scale.load_scale("cpu"), processes=1)
    assert "model.bn_splits=8" in commands.settings_of(jcl, small)


@pytest.mark.parametrize(
    ("pattern", "text", "is_one"),
    [
        ("*CIFAR-10*", "IR, CIFAR-10", True),
        ("*CIFAR-10*", "IR, CIFAR-100", False),
        ("*t = 0.1*", "t = 0.15, linear", False),
        ("MoCo*", "MoCo + Ring, STL-10", True),
        ("MoCo", "MoCo, STL-10", False),
    ],
)
def test_a_pattern_chooses_rows_and_cuts_no_number(pattern, text, is_one):
    assert reproduce.matches(text, pattern) == is_one


# ------------------------------------------------------------------------------------- what it runs


def test_it_runs_what_is_missing_and_prints_the_table(here, out):
    printed, status = out("T", "--seeds", "0", "1")
    assert status == 0
    assert [call[:2] for call in calls()] == [
        ("train_pretrain.py", "a"),
        ("train_linear.py", "a"),
        ("train_pretrain.py", "b"),
        ("train_linear.py", "b"),
        ("train_linear.py", "c"),
        ("train_pretrain.py", "a_seed1"),
        ("train_linear.py", "a_seed1"),
        ("train_pretrain.py", "b_seed1"),
        ("train_linear.py", "b_seed1"),
        ("train_linear.py", "c_seed1"),
    ]
    assert printed.count("50.5 ± 0.7 (n 2)") == 3
    assert out("T", "--seeds", "0", "1")[0].startswith("nothing is missing\n")
    assert not os.path.exists("calls")
    os.remove("runs/b/linear.jsonl")
    states = out("--list")[0].splitlines()
    assert states[:2] == ["T", "  A, c  seed 0: done; seed 1: done"]
    assert states[2] == "  B, c  seed 0: pre-trained, without linear top-1; seed 1: done"
    assert out("--list", "--scale", "small", "--seeds", "0")[0].count("not begun") == 3
    out("T")
    assert calls() == [("train_linear.py", "b", "all")]


def test_an_unfinished_run_and_one_of_another_protocol_are_gone_on_with(here, out):
    out("T", "--rows", "A, *")
    calls()
    with open("runs/a/log.jsonl") as f:
        lines = f.readlines()
    with open("runs/a/log.jsonl", "w") as f:
        f.writelines(lines[:3])
    assert "A, c  seed 0: at epoch 3 of 4" in out("--list", "T")[0]
    out("T", "--rows", "A, *")
    assert [call[0] for call in calls()] == ["train_pretrain.py", "train_linear.py"]
    with open("runs/a/linear.jsonl") as f:
        line = json.loads(f.readlines()[-1])
    with open("runs/a/linear.jsonl", "w") as f:
        f.write(json.dumps(line | {"protocol": "another one"}) + "\n")
    out("T", "--rows", "A, *")
    assert calls() == [("train_linear.py", "a", "all")]


def test_runs_of_settings_that_were_given_are_done_with_these(here, out):
    """A run keeps the numbers that `auto` came to."""
    given = "data.mean=auto", "weights=w.pt"
    row = "T", "--rows", "A, *"
    out(*row, *given)
    config_file = here / "runs" / "a" / "config.yaml"
    written = config_file.read_text()
    assert "weights: w.pt" in written
    config_file.write_text(written.replace("mean: auto", "mean: [0.1, 0.2, 0.3]"))
    calls()
    assert "nothing is missing" in out(*row, *given)[0]
    states = out("--list", *row)[0]
    assert "A, c  seed 0: in runs/a are other settings: began from w.pt" in states


def test_one_failure_stops_no_other_job(here, out):
    (here / "fails").write_text("a")
    printed, status = out("T", "data.limit=7")
    assert status == 1
    assert [call[1] for call in calls()] == ["a", "b", "b"]
    command = "python train_pretrain.py --cfg yaml/a.yaml data.limit=7"
    end = printed[printed.index("\nfailed: ") :]
    assert f"failed: {command}\nthe disk is full\nask for room\n" in end
    assert "left out, for what they need has failed: a, evaluation; c, evaluation" in end
    assert "1 of 5 jobs failed" in end
    assert f"$ {command}" in (here / "runs" / "a" / "train_pretrain.log").read_text()


def test_a_scale_has_runs_and_a_table_of_its_own(here, out):
    out("T", "--rows", "A, *")
    calls()
    printed, status = out("T", "--rows", "A, *", "--scale", "small")
    assert status == 0
    assert [call[1] for call in calls()] == ["a_small", "a_small"]
    assert "T, at the scale small: no figure beside the paper's\n" in printed
    assert "optim.epochs 2" in printed
    assert "reported" not in printed
    assert lines("runs/a_small/log.jsonl")[-1]["epoch"] == 2


def test_each_gpu_has_one_job_at_a_time(here, out):
    (here / "fails").write_text("none")
    _, status = out("T", "--rows", "[AB], *", "--gpus", "4,6")
    assert status == 0
    seen = calls()
    assert {call[2] for call in seen[:2]} == {"4", "6"}
    assert sorted(call[:2] for call in seen[:2]) == [
        ("train_pretrain.py", "a"),
        ("train_pretrain.py", "b"),
    ]
    assert sorted(call[1] for call in seen) == ["a", "a", "b", "b"]


def test_dry_run_prints_commands_that_can_be_copied(here, out):
    printed, _ = out("T", "--rows", "[AC], *", "--scale", "small", "--seeds", "3", "--dry-run")
    scaled = "seed=3 paper.scale=small optim.epochs=2"
    assert printed.splitlines() == [
        f"python train_pretrain.py --cfg yaml/a.yaml name=a_small_seed3 {scaled}",
        f"python train_linear.py --cfg yaml/a.yaml name=a_small_seed3 {scaled}",
        "python train_linear.py --cfg yaml/c.yaml --weights runs/a_small_seed3/backbone.pt "
        f"name=c_small_seed3 {scaled}",
    ]
    assert not os.path.exists("calls")
    assert not os.path.exists("runs")


# ------------------------------------------------------------------------------------------- SLURM

# It takes its number from how many jobs there are, and knows only those as dependencies.
SBATCH = f"""#!{sys.executable} -S
import os
import sys

lines = open("jobs").read().splitlines() if os.path.exists("jobs") else []
words = [word for word in sys.argv[1:] if word.startswith("--dependency=afterok:")]
assert all(1 <= int(word.split(":")[1]) - 70 <= len(lines) for word in words)
if "--job-name=" + os.environ.get("REFUSES", "none") in sys.argv:
    sys.exit("sbatch: error: invalid partition")
with open("jobs", "a") as f:
    f.write(" ".join(sys.argv[1:]) + "\\n")
print(f"{{71 + len(lines)}};cluster")
"""


@pytest.fixture
def cluster(here, monkeypatch):
    """An sbatch that writes down its jobs."""
    (here / "bin").mkdir()
    (here / "bin" / "sbatch").write_text(SBATCH)
    (here / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")


def test_slurm_gets_each_evaluation_after_its_pre_training(here, cluster, out):
    printed, status = out("T", "--slurm", "--nproc_per_node", "2")
    assert status == 0
    submitted = (here / "jobs").read_text().splitlines()
    after = [line.partition("--dependency=afterok:")[2].split(" ")[0] for line in submitted]
    assert after == ["", "71", "", "73", "71"]
    assert "--gpus-per-node=2" in submitted[0]
    assert submitted[0].endswith("slurm/train.sbatch train_pretrain.py --cfg yaml/a.yaml")
    assert submitted[4].endswith("train_linear.py --cfg yaml/c.yaml --weights runs/a/backbone.pt")
    assert "c, evaluation: job 75, see runs/c/train_linear.log" in printed
    assert os.path.isdir("runs/c"), "SLURM makes no folder for --output"


def test_a_refusal_of_sbatch_is_one_sentence(here, cluster, out, monkeypatch):
    monkeypatch.setenv("REFUSES", "b")
    _, status = out("T", "--slurm")
    assert status.startswith("sbatch refused a job: sbatch: error: invalid partition; it was: sb")
    monkeypatch.setenv("PATH", str(here))
    assert out("T", "--slurm")[1] == "--slurm wants sbatch, and there is none on this machine"


# ------------------------------------------------------------------------------------------ a stop

WAITS = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open(sys.argv[1], "w").close()
signal.sigwait([signal.SIGTERM])
open(sys.argv[1] + ".saved", "w").close()
sys.exit(75)
"""


def test_jobs_are_told_to_stop_and_waited_for(here, monkeypatch, capsys):
    (here / "waits.py").write_text(WAITS)
    monkeypatch.setattr(signals, "state", signals.State())
    queue = [jobs.Job(name, ["python", "waits.py", name], f"runs/{name}/log") for name in "ab"]

    def stop_once_it_runs(seconds):
        if os.path.exists("a"):
            signals.note_request()

    monkeypatch.setattr(jobs.time, "sleep", stop_once_it_runs)
    with pytest.raises(signals.StopRequested):
        jobs.run_jobs(queue)
    assert os.path.exists("a.saved")
    assert not os.path.exists("b")
    signals.say_stopped()
    assert "so were the jobs, and the same line goes on where they are" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["U"], "there is no table 'U'"),
        (["Tt"], "there is no table 'Tt'; did you mean T?"),
        ([], "name a table: python reproduce.py --list prints their titles"),
        (["T", "--rows", "*X*"], "--rows '*X*' matches no row"),
        (["T", "--seeds", "1.5"], "--seeds 1.5: a seed is a whole number"),
        (["T", "name=mine"], "name=mine: reproduce.py sets name itself"),
        (["T", "paper.row=mine"], "paper.row=mine: reproduce.py sets paper.row itself"),
        (["T", "--gpus", "a"], "--gpus a: give the numbers of GPUs"),
        (["T", "--gpus", "0", "--slurm"], "--gpus gives each job one GPU; leave it out"),
        (["T", "--nproc_per_node", "0"], "--nproc_per_node is 0; it must be at least 1"),
        (["T", "--scale", "smal"], "yaml/scales/smal.yaml does not exist; did you mean small.yaml"),
        (["T", "optim.epoch=3"], "yaml/a.yaml: optim.epoch is not a setting; did you mean"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, sentence, here, out):
    _, status = out(*arguments)
    assert status.startswith(sentence)
    assert not os.path.exists("runs")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {epoch: 2}", "bad.yaml: optim.epoch is not a setting; did you mean epochs?"),
        ("modell: {width: 2}", "bad.yaml: modell is not a setting; did you mean model?"),
        ("optim: 2", "bad.yaml: optim is 2; it must hold keys and values"),
        ("model: {width: wide}", "yaml/a.yaml: model.width is 'wide'; it must be a whole number"),
    ],
)
def test_a_bad_scale_gets_one_sentence(text, sentence, here, out):
    (here / "yaml" / "scales" / "bad.yaml").write_text(text)
    _, status = out("T", "--scale", "bad")
    assert sentence in status


def test_slurm_gets_no_job_where_a_folder_cannot_be_written(here, cluster, out):
    (here / "runs").write_text("no folder")
    _, status = out("T", "--slurm")
    assert status.startswith("runs/a/train_pretrain.log cannot be written")


def test_a_file_in_place_of_a_run_stops_no_other_job(here, out):
    (here / "fails").write_text("none")
    (here / "runs").mkdir()
    (here / "runs" / "a").write_text("no folder")
    printed, status = out("T", "--rows", "[AB], *")
    assert status == 1
    assert [call[1] for call in calls()] == ["b", "b"]
    end = printed[printed.index("\nfailed: ") :]
    assert "runs/a/train_pretrain.log cannot be written" in end
    assert "left out, for what they need has failed: a, evaluation" in end


def test_a_row_without_its_command_or_its_weights_is_refused(here, out):
    write_row("a", "A", "python train_pretrain.py --cfg {0}")
    assert "has no command of train_linear.py" in out("T")[1]
    write_row("c", "C", "python train_linear.py --cfg {0} --weights runs/x/backbone.pt")
    assert out("T", "--rows", "C*")[1] == "yaml/c.yaml: no file in yaml/ makes runs/x/backbone.pt"
