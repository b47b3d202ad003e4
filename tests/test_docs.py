"""README.md, docs/ and their like: what they link to, name and tell the reader to type is there."""

import functools
import glob
import os
import re
import shlex

import pytest

import embed
import report
import reproduce
import train_detect
import train_finetune
import train_linear
import train_pretrain
import yaml
from engine import config
from engine.log import FIGURES
from processes import ROOT

NAMES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "RESULTS.md"),
    *sorted(glob.glob("docs/**/*.md", root_dir=ROOT, recursive=True)),
]
LOSSES = config.modules("losses")
SCRIPTS = {
    "train_pretrain.py": (train_pretrain, ()),
    "train.sbatch": (train_pretrain, ()),
    "train_linear.py": (train_linear, ()),
    "train_finetune.py": (train_finetune, ("finetune",)),
    "train_detect.py": (train_detect, ("detect",)),
    "embed.py": (embed, ()),
}
# What a page writes where the reader has something of their own.
PLACEHOLDERS = {"FILE": "yaml/quickstart.yaml", "HOST": "simclr", "LOSS": "ring"}
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def prose(name):
    """A page without its blocks of code."""
    return CODE_BLOCK.sub("", read(name))


def code_spans(name):
    """What stands between backticks within the text of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(name))]


# ------------------------------------------------------------------------------------------- links


def anchors(name):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        assert os.path.exists(os.path.join(ROOT, target)), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name} links to {link}"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_is_there(name):
    for span in code_spans(name):
        is_ours = re.fullmatch(r"[\w./]+/[\w.]+\.(py|md|yaml|sbatch|png)", span)
        if is_ours and not span.startswith("runs/") and "NAME" not in span:
            assert os.path.exists(os.path.join(ROOT, span)), f"{name} names {span}"


def test_anchors_are_those_of_the_headings():
    assert "the-two-commands" not in anchors("README.md")
    assert "two-commands" in anchors("README.md")
    assert "what-the-log-says" in anchors("docs/methods/ring.md")


# ---------------------------------------------------------------------------------------- commands


def commands(name):
    """Each command of a page that starts Python, as a list of words.

    They stand in blocks of code without a language, and within the text.
    """
    blocks = [code for language, code in CODE_BLOCK.findall(read(name)) if not language]
    spans = [span for span in code_spans(name) if span.startswith(("python ", "torchrun "))]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + spans
    for line in lines:
        for command in re.split(r"&&|\|\|", line):
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # printed text, with an apostrophe
                continue
            words = [word for word in words if not re.fullmatch(r"[A-Z]+=.*|\.\.\.", word)]
            if words and words[0] in ("python", "torchrun", "sbatch"):
                yield words


@functools.cache
def all_cells():
    """The cells of all tables: more than a hundred files."""
    return reproduce.all_cells()


def check_command(words):
    """Let the script that a command names read its command line. Nothing is run."""
    if words[:3] == ["python", "-m", "pytest"]:
        check_paths([word for word in words if word.startswith("tests/")])
        return
    if words[0] == "python" and words[1].startswith("-"):  # -m venv, -W default
        return
    at = next(i for i, word in enumerate(words) if word.endswith((".py", ".sbatch")))
    script, arguments = words[at], [fill_in(word) for word in words[at + 1 :]]
    check_paths([script])
    if script == "report.py":
        report.command_line().parse_args(arguments)
    elif script == "reproduce.py":
        parsed = reproduce.make_parser().parse_args(arguments)
        reproduce.choose(all_cells(), parsed.table, parsed.rows)
    elif script.startswith("benchmarks/"):
        options = [word for word in arguments if word.startswith("--")]
        assert all(f'"{option}"' in read(script) for option in options)
    else:
        module, also = SCRIPTS[os.path.basename(script)]
        parsed = module.make_parser().parse_args(arguments)
        config.load(os.path.join(ROOT, parsed.cfg), parsed.overrides, also)


def fill_in(word):
    for placeholder, value in PLACEHOLDERS.items():
        word = re.sub(rf"^(.*=)?{placeholder}$", rf"\g<1>{value}", word)
    return word


def check_paths(paths):
    for path in paths:
        assert os.path.exists(os.path.join(ROOT, path)), f"there is no {path}"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_accepted(name):
    for words in commands(name):
        try:
            check_command(words)
        except SystemExit as refusal:
            pytest.fail(f"{name}: {shlex.join(words)}: {refusal.code}")


@pytest.mark.parametrize(
    "line",
    [
        "python train_pretrain.py --cfg yaml/quickstart.yaml optim.epoch=3",
        "python train_pretrain.py --cfg yaml/quickstart.yml",
        "python train_linear.py --cfg yaml/quickstart.yaml --no-baseline-at-all",
        "python report.py --csv table.csv",
        "python reproduce.py 'Ring, Table 7'",
        "python benchmarks/step.py --cores 3",
        "python train.py --cfg yaml/quickstart.yaml",
        "python -m pytest tests/test_nothing.py",
    ],
)
def test_a_command_that_would_be_refused_is_noticed(line):
    with pytest.raises((SystemExit, AssertionError)):
        check_command(shlex.split(line))


def test_the_pages_have_commands():
    """The search for commands has not gone blind."""
    assert ["python", "train_pretrain.py", "--cfg", "yaml/quickstart.yaml"] in commands("README.md")
    assert sum(len(list(commands(name))) for name in NAMES) > 50


# ---------------------------------------------------------------------------------------- settings


def known_keys():
    """{section: its keys}, of all hosts and all losses."""
    keys = {}
    for section, homes in config.SECTIONS.items():
        choice = config.CHOICE.get(section)
        names = config.modules(config.PACKAGE[section]) if choice else [None]
        homes = {home.format(**{choice or "": name}) for home in homes for name in names}
        keys[section] = {choice, *(key for home in homes for key in config.keys_at(home))}
    return keys


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_is_named_is_known(name):
    keys = known_keys()
    for span in code_spans(name):
        for section, key in re.findall(r"(?<![\w./])([a-z]+)\.([a-z_A-Z]+)(?==|:|$|\s)", span):
            if section in keys and key not in ("pt", "yaml", "jsonl", "py"):
                assert key in keys[section] | set(LOSSES), f"{name} names {section}.{key}"


def table(name, heading):
    """The rows of the first table below a heading, each a list of cells, without its head."""
    below = read(name).split(f"\n## {heading}\n")[1]
    rows = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_methods_page_has_its_keys_and_their_defaults(loss):
    rows = table(f"docs/methods/{loss}.md", "Keys")
    explained = {key.strip("`"): yaml.safe_load(default) for key, default, _ in rows}
    parameters = config.keys_at(f"losses.{loss}:{loss}")
    assert explained == {key: parameter.default for key, parameter in parameters.items()}


def test_the_hosts_keys_and_their_defaults():
    page = "docs/methods/index.md"
    tables = read(page).split("\n## The hosts\n")[1].split("\n## ")[0]
    explained = {host: {} for host in config.modules("models")}
    for row in re.findall(r"^\| `(\w+)` \| (\S+) \| ([`\w, ]+) \|", tables, re.MULTILINE):
        for host in re.findall(r"\w+", row[2]):
            explained[host][row[0]] = yaml.safe_load(row[1])
    for host, keys in explained.items():
        parameters = config.keys_at(f"models.{host}:{host}")
        assert keys == {key: parameter.default for key, parameter in parameters.items()}, host


@pytest.mark.parametrize("loss", LOSSES)
def test_a_methods_page_explains_its_figures(loss):
    spans = code_spans(f"docs/methods/{loss}.md")
    for figure, (group, _) in FIGURES.items():
        if group == loss:
            assert figure in spans, f"docs/methods/{loss}.md lacks {figure}"


def test_the_figures_of_all_methods_are_explained():
    common = {"loss", "optimizer", "negatives", "time"}
    spans = code_spans("docs/methods/index.md")
    for figure, (group, _) in FIGURES.items():
        if group in common and not figure.startswith("loss_"):  # detection's
            assert figure in spans, figure


# ------------------------------------------------------------------------------------------- width


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.parametrize("name", NAMES)
def test_prose_is_at_most_100_columns_wide(name):
    """Tables, their footnotes and printed text may be wider."""
    for line in prose(name).splitlines():
        is_of_table = re.match(r"\||\[\d+\] ", line)
        assert len(line) <= 100 or is_of_table, f"{name}: {line}"


def test_every_method_and_page_is_reached_from_the_readme():
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        links = set()
        for name in new:
            for link in re.findall(r"\]\(([^)\s#]+\.md)", prose(name)):
                links.add(os.path.normpath(os.path.join(os.path.dirname(name), link)))
        new = links - reached
    assert reached == set(NAMES)
