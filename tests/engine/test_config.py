"""Settings: what is accepted, what it becomes, and the one sentence for everything else."""

import os

import pytest
import torch

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
    assert cfg["name"] == "a"
    assert cfg["seed"] == 0
    assert cfg["optim"]["lr"] == 0.03
    assert cfg["model"]["dim"] == 128
    expected = {"name": "nce", "temperature": 0.2, "n_negatives": None, "base_temperature": None}
    assert cfg["loss"] == expected
    # what is printed is what is saved, and it loads
    assert yaml.safe_load(config.to_yaml(cfg)) == cfg


def test_overrides(file):
    cfg = config.load(
        file,
        [
            "optim.epochs=7",
            "name=b",
            "seed=3",
            "optim.milestones=[1,2]",
            "optim.schedule=step",
            "loss.n_negatives=9",
            "optim.lr=1e-3",
        ],
    )
    assert (
        cfg["optim"]["epochs"],
        cfg["name"],
        cfg["seed"],
        cfg["optim"]["milestones"],
        cfg["loss"]["n_negatives"],
    ) == (7, "b", 3, [1, 2], 9)
    assert cfg["optim"]["lr"] == 0.001


def test_another_host_or_method_takes_only_what_it_shares(file):
    cfg = config.load(file, ["model.host=ir", "loss.name=ring"])
    # IR's own momentum is another thing
    assert cfg["model"]["momentum"] == 0.5
    assert "queue_size" not in cfg["model"]
    assert cfg["loss"]["temperature"] == 0.2
    assert cfg["loss"]["outer"] == 0.1


def test_base(file, tmp_path):
    (tmp_path / "b.yaml").write_text("base: a.yaml\nloss: {name: ring, inner: 0}\noptim: {lr: 1}\n")
    cfg = config.load(str(tmp_path / "b.yaml"))
    assert cfg["name"] == "b"
    assert cfg["optim"] == {**config.load(file)["optim"], "lr": 1.0}
    assert cfg["loss"]["name"] == "ring"
    assert cfg["loss"]["inner"] == 0.0
    (tmp_path / "c.yaml").write_text("base: b.yaml\n")
    with pytest.raises(SystemExit, match="one level deep"):
        config.load(str(tmp_path / "c.yaml"))


def test_a_list_of_losses(file):
    several = "loss=[{name: ifnd, clusters: [3]}, {name: ring}]"
    cfg = config.load(file, [several, "loss.ring.inner=0.05", "loss.ifnd.temperature=1"])
    assert [one["name"] for one in cfg["loss"]] == ["ifnd", "ring"]
    assert cfg["loss"][0]["clusters"] == [3]
    assert cfg["loss"][0]["temperature"] == 1.0
    assert cfg["loss"][1]["inner"] == 0.05
    assert cfg["loss"][1]["outer"] == 0.1
    assert yaml.safe_load(config.to_yaml(cfg)) == cfg
    assert config.difference(cfg, config.load(file, [several])).startswith("loss was [")
    for overrides, message in [
        (["loss=[]"], "loss is an empty list"),
        (["loss=[{name: rig}]"], r"loss\[0\]\.name is 'rig'; did you mean ring\?"),
        (["loss=[3]"], r"loss\[0\] is 3"),
        ([several, "loss.inner=1"], "a key of it is loss.<name>.key, with one of ifnd, ring"),
        ([several, "loss.mochi.mixed=1"], "with one of ifnd, ring"),
        ([several, "loss.ring.iner=1"], r"loss\[1\]\.iner is not a setting; did you mean inner"),
    ]:
        with pytest.raises(SystemExit, match=message):
            config.load(file, overrides)


