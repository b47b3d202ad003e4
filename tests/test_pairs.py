"""Every method on every host, and methods together: two epochs on shapes, in one process or two.

Ranks stay equal, a resumed run is bit-exact, and labels do not reach the weights.
"""

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
# The pairs that draw their negatives from the bank, as the papers do.
DRAWS = {("ir", "nce"), ("cmc", "ring"), ("ir", "ring")}

IFND = "name: ifnd, temperature: 0.2, clusters: [4, 8], reassign_every: 1"
RING = "name: ring, temperature: 0.2, inner: 0.05, outer: 0.6"
MOCHI = "name: mochi, temperature: 0.2, hardest: 8, mixed: 10, query_mixed: 5, warmup_epochs: 1"
JCL = "name: jcl, temperature: 0.2"
TOGETHER = {
    "moco-ifnd+ring+mochi": [
        "model.host=moco",
        "model.queue_size=64",
        f"loss=[{{{IFND}}}, {{{RING}}}, {{{MOCHI}}}]",
    ],
    "ir-ring+jcl": [
        "model.host=ir",
        "model.n_views=2",
        f"loss=[{{{RING}, n_negatives: 20}}, {{{JCL}}}]",
    ],
    "simclr-ring+attract": [
        "model.host=simclr",
        f"loss=[{{{RING}}}, {{{IFND}, mode: attract}}]",
    ],
}


def pair_settings(host, loss):
    settings = [f"model.host={host}", *HOSTS[host], f"loss.name={loss}", *LOSSES[loss]]
    if (host, loss) in DRAWS:
        settings.append("loss.n_negatives=20")
    return settings


PAIRS = {f"{host}-{loss}": pair_settings(host, loss) for host in HOSTS for loss in LOSSES}
PAIRS |= TOGETHER
ORACLE = {"oracle": [*PAIRS["moco-mochi"], "loss.oracle=true"]}

# Every host, every loss and the longest list are run once; the rest are slow.
# (test_distributed.py has plain InfoNCE.)
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

# A job trains all pairs of a group, each twice: undisturbed, and as a run that was cut after its
# first epoch and resumes with shuffled labels.
JOB = """
    import copy
    import functools
    import hashlib
    import json
    import os
    import shutil
    import sys

    sys.path.insert(0, {root!r})
    import torch
    from engine import checkpoint, distributed
    import train_pretrain
    from training import build

    # All runs of the job share one process group.
    device = distributed.init_distributed()
    leave_group = distributed.cleanup
    distributed.init_distributed = lambda asked: device
    distributed.cleanup = lambda: None

    plain_save = checkpoint.save
    plain_load = build.load
    drawn = functools.cache(plain_load)  # all runs have the same images
    saved = None

    def save(path, settings, epoch, **parts):
        # Every rank keeps its own state.
        global saved
        plain_save(path, settings, epoch, **parts)
        saved = {{name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}}
        saved["rng"] = torch.get_rng_state()
        # The figures of the epoch have times among them, which differ from run to run.
        del saved["place"]["finished"]
        # The file of the first epoch is what a killed run would leave.
        if distributed.is_main() and epoch == 1:
            cut = os.path.dirname(path) + "-cut"
            os.makedirs(cut)
            shutil.copy(path, cut)

    def update_hash(hasher, value):
        if isinstance(value, torch.Tensor):
            hasher.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            update_hash(hasher, list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                update_hash(hasher, item)
        else:
            hasher.update(repr(value).encode())

    def digest(value):
        hasher = hashlib.sha256()
        update_hash(hasher, value)
        return hasher.hexdigest()

    def pretrain(name, settings, load):
        build.load = load
        sys.argv = ["train_pretrain.py", *{tiny!r}, *settings, "log.pictures=0", f"name={{name}}"]
        train_pretrain.main()
        return {{part: digest(state) for part, state in saved.items()}}

    # The settings of a data set are read from the signature of `load`, which `wraps` keeps.
    @functools.wraps(plain_load)
    def load(*args, **settings):
        return copy.copy(drawn(*args, **settings))

    @functools.wraps(plain_load)
    def load_with_shuffled_labels(*args, **settings):
        data = load(*args, **settings)
        generator = torch.Generator().manual_seed(0)
        data.labels = data.labels[torch.randperm(len(data), generator=generator)]
        return data

    checkpoint.save = save
    digests = {{}}
    for name, settings in {pairs!r}.items():
        whole = pretrain(name, settings, load)
        distributed.barrier()
        resumed = pretrain(name + "-cut", settings, load_with_shuffled_labels)
        digests[name] = distributed.all_gather_object((whole, resumed))
    if distributed.is_main():
        with open("digests.json", "w") as f:
            json.dump(digests, f)
    leave_group()
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(processes, group) runs all pairs of a group, undisturbed and cut, in one job.

    Each job is run once. What resumes has its labels shuffled.

    Returns:
        {pair: [(whole, resumed) of each rank]}, where both are the digests of every part of the
        state; and the folder of the runs.
    """

    @functools.cache
    def train_once(processes, group):
        folder = tmp_path_factory.mktemp("pairs")
        (folder / "job.py").write_text(
            textwrap.dedent(JOB).format(root=ROOT, tiny=TINY, pairs=GROUPS[group])
        )
        run(folder, folder / "job.py", processes=processes)
        with open(folder / "digests.json") as f:
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
    digests, folder = train(processes, group)
    ranks = digests[pair]
    for whole, resumed in ranks:
        assert whole == resumed  # weights, host, loss, optimizer, random numbers
    for part in ("encoder", "host", "loss", "optimizer"):
        assert len({whole[part] for whole, _ in ranks}) == 1
    assert len({whole["rng"] for whole, _ in ranks}) == len(ranks)  # each process draws its own
    with open(folder / "runs" / pair / "log.jsonl") as f:
        log = [json.loads(line) for line in f]
    assert [line["epoch"] for line in log] == [1, 2]
    for line in log:
        for name, figure in line.items():
            assert name == "hardware" or abs(figure) < 1e9, name  # nan is not below 1e9 either
    assert abs(log[-1]["loss"] - log[0]["loss"]) > 1e-6
    assert log[-1]["spread"] > 0.01


@pytest.mark.parametrize("processes, group", JOBS)
def test_labels_reach_the_weights_of_an_oracle_alone(train, processes, group):
    """The resumed runs had other labels, and all but the oracle ended as if they had not.

    The figures of the log differ, for labels serve to compute these.
    """
    digests, folder = train(processes, group)
    changed = {
        pair for pair, ranks in digests.items() if any(whole != resumed for whole, resumed in ranks)
    }
    assert changed == {"oracle"} & digests.keys()
    for pair in {"oracle", "moco-nce", "simclr-ring"} & digests.keys():
        whole = last_log_line(folder / "runs" / pair)
        resumed = last_log_line(folder / "runs" / f"{pair}-cut")
        if pair == "oracle":
            assert whole["oracle"] == 1
        else:
            assert "oracle" not in whole
            assert whole["false negatives used %"] != resumed["false negatives used %"]


def last_log_line(run_folder):
    return json.loads((run_folder / "log.jsonl").read_text().splitlines()[-1])
