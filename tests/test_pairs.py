"""Every method on every host, and methods together: two epochs on shapes, in one process and in two; ranks stay equal, resume is bit-exact, and labels
do not reach the weights."""

import functools
import json
import textwrap

import pytest

from processes import ROOT, run
from test_distributed import TINY

HOSTS = {"ir": [], "cmc": [], "moco": ["model.queue_size=64"], "simclr": []}
LOSSES = {
    "nce": [],
    "ring": ["loss.inner=0.1", "loss.outer=0.5"],
    "mochi": ["loss.hardest=16", "loss.mixed=20", "loss.query_mixed=10", "loss.warmup_epochs=1"],
    "jcl": ["model.n_views=3"],
    "ifnd": ["loss.clusters=[4,8]", "loss.reassign_every=1"],
}
DRAWS = {("ir", "nce"), ("cmc", "ring"), ("ir", "ring")}  # as the papers do on a bank
IFND, RING, MOCHI = (
    "{name: ifnd, temperature: 0.2, clusters: [4, 8], reassign_every: 1%s}",
    "{name: ring, temperature: 0.2, inner: 0.05, outer: 0.6%s}",
    "{name: mochi, temperature: 0.2, hardest: 8, mixed: 10, query_mixed: 5, warmup_epochs: 1}",
)
TOGETHER = {
    "moco-ifnd+ring+mochi": [
        "model.host=moco",
        "model.queue_size=64",
        f"loss=[{IFND % ''}, {RING % ''}, {MOCHI}]",
    ],
    "ir-ring+jcl": [
        "model.host=ir",
        "model.n_views=2",
        f"loss=[{RING % ', n_negatives: 20'}, {{name: jcl, temperature: 0.2}}]",
    ],
    "simclr-ring+attract": ["model.host=simclr", f"loss=[{RING % ''}, {IFND % ', mode: attract'}]"],
}
PAIRS = {
    f"{host}-{loss}": [
        f"model.host={host}",
        *of_host,
        f"loss.name={loss}",
        *of_loss,
        *(["loss.n_negatives=20"] if (host, loss) in DRAWS else []),
    ]
    for host, of_host in HOSTS.items()
    for loss, of_loss in LOSSES.items()
} | TOGETHER

ORACLE = {"oracle": [*PAIRS["moco-mochi"], "loss.oracle=true"]}
# Every host, every loss (plain InfoNCE: test_distributed.py) and the longest list once; the rest are slow.
QUICK = ["ir-ring", "cmc-mochi", "moco-ifnd", "simclr-jcl", "moco-ifnd+ring+mochi", "oracle"]
GROUPS = {
    "quick": {name: settings for name, settings in (PAIRS | ORACLE).items() if name in QUICK},
    "rest": {name: settings for name, settings in PAIRS.items() if name not in QUICK},
}
JOBS = [
    pytest.param(
        processes,
        group,
        id=f"{processes} {'process' if processes == 1 else 'processes'}, {group}",
        marks=[pytest.mark.slow] * (group == "rest"),
    )
    for processes in (1, 2)
    for group in GROUPS
]

