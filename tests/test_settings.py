"""Settings: each is taken as it stands, or refused in one sentence that names the key or the file.

Then what each key can bear alone, and what makes no sense together. The first part throws whatever
it can think of at the parser and at what is built from its settings; FULL=1 throws ten times as
much.
"""

import functools
import glob
import os
import random
import re
import sys
import typing

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train_finetune
import train_linear
import yaml
from data.datasets import ArraySet
from data.loader import Loader
from engine import config
from engine.schedule import Schedule, sgd
from evaluation.features import KNN, knn
from evaluation.unlabelled import Unlabelled
from losses import Contrast
from losses.diagnostics import step_diagnostics
from losses.ifnd import IFND
from losses.mochi import MoCHi
from losses.nce import NCE
from losses.ring import Ring
from losses.together import Together
from models.cmc import CMC, LabEncoder
from models.ir import IR
from models.moco import MoCo
from models.resnet import Encoder
from test_scripts import QUICK, TINY
from train_detect import Detect
from train_finetune import Finetune
from train_linear import Probe

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CASES = 10 if os.environ.get("FULL") else 1
CPU = torch.device("cpu")
DATA = ArraySet(
    torch.zeros(24, 3, 16, 16, dtype=torch.uint8),
    torch.arange(24) % 3,
    ["a", "b", "c"],
    (0.5,) * 3,
    (0.25,) * 3,
)
# what each script's main asks of config.load
EXTRA = {
    "train_pretrain": (),
    "train_linear": (),
    "train_finetune": ("finetune",),
    "train_detect": ("detect",),
}

# a small run: section -> key -> its value, as it is written in a file
RUN = {
    "data": {
        "name": "shapes",
        "limit": "24",
        "augment": "cifar",
        "image_size": "16",
        "workers": "0",
    },
    "optim": {"epochs": "4", "batch_size": "8", "lr": "0.1"},
    "knn": {"every": "1"},
    "linear": {"epochs": "3"},
    "finetune": {"labels": "0.5"},
    "detect": {"task": "box"},
}
ENCODER = {"backbone": "resnet10", "stem": "cifar", "width": "4", "dim": "8", "precision": "fp32"}
HOSTS = {"ir": {}, "cmc": {"exclude_self": "false"}, "moco": {"queue_size": "16"}, "simclr": {}}
LOSSES = {
    "nce": {},
    "ring": {},
    "mochi": {"hardest": "4", "mixed": "3", "warmup_epochs": "1"},
    "ifnd": {"clusters": "[2, 3]", "reassign_every": "2"},
    "jcl": {},
}

NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "5",
    "-1",
    "-3",
    "24",
    "25",
    "1000",
    "0.5",
    "1.5",
    "-0.5",
    "1e-4",
    "1.0e-4",
    "2E1",
    "-0.0",
    "1e-320",
    "1e400",
    ".inf",
    "-.inf",
    ".nan",
    "nan",
    "inf",
    "-Infinity",
    "010",
    "-017",
    "0o17",
    "0x10",
    "0b11",
    "1:30",
    "-1:30:00",
    "1:30.5",
    "1_000",
    "1_0.5",
    "_1",
    "'3'",
    '"0.1"',
    "'010'",
    "3 # 4",
    "3 #4",
    "1e",
    "３",
    "٣",
    "4294967296",
    "1125899906842624",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "1" + "0" * 400,
    "9" * 5000,
    "08",
    "0_7",
    "+3",
]
WORDS = [
    "",
    "''",
    "~",
    "null",
    "Null",
    "true",
    "True",
    "false",
    "yes",
    "no",
    "on",
    "OFF",
    "y",
    "a",
    "abc def",
    "moco",
    "Ring",
    "shapes",
    "ring",
    "nce",
    "ir",
    "cmc",
    "jcl",
    "ifnd",
    "folder",
    "os:system",
    "Encoder",
    "encoder",
    "__init__",
    "resnet",
    "resnet18",
    "partition",
    "cosine",
    "step",
    "mlp",
    "pil",
    "crop_flip",
    "eval",
    "svm",
    "voc2007",
    "coco",
    "voc",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".",
    "..",
    '"a\\0b"',
    '"a\\nb"',
    '"\\ud800"',
    "\U0001f642",
    "x" * 3000,
    "2026-11-21",
    "2026-13-45",
    "2026-11-21T25:00:00",
    "12:30:45",
    '"\\u202e"',
    "!",
    "=",
    "<<",
    "@x",
    "`x",
    "%x",
    "#x",
    "a: b: c",
    "a:",
    "|",
    ">-",
    "---",
    "--- 3",
    "...",
    "--- 1\n--- 2",
    "3\n4",
    "\t3",
    "3\t",
    "\x00",
    "\x07",
    "\ufeff3",
    "\r",
]
SHAPES = [
    "[]",
    "[1]",
    "[1, 2]",
    "[2, 1]",
    "[0.5, 1]",
    "[0, 0]",
    "[1, 1]",
    "[1e-4, '2']",
    "[-1]",
    "[0]",
    "[.inf]",
    "[.nan]",
    "[true]",
    "[null]",
    "[a]",
    "[[1]]",
    "[1, [2]]",
    "{}",
    "{a: 1}",
    "{a: 1, a: 2}",
    "[{name: ring}]",
    "[{name: ring, inner: 0, inner: 0.02}]",
    "[{name: ifnd, clusters: [2]}, {name: ring, temperature: 0.5}]",
    "- 1",
    "? a",
    "[",
    "]",
    "}",
    "{",
    "[1,",
    "!!python/object/apply:os.mkdir [owned]",
    "!!python/name:os.system",
    "!!python/tuple [1]",
    "!!bool maybe",
    "!!int x",
    "!!int ''",
    "!!int '3'",
    "!!float ''",
    "!!float x",
    "!!float 3",
    "!!str 3",
    "!!null 3",
    "!!binary x",
    "!!binary YQ==",
    "!!set {a}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!!timestamp x",
    "!!map 3",
    "!!seq 3",
    "!x 3",
    "!<x> 3",
    "&a 3",
    "*a",
    "&a [*a]",
    "&a {a: *a}",
    "[&a 1, *a]",
    "{<<: {a: 1}}",
    "{<<: 3}",
    "[" * 1000,
    "{a: " * 1000,
    "[" * 90 + "]" * 90,
    "[&a [1, 1], &b [*a, *a], &c [*b, *b]]",
]
ANYTHING = NUMBERS + WORDS + SHAPES
INTEGERS = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "8",
    "16",
    "24",
    "25",
    "100",
    "1000",
    "-1",
    "1125899906842624",
]
FLOATS = [
    "0",
    "0.01",
    "0.1",
    "0.2",
    "0.5",
    "0.99",
    "1",
    "1.5",
    "3",
    "100",
    "1e-4",
    "1e-30",
    "1e30",
    "-0.5",
]


# ----------------------------------------------------------------------------------- what is thrown


def draw_run(chance):
    """A valid run: a host, one loss or several, all sections."""
    host = chance.choice(list(HOSTS))
    names = chance.choice([*([name] for name in LOSSES), ["ifnd", "ring"], ["ifnd", "jcl"]])
    views = {"n_views": "3"} if "jcl" in names else {}
    losses = [{"name": name, **LOSSES[name]} for name in names]
    if len(losses) > 1:
        for loss in losses:
            loss["temperature"] = "0.2"
    sections = {section: dict(keys) for section, keys in RUN.items()}
    return {
        **sections,
        "model": {"host": host, **ENCODER, **HOSTS[host], **views},
        "loss": losses[0] if len(losses) == 1 else losses,
    }


def to_yaml(run):
    """Write a run as YAML, a line for each key."""
    lines = []
    for section, value in run.items():
        if isinstance(value, str):
            lines.append(f"{section}: {value}")
            continue
        lines.append(f"{section}:")
        for keys in value if isinstance(value, list) else [value]:
            first_line = len(lines)
            lines += [f"    {key}: {word}" for key, word in keys.items()]
            if isinstance(value, list):
                lines[first_line] = "  - " + lines[first_line].lstrip(" ")
    return "\n".join(lines) + "\n"


def save(run):
    with open("a.yaml", "w", encoding="utf-8", newline="", errors="surrogatepass") as f:
        f.write(to_yaml(run))


@functools.cache
def keys_of(section, name):
    """{key: kind} of a section, with the host or method of that name."""
    homes = [
        home.replace("{host}", str(name)).replace("{name}", str(name))
        for home in config.SECTIONS[section]
    ]
    choice = (
        {config.CHOICE[section]: typing.Literal[tuple(HOSTS if section == "model" else LOSSES)]}
        if section in config.CHOICE
        else {}
    )
    return choice | {
        k: p.annotation
        for home in homes
        for k, p in config.keys_of_choice(config.import_object(home)).items()
    }


