"""Which folder imports from which: none from one that stands above it."""

import ast
import os

import pytest

from processes import ROOT

# From the bottom up. Scripts, benchmarks and tests import from all of them.
BELOW = {
    "engine": {"engine"},
    "losses": {"engine", "losses"},
    "models": {"engine", "losses", "models"},
    "data": {"engine", "data"},
    "evaluation": {"engine", "data", "evaluation"},
    "reporting": {"engine", "data", "reporting"},
    "training": {"engine", "losses", "models", "data", "evaluation", "training"},
}


def imported_folders(path):
    """The folders of ours that a file imports from, at its top or within a function."""
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.append(node.module)
    scripts = [name for name in modules if name.startswith(("train_", "report", "reproduce"))]
    return {name.split(".")[0] for name in modules} & set(BELOW) | set(scripts)


@pytest.mark.parametrize("folder", BELOW)
def test_no_file_imports_from_a_folder_above_its_own(folder):
    files = [name for name in os.listdir(os.path.join(ROOT, folder)) if name.endswith(".py")]
    assert files
    for name in files:
        above = imported_folders(os.path.join(ROOT, folder, name)) - BELOW[folder]
        assert not above, f"{folder}/{name} imports from {above}"
