"""Two gloo processes against one: every collective, and the hosts' whole steps."""

import contextlib
import json
import multiprocessing
import os
import signal
import textwrap
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from engine import distributed, signals
from processes import ROOT, group_environments, run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Let two processes run every collective once. -> what each saw."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "job.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        from data.datasets import ArraySet
        from data.loader import Loader
        from data.shapes import shapes
        from engine import distributed
        from evaluation.features import extract, knn
        from losses.kmeans import kmeans
        device = distributed.init_distributed()
        r = distributed.rank()
        images, labels = map(torch.from_numpy, shapes(21))
        data = ArraySet(images, labels, None, (0.0,) * 3, (1.0,) * 3)
        bn = nn.BatchNorm1d(2)
        bn.running_mean.fill_(float(r))
        distributed.average_buffers(bn)
        kinds = {"augment": "cifar", "image_size": 32}
        loader = Loader(data, batch_size=8, n_views=2, seed=0, device=device, **kinds)
        x = torch.arange(3.0).add(10 * r).requires_grad_()
        weight = torch.tensor([1.0, 1, 1, 2, 2, 2]) * (r + 1)
        (distributed.all_gather_with_gradient(x) ** 2 * weight).sum().backward()
        before = distributed.bytes_sent
        pair = distributed.all_gather(torch.arange(6.0).view(3, 2) + 10 * r, torch.arange(3) - r)
        told = distributed.bytes_sent - before
        order = {2: [0, 2, 1, 3], 3: [4, 0, 2, 1, 5, 3], 1: [1, 0]}
        dealt, back = {}, {}
        for n in order:
            order_n = torch.tensor(order[n])
            rows = torch.arange(n * 2, dtype=torch.bfloat16).view(n, 2, 1) + 100 * r
            dealt[n] = distributed.all_to_all_rows(rows, order_n)
            back[n] = torch.equal(distributed.all_to_all_rows(dealt[n], order_n.argsort()), rows)
        saw = {
            "pair": pair,
            "told": told,
            "dealt": dealt,
            "back": back,
            "gradient": x.grad,
            "kmeans": kmeans(torch.arange(40.0).view(20, 2), 3),
            "sum": distributed.all_reduce_sum(torch.tensor([2 ** 60 + r])),
            "gather": distributed.all_gather(torch.arange(3) + 10 * r),
            "mean": distributed.all_reduce_mean(torch.tensor([float(r)])),
            "objects": distributed.all_gather_object({"rank": r}),
            "bn": bn.running_mean,
            "extract": extract(lambda x: x.flatten(1), data, 32, device),
            "knn": knn(images.flatten(1).float(), labels, images[:9].flatten(1) + 0.5, 3, 0.1),
            "views": [torch.stack(v) for v, _ in loader.epoch(3)],
            "index": [i for _, i in loader.epoch(3)],
        }
        torch.save(saw, f"saw{r}.pt")
        distributed.cleanup()
    """)
    )
    run(folder, folder / "job.py", processes=2)
    return [torch.load(folder / f"saw{r}.pt") for r in (0, 1)]


def test_collectives(two):
    for saw in two:
        assert saw["gather"].tolist() == [0, 1, 2, 10, 11, 12]
        assert saw["mean"].item() == 0.5
        assert saw["sum"].item() == 2**61 + 1  # whole numbers, exactly
        assert saw["objects"] == [{"rank": 0}, {"rank": 1}]
        assert saw["bn"].tolist() == [0.5, 0.5]


def test_several_tensors_are_gathered_by_one_message(two):
    for saw in two:
        values, index = saw["pair"]
        assert torch.equal(
            values, torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 10])
        )
        assert torch.equal(index, torch.tensor([0, 1, 2, -1, 0, 1]))
        assert index.dtype == torch.long
        # Three rows of two floats and one index went to one other process.
        assert saw["told"] == 3 * (2 * 4 + 8)


def test_an_exchange_deals_rows_in_any_order_and_takes_them_back(two):
    def first(n):
        return [[row[0, 0].item() for row in saw["dealt"][n]] for saw in two]

    assert first(2) == [[0, 100], [2, 102]]  # one row to each
    assert first(3) == [[102, 0, 4], [2, 104, 100]]  # one from the other, which comes first; two
    assert first(1) == [[100], [0]]
    for saw in two:
        assert saw["back"] == {2: True, 3: True, 1: True}
        assert saw["dealt"][3].dtype == torch.bfloat16


def test_the_gradient_of_a_gather_is_summed_over_its_users(two):
    for r, saw in enumerate(two):  # d/dx of (1 + 2) w_r x^2
        assert saw["gradient"].tolist() == [2 * 3 * (r + 1) * (x + 10 * r) for x in range(3)]


def test_clusters_are_the_same_on_every_rank(two):
    assert all(torch.equal(a, b) for a, b in zip(two[0]["kmeans"], two[1]["kmeans"]))
    assert len(two[1]["kmeans"][1].unique()) == 3


def test_uneven_data_lose_and_repeat_no_image(two):
    from data.shapes import shapes

    expected = torch.from_numpy(shapes(21)[0]).float().flatten(1) / 255
    for saw in two:
        assert torch.allclose(saw["extract"], expected)


def test_two_processes_share_the_queries_of_knn(two):
    """Nine of them, of which the second gets four."""
    from data.shapes import shapes
    from evaluation.features import knn

    images, labels = map(torch.from_numpy, shapes(21))
    expected = knn(images.flatten(1).float(), labels, images[:9].flatten(1) + 0.5, 3, 0.1)
    assert len(expected.unique()) > 2
    for saw in two:
        assert torch.equal(saw["knn"], expected)


def test_two_processes_see_the_very_views_of_one(two):
    from data.datasets import ArraySet
    from data.loader import Loader
    from data.shapes import shapes

    images, labels = map(torch.from_numpy, shapes(21))
    one = Loader(
        ArraySet(images, labels, None, (0.0,) * 3, (1.0,) * 3),
        batch_size=8,
        n_views=2,
        seed=0,
        device=torch.device("cpu"),
        augment="cifar",
        image_size=32,
    )
    for step, (views, index) in enumerate(one.epoch(3)):
        assert torch.equal(index, torch.cat([saw["index"][step] for saw in two]))
        assert torch.allclose(
            torch.stack(views), torch.cat([saw["views"][step] for saw in two], dim=1), atol=1e-6
        )


def in_processes(world, job, folder, nodes=1):
    """Call job() in `world` processes that torchrun might have started on so many nodes.

    They are forks of this process, which saves them the seconds of an import. The store is this
    process's, as it is torchrun's.

    Returns:
        What job returned in each process, and what each printed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world // nodes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": 0,
    }

    def work(rank):
        node, local_rank = divmod(rank, world // nodes)
        environment = {**shared, "RANK": rank, "LOCAL_RANK": local_rank, "GROUP_RANK": node}
        os.environ.update({key: str(value) for key, value in environment.items()})
        torch.set_num_threads(1)
        with open(folder / f"said{rank}", "w") as output, contextlib.redirect_stdout(output):
            torch.save(job(), folder / f"saw{rank}.pt")

    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=work, args=(rank,)) for rank in range(world)]
    for process in started:
        process.start()
    end = time.monotonic() + 60
    for process in started:
        process.join(max(0, end - time.monotonic()))
        process.kill()
        process.join()
    assert [process.exitcode for process in started] == [0] * world
    saw = [torch.load(folder / f"saw{rank}.pt") for rank in range(world)]
    return saw, [(folder / f"said{rank}").read_text() for rank in range(world)]


