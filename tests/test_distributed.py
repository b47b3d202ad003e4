"""Two gloo processes against one: every collective, and both hosts' whole steps."""
import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def torchrun(processes, arguments, cwd, check=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port()), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes run every collective once; -> the folder with what each saw."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "job.py").write_text(textwrap.dedent("""
        import torch
        from torch import nn
        from data.datasets import ArraySet
        from data.loader import Loader
        from data.shapes import shapes
        from engine import distributed
        from engine.features import extract
        device = distributed.start()
        r = distributed.rank()
        images, labels = map(torch.from_numpy, shapes(21))
        data = ArraySet(images, labels, None, (0.0,) * 3, (1.0,) * 3)
        bn = nn.BatchNorm1d(2)
        bn.running_mean.fill_(float(r))
        distributed.average_buffers(bn)
        loader = Loader(data, batch_size=8, n_views=2, seed=0, device=device, augment="cifar", image_size=32)
        saw = {"gather": distributed.gather(torch.arange(3) + 10 * r), "broadcast": distributed.broadcast(torch.tensor([7 + r])),
               "mean": distributed.mean(torch.tensor([float(r)])), "objects": distributed.gather_objects({"rank": r}), "bn": bn.running_mean,
               "extract": extract(lambda x: x.flatten(1), data, 32, device),
               "views": [torch.stack(v) for v, _ in loader.epoch(3)], "index": [i for _, i in loader.epoch(3)]}
        torch.save(saw, f"saw{r}.pt")
        distributed.stop()
    """))
    torchrun(2, [folder / "job.py"], folder)
    return [torch.load(folder / f"saw{r}.pt") for r in (0, 1)]


def test_collectives(two):
    for saw in two:
        assert saw["gather"].tolist() == [0, 1, 2, 10, 11, 12] and saw["broadcast"].item() == 7 and saw["mean"].item() == 0.5
        assert saw["objects"] == [{"rank": 0}, {"rank": 1}] and saw["bn"].tolist() == [0.5, 0.5]


def test_uneven_data_lose_and_repeat_no_image(two):
    from data.shapes import shapes
    expected = torch.from_numpy(shapes(21)[0]).float().flatten(1) / 255
    for saw in two:
        assert torch.allclose(saw["extract"], expected)


def test_two_processes_see_the_very_views_of_one(two):
    from data.datasets import ArraySet
    from data.loader import Loader
    from data.shapes import shapes
    images, labels = map(torch.from_numpy, shapes(21))
    one = Loader(ArraySet(images, labels, None, (0.0,) * 3, (1.0,) * 3), batch_size=8, n_views=2, seed=0, device=torch.device("cpu"), augment="cifar",
                 image_size=32)
    for step, (views, index) in enumerate(one.epoch(3)):
        assert torch.equal(index, torch.cat([saw["index"][step] for saw in two]))
        assert torch.allclose(torch.stack(views), torch.cat([saw["views"][step] for saw in two], dim=1), atol=1e-6)


TINY = ["--cfg", os.path.join(ROOT, "yaml", "quickstart.yaml"), "data.limit=128", "optim.batch_size=32", "optim.epochs=2", "model.width=8", "model.precision=fp32",
        "optim.lr=0.01", "knn.every=0"]


@pytest.mark.parametrize("settings", [["model.host=moco", "model.queue_size=64"], ["model.host=ir", "optim.lr=0.001"]], ids=["moco", "ir"])
def test_two_processes_train_as_one(settings, tmp_path):
    """Plain InfoNCE on all candidates draws nothing, so one process with split BN must equal two: weights, momentum net, queue and bank.

    (IR at a small lr: against a random bank its gradients are steep, and rounding grows from 1e-7 to 1e-4 in four steps of 0.01.)"""
    settings = [*TINY, *settings, "loss.name=nce"]
    script = os.path.join(ROOT, "train_pretrain.py")
    torchrun(2, [script, *settings, "name=two"], tmp_path)
    subprocess.run([sys.executable, script, *settings, "name=one", "model.bn_splits=2"], cwd=tmp_path, check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True) for name in ("one", "two"))
    compared = 0
    for part in ("encoder", "host"):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            assert torch.allclose(value.float(), two[part][key].float(), atol=1e-5), f"{part}.{key}"
            compared += 1
    assert compared > 20 and len(two["rng"]) == 2


def test_ranks_stay_equal(tmp_path):
    """Ring with its draws differs between ranks in what it draws, never in the state: every rank's own copy is compared."""
    (tmp_path / "job.py").write_text(textwrap.dedent(f"""
        import sys, torch, runpy
        from engine import checkpoint, distributed
        sys.path.insert(0, {ROOT!r})
        plain = checkpoint.save
        def save(path, settings, epoch, **parts):
            torch.save({{k: v.state_dict() for k, v in parts.items()}}, f"rank{{distributed.rank()}}.pt")
            plain(path, settings, epoch, **parts)
        checkpoint.save = save
        runpy.run_path({os.path.join(ROOT, 'train_pretrain.py')!r}, run_name="__main__")
    """))
    for host, draws in (("ir", "20"), ("moco", "null")):
        torchrun(2, [tmp_path / "job.py", *TINY, f"model.host={host}", "loss.name=ring", "loss.inner=0.1", "loss.outer=0.5", f"loss.n_negatives={draws}", f"name={host}"],
                 tmp_path)
        a, b = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
        assert all(torch.equal(v, b[part][k]) for part in ("encoder", "host") for k, v in a[part].items())


