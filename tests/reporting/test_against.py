"""report.py --against: which runs make a line, and what it is beside plain InfoNCE."""

import pytest
from PIL import Image

from engine import config
from reporting.against import against_table, data_of_all, draw_against, make_lines
from reporting.runs import Run

CFG = "yaml/cifar10_cpu.yaml"


def run(name, seed, knn, *settings, done=60):
    cfg = config.load(CFG, [f"name={name}", f"seed={seed}", *settings])
    return Run(name, f"runs/{name}", cfg, [{"epoch": done, "loss": 1.0, "knn": knn}], done)


def temperatures(loss, figures):
    """Runs of a loss, {temperature: [kNN of seed 0, of seed 1]}."""
    return [
        run(f"{loss}_{t}_{seed}", seed, knn, f"loss.name={loss}", f"loss.temperature={t}")
        for t, of_seeds in figures.items()
        for seed, knn in enumerate(of_seeds)
    ]


def rows(runs, key):
    return [[word.strip() for word in row] for row in against_table(runs, key).rows]


def test_each_value_is_beside_infonce_at_that_value_seed_by_seed():
    runs = temperatures("nce", {0.2: [50, 53], 0.1: [40, 42]})
    runs += temperatures("ring", {0.2: [49, 50], 0.1: [45, 49]})
    assert rows(runs, "loss.temperature") == [
        ["moco, nce", "0.1", "41.0 ± 1.4", "", "", "", "2"],
        ["moco, nce", "0.2", "51.5 ± 2.1", "", "", "", "2"],
        ["moco, ring", "0.1", "47.0 ± 2.8", "+6.0 ± 1.4", "", "", "2"],
        ["moco, ring", "0.2", "49.5 ± 0.7", "-2.0 ± 1.4", "", "", "2"],
    ]


def test_a_method_without_the_setting_is_level_and_infonce_so_is_beside_each_value():
    ifnd = ["loss.name=ifnd", "loss.reassign_every=5"]
    runs = [run("nce", 0, 50)]
    runs += [run(f"ifnd_{k}", 0, 50 + k, *ifnd, f"loss.clusters=[{k}]") for k in (2, 10)]
    runs.append(run("levels", 0, 55, *ifnd, "loss.clusters=[2, 10]"))
    assert rows(runs, "loss.clusters") == [
        ["moco, nce", "", "50.0", "", "", "", "1"],
        ["moco, ifnd", "2", "52.0", "+2.0", "", "", "1"],
        ["moco, ifnd", "10", "60.0", "+10.0", "", "", "1"],
        ["moco, ifnd, 2, 10", "", "55.0", "+5.0", "", "", "1"],
    ]


def test_infonce_is_that_of_the_same_host():
    ring = ["loss.name=ring", "model.host=ir"]
    runs = [run("moco", 0, 50), run("ir", 0, 30, "model.host=ir")]
    runs += [run(f"ring_{t}", 0, 100 * t, *ring, f"loss.temperature={t}") for t in (0.3, 0.5)]
    gains = {row[1]: row[3] for row in rows(runs, "loss.temperature") if "ring" in row[0]}
    assert gains == {"0.3": "+0.0", "0.5": "+20.0"}


def test_unfinished_runs_and_other_settings_make_no_line_together():
    runs = temperatures("nce", {0.1: [40], 0.2: [50]})
    runs.append(run("short", 0, 10, "loss.temperature=0.3", done=30))
    runs.append(run("wide", 0, 60, "loss.temperature=0.3", "model.width=32"))
    values = [list(line.runs) for line in make_lines(runs, "loss.temperature")]
    assert values == [[0.1, 0.2], [0.3]]


@pytest.mark.parametrize("key", ["optim.lr", "loss.nonsense", "model.host"])
def test_a_setting_in_which_no_runs_differ_is_refused_in_a_sentence(key):
    runs = temperatures("nce", {0.1: [40], 0.2: [50]})
    with pytest.raises(SystemExit, match=f"--against {key}: no two finished runs differ in {key}"):
        against_table(runs, key)


def test_the_picture_is_drawn_and_repeats_its_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    runs = temperatures("nce", {0.1: [40, 42], 0.2: [50, 53]})
    runs += temperatures("ring", {0.1: [45, 49], 0.2: [49, 50]})
    paths = tmp_path / "a.png", tmp_path / "b.png"
    for path in paths:
        draw_against(path, runs, "loss.temperature")
    assert Image.open(paths[0]).size == (550, 680)  # the gains in a row below
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_title_leaves_open_what_the_axis_has():
    cfg = run("a", 0, 50, "data.name=shapes", "data.classes=4", "data.limit=500").cfg
    assert data_of_all(cfg, "data.classes") == "shapes, 500 images, n classes, 32 px"
    assert data_of_all(cfg, "data.limit") == "shapes, n images, 4 classes, 32 px"
    assert data_of_all(cfg, "loss.temperature") == "shapes, 500 images, 4 classes, 32 px"


def test_the_average_of_infonce_is_not_called_jcl_alone():
    jcl = ["loss.name=jcl", "model.n_views=3"]
    runs = [run(f"jcl_{lam}", 0, 50, *jcl, f"loss.lam={lam}") for lam in (1, 2)]
    runs.append(run("average", 0, 51, *jcl, "loss.average=true"))
    labels = [line.label for line in make_lines(runs, "loss.lam")]
    assert labels == ["moco, jcl", "moco, jcl (average of InfoNCE)"]