def first_and_others():
    """Run every kind of function by the first process. -> what this one saw."""
    distributed.init_distributed("cpu")
    r, saw, run = distributed.rank(), {}, distributed.run_on_first

    def ending(function, per_node=False):
        try:
            return "no end", run(function, per_node)
        except BaseException as error:
            return type(error).__name__, error.args[0] if error.args else error.code

    def refuse():
        raise SystemExit(f"process {r} refuses")

    def fail():
        raise ValueError(f"process {r} fails")

    saw["value"] = run(lambda: {"by": r})
    saw["node"] = run(lambda: {"by": r}, per_node=True)
    saw["large"] = len(run(lambda: bytes(9 * 2**20)))
    saw["refusal"] = ending(refuse)
    saw["error"] = ending(fail)
    saw["one node"] = ending(lambda: refuse() if r == 2 else r, per_node=True)
    saw["both nodes"] = ending(refuse, per_node=True)
    saw["no pickle"] = ending(lambda: lambda: 0)[0]
    saw["still"] = run(lambda: r)
    saw["objects"] = distributed.all_gather_object(r)
    mixed = distributed.all_gather_object(bytes(2**21 if r == 1 else r))
    saw["mixed"] = [len(part) for part in mixed]
    saw["agree"] = []
    for problem in (None, f"{r} disagrees" if r in (1, 2) else None):
        try:
            saw["agree"].append(distributed.exit_all_ranks(problem))
        except SystemExit as end:
            saw["agree"].append(end.code)
    saw["told"], saw["first told"] = told_to_stop(ending)
    saw["outlasts"], saw["barrier"] = outlast_the_limit(run)
    distributed.cleanup()
    return saw


