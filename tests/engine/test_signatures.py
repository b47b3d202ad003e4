"""Signatures that are read are those that are imported, and reading them imports nothing."""

import inspect
import os
import subprocess
import sys

import pytest

from engine import config, signatures

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCRIPTS = ["train_pretrain.py", "train_linear.py", "train_finetune.py", "train_detect.py"]
HOMES = [home for homes in config.SECTIONS.values() for home in homes if "{" not in home]
HOMES += [f"models.{host}:{host}" for host in config.modules("models")]
HOMES += [f"losses.{loss}:{loss}" for loss in config.modules("losses")]


@pytest.mark.parametrize("home", HOMES)
def test_what_is_read_is_what_is_imported(home):
    read, imported = (
        signatures.keyword_only(home),
        config.keys_of_choice(config.import_object(home)),
    )
    assert list(read) == list(imported)
    assert read
    for key, parameter in imported.items():
        assert read[key].annotation == parameter.annotation, key
        assert read[key].default == parameter.default, key
        assert type(read[key].default) is type(parameter.default), key


@pytest.mark.parametrize(
    "text, reason",
    [
        ("class A:\n    def __init__(self, *, k: int = 2 ** 3): pass", "is computed"),
        ("class A:\n    def __init__(self, *, k: Path = None): pass", "no type that settings have"),
        ("@frozen\nclass A:\n    def __init__(self, *, k: int = 2): pass", "decorator"),
        ("class A(B):\n    pass", "no __init__"),
        (
            "class A(b.B):\n    def __init__(self, **settings): pass",
            "no parent that is a plain name",
        ),
        ("class B:\n    pass", "does not define"),
        ("class A:", "expected an indented block"),
    ],
)
def test_what_cannot_be_read_is_left_to_the_import(text, reason, tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text(text)
    monkeypatch.setattr(signatures, "ROOT", str(tmp_path))
    with pytest.raises(signatures.UnreadableError, match=reason):
        signatures.keyword_only("m:a")


def test_a_signature_that_cannot_be_read_is_imported(tmp_path, monkeypatch):
    text = "class A:\n    def __init__(self, *, k: int = 2 ** 3): pass\n"
    (tmp_path / "computed_default.py").write_text(text)
    monkeypatch.setattr(signatures, "ROOT", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    keys = config.keys_at("computed_default:a")
    assert keys["k"].default == 8
    assert keys["k"].annotation is int
    assert keys["k"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--help"], 0, "--device NAME"),
        (["--cfg", "yaml/quickstart.yaml", "loss.temprature=1"], 1, "did you mean temperature?"),
        (
            ["--cfg", "yaml/quickstart.yaml", "model.host=cmc", "--print-config"],
            0,
            "colour_space: lab",
        ),
    ],
)
def test_what_needs_no_torch_does_not_import_it(script, arguments, code, message):
    check_imports(script, arguments, code, message)


def test_reproduce_answers_before_torch_is_imported():
    check_imports("reproduce.py", ["--help"], 0, "--nproc_per_node N")
    check_imports("reproduce.py", ["T", "--gpus", "x"], 1, "give the numbers of GPUs")


def check_imports(script, arguments, code, message):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "yaml" in imported
    assert not imported & {"torch", "torchvision", "numpy", "tqdm", "PIL"}