@pytest.mark.parametrize(
    "override,message",
    [
        (
            "loss.temprature=1",
            r"a\.yaml: loss\.temprature is not a setting; did you mean temperature\?",
        ),
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
        ("loss", "not key=value"),
        ("=3", "not key=value"),
        ("loss.ring.inner=3", "section.key"),
        ("loss=3", "section.key"),
        ("optim.lr=[", "not YAML"),
        ("names=3", r"names is not a setting; did you mean name\?"),
        ("seed=a", "seed is 'a'"),
        ("seed=-1", "seed is -1"),
        ("name=../x", "must name one folder"),
        ("model.encoder=3", "model.encoder is not a setting"),  # what the script supplies is no key
        (
            "optim.epochs=010",
            "on the command line: the value cannot be read: '010' would be read to the base of 8",
        ),  # as 8
        ("optim.epochs=-0_7", "base of 8"),
        ("optim.epochs=1:30", "base of 60"),
        ("optim.lr=1:30.5", "base of 60"),
        ("optim.epochs=0o17", "optim.epochs is '0o17'; it must be a whole number"),
        ("optim.epochs=1e2", "'1e2'; it must be a whole number"),
        ("optim.lr=.inf", "optim.lr is inf; it must be a number"),
        ("optim.lr=1e400", "optim.lr is inf"),
        ("optim.lr=-Infinity", "optim.lr is -inf"),
        ("optim.epochs=9007199254740993", r"of 2 \*\* 53 at most"),
        (
            f"optim.lr={10**400}",
            r"optim\.lr is 1000.* \.\.\. .*000; it must be a number, of 2 \*\* 53",
        ),
        (f"optim.epochs=0x{'f' * 5000}", "optim.epochs is a value too large to be written"),
        (f"optim.epochs={'9' * 5000}", "cannot be read: Exceeds the limit"),
        ("name=2026-13-45", "cannot be read: month must be"),
        ("name=2026-11-21", "must be a word"),
        ("name=!!bool maybe", "!!bool is a tag"),
        ("name=! a", "! is a tag"),
        ("optim.milestones=[&a 1, *a]", r"\*a stands for what is written elsewhere"),
        (f"optim.lr={'[' * 1000}", "nested too deep"),
        ('name="a\\nb"', "name is 'a.{1,2}nb'; it must be printable"),
        ('name="\\ud800"', "printable"),
        (f"name={'x' * 201}", "at most 200 bytes"),
        (f"data.root={'x' * 1001}", "1000 characters"),
        ("loss.name=os:system", "loss.name is 'os:system'; there are ifnd"),
        ("model.host=Encoder", "model.host is 'Encoder'; there are cmc"),
        ("model.host=[moco]", r"model.host is \['moco'\]"),
        ("loss=[{name: ring, inner: 0, inner: 0.5}]", "inner stands twice, in line 1; keep one"),
        ("paper.reported=2026-11-21", "paper.reported is datetime"),
        ("paper.reported=[1]", "paper.reported is"),
    ],
)
def test_what_is_wrong_is_named(file, override, message):
    with pytest.raises(SystemExit, match=message):
        config.load(file, [override])