class SignalsWhileWaiting:
    """A store whose user gets SIGTERM when it looks whether something is there."""

    def __init__(self, store):
        self.store = store

    def check(self, keys):
        os.kill(os.getpid(), signal.SIGTERM)
        return self.store.check(keys)

    def __getattr__(self, name):
        return getattr(self.store, name)


def told_to_stop(ending):
    """Tell the other processes to stop, and then the first, while they are in run_on_first.

    Returns:
        How both calls ended.
    """
    objects = distributed.object_store
    store = objects.store
    signal.signal(signal.SIGTERM, signals.handle)

    def until_the_others_left():
        store.wait(["left 1", "left 2", "left 3"])
        return "done"

    if distributed.rank() > 0:
        objects.store = SignalsWhileWaiting(store)
    told = ending(until_the_others_left)
    objects.store = store
    store.set(f"left {distributed.rank()}", "")
    signals.state.__init__()
    first_told = ending(lambda: os.kill(os.getpid(), signal.SIGTERM))
    signals.state.__init__()
    return told, first_told


def outlast_the_limit(run):
    """Set a limit of 1 s for collectives. -> what run_on_first returns, and how a barrier ends."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    outlasts = run(lambda: time.sleep(1.5) or "done")
    try:
        if distributed.rank() == 0:  # at work until another has given up
            distributed.object_store.spread([1])
        else:
            distributed.barrier()
        return outlasts, "no end"
    except RuntimeError as error:
        distributed.object_store.spread([1], b"given up")
        return outlasts, str(error)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Run four processes of two nodes. -> what each saw of run_on_first, and what they printed."""
    return in_processes(4, first_and_others, tmp_path_factory.mktemp("four"), nodes=2)


def test_the_first_process_works_for_all(four):
    for saw in four[0]:
        assert saw["value"] == {"by": 0}
        assert saw["large"] == 9 * 2**20
        assert saw["still"] == 0
    assert [saw["node"]["by"] for saw in four[0]] == [0, 0, 2, 2]


def test_what_it_raises_ends_all_and_is_said_once(four):
    saw = four[0]
    ended = ("SystemExit", 1)  # a code of 1 prints nothing
    assert [seen["refusal"] for seen in saw] == [("SystemExit", "process 0 refuses"), *[ended] * 3]
    assert [seen["error"] for seen in saw] == [("ValueError", "process 0 fails"), *[ended] * 3]
    assert [seen["one node"] for seen in saw] == [
        ended,
        ended,
        ("SystemExit", "process 2 refuses"),
        ended,
    ]
    assert [seen["both nodes"] for seen in saw] == [
        ("SystemExit", "process 0 refuses"),
        *[ended] * 3,
    ]
    assert saw[0]["no pickle"] != "no end"
    assert saw[1]["no pickle"] == "SystemExit"


def test_a_run_that_is_told_to_stop_while_it_waits_ends(four):
    saw, _ = four
    stopped = "StopRequested", signals.EXIT_CODE
    assert [seen["told"] for seen in saw] == [("no end", "done"), *[stopped] * 3]
    assert [seen["first told"] for seen in saw] == [stopped, *[("SystemExit", 75)] * 3]