def draw_key(chance, run):
    """Draw a key of a run.

    Returns:
        The key as on the command line, e.g. optim.lr or loss.ring.inner; what it lies in, a section
        or one of several losses; and its kind.
    """
    section = chance.choice([*run, "model", "loss", "loss", "name", "seed"])
    if section in ("name", "seed"):
        return section, run, str if section == "name" else int
    if isinstance(run[section], dict):
        settings, path = run[section], section
    else:
        settings = chance.choice(run[section])
        path = f"{section}.{settings['name']}"
    kinds = keys_of(section, settings.get(config.CHOICE.get(section)))
    key = chance.choice([key for key in kinds if key != "name" or path == section])
    return f"{path}.{key}", settings, kinds[key]


def draw_value(chance, kind):
    """Draw something of that kind, sensible or not; or anything."""
    if chance.random() < 0.3:
        return chance.choice(ANYTHING)
    alternatives = typing.get_args(kind)
    if type(None) in alternatives:
        kind = chance.choice([k for k in alternatives if k is not type(None)])
    if typing.get_origin(kind) is typing.Literal:
        return chance.choice(typing.get_args(kind))
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        count = chance.choice([0, 1, 1, 2, 2, 3])
        return f"[{', '.join(draw_value(chance, item) for _ in range(count))}]"
    values = {int: INTEGERS, float: FLOATS, bool: ["true", "false"], str: WORDS}
    return chance.choice(values.get(kind, ANYTHING))


class Tiny(nn.Module):
    """Stands in for an encoder whose settings are not the question."""

    def __init__(self, dim, vectors):
        super().__init__()
        self.dim = dim
        self.bn_splits = 1
        self.dtype = torch.float32
        self.layer = nn.Linear(3, vectors * dim)

    def forward(self, x):
        vectors = self.layer(x.mean((2, 3))).unflatten(1, (-1, self.dim))
        return F.normalize(vectors, dim=2).flatten(1)


def build(cfg, file, touched):
    """Build what the scripts make of the settings, on DATA, and take a step. -> True.

    The encoder is a Tiny unless its settings are `touched`.
    """

    def make(target, section, **kwargs):
        return config.build(target, cfg[section], f"{file}: {section}", **kwargs)

    torch.manual_seed(cfg["seed"])
    Host = config.method_class(cfg["model"], "model")
    if touched:
        EncoderOfHost = getattr(Host, "Encoder", Encoder)
        encoder = make(EncoderOfHost, "model", device=CPU, mean=DATA.mean, std=DATA.std)
    else:
        encoder = Tiny(cfg["model"]["dim"], 2 if cfg["model"]["host"] == "cmc" else 1)
    host = make(Host, "model", encoder=encoder, n_data=len(DATA))
    losses = [
        config.build(
            config.method_class(settings, "loss"),
            settings,
            f"{file}: loss",
            epochs=cfg["optim"]["epochs"],
            n_data=len(DATA),
            n_keys=host.n_keys,
            labels=DATA.labels,
        )
        for settings in config.loss_settings(cfg["loss"])
    ]
    loss_fn = losses[0]
    if len(losses) > 1:
        loss_fn = config.build(Together, {}, f"{file}: loss", losses=losses)
    schedule = make(Schedule, "optim")
    make(sgd, "optim", parameters=encoder.parameters(), lr=schedule.lr)
    for epoch in (0, 0.5, schedule.epochs / 2, schedule.epochs):
        assert 0 <= schedule(epoch) < float("inf"), "a learning rate that is none"
    loader = config.build(
        Loader,
        cfg["data"],
        f"{file}: optim",
        dataset=DATA,
        batch_size=schedule.batch_size,
        n_views=host.n_views,
        seed=cfg["seed"],
        device=CPU,
    )
    assert len(loader) > 0, "no step"
    make(
        KNN,
        "knn",
        train=DATA,
        test=DATA,
        image_size=cfg["data"]["image_size"],
        device=CPU,
        workers=0,
    )
    make(Unlabelled, "knn", loader=loader)
    for kind, section in ((Probe, "linear"), (Finetune, "finetune"), (Detect, "detect")):
        if section in cfg:
            assert str(make(kind, section))
    if host.n_views <= 5 and not touched and not draw_many(losses):
        # In the first epoch the queue of MoCo still holds keys of no image.
        for epoch in (0, schedule.epochs - 1):
            take_step(encoder, host, loss_fn, losses, epoch)
    return True


def draw_many(losses):
    """Does a loss draw or mix so many negatives that a step would take long?"""
    numbers = ("n_negatives", "mixed", "query_mixed")
    counts = [getattr(loss, number, 0) for loss in losses for number in numbers]
    return any(count is not None and count >= 10000 for count in counts)


