"""Two gloo processes against one: every collective, and the hosts' whole steps."""
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
        from engine.kmeans import kmeans
        device = distributed.start()
        r = distributed.rank()
        images, labels = map(torch.from_numpy, shapes(21))
        data = ArraySet(images, labels, None, (0.0,) * 3, (1.0,) * 3)
        bn = nn.BatchNorm1d(2)
        bn.running_mean.fill_(float(r))
        distributed.average_buffers(bn)
        loader = Loader(data, batch_size=8, n_views=2, seed=0, device=device, augment="cifar", image_size=32)
        x = torch.arange(3.0).add(10 * r).requires_grad_()
        (distributed.gather_with_gradient(x) ** 2 * torch.tensor([1.0, 1, 1, 2, 2, 2]) * (r + 1)).sum().backward()
        before = distributed.sent
        pair = distributed.gather(torch.arange(6.0).view(3, 2) + 10 * r, torch.arange(3) - r)
        told = distributed.sent - before
        rows = {n: torch.arange(n * 2, dtype=torch.bfloat16).view(n, 2, 1) + 100 * r for n in (2, 3, 1)}
        order = {2: torch.tensor([0, 2, 1, 3]), 3: torch.tensor([4, 0, 2, 1, 5, 3]), 1: torch.tensor([1, 0])}
        dealt = {n: distributed.exchange(x, order[n]) for n, x in rows.items()}
        back = {n: torch.equal(distributed.exchange(x, order[n].argsort()), rows[n]) for n, x in dealt.items()}
        saw = {"pair": pair, "told": told, "dealt": dealt, "back": back, "gradient": x.grad, "kmeans": kmeans(torch.arange(40.0).view(20, 2), 3), "sum": distributed.all_reduce_sum(torch.tensor([2 ** 60 + r])),
               "gather": distributed.gather(torch.arange(3) + 10 * r), "broadcast": distributed.broadcast(torch.tensor([7 + r])),
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
        assert saw["sum"].item() == 2 ** 61 + 1            # whole numbers, exactly
        assert saw["objects"] == [{"rank": 0}, {"rank": 1}] and saw["bn"].tolist() == [0.5, 0.5]


def test_several_tensors_are_gathered_by_one_message(two):
    for r, saw in enumerate(two):
        values, index = saw["pair"]
        assert torch.equal(values, torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 10]))
        assert torch.equal(index, torch.tensor([0, 1, 2, -1, 0, 1])) and index.dtype == torch.long
        assert saw["told"] == 3 * (2 * 4 + 8)              # three rows of two floats and one index, to one other process


def test_an_exchange_deals_rows_in_any_order_and_takes_them_back(two):
    first = lambda n: [[row[0, 0].item() for row in saw["dealt"][n]] for saw in two]
    assert first(2) == [[0, 100], [2, 102]]                # one row to each
    assert first(3) == [[102, 0, 4], [2, 104, 100]]        # one from the other, which comes first; two
    assert first(1) == [[100], [0]]
    assert all(saw["back"] == {2: True, 3: True, 1: True} and saw["dealt"][3].dtype == torch.bfloat16 for saw in two)


def test_the_gradient_of_a_gather_is_summed_over_its_users(two):
    for r, saw in enumerate(two):                          # d/dx of (1 + 2) w_r x^2
        assert saw["gradient"].tolist() == [2 * 3 * (r + 1) * (x + 10 * r) for x in range(3)]


def test_clusters_are_the_same_on_every_rank(two):
    assert all(torch.equal(a, b) for a, b in zip(two[0]["kmeans"], two[1]["kmeans"])) and len(two[1]["kmeans"][1].unique()) == 3


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
ALONE = {"moco": ["model.host=moco", "model.queue_size=64", "loss.name=nce"], "ir": ["model.host=ir", "optim.lr=0.001", "loss.name=nce"],
         "cmc": ["model.host=cmc", "optim.lr=0.001", "loss.name=nce"], "simclr": ["model.host=simclr", "optim.lr=0.001", "loss.name=nce"],
         "moco-jcl": ["model.host=moco", "model.queue_size=64", "model.n_views=4", "loss.name=jcl", "loss.temperature=0.2"]}


@pytest.mark.parametrize("name", ALONE if os.environ.get("FULL") else ["moco", "moco-jcl"])       # the others: tests/test_scaleout.py
def test_two_processes_train_as_one(name, tmp_path):
    """Plain InfoNCE (and JCL) on all candidates draw nothing, so one process with split BN must equal two: weights, momentum net, queue and bank.

    (One epoch of four steps, and all but MoCo at a small lr: their gradients are steep, and the 3e-8 of the first step grow to 1e-4 in eight.)"""
    settings = [*TINY, *ALONE[name], "optim.epochs=1"]
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


def test_a_batch_in_parts_is_a_step(tmp_path):
    """One process that takes a batch in four parts, and one with split BN, take the same steps, running statistics aside; two processes with two parts
    each get through them."""
    script, settings = os.path.join(ROOT, "train_pretrain.py"), [*TINY, *ALONE["ir"]]
    torchrun(2, [script, *settings, "name=four", "optim.accumulate=2"], tmp_path)
    for more in (["name=split", "model.bn_splits=4"], ["name=parts", "optim.accumulate=4"]):
        subprocess.run([sys.executable, script, *settings, *more], cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    split, parts, four = (torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True) for name in ("split", "parts", "four"))
    assert torch.allclose(split["host"]["bank.rows"], parts["host"]["bank.rows"], atol=1e-5)
    for key, value in split["encoder"].items():
        if "running" not in key and "tracked" not in key:
            assert torch.allclose(value, parts["encoder"][key], atol=1e-5), key
    line = lambda name: json.loads((tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()[-1])
    assert line("parts")["loss"] == pytest.approx(line("split")["loss"], abs=1e-4) and line("parts")["K"] == line("split")["K"]
    assert four["epoch"] == 2 and line("four")["loss"] == pytest.approx(line("split")["loss"], abs=0.2)


@pytest.mark.skipif("FULL" not in os.environ, reason="FULL=1: longer tests")
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
