"""Each file in losses/ that is a loss, against its literal form; and what losses/ promises."""

import ast
import os
import sys

import literal
import pytest
import torch
from literal import EPOCH, N_DATA, assert_agrees, contrast, mean_over_queries

from engine import config
from losses import Output
from losses.diagnostics import QUERIES, chance, step_diagnostics
from losses.together import Together
from processes import ROOT

LOSSES = config.modules("losses")


def literal_form(name, c, t=0.2):
    """-> a loss, and the function that says what its formula is for one query."""
    if not hasattr(literal, f"literal_{name}"):
        pytest.fail(
            f"losses/{name}.py has no literal form: write literal_{name}(c, t) in "
            "tests/losses/literal.py, whose first lines say how"
        )
    return getattr(literal, f"literal_{name}")(c, t)


def test_losses_are_found_by_their_files():
    assert LOSSES == ["ifnd", "jcl", "mochi", "nce", "ring"]


@pytest.mark.parametrize("t", [0.07, 0.5])
@pytest.mark.parametrize("masked", [False, True, "self"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_literal_form(name, masked, t):
    c = contrast(N=5, K=40, M=3, masked=masked, n_data=N_DATA)
    loss_fn, of_one = literal_form(name, c, t)
    assert_agrees(loss_fn(c, EPOCH).loss, c, *mean_over_queries(c, of_one))


def test_a_loss_without_a_literal_form_fails_with_a_sentence():
    with pytest.raises(pytest.fail.Exception, match=r"write literal_x\(c, t\) in tests/losses/lit"):
        literal_form("x", contrast())


def test_a_comparison_that_fails_prints_both_numbers():
    c = contrast(N=2, K=5)
    loss_fn, of_one = literal_form("nce", c)
    expected, gradient = mean_over_queries(c, of_one)
    loss = loss_fn(c, EPOCH).loss
    wrong = loss + 0.5
    numbers = f"the loss is {wrong.item():.9g}, and its literal form says {expected.item():.9g}"
    with pytest.raises(AssertionError, match=numbers):
        assert_agrees(wrong, c, expected, gradient)
    with pytest.raises(AssertionError, match="coordinate of the query is .*literal form"):
        assert_agrees(loss + c.query[0, 0] - c.query[0, 0].detach(), c, expected, gradient)


@pytest.mark.parametrize("masked", [False, True, "self"])
@pytest.mark.parametrize("name", [*LOSSES, "list"])
def test_diagnostics_draw_nothing_and_do_not_touch_the_loss(name, masked):
    c = contrast(N=QUERIES + 8, K=60, M=3, masked=masked, n_data=N_DATA)
    if name == "list":
        members = [literal_form(one, c)[0] for one in ("ifnd", "ring", "mochi", "jcl")]
        del members[2].draw_points  # MoCHi draws its points anew
        loss_fn = Together(members)
    else:
        loss_fn, _ = literal_form(name, c)
    output = loss_fn(c, EPOCH)
    labels = torch.arange(N_DATA) % 3
    before = torch.get_rng_state(), *(x.clone() for x in c if x is not None)
    figures = step_diagnostics(loss_fn, [c, c], [output, output], labels, EPOCH)
    after = torch.get_rng_state(), *(x for x in c if x is not None)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    for figure, value in figures.items():
        assert value.shape == (), figure
        assert value.isfinite(), figure
        assert not value.requires_grad, figure
    assert figures["contrasts"] == 2
    assert figures["K"] > 0
    without = step_diagnostics(loss_fn, [c], [output], None, EPOCH)
    assert {"K", "positive", "used %", "spread"} <= without.keys() < figures.keys()
    output.loss.backward()
    assert c.query.grad.isfinite().all()


class Halved(torch.nn.Module):
    """A stranger's loss, with everything that it may have."""

    def forward(self, c, epoch):
        return Output((c.query @ c.negative.T).mean() / 2)

    def diagnostics(self, c, output, labels, epoch):
        return {"queries": len(c.query), "K": 7, "half": output.loss}

    def chance(self, K):
        return K / 2


def test_a_loss_may_have_figures_and_a_chance_of_its_own():
    c, loss_fn = contrast(N=QUERIES + 8), Halved()
    output = loss_fn(c, EPOCH)
    figures = step_diagnostics(loss_fn, [c], [output], None, EPOCH)
    assert figures["queries"] == QUERIES
    assert figures["K"] == 7
    assert figures["half"] == output.loss
    assert figures["used %"] == 100
    assert chance(loss_fn, 10.0) == 5
    scaled, _ = literal_form("nce", c)
    scaled.scale = 2.0
    assert chance(scaled, 99.0) == pytest.approx(2 * 4.60517, rel=1e-5)


def imported(file):
    """The modules that a file imports, those beside it by a leading point."""
    with open(file) as f:
        tree = ast.parse(f.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_losses_import_torch_and_their_neighbours_alone():
    folder = os.path.join(ROOT, "losses")
    files = [os.path.join(path, f) for path, _, names in os.walk(folder) for f in names]
    for file in (file for file in files if file.endswith(".py")):
        for module in imported(file):
            top = module.split(".")[0]
            is_numpys = top == "numpy" and file.endswith(os.path.join("kmeans", "lloyd.py"))
            assert top in {"", "torch", *sys.stdlib_module_names} or is_numpys, (file, module)