def take_step(encoder, host, loss_fn, losses, epoch):
    """Take a step in the middle of an epoch. losses: loss_fn, or what it puts together."""
    now = epoch + 0.5
    for loss in losses:
        if hasattr(loss, "before_epoch"):
            reassigned = epoch // loss.reassign_every * loss.reassign_every
            loss.before_epoch(
                reassigned, lambda: F.normalize(torch.randn(len(DATA), encoder.dim), dim=1)
            )
    views = list(torch.rand(host.n_views, 8, 3, 16, 16))
    contrasts = host(encoder, views, torch.arange(8))
    outputs = [loss_fn(contrast, now) for contrast in contrasts]
    sum(output.loss for output in outputs).backward()
    host.update_memory()
    has_one_cluster = any(1 in getattr(loss, "clusters", []) for loss in losses)
    for contrast, output in zip(contrasts, outputs):
        figures = step_diagnostics(loss_fn, [contrast], [output], DATA.labels, now)
        assert figures["K"] > 0 or has_one_cluster, "a query has no negatives"


# ----------------------------------------------------------------------------------- what must hold


def means(raw, got):
    """Is `got` what one reads in `raw`?"""
    if re.fullmatch(r"[-+]?[0-9][0-9_]*", raw):
        number = int(raw.replace("_", ""))  # not octal
        if type(got) is int:
            return got == number
        if type(got) is float:
            return got == float(number)
        return got == raw
    if re.fullmatch(r"[-+]?[0-9]+(:[0-9]+)+(\.[0-9]*)?", raw):
        return isinstance(got, str)  # not to the base of sixty
    return alike(yaml.safe_load(raw), got)


def alike(read, got):
    """Is `got`, or the part of it that `read` speaks of, what PyYAML reads?

    But 1e-4, a word in YAML 1.1, may be a number.
    """
    if isinstance(got, list):
        return isinstance(read, list) and len(read) == len(got) and all(map(alike, read, got))
    if isinstance(got, dict):
        return isinstance(read, dict) and all(
            k in got and alike(v, got[k]) for k, v in read.items()
        )
    if isinstance(got, float) and type(read) in (int, str):
        read = float(read)
    return type(read) is type(got) and read == got and read not in (float("inf"), float("-inf"))


def flatten(cfg):
    """{"optim.lr": 0.1, "loss.ring.inner": 0.01, ...}"""
    values = {}
    for section, value in cfg.items():
        if isinstance(value, dict):
            values |= {f"{section}.{key}": v for key, v in value.items()}
        elif isinstance(value, list):
            for loss in value:
                values |= {f"{section}.{loss['name']}.{key}": v for key, v in loss.items()}
        else:
            values[section] = value
    return values


def outcome(call, *names):
    """call()'s result, or None where it refuses.

    It must refuse in one sentence that holds one of `names`: AssertionError for anything else.
    """
    try:
        return call()
    except SystemExit as refusal:
        sentence = refusal.code
        assert isinstance(sentence, str), f"refused by {sentence!r:.300}"
        assert sentence, f"refused by {sentence!r:.300}"
        assert "\n" not in sentence, f"refused by {sentence!r:.300}"
        assert len(sentence) < 1500, f"refused by {sentence!r:.300}"
        assert any(name in sentence for name in names), f"names none of {names}: {sentence:.300}"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}"[:300]) from error


def same_as_saved(cfg):
    """What is printed and saved as config.yaml means the same when it is read again."""
    with open("again.yaml", "w") as f:
        f.write(config.to_yaml(cfg))
    again = config.load("again.yaml")
    assert again == cfg, f"reads otherwise when it was saved: {config.difference(cfg, again)}"
    return True


class Tally:
    """Cases, and what was wrong with them."""

    def __init__(self):
        self.accepted, self.refused, self.faults = 0, 0, []

    def case(self, given, check, *arguments):
        """check(*arguments): accepted (true), refused (false), or an AssertionError."""
        try:
            if check(*arguments):
                self.accepted += 1
            else:
                self.refused += 1
        except AssertionError as error:
            self.faults.append(f"{str(given)[:300]}\n        {str(error).splitlines()[0]}")

    def __str__(self):
        counts = f"{self.accepted} accepted, {self.refused} refused, {len(self.faults)} faults"
        shown = self.faults[: int(os.environ.get("SHOW", 10))]
        return "\n".join([counts, *shown])


@pytest.fixture
def tally(tmp_path, monkeypatch):
    """Count cases in a folder of the test's own, and print how many there were (see pytest -rP)."""
    monkeypatch.chdir(tmp_path)
    tally = Tally()
    yield tally
    print(tally)
    assert not os.path.exists("owned"), "a tag of Python's ran"
    assert not tally.faults, tally


# ----------------------------------------------------------------------------------------- whatever


