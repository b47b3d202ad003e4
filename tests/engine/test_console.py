"""Any character on any console, and warnings as plain sentences, once, by the first process."""

import io
import os
import subprocess
import sys
import warnings

import pytest

from engine import config, console, orphans, signals

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OURS = os.path.join(ROOT, "losses", "ring.py")


@pytest.fixture
def plain_warnings(monkeypatch):
    """Warnings as a script shows them; pytest's own way is back after the test."""
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings():
        console.show_warnings_plainly()
        yield


def warn(sentence, category=UserWarning, file=OURS, line=1):
    warnings.warn_explicit(sentence, category, file, line)


def test_our_own_warning_is_one_sentence_once(plain_warnings, capsys):
    for line in (1, 2):
        warn("queue_size is too large", line=line)
    warn("another one")
    captured = capsys.readouterr()
    assert captured.out == "WARNING: queue_size is too large\nWARNING: another one\n"
    assert captured.err == ""


def test_the_other_processes_are_silent(plain_warnings, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    warn("queue_size is too large")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "sentence, category, file",
    [
        ("TypedStorage is deprecated", UserWarning, "/x/site-packages/torch/_utils.py"),
        (
            "not writable (Triggered internally at ../torch/csrc/utils/tensor_numpy.cpp)",
            UserWarning,
            OURS,
        ),
        ("weights_only", FutureWarning, OURS),
        ("bad EXIF", UserWarning, os.path.join(ROOT, ".venv/lib/site-packages/PIL/Image.py")),
        ("another program's", UserWarning, ROOT + "2/engine/x.py"),
    ],
)
def test_what_others_warn_of_is_not_shown(sentence, category, file, plain_warnings, capsys):
    warn(sentence, category, file)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_whoever_asks_python_for_warnings_gets_them(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    before = warnings.showwarning
    console.show_warnings_plainly()
    assert warnings.showwarning is before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_character_is_printed_on_any_console(encoding, monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", written)
    console.accept_any_character()
    print("\u00e4\u2026\udce4")
    written.flush()
    text = written.buffer.getvalue().decode(encoding)
    assert text.endswith("\\udce4\n")
    assert ("\\u2026" in text) == (encoding != "utf-8")


@pytest.mark.parametrize("variable", ["PYTHONIOENCODING=ascii", "LC_ALL=C"])
def test_a_script_prints_a_name_with_umlauts(variable):
    name, value = variable.split("=")
    command = ["train_pretrain.py", "--cfg", "yaml/quickstart.yaml", "name=\u00e4"]
    done = subprocess.run(
        [sys.executable, *command, "loss.temprature=\u00e4", "--print-config"],
        cwd=ROOT,
        env={**os.environ, name: value},
        capture_output=True,
    )
    assert b"did you mean temperature" in done.stderr
    assert b"Traceback" not in done.stderr
    done = subprocess.run(
        [sys.executable, *command, "--print-config"],
        cwd=ROOT,
        env={**os.environ, name: value},
        capture_output=True,
    )
    assert done.returncode == 0
    assert done.stdout.startswith(b"name:")


@pytest.mark.parametrize("local_rank, code", [(None, True), ("0", True), ("1", False)])
def test_a_refusal_of_the_settings_is_said_by_the_first_process_of_a_machine(
    local_rank, code, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["x", "--cfg", "no_such_file.yaml"])
    monkeypatch.setattr(console, "show_warnings_plainly", bool)
    # What they change of a process would stay, and all that a later test forks would have it.
    monkeypatch.setattr(signals, "listen", bool)
    monkeypatch.setattr(orphans, "end_with_launcher", bool)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as refusal:
        config.answer_early(config.command_line(""))
    assert refusal.value.code == ("no_such_file.yaml does not exist" if code else 1)