def test_objects_of_any_size_are_gathered_and_a_problem_ends_all(four):
    for r, saw in enumerate(four[0]):
        assert saw["objects"] == [0, 1, 2, 3]
        assert saw["mixed"] == [0, 2**21, 2, 3]
        assert saw["agree"] == [None, "1 disagrees" if r == 0 else 1]


def test_the_wait_for_the_first_outlasts_the_limit_of_collectives(four):
    """The barrier, which did this before, does not."""
    saw = four[0]
    assert [seen["outlasts"] for seen in saw] == ["done"] * 4
    ends = [seen["barrier"] for seen in saw]
    assert ends[0] == "no end"
    assert "no end" not in ends[1:]
    assert any("imed out" in end for end in ends[1:])  # and the others lose a peer


TINY = [
    "--cfg",
    os.path.join(ROOT, "yaml", "quickstart.yaml"),
    "data.limit=128",
    "optim.batch_size=32",
    "optim.epochs=2",
    "model.width=8",
    "model.precision=fp32",
    "optim.lr=0.01",
    "knn.every=0",
]
ALONE = {
    "moco": ["model.host=moco", "model.queue_size=64", "loss.name=nce"],
    "ir": ["model.host=ir", "optim.lr=0.001", "loss.name=nce"],
    "cmc": ["model.host=cmc", "optim.lr=0.001", "loss.name=nce"],
    "simclr": ["model.host=simclr", "optim.lr=0.001", "loss.name=nce"],
    "moco-jcl": [
        "model.host=moco",
        "model.queue_size=64",
        "model.n_views=4",
        "loss.name=jcl",
        "loss.temperature=0.2",
    ],
}


@pytest.mark.parametrize(
    "name",
    ["moco", *(pytest.param(name, marks=pytest.mark.slow) for name in ALONE if name != "moco")],
)
def test_two_processes_train_as_one(name, tmp_path):
    """Weights, momentum network, queue and bank of two processes are those of one with split BN.

    Plain InfoNCE (and JCL) on all candidates draws nothing. One epoch of four steps, and all but
    MoCo at a small lr: their gradients are steep, and the 3e-8 of the first step grow to 1e-4 in
    eight.
    """
    settings = [*TINY, *ALONE[name], "optim.epochs=1"]
    run(tmp_path, "train_pretrain.py", *settings, "name=two", processes=2)
    run(tmp_path, "train_pretrain.py", *settings, "name=one", "model.bn_splits=2")
    one = torch.load(tmp_path / "runs" / "one" / "last.pt", weights_only=True)
    two = torch.load(tmp_path / "runs" / "two" / "last.pt", weights_only=True)
    compared = 0
    for part in ("encoder", "host"):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            assert torch.allclose(value.float(), two[part][key].float(), atol=1e-5), f"{part}.{key}"
            compared += 1
    assert compared > 20
    assert len(two["rng"]) == 2