def check_values(words, script, names, before, given, chance):
    """The keys that were given have their new values, and the others what they had before."""
    arguments = config.command_line("").parse_args(["--cfg", "a.yaml", *words])
    cfg = outcome(lambda: config.load(arguments.cfg, arguments.overrides, EXTRA[script]), *names)
    if cfg is None:
        return False
    after = flatten(cfg)
    chosen = [key.split(".")[0] for key in given if key in ("model.host", "loss.name")]
    for key, (raw, source) in given.items():
        # Another host takes the file's keys away, but not the command line's.
        if source == "command line" or key.split(".")[0] not in chosen:
            message = f"{key}={raw:.100} became {after.get(key)!r:.100}"
            assert key in after, message
            assert means(raw, after[key]), message
    for key in {**before, **after}:
        section = key.split(".")[0]
        if key not in given and section not in chosen and section in before:
            message = f"{key} was {before.get(key)} and is now {after.get(key)}"
            assert before.get(key) == after.get(key), message
    if chance.random() < 0.25:
        same_as_saved(cfg)
    encoders = ("host", *ENCODER, "head", "bn_splits")
    touched = any(key.startswith("model.") and key.split(".")[1] in encoders for key in given)
    return outcome(lambda: build(cfg, "a.yaml", touched), *names, "more memory")


@pytest.mark.slow
def test_values_are_taken_as_they_stand_or_refused_and_what_follows_is_built_or_refused(tally):
    """One to three keys of a valid run get another value, in the file or on the command line."""
    chance, valid = random.Random(1), {}
    for _ in range(800 * CASES):
        run = draw_run(chance)
        script = chance.choice(list(EXTRA))
        valid_text = to_yaml(run)
        if valid_text not in valid:  # parsing takes most of this test's time
            save(run)
            valid[valid_text] = flatten(config.load("a.yaml"))
        before, given, words, names = valid[valid_text], {}, [], []
        count = chance.choice([1, 1, 1, 2, 3])
        for key, settings, kind in [draw_key(chance, run) for _ in range(count)]:
            raw = draw_value(chance, kind)
            last = key.split(".")[-1]
            names.append(last)
            if key == "loss.name":  # another method's defaults may not suit the rest
                names += ["n_views", "clusters"]
            fits_in_a_line = not re.search("[\n\r\t\x00\ufeff]|^---|^[.]{3}$", raw)
            if chance.random() < 0.3 and fits_in_a_line and key not in given:
                settings[last] = raw
                given[key] = raw, "file"
                names.append("a.yaml")
            else:
                words.append(f"{key}={raw}")
                given[key] = raw, "command line"
        save(run)

        tally.case((given, to_yaml(run)), check_values, words, script, names, before, given, chance)
    assert min(tally.accepted, tally.refused) > 200 * CASES


def check_refused(words, wrong):
    """The settings are refused in a sentence that names the key, or the file."""
    names = wrong.split(".")[0].strip(), repr(wrong.strip())[1:-1], "a.yaml"
    assert outcome(lambda: config.load("a.yaml", words), *names) is None, f"{wrong!r} was taken"


def test_a_key_that_does_not_exist_is_never_taken(tally):
    """Misspelt, of another section or host, or with dots where there are none."""
    chance = random.Random(2)
    for _ in range(300 * CASES):
        run = draw_run(chance)
        key, settings, kind = draw_key(chance, run)
        *path, last = key.split(".")
        i = chance.randrange(len(last) + 1)
        wrong = chance.choice(
            [
                last[:i] + last[i + 1 :],
                last[:i] + chance.choice("aeiou_ -3") + last[i:],
                last.upper(),
                last[:i] + last[i:][::-1],
                last.capitalize(),
                last + "s",
                f"{last}.{last}",
                f".{last}",
                f"{last}.",
                "self",
                "encoder",
                "dataset",
                "device",
                "epochs_",
                "__init__",
                "\u00e9" + last,
                "queue_size",
                "name",
            ]
        )
        if path:
            keys = keys_of(path[0], settings.get(config.CHOICE.get(path[0])))
            exists = wrong.strip() == last or wrong in keys
        else:
            exists = wrong.strip() in ("name", "seed")
        if exists:
            continue
        in_file = chance.random() < 0.5
        draw_value(chance, kind)
        value = chance.choice(["3", "0.5", "a"])
        words = []
        if in_file:
            settings[wrong] = value
        else:
            words.append(".".join([*path, wrong]) + f"={value}")
        save(run)

        tally.case((words, wrong), check_refused, words, wrong)
    assert tally.refused > 200 * CASES


