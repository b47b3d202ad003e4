"""Settings: what is accepted, what it becomes, and the one sentence for everything else."""
import glob
import os

import pytest
import yaml

from engine import config

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FILE = """
data: {name: shapes, augment: cifar, image_size: 32}
model: {host: moco, momentum: 0.9, queue_size: 64}
loss: {name: nce, temperature: 0.2}
optim: {epochs: 2, batch_size: 8, lr: 3e-2}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(FILE)
    return str(path)


def test_defaults_are_the_signatures_and_1e_2_is_a_number(file):
    cfg = config.load(file)
    assert cfg["name"] == "a" and cfg["seed"] == 0 and cfg["optim"]["lr"] == 0.03 and cfg["model"]["dim"] == 128
    assert cfg["loss"] == {"name": "nce", "temperature": 0.2, "n_negatives": None}
    assert yaml.safe_load(config.text(cfg)) == cfg         # what is printed is what is saved, and it loads


def test_overrides(file):
    cfg = config.load(file, ["optim.epochs=7", "name=b", "seed=3", "optim.milestones=[1,2]", "optim.schedule=step", "loss.n_negatives=9", "optim.lr=1e-3"])
    assert (cfg["optim"]["epochs"], cfg["name"], cfg["seed"], cfg["optim"]["milestones"], cfg["loss"]["n_negatives"]) == (7, "b", 3, [1, 2], 9)
    assert cfg["optim"]["lr"] == 0.001


def test_another_host_or_method_takes_only_what_it_shares(file):
    cfg = config.load(file, ["model.host=ir", "loss.name=ring"])
    assert cfg["model"]["momentum"] == 0.5 and "queue_size" not in cfg["model"]       # IR's own momentum is another thing
    assert cfg["loss"]["temperature"] == 0.2 and cfg["loss"]["outer"] == 0.1


def test_base(file, tmp_path):
    (tmp_path / "b.yaml").write_text("base: a.yaml\nloss: {name: ring, inner: 0}\noptim: {lr: 1}\n")
    cfg = config.load(str(tmp_path / "b.yaml"))
    assert cfg["name"] == "b" and cfg["optim"] == {**config.load(file)["optim"], "lr": 1.0}
    assert cfg["loss"]["name"] == "ring" and cfg["loss"]["inner"] == 0.0
    (tmp_path / "c.yaml").write_text("base: b.yaml\n")
    with pytest.raises(SystemExit, match="one level deep"):
        config.load(str(tmp_path / "c.yaml"))


def test_a_list_of_losses(file):
    several = "loss=[{name: ifnd, clusters: [3]}, {name: ring}]"
    cfg = config.load(file, [several, "loss.ring.inner=0.05", "loss.ifnd.temperature=1"])
    assert [one["name"] for one in cfg["loss"]] == ["ifnd", "ring"] and cfg["loss"][0]["clusters"] == [3] and cfg["loss"][0]["temperature"] == 1.0
    assert cfg["loss"][1]["inner"] == 0.05 and cfg["loss"][1]["outer"] == 0.1
    assert yaml.safe_load(config.text(cfg)) == cfg
    assert config.difference(cfg, config.load(file, [several])).startswith("loss was [")
    for overrides, message in [(["loss=[]"], "loss is an empty list"), (["loss=[{name: rig}]"], r"loss\[0\]\.name is 'rig'; did you mean ring\?"),
                               (["loss=[3]"], r"loss\[0\] is 3"), ([several, "loss.inner=1"], "a key of it is loss.<name>.key, with one of ifnd, ring"),
                               ([several, "loss.mochi.mixed=1"], "with one of ifnd, ring"), ([several, "loss.ring.iner=1"], r"loss\[1\]\.iner is not a setting; did you mean inner")]:
        with pytest.raises(SystemExit, match=message):
            config.load(file, overrides)


@pytest.mark.parametrize("override,message", [
    ("loss.temprature=1", r"a\.yaml: loss\.temprature is not a setting; did you mean temperature\?"),
    ("optim.lr=fast", r"optim\.lr is 'fast'; it must be a number"),
    ("optim.lr=.nan", r"optim\.lr is nan"),
    ("optim.epochs=2.5", "optim.epochs is 2.5; it must be a whole number"),
    ("optim.epochs=true", "optim.epochs is True; it must be a whole number"),
    ("model.host=mocoo", r"model\.host is 'mocoo'; did you mean moco\?"),
    ("model.host=resnet", "model.host is 'resnet'"),
    ("loss.name=rings", r"did you mean ring\?; there are ifnd, jcl, mochi, nce, ring"),
    ("model.backbone=resnet19", "must be one of resnet10"),
    ("optim.milestones=[1,a]", r"optim\.milestones\[1\] is 'a'"),
    ("modell.dim=3", r"modell is not a section; did you mean model\?"),
    ("loss", "not key=value"), ("=3", "not key=value"), ("loss.ring.inner=3", "section.key"), ("loss=3", "section.key"),
    ("optim.lr=[", "not YAML"), ("names=3", r"names is not a setting; did you mean name\?"), ("seed=a", "seed is 'a'"), ("seed=-1", "seed is -1"), ("name=../x", "must name one folder"),
    ("model.encoder=3", "model.encoder is not a setting"),                             # what the script supplies is no key
])
def test_what_is_wrong_is_named(file, override, message):
    with pytest.raises(SystemExit, match=message):
        config.load(file, [override])


@pytest.mark.parametrize("text,message", [
    ("loss: {name: nce}\n", "model.host is missing|data.augment is missing|data.name is missing"),
    ("- 1\n", "must hold keys and values"), ("a: [\n", "is not YAML"), ("data: 3\n", "data is 3"), ("dta: {}\n", r"dta is not a setting; did you mean data\?"),
    (FILE + "paper: {tabel: x}\n", r"paper\.tabel is not a setting; did you mean table\?"),
    (FILE.replace("optim: {epochs: 2, ", "optim: {"), r"optim\.epochs is missing; add it to the file, or optim\.epochs=\.\.\. to the command line"),
    (FILE.replace("name: nce, ", ""), r"loss\.name is missing; there are ifnd, jcl, mochi, nce, ring"),
])
def test_files_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        config.load(str(path))


def test_a_file_that_is_not_there_and_its_neighbour(file):
    with pytest.raises(SystemExit, match=r"does not exist; did you mean a\.yaml\?"):
        config.load(file.replace("a.yaml", "aa.yaml"))


def test_no_init_in_yaml():
    assert not os.path.exists(os.path.join(ROOT, "yaml", "__init__.py"))               # it would hide PyYAML
    assert "site-packages" in yaml.__file__ or "dist-packages" in yaml.__file__


def test_difference_names_the_first():
    old = {"seed": 0, "loss": {"t": 1, "u": 2}, "knn": {"k": 1}}
    assert config.difference(old, old) is None
    assert config.difference(old, {**old, "loss": {"t": 1, "u": 3}}) == "loss.u was 2 and is now 3"
    assert config.difference(old, {**old, "knn": {"k": 2}}, ["knn"]) is None
    assert config.difference(old, {**old, "knn": {"k": 2}}, ["knn.k"]) is None


def test_whatever_is_thrown_at_it_is_accepted_or_refused_in_one_line(tmp_path):
    """Three thousand mutated files and overrides: settings, or one sentence; never anything else."""
    import random
    chance, files, outcomes = random.Random(0), sorted(glob.glob(os.path.join(ROOT, "yaml", "*.yaml"))), {"accepted": 0, "refused": 0}
    values = ["1", "-1", "1.5", "null", "true", "[1]", "{a: 1}", "abc", "", ".nan", "[[1]]", "{}", "2026-11-21", "!!python/object:os.system x", "&a [*a]", "- b", "[{name: ring}, {name: jcl, lam: x}]", "[{name: ring}, {name: mochi}]"]
    for _ in range(1000):
        file, path = chance.choice(files), str(tmp_path / "mutant.yaml")
        with open(file) as f:
            text = list(f.read())
        for _ in range(chance.randint(0, 5)):
            i = chance.randrange(len(text))
            text[i] = chance.choice(["", "", *"{}[]:,-#\n '1&*!"])
        with open(path, "w") as f:
            f.write("".join(text))
        section = chance.choice([*config.SECTIONS, "paper", "name", "seed", "base", "x"])
        key = chance.choice(["epochs", "lr", "name", "host", "temperature", "limit", "dim", "k", "zz", "", "ring.inner"])
        for call in ((path, []), (file, [f"{section}.{key}={chance.choice(values)}"]), (file, [f"{section}={chance.choice(values)}"])):
            try:
                config.load(*call)
                outcomes["accepted"] += 1
            except SystemExit as refusal:
                assert refusal.code and "\n" not in str(refusal.code)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