@pytest.mark.slow
def test_a_batch_in_parts_is_a_step(tmp_path):
    """One process that takes a batch in four parts, and one with split BN, take the same steps.

    Running statistics differ. Two processes with two parts each get through them.
    """
    settings = [*TINY, *ALONE["ir"]]
    run(tmp_path, "train_pretrain.py", *settings, "name=four", "optim.accumulate=2", processes=2)
    run(tmp_path, "train_pretrain.py", *settings, "name=split", "model.bn_splits=4")
    run(tmp_path, "train_pretrain.py", *settings, "name=parts", "optim.accumulate=4")
    split = torch.load(tmp_path / "runs" / "split" / "last.pt", weights_only=True)
    parts = torch.load(tmp_path / "runs" / "parts" / "last.pt", weights_only=True)
    four = torch.load(tmp_path / "runs" / "four" / "last.pt", weights_only=True)
    assert torch.allclose(split["host"]["bank.rows"], parts["host"]["bank.rows"], atol=1e-5)
    for key, value in split["encoder"].items():
        if "running" not in key and "tracked" not in key:
            assert torch.allclose(value, parts["encoder"][key], atol=1e-5), key

    def line(name):
        return json.loads((tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()[-1])

    assert line("parts")["loss"] == pytest.approx(line("split")["loss"], abs=1e-4)
    assert line("parts")["K"] == line("split")["K"]
    assert four["epoch"] == 2
    assert line("four")["loss"] == pytest.approx(line("split")["loss"], abs=0.2)


@pytest.mark.slow
def test_the_linear_probe_is_the_same_in_two_processes(tmp_path):
    """kNN and the cached probe, figure for figure.

    The augmented one averages gradients over the same global batches.
    """
    run(tmp_path, "train_pretrain.py", *TINY, "name=a", "optim.epochs=1")
    for features in ("cached", "augmented"):
        settings = [
            f"linear.features={features}",
            "linear.epochs=3",
            "linear.batch_size=32",
            "linear.lr=0.01",
            "--no-baselines",
        ]
        for processes in (1, 2):
            run(tmp_path, "train_linear.py", *TINY, "name=a", *settings, processes=processes)
        with open(tmp_path / "runs" / "a" / "linear.jsonl") as f:
            one, two = [json.loads(line)["rows"]["a"] for line in f][-2:]
        assert one == pytest.approx(two, abs=0.2), features


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    done = run(
        tmp_path, "train_pretrain.py", *TINY, "optim.batch_size=33", processes=2, check=False
    )
    assert done.returncode != 0
    assert "batch_size 33 does not divide by 2 processes" in done.stderr


# -------------------------------------------------- what the processes say as they end


def refusals():
    """What each of two processes ends with that refuse alike, alone, and otherwise."""
    distributed.init_distributed("cpu")
    rank, ends = distributed.rank(), []
    store = distributed.object_store.store
    for sentences in (("alike", "alike"), (None, "alone"), ("one", "another")):
        try:
            with distributed.say_refusals_once():
                if sentences[rank]:
                    raise SystemExit(sentences[rank])
            ends.append("none")
        except SystemExit as refusal:
            ends.append(refusal.code)
        distributed.all_gather_object(0)
        if rank == 0:
            for key in ("last sentence", "left 0", "left 1"):
                store.delete_key(key)
        distributed.all_gather_object(0)
    distributed.cleanup()
    return ends


def test_what_all_processes_refuse_the_first_says(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.store.LONGEST_ECHO", 0.2)
    first, second = in_processes(2, refusals, tmp_path)[0]
    assert first == ["alike", "none", "one"]
    assert second == [1, "alone", "another"]


def test_one_process_says_what_it_refuses():
    with pytest.raises(SystemExit, match="a sentence"), distributed.say_refusals_once():
        raise SystemExit("a sentence")


@pytest.mark.slow
def test_a_script_in_two_processes_refuses_once(tmp_path):
    quickstart = os.path.join(ROOT, "yaml", "quickstart.yaml")
    arguments = ["--cfg", quickstart, "data.limit=24", "optim.batch_size=12", "model.bn_splits=5"]
    done = run(tmp_path, "train_pretrain.py", *arguments, processes=2, check=False)
    assert "which optim.accumulate 1 times model.bn_splits 5" in done.stderr.replace("\n", " ")
    assert (tmp_path / "said1.err").read_text() == ""


@pytest.mark.parametrize(
    "environment, sentence",
    [
        (
            {"RANK": "0"},
            "RANK=0, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with torchrun",
        ),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "RANK=3, but not MASTER_ADDR, MASTER_PORT"),
        (
            group_environments(2)[0] | {"RANK": "2"},
            "RANK=2, WORLD_SIZE=2 and .*RANK below WORLD_SIZE",
        ),
        (group_environments(2)[0] | {"RANK": "zero"}, "RANK=zero, .* must be whole numbers"),
        (
            group_environments(2)[0] | {"MASTER_PORT": "http"},
            "MASTER_PORT=http: they must be whole numbers",
        ),
    ],
)
def test_an_environment_with_half_a_process_group_is_refused(environment, sentence, monkeypatch):
    for name in distributed.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=sentence):
        distributed.init_distributed("cpu")


def test_torch_gets_no_more_threads_than_the_container_has_cores(monkeypatch):
    limited = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(distributed, "limit_threads", lambda: limited.append(True))
    distributed.init_distributed("cpu")
    assert limited == [True]