@pytest.mark.parametrize(
    "text,message",
    [
        (
            "loss: {name: nce}\n",
            "model.host is missing|data.augment is missing|data.name is missing",
        ),
        ("- 1\n", "must hold keys and values"),
        ("a: [\n", "is not YAML"),
        ("data: 3\n", "data is 3"),
        ("dta: {}\n", r"dta is not a setting; did you mean data\?"),
        (FILE + "paper: {tabel: x}\n", r"paper\.tabel is not a setting; did you mean table\?"),
        (
            FILE.replace("optim: {epochs: 2, ", "optim: {"),
            r"optim\.epochs is missing; add it to the file, or optim\.epochs=\.\.\. to the command",
        ),
        (
            FILE.replace("name: nce, ", ""),
            r"loss\.name is missing; there are ifnd, jcl, mochi, nce, ring",
        ),
        (
            FILE + "optim: {epochs: 9}\n",
            r"x\.yaml cannot be read: optim stands twice, in line 5 and 6; keep one",
        ),  # PyYAML takes the last
        (FILE.replace("epochs: 2", "epochs: 2, 'epochs': 3"), "epochs stands twice, in line 5"),
        ("knn:\n  k: 1\n  every: 2\n  k: 3\n", "k stands twice, in line 2 and 4"),
        ("a: &a {b: 1}\nc: *a\n", "a stands for what is written elsewhere; write it out"),
        ("a: &a {b: 1}\nc: {<<: *a}\n", r"\*a stands for"),
        ("a: &a [*a]\n", r"\*a stands for"),
        (FILE + "seed: 010\n", "'010' in line 6 would be read to the base of 8"),
        ("a: 1\nb: !!int 3\n", "!!int in line 2 is a tag"),
        ("a: &a 1\nb: *a\n", "write it out in line 2"),
        (FILE + "base:\n", "base is None; it must name a .yaml file"),
        (FILE + "base: /etc/hostname\n", "base is '/etc/hostname'"),
        (FILE + "--- \na: 3\n", "x.yaml is not YAML: expected a single document"),
        (FILE + "3: 4\n", "x.yaml: 3 is not a setting"),
        (FILE + '"a\\nb": 4\n', r"x.yaml: 'a\\nb' is not a setting"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        config.load(str(path))


def test_bytes_that_are_no_text_and_those_that_say_what_text_it_is(tmp_path):
    path = tmp_path / "x.yaml"
    for content, message in (
        (b"\xff" + FILE.encode(), "can't decode byte 0xff"),
        (FILE.encode() + b"name: \xe9\n", "can't decode byte 0xe9"),
        (b"a: \x00\n", "not YAML: unacceptable character"),
        (FILE.encode("utf-16"), "can't decode"),
    ):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            config.load(str(path))
    # as Windows writes it
    path.write_bytes(b"\xef\xbb\xbf" + FILE.encode() + "name: \u00e9\r\n".encode())
    assert config.load(str(path))["name"] == "\u00e9"


def test_what_chooses_other_keys_comes_first_on_the_command_line(file):
    """Or the new host would take the keys before it away, as it does with the file's."""
    for overrides in (
        ["model.momentum=0.7", "model.host=ir"],
        ["model.host=ir", "model.momentum=0.7"],
        ["model.host=cmc", "model.momentum=0.7", "model.host=ir"],
    ):
        assert config.load(file, overrides)["model"]["momentum"] == 0.7
    assert (
        config.load(file, ["loss.ring.inner=0.05", "loss=[{name: ifnd}, {name: ring}]"])["loss"][1][
            "inner"
        ]
        == 0.05
    )
    # else the last counts
    assert config.load(file, ["optim.lr=1", "optim.lr=2"])["optim"]["lr"] == 2.0


def test_a_host_may_bring_keys_of_its_own_encoder(file):
    """CMC's: they come with the host, reach its encoder, and go with it."""
    cfg = config.load(file, ["model.host=cmc", "model.colour_space=ycbcr"])
    assert cfg["model"]["colour_space"] == "ycbcr"
    assert config.load(file, ["model.host=cmc"])["model"]["colour_space"] == "lab"
    encoder = config.build(
        config.method_class(cfg["model"], "model").Encoder,
        cfg["model"] | {"width": 4},
        "a",
        device=torch.device("cpu"),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    assert encoder.colour_space == "ycbcr"
    with pytest.raises(SystemExit, match="colour_space is not a setting"):
        config.load(file, ["model.colour_space=ycbcr"])
    with pytest.raises(SystemExit, match="colour_space is 'luv'.*must be one of lab, ycbcr"):
        config.load(file, ["model.host=cmc", "model.colour_space=luv"])
    with open(file) as f:
        text = f.read()
    with open(file, "w") as f:  # a host on the command line takes the old one's keys away
        f.write(
            text.replace(
                "host: moco, momentum: 0.9, queue_size: 64", "host: cmc, colour_space: ycbcr"
            )
        )
    assert config.load(file)["model"]["colour_space"] == "ycbcr"
    assert "colour_space" not in config.load(file, ["model.host=ir"])["model"]


def test_defaults_are_not_shared(file):
    """Two equal lists in YAML would be one, by an alias, which is not read again."""
    cfg = config.load(file, ["loss=[{name: ifnd}, {name: ifnd}]"])
    assert cfg["loss"][0]["clusters"] is not cfg["loss"][1]["clusters"]
    assert "*" not in config.to_yaml(cfg)


def test_more_memory_than_there_is_is_a_sentence_and_other_errors_stay_as_they_are():
    def target(*, size: int):
        return torch.empty(size) if size > 0 else torch.ones(2) @ torch.ones(3)

    for size in (2**50, 2**62):
        message = r"a.yaml: model: this takes more memory than there is \(.*\); lower size$"
        with pytest.raises(SystemExit, match=message):
            config.build(target, {"size": size}, "a.yaml: model")
    with pytest.raises(RuntimeError):
        config.build(target, {"size": 0}, "a.yaml: model")


def test_a_file_that_is_not_there_and_its_neighbour(file):
    with pytest.raises(SystemExit, match=r"does not exist; did you mean a\.yaml\?"):
        config.load(file.replace("a.yaml", "aa.yaml"))


def test_no_init_in_yaml():
    assert not os.path.exists(os.path.join(ROOT, "yaml", "__init__.py"))  # it would hide PyYAML
    assert "site-packages" in yaml.__file__ or "dist-packages" in yaml.__file__


def test_difference_names_the_first():
    old = {"seed": 0, "loss": {"t": 1, "u": 2}, "knn": {"k": 1}}
    assert config.difference(old, old) is None
    assert config.difference(old, {**old, "loss": {"t": 1, "u": 3}}) == "loss.u was 2 and is now 3"
    assert config.difference(old, {**old, "knn": {"k": 2}}, ["knn"]) is None
    assert config.difference(old, {**old, "knn": {"k": 2}}, ["knn.k"]) is None
