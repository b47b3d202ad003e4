"""What a script prints: any character on any console, and warnings as plain sentences.

No module of torch is imported here: both must be in place before torch is.
"""

import functools
import os
import sys
import warnings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def accept_any_character():
    r"""Print "\xe4" where a console without UTF-8 has no such letter, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        # A notebook's streams, and a test's, have no encoding to fail at.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def show_warnings_plainly():
    """Show what this repository warns of as `WARNING: sentence`, once, by the first process alone.

    What torch, PIL or numpy warn of among themselves is not shown: a user can do nothing about it.
    `python -W default` or PYTHONWARNINGS=default shows all warnings, as Python does.
    """
    if sys.warnoptions:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's C++ reads it when it is loaded
    warnings.showwarning = functools.partial(show_once, set())


def show_once(said, message, category, filename, *_):
    """Print a warning of ours on the first process, if its sentence is not in `said` yet."""
    sentence = str(message)
    if is_ours(sentence, category, filename) and sentence not in said:
        said.add(sentence)
        if os.environ.get("RANK", "0") == "0":
            print(f"WARNING: {sentence}", flush=True)


def is_ours(sentence, category, filename):
    """Does a warning come from this repository's own code?

    Args:
        sentence: what it says.
        category: the class of the warning.
        filename: of the line that it is about.
    """
    # torch's C++ names the line of ours that called it.
    if category is not UserWarning or "Triggered internally at" in sentence:
        return False
    # ROOT may hold a virtual environment, too.
    is_installed = "site-packages" in filename or "dist-packages" in filename
    return os.path.abspath(filename).startswith(ROOT + os.sep) and not is_installed