def check_refused_twice(words, key):
    """The settings are refused in a sentence that says so."""
    sentence = f"{key} stands twice"
    assert outcome(lambda: config.load("a.yaml", words), sentence) is None, "was taken"


def test_a_key_twice_is_refused(tally):
    """In the block form or the flow form, quoted or not, in the file or on the command line."""
    chance = random.Random(3)
    for _ in range(100 * CASES):
        run = draw_run(chance)
        section = chance.choice(list(run))
        is_list = isinstance(run[section], list)
        settings = chance.choice(run[section]) if is_list else run[section]
        key = chance.choice(list(settings))
        again = chance.choice([key, f"'{key}'", f'"{key}"'])
        text, words = to_yaml(run), []
        kind = chance.choice(["block", "flow", "section", "command line"])
        pairs = [f"{k}: {v}" for k, v in settings.items()]
        section_again = f"{section}: {{{', '.join(pairs)}}}\n"
        position = chance.randrange(len(pairs) + 1)
        pairs.insert(position, f"{again}: {chance.choice([settings[key], '3'])}")
        if kind == "section":
            key = section
            text += section_again
        elif kind == "command line":
            words = [f"loss=[{{{', '.join(pairs)}}}]"]
        else:
            flow = f"{{{', '.join(pairs)}}}"
            block = "".join(f"\n    {pair}" for pair in pairs)
            run[section] = flow if kind == "flow" else block
            text = to_yaml(run)
        with open("a.yaml", "w") as f:
            f.write(text)

        tally.case((kind, again, text, words), check_refused_twice, words, key)
    assert tally.refused == 100 * CASES


def check_as_pyyaml(text):
    """What is taken is what PyYAML reads."""
    cfg = outcome(lambda: config.load("a.yaml"), "a.yaml")
    if cfg is None:
        return False
    assert alike(yaml.safe_load(text), cfg), f"PyYAML reads {yaml.safe_load(text)}"
    return same_as_saved(cfg)


def test_files_with_anything_in_them(tally):
    """Lines and characters of a valid file are lost, doubled, moved and put in.

    There are bytes among them that are no text. The file is named, or means what PyYAML reads.
    """
    chance = random.Random(4)
    bits = [
        *"{}[]:,-#'\"&*!|>%@`?0.~= \n\r\t",
        ": ",
        "- ",
        "&a ",
        "*a",
        "!!int ",
        "!!python/name:os.system ",
        "<<: ",
        "---\n",
        "...\n",
        "# ",
        "\u00e9",
        "\u2028",
        "\x85",
        "\x00",
        "\x1b",
    ]
    bits = [bit.encode() for bit in bits] + [
        b"\xff",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\xc3",
    ]
    rows = sorted(glob.glob(os.path.join(ROOT, "yaml", "*.yaml")))
    for _ in range(500 * CASES):
        lines = to_yaml(draw_run(chance)).encode().splitlines(True)
        if chance.random() < 0.5:
            with open(chance.choice(rows), "rb") as f:
                lines = f.read().splitlines(True)
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            i, j = chance.randrange(len(lines)), chance.randrange(len(lines))
            lines[i] = chance.choice(
                [
                    b"",
                    lines[j],
                    lines[i] + lines[j],
                    b"  " + lines[i],
                    lines[i].lstrip(),
                    lines[i].split(b":")[0] + b":\n",
                ]
            )
        text = b"".join(lines)
        for _ in range(chance.choice([0, 1, 1, 2, 3])):
            i = chance.randrange(len(text) + 1)
            text = text[:i] + chance.choice([b"", *bits]) + text[i + chance.choice([0, 1]) :]
        with open("a.yaml", "wb") as f:
            f.write(text)

        tally.case(text, check_as_pyyaml, text)
    assert min(tally.accepted, tally.refused) > 50 * CASES


# ------------------------------------------------------------------------- one by one, and together


def schedule(**settings):
    return Schedule(**{**dict(epochs=5, batch_size=2, lr=1.0), **settings})