def test_resume_in_two_processes_is_exact(tmp_path):
    script, settings = os.path.join(ROOT, "train_pretrain.py"), [*TINY, "loss.name=ring", "loss.n_negatives=20", "model.queue_size=64", "loss.inner=0.1", "loss.outer=0.5"]
    torchrun(2, [script, *settings, "name=whole"], tmp_path)
    stopper = tmp_path / "stop.py"                         # ends after one epoch, as a kill between epochs would
    stopper.write_text(textwrap.dedent(f"""
        import os, runpy, sys
        sys.path.insert(0, {ROOT!r})
        from engine import checkpoint, distributed
        plain = checkpoint.save
        def save(*a, **k):
            plain(*a, **k)
            distributed.barrier()
            os._exit(0)
        checkpoint.save = save
        runpy.run_path({script!r}, run_name="__main__")
    """))
    torchrun(2, [stopper, *settings, "name=cut"], tmp_path)
    torchrun(2, [script, *settings, "name=cut"], tmp_path)
    whole, cut = (torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    for part in ("encoder", "host"):
        assert all(torch.equal(v, cut[part][k]) for k, v in whole[part].items())
    assert all(torch.equal(a["cpu"], b["cpu"]) for a, b in zip(whole["rng"], cut["rng"]))


def test_the_linear_probe_is_the_same_in_two_processes(tmp_path):
    """kNN and the cached probe, figure for figure; the augmented one averages gradients over the same global batches."""
    run = lambda script, *more: subprocess.run([sys.executable, os.path.join(ROOT, script), *TINY, "name=a", *more], cwd=tmp_path, check=True, capture_output=True,
                                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    run("train_pretrain.py", "optim.epochs=1")
    for features in ("cached", "augmented"):
        settings = [f"linear.features={features}", "linear.epochs=3", "linear.batch_size=32", "linear.lr=0.01", "--no-baselines"]
        run("train_linear.py", *settings)
        torchrun(2, [os.path.join(ROOT, "train_linear.py"), *TINY, "name=a", *settings], tmp_path)
        with open(tmp_path / "runs" / "a" / "linear.jsonl") as f:
            one, two = [json.loads(line)["rows"]["a"] for line in f][-2:]
        assert one == pytest.approx(two, abs=0.2), features


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    done = torchrun(2, [os.path.join(ROOT, "train_pretrain.py"), *TINY, "optim.batch_size=33"], tmp_path, check=False)
    assert done.returncode != 0 and "batch_size 33 does not divide by 2 processes" in done.stderr
