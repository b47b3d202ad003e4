"""The linear probe: a learning rate that diverges, a folder that may not be written, protocols."""

import json
import os

import pytest

from processes import ROOT, run
from test_faults import SERVER, child, drop_capabilities

TINY = [
    "--cfg",
    os.path.join(ROOT, "yaml", "quickstart.yaml"),
    "data.name=shapes",
    "data.limit=60",
    "data.image_size=16",
    "model.width=8",
    "optim.epochs=1",
    "optim.batch_size=20",
    "model.queue_size=40",
    "knn.every=0",
    "linear.epochs=3",
    "linear.batch_size=20",
    "name=a",
]
# In float32 a weight that such a step moves is infinite.
TOO_HIGH = "1e38"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run `a`."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, "train_pretrain.py", *TINY)
    return folder


@pytest.mark.parametrize("features", ["cached", "augmented"])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_learning_rate_that_diverges_leaves_the_others(features, processes, trained):
    settings = [*TINY, f"linear.lr=[0.1,{TOO_HIGH}]", f"linear.features={features}"]
    done = run(trained, "train_linear.py", *settings, processes=processes)
    assert "WARNING: linear.lr 1e+38 diverges in epoch 1 (a)" in done.stdout
    assert "diverged" in done.stdout.splitlines()[-1]
    line = json.loads((trained / "runs/a/linear.jsonl").read_text().splitlines()[-1])
    assert line["figures"]["top-1"] == line["rows"]["a"]["top-1, lr 0.1"] > 0
    assert line["rows"]["a"]["top-1, lr 1e+38"] is None
    run(trained, "train_linear.py", *settings, "linear.lr=[0.1,0.2]", processes=processes)
    again = json.loads((trained / "runs/a/linear.jsonl").read_text().splitlines()[-1])
    assert again["figures"] == line["figures"]


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_where_all_diverge_the_probe_ends_with_a_sentence(features, trained):
    settings = [*TINY, f"linear.lr={TOO_HIGH}", "linear.epochs=1000", f"linear.features={features}"]
    done = run(trained, "train_linear.py", *settings, "--fresh", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("the probe diverged at every learning rate; lower linear.lr")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train_linear.py", "train_finetune.py"])
def test_a_folder_that_may_not_be_written_is_told_before_the_work(script, trained):
    """Of a colleague's run, say."""
    folder = trained / "runs/a"
    more = ["finetune.labels=1", "finetune.batch_size=20"] if "finetune" in script else []
    os.chmod(folder, 0o555)
    try:
        arguments = [*TINY[2:], *more]
        given = (str(trained), "a", arguments, drop_capabilities, {})
        process = SERVER.Process(target=child, args=(*given, "", script))
        process.start()
        process.join()
    finally:
        os.chmod(folder, 0o755)
    err = (trained / "a.err").read_text()
    assert process.exitcode == 1
    assert "cannot be written: Permission denied" in err and err.count("\n") == 1, err
    out = (trained / "a.out").read_text()
    assert "top-1" not in out and "epoch" not in out.replace("epochs", "")


@pytest.mark.parametrize("script", ["train_linear.py", "train_finetune.py"])
def test_sets_whose_protocol_it_is_get_the_mean_of_the_classes(script, trained, tmp_path):
    """Aircraft, flowers and pets; here the built-in set is made one of them."""
    job = tmp_path / "job.py"
    job.write_text(
        "import runpy\n"
        "from data import datasets\n"
        "datasets.MEAN_PER_CLASS = ('shapes',)\n"
        f"runpy.run_path({os.path.join(ROOT, script)!r}, run_name='__main__')\n"
    )
    few = ["finetune.labels=1", "finetune.batch_size=20", "finetune.epochs=1", "linear.lr=0.1"]
    done = run(trained, str(job), *TINY, *few, "--weights", "runs/a/backbone.pt")
    file = "linear.jsonl" if "linear" in script else "finetune.jsonl"
    line = json.loads((trained / "runs/a" / file).read_text().splitlines()[-1])
    assert 0 < line["figures"]["per class"] <= 100
    assert "per class" in done.stdout