def loader(images=24, **settings):
    return Loader(
        DATA.select(torch.arange(images)),
        **{
            **dict(batch_size=8, n_views=2, seed=0, device=CPU, augment="cifar", image_size=16),
            **settings,
        },
    )


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: schedule(gamma=0.0), "gamma is 0.0; it must be above 0"),
        (lambda: schedule(warmup_epochs=-1), "warmup_epochs is -1"),
        (lambda: schedule(warmup_epochs=5), "leaves nothing"),
        (
            lambda: schedule(schedule="step"),
            "schedule is step, but there are no milestones; .* schedule: constant",
        ),
        (lambda: schedule(accumulate=0), "accumulate is 0"),
        (
            lambda: schedule(schedule="step", milestones=[3, 0]),
            r"milestones \[3, 0\] must lie above 0",
        ),
        (lambda: schedule(milestones=[3]), "write schedule: step"),
        (lambda: sgd([], 1.0, momentum=1.0), "momentum value: 1.0"),
        (lambda: sgd([], 1.0, weight_decay=-1e-4), "weight_decay value"),
        (lambda: loader(image_size=7), "data.image_size is 7"),
        (lambda: loader(image_size=10**5), "4096 at most"),
        (lambda: loader(workers=10**6), "1024 at most"),
        (lambda: loader(images=7), "batch_size 8 is larger than the data set of 7 images"),
        (lambda: IR(Tiny(8, 1), 1), "a data set of 1 image has no negatives once exclude_self"),
        (lambda: CMC(Tiny(8, 2), 1), "has no negatives"),
        (lambda: MoCo(Tiny(8, 1), 1), "has no negatives"),
        (
            lambda: IR(Tiny(8, 1), 24, candidates=25),
            "candidates is 25; it must lie between 2 and the 24 rows",
        ),
        (lambda: IR(Tiny(8, 1), 24, candidates=1), "candidates is 1"),
        (lambda: IR(Tiny(8, 1), 24, n_views=0), "n_views is 0"),
        (lambda: MoCo(Tiny(8, 1), 24, n_views=0), "n_views is 0"),
        (lambda: MoCo(Tiny(8, 1), 24, queue_size=0), "queue_size is 0"),
        (
            lambda: LabEncoder((0.0,) * 3, (1.0,) * 3, backbone="resnet10", width=5),
            "width is 5; cmc halves it, so it must be even",
        ),
        (lambda: IFND(10, 24, clusters=[2, 25]), "the 24 images there are"),
        (lambda: Ring(10, anneal_epochs=-1.0), "anneal_epochs is -1.0"),
        (lambda: Ring(10, inner=0.2, outer=0.1), "do not bound a ring"),
        (lambda: MoCHi(warmup_epochs=-1.0), "warmup_epochs is -1.0"),
        (lambda: KNN(DATA, DATA, 16, CPU, 0, k=0), "k 0 at least 1"),
        (lambda: KNN(DATA, DATA, 16, CPU, 0, temperature=0.0), "temperature 0.0 above 0"),
        (lambda: Probe(momentum=-1.0), "momentum value: -1.0"),
        (lambda: Probe(weight_decay=-1.0), "weight_decay value"),
        (lambda: Probe(lr=[0.1, 0.2, 0.1]), "twice"),
        (lambda: Probe(lr=[]), "lr is an empty"),
        (lambda: Probe(image_size=4), "image_size is 4"),
        (
            lambda: Probe(augment="crop_flop"),
            "augment 'crop_flop' is not a recipe; there are moco_v1",
        ),
        (lambda: Finetune(momentum=1.5), "momentum value: 1.5"),
        (lambda: Finetune(augment="x"), "augment 'x' is not a recipe"),
        (lambda: Finetune(labels=0.0), "labels is 0"),
        (lambda: Detect(momentum=-1.0), "momentum value"),
        (lambda: Detect(gamma=0.0), "gamma is 0.0"),
        (lambda: Detect(milestones=[-5]), r"milestones \[-5\] must lie"),
        (lambda: Detect(workers=2000), "1024"),
    ],
)
def test_what_no_run_can_bear_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make,message",
    [
        (
            lambda: schedule(schedule="step", milestones=[3, 5, 9]),
            r"milestones \[3, 5, 9\]: epochs 5 end before the last of them is reached, "
            "and the learning rate falls 1 times; lower the milestones too",
        ),
        (
            lambda: NCE(n_data=24, n_negatives=25),
            "n_negatives 25 is larger than the data set of 24 images, "
            "so that each is drawn several times; lower it",
        ),
        (
            lambda: Ring(10, n_data=24, n_negatives=4095),
            "n_negatives 4095 is larger than the data set of 24 images",
        ),
        (
            lambda: IFND(20, 24, clusters=[3]),
            "reassign_every 20 leaves no clustering before the end, epochs 20: "
            ".* ifnd is nce; lower it",
        ),
        (
            lambda: IFND(30, 24, clusters=[3, 1]),
            r"clusters \[3, 1\] has a level of 1, whose one cluster leaves no negatives "
            ".*; take 2 or more",
        ),
        (
            lambda: Ring(5, anneal_epochs=6.0),
            "anneal_epochs 6 is above epochs 5: the ring does not get down to outer 0.1",
        ),
        (
            lambda: MoCHi(epochs=10, warmup_epochs=10.0),
            "warmup_epochs 10 of mochi leaves nothing of epochs 10: no negatives are mixed",
        ),
        (
            lambda: Detect(iterations=1000),
            r"(?s)milestones \[60000, 80000\]: iterations 1000 end .* falls 0 times.*"
            "warmup_iterations 1000 leaves nothing of iterations 1000",
        ),
    ],
    ids=[
        "milestones",
        "draws",
        "draws in a ring",
        "reassign",
        "clusters",
        "anneal",
        "mochi's warm-up",
        "detect",
    ],
)
def test_what_does_less_than_it_says_is_said(make, message, capsys, recwarn):
    """These are not refused. A run that is cut short for a look is one of them.

    An example is optim.epochs=10 with a paper's file.
    """
    make()
    warned = [str(warning.message) for warning in recwarn]
    assert re.search(message, "\n".join([capsys.readouterr().out, *warned]))


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_settings_that_suit(capsys, recwarn):
    schedule(schedule="step", milestones=[3, 4])
    MoCo(Tiny(8, 1), 24, queue_size=24)
    IFND(21, 24, clusters=[3])
    Ring(5, anneal_epochs=5.0)
    Ring(5)
    NCE(n_data=24, n_negatives=24)
    MoCHi(epochs=1)
    MoCHi()
    Detect()
    assert capsys.readouterr().out == ""
    assert not recwarn.list