JOB = """
    import copy, functools, hashlib, json, os, shutil, sys
    sys.path.insert(0, {root!r})
    import torch
    from engine import checkpoint, distributed
    import train_pretrain
    from training import build

    device, stop, saved = distributed.init_distributed(), distributed.cleanup, None
    distributed.init_distributed, distributed.cleanup = lambda asked: device, lambda: None
    plain = checkpoint.save

    def save(path, settings, epoch, **parts):              # every rank keeps its own state; the first epoch's file is what a kill would leave
        global saved
        plain(path, settings, epoch, **parts)
        saved = dict(rng=torch.get_rng_state(), **{{k: copy.deepcopy(v.state_dict()) for k, v in parts.items()}})
        del saved["place"]["finished"]                     # the epoch's figures, times among them
        if distributed.is_main() and epoch == 1:
            cut = os.path.dirname(path) + "-cut"
            os.makedirs(cut)
            shutil.copy(path, cut)

    def digest(x, h):
        if isinstance(x, torch.Tensor):
            h.update(x.contiguous().numpy().tobytes())
        elif isinstance(x, (dict, list, tuple)):
            [digest(v, h) for v in (x.values() if isinstance(x, dict) else x)]
        else:
            h.update(repr(x).encode())
        return h.hexdigest()

    def run(name, settings, load=build.load):
        build.load = load
        sys.argv = ["train_pretrain.py", *{tiny!r}, *settings, f"name={{name}}"]
        train_pretrain.main()
        return {{k: digest(v, hashlib.sha256()) for k, v in saved.items()}}

    load = build.load

    @functools.wraps(load)                                 # whose settings are read from its signature
    def shuffled(*given, **settings):
        data = load(*given, **settings)
        data.labels = data.labels[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
        return data

    checkpoint.save = save
    found = {{}}
    for name, settings in {pairs!r}.items():
        whole = run(name, settings)
        distributed.barrier()
        found[name] = distributed.all_gather_object((whole, run(name + "-cut", settings, shuffled)))
    if distributed.is_main():
        json.dump(found, open("found.json", "w"))
    stop()
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(processes, group) runs all pairs of a group, whole and cut, in one job; each job is run once.

    It returns {pair: [(whole, resumed) of each rank]}, each a digest of every part of the state; and the folder. What resumes has its labels shuffled.
    """

    @functools.cache
    def train_once(processes, group):
        folder = tmp_path_factory.mktemp("pairs")
        (folder / "job.py").write_text(
            textwrap.dedent(JOB).format(root=ROOT, tiny=TINY, pairs=GROUPS[group])
        )
        run(folder, folder / "job.py", processes=processes)
        with open(folder / "found.json") as f:
            return json.load(f), folder

    return train_once


CASES = [
    pytest.param(*job.values, pair, id=f"{job.id}-{pair}", marks=job.marks)
    for job in JOBS
    for pair in GROUPS[job.values[1]]
    if pair != "oracle"
]


@pytest.mark.parametrize("processes, group, pair", CASES)
def test_trains_stays_equal_and_resumes_exactly(train, processes, group, pair):
    found, folder = train(processes, group)
    ranks = found[pair]
    for whole, resumed in ranks:
        assert whole == resumed  # weights, host, loss, optimizer, random numbers
    for part in ("encoder", "host", "loss", "optimizer"):
        assert len({whole[part] for whole, _ in ranks}) == 1
    assert len({whole["rng"] for whole, _ in ranks}) == len(ranks)  # each process draws its own
    with open(folder / "runs" / pair / "log.jsonl") as f:
        log = [json.loads(line) for line in f]
    assert [line["epoch"] for line in log] == [1, 2]
    assert all(v == v and abs(v) < 1e9 for line in log for k, v in line.items() if k != "hardware")
    assert abs(log[-1]["loss"] - log[0]["loss"]) > 1e-6
    assert log[-1]["spread"] > 0.01


@pytest.mark.parametrize("processes, group", JOBS)
def test_labels_reach_the_weights_of_an_oracle_alone(train, processes, group):
    """Those which resumed had other labels; all but the oracle ended as if they had not, by the test above. The log's figures differ: labels are for these."""
    found, folder = train(processes, group)
    assert {
        pair for pair, ranks in found.items() if any(whole != resumed for whole, resumed in ranks)
    } == {"oracle"} & found.keys()
    for pair in {"oracle", "moco-nce", "simclr-ring"} & found.keys():
        logs = [
            json.loads((folder / "runs" / name / "log.jsonl").read_text().splitlines()[-1])
            for name in (pair, f"{pair}-cut")
        ]
        assert logs[0].get("oracle") == (1 if pair == "oracle" else None)
        assert (
            pair == "oracle"
            or logs[0]["false negatives used %"] != logs[1]["false negatives used %"]
        )