def contrast(K=5):
    q, k, n = (F.normalize(torch.randn(*shape), dim=-1) for shape in ((4, 8), (4, 1, 8), (K, 8)))
    return Contrast(q.requires_grad_(), k, n, torch.arange(4), torch.arange(10, 10 + K))


@pytest.mark.parametrize(
    "loss,K",
    [
        (NCE(n_negatives=1000), 1000),
        (Ring(10, n_negatives=1000, anneal_epochs=0.0), 1000),
        (Ring(10, inner=0.0, outer=1e-9, anneal_epochs=0.0), 1),
        (MoCHi(hardest=1000, mixed=7, query_mixed=0, warmup_epochs=0.0), 12),
    ],
    ids=["nce", "ring", "thin ring", "mochi"],
)
def test_more_than_there_are_candidates_is_taken_as_it_is_meant(loss, K):
    """n_negatives are draws with replacement, an estimate of the same mean, however many.

    A ring is never empty. `hardest` takes all that there are.
    """
    c = contrast()
    output = loss(c, 0.0)
    figures = step_diagnostics(loss, [c], [output], None, 0.0)
    value = output.loss
    value.backward()
    assert value.isfinite()
    assert value > 0
    assert figures["K"] == K


def test_neighbours_beyond_the_bank_and_a_small_temperature():
    """k is all that there are, of which the monitor lets a tenth vote.

    e^{s / T} overflows below T = 1 / 88: all classes would tie at infinity, the first would win.
    """
    bank, labels = (
        F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]]), dim=1),
        torch.tensor([0, 1, 2]),
    )
    queries = torch.tensor([[1.0, 0.0], [0.1, 1.0]])
    for temperature in (1.0, 0.1, 0.01, 1e-4, 1e-30):
        assert knn(bank, labels, queries, 1000, temperature).tolist() == [1, 2]
    assert str(KNN(DATA, DATA, 16, CPU, 0)).startswith("weighted kNN, k 2 (knn.k is 200,")


@pytest.mark.parametrize(
    "script,arguments,message",
    [
        (train_linear, ["data.image_size=4"], "data.image_size is 4; it must be at least 8"),
        (train_linear, ["data.limit=1"], "a linear probe needs more training images than 1"),
        (train_finetune, ["data.image_size=-4"], "data.image_size is -4"),
        (
            train_finetune,
            ["finetune.batch_size=1"],
            "finetune.batch_size 1 leaves BatchNorm one image at a time, .* "
            "so raise finetune.batch_size",
        ),
        (
            train_finetune,
            ["finetune.batch_size=8", "model.bn_splits=8"],
            "model.bn_splits 8; it needs two",
        ),
    ],
)
def test_what_a_script_alone_can_see(script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Encoder(backbone="resnet10", stem="cifar", width=8).backbone.state_dict(), "w.pt")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "x",
            "--cfg",
            QUICK,
            "--weights",
            "w.pt",
            *TINY,
            *["finetune.labels=1"] * (script is train_finetune),
            *arguments,
        ],
    )
    with pytest.raises(SystemExit, match=message) as refusal:
        script.main()
    assert "\n" not in refusal.value.code
