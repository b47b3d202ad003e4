"""embed.py: rows, their order, and what is made of them; kills, several processes, bad input."""

import csv
import json
import os
import resource
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import embed
from data.datasets import STATISTICS
from data.image_files import FolderSet
from engine import checkpoint, config
from engine.weights import save_backbone
from evaluation import embedding_file
from evaluation.embedding_file import EmbeddingFile, from_line, near_duplicates, to_line
from evaluation.features import embeddings
from processes import ROOT, SERVER, run
from training.build import Builder

QUICK = os.path.join(ROOT, "yaml", "quickstart.yaml")
TINY = ["model.width=8", "model.precision=fp32", "data.workers=0"]
CPU = torch.device("cpu")
GREY = {"image_size": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


def make_encoder(*settings):
    cfg = config.load(QUICK, [*TINY, *settings])
    torch.manual_seed(0)
    dataset = FolderSet([], None, None, GREY["mean"], GREY["std"])
    return Builder(cfg, QUICK).encoder(dataset, CPU), cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with weights, and images of several sizes in nested folders, two of them equal."""
    folder = tmp_path_factory.mktemp("embed")
    encoder, cfg = make_encoder()
    save_backbone(str(folder / "backbone.pt"), encoder.backbone, cfg, GREY)
    cfg["data"] |= GREY
    save_last(folder / "last.pt", encoder, cfg)
    generator = np.random.default_rng(0)
    for i in range(20):
        path = folder / "images" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_noise(path, generator, (12 + i, 30 - i))
    shutil.copy(folder / "images/a/3.png", folder / "images/copy.png")
    return folder


def save_last(path, encoder, cfg):
    saved = {"encoder": encoder.state_dict(), "host": {}, "settings": cfg}
    checkpoint.write(str(path), saved)


def save_noise(path, generator, size):
    """An image of few, large patches, so that no two are alike at any size."""
    patches = Image.fromarray(generator.integers(0, 256, (3, 3, 3), np.uint8))
    patches.resize(size, Image.Resampling.NEAREST).save(path)


@pytest.fixture
def call(folder, tmp_path, monkeypatch):
    """A function that runs embed.py in this process, with more arguments; it gives --out."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["embed.py", *command(folder), *arguments])
        embed.main()
        return tmp_path / "out"

    return call


def command(folder):
    weights = ["--weights", str(folder / "backbone.pt")]
    return ["--cfg", QUICK, *TINY, *weights, "--images", str(folder / "images"), "--out", "out"]


def rows_of(out):
    return np.load(out / "embeddings.npy", mmap_mode="r")


def names_of(out):
    lines = (out / "files.txt").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return lines


def pairs_of(out):
    with open(out / "duplicates.csv", newline="", encoding="utf-8") as f:
        return list(csv.reader(f))[1:]


def read_state(out):
    with open(os.path.join(out, "state.json")) as f:
        return json.load(f)


# ---------------------------------------------------------------------------------- what it writes


@pytest.mark.parametrize("feature", ["backbone", "output"])
def test_the_rows_are_the_features_of_the_files_in_their_order(feature, folder, call):
    weights = folder / ("last.pt" if feature == "output" else "backbone.pt")
    out = call("--feature", feature, "--weights", str(weights))
    files = [str(folder / "images" / name) for name in names_of(out)]
    assert names_of(out)[:2] == ["copy.png", "a/0.png"] and len(files) == 21
    dataset = FolderSet(files, None, None, GREY["mean"], GREY["std"])
    expected = embeddings(make_encoder()[0], dataset, 16, CPU, 0, feature)
    rows = rows_of(out)
    assert rows.dtype == np.float32 and rows.flags.c_contiguous
    torch.testing.assert_close(torch.tensor(rows), expected)
    assert pairs_of(out)[0] == ["copy.png", "a/3.png", "1.0000"]
    assert Image.open(out / "neighbours.png").width > 9 * 64
    assert (out / "projector/metadata.tsv").read_text().split() == names_of(out)


def test_the_runs_settings_serve_where_the_weights_say_nothing(folder, call, capsys):
    state = dict(torch.load(folder / "backbone.pt"))
    torch.save(state, folder / "plain.pth")
    call("--weights", str(folder / "plain.pth"), "--duplicates", "0", "data.image_size=24")
    assert "24 pixels a side" in capsys.readouterr().out
    assert read_state("out")["source"]["preprocessing"]["mean"] == [
        0.5,
        0.5,
        0.5,
    ]  # of quickstart's shapes
    assert not os.path.exists("out/duplicates.csv")


def test_a_normalisation_that_nobody_knows_is_refused(folder):
    torch.save(dict(torch.load(folder / "backbone.pt")), folder / "plain.pth")
    data = {"name": "folder", "image_size": 16, "mean": "auto", "std": "auto"}
    with pytest.raises(SystemExit, match=r"plain.pth does not say .* a.yaml says auto; give the"):
        embed.find_preprocessing(str(folder / "plain.pth"), {"data": data}, "a.yaml")


def test_of_a_last_pt_the_set_s_own_normalisation_is_that_of_its_run(folder, tmp_path):
    encoder, cfg = make_encoder("data.name=cifar10", "data.image_size=24")
    save_last(tmp_path / "last.pt", encoder, cfg)
    _, other = make_encoder()
    known = embed.find_preprocessing(str(tmp_path / "last.pt"), other, "a.yaml")
    mean, std = map(list, STATISTICS["cifar10"])
    assert known == {"image_size": 24, "mean": mean, "std": std}


def test_cmc_is_embedded_by_its_two_networks(folder, call):
    encoder, cfg = make_encoder("model.host=cmc")
    save_last(folder / "cmc.pt", encoder, cfg)
    weights = ["--weights", str(folder / "cmc.pt"), "model.host=cmc"]
    assert rows_of(call(*weights)).shape == (21, 64)
    assert rows_of(call(*weights, "--feature", "output", "--fresh")).shape == (21, 2 * 64)


def test_the_projector_has_a_sample_of_many(call, monkeypatch):
    monkeypatch.setattr(embed, "MOST_THUMBNAILS", 5)
    out = call()
    names = (out / "projector/metadata.tsv").read_text().split()
    assert len(names) == 5 and set(names) < set(names_of(out))


def test_an_unreadable_image_stops_or_has_a_row_of_nan(folder, call, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    (images / "b/1.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"b/1\.png cannot be read as an image .* 0 of 21 rows"):
        call("--images", str(images))
    out = call("--images", str(images), "data.on_error=skip", "--duplicates", "0.0001")
    row = names_of(out).index("b/1.png")
    assert np.isnan(rows_of(out)).all(1).nonzero()[0].tolist() == [row]
    assert (out / "unreadable.txt").read_text() == "b/1.png\n"
    assert len(pairs_of(out)) == 20 * 19 / 2
    assert "b/1.png" not in (out / "duplicates.csv").read_text()


def test_every_name_is_one_line_and_comes_back(folder, call, tmp_path):
    names = ["a b,c.png", "ä.png", "line\nfeed.png", "tab\t\x85.png", "back\\n.png"]
    names.append(os.fsdecode(b"not \xff utf-8.png"))
    for name in names:
        assert from_line(to_line(name)) == name
    images = tmp_path / "images"
    images.mkdir()
    for name in names:
        shutil.copy(folder / "images/copy.png", os.fsencode(images / name))
    out = call("--images", str(images))
    assert sorted(map(from_line, names_of(out))) == sorted(names)
    assert len(pairs_of(out)) == 6 * 5 / 2
    assert "ä.png" in names_of(out) and r"line\nfeed.png" in names_of(out)


# --------------------------------------------------------------------------- stopped, and resumed


@pytest.fixture
def many(folder, tmp_path):
    """The command line for 300 images, which are three batches."""
    images = tmp_path / "many"
    images.mkdir()
    generator = np.random.default_rng(1)
    for i in range(300):
        save_noise(images / f"{i:03}.png", generator, (8, 8))
    return ["--images", str(images)]


def signalled_at(tmp_path, number, batch):
    """A script that runs embed.py and gets a signal after so many batches; each is saved."""
    job = tmp_path / "job.py"
    job.write_text(
        "import os, runpy\n"
        "from evaluation import embedding_file\n"
        "embedding_file.SAVE_SECONDS = -1\n"
        "append = embedding_file.EmbeddingFile.append\n"
        "def append_and_signal(table, rows):\n"
        "    append(table, rows)\n"
        f"    if table.done >= {128 * batch} and os.environ.get('RANK', '0') == '0':\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "embedding_file.EmbeddingFile.append = append_and_signal\n"
        f"runpy.run_path({os.path.join(ROOT, 'embed.py')!r}, run_name='__main__')\n"
    )
    return str(job)


def test_sigterm_ends_with_75_and_the_same_line_goes_on(many, folder, call, tmp_path, capsys):
    whole = call(*many).rename(tmp_path / "whole")
    job = signalled_at(tmp_path, signal.SIGTERM, batch=1)
    stopped = run(tmp_path, job, *command(folder), *many, check=False)
    assert stopped.returncode == 75
    assert "out/embeddings.npy holds 128 of 300 rows, and the same line goes on" in stopped.stdout
    part = rows_of(tmp_path / "out")
    assert (part[:128] == rows_of(whole)[:128]).all() and not part[128:].any()
    out = call(*many)
    assert "going on after row 128" in capsys.readouterr().out
    assert_same_bytes(out, whole)
    call(*many, "--duplicates", "0.999")
    assert "all rows are there" in capsys.readouterr().out


def assert_same_bytes(out, whole):
    for name in ("embeddings.npy", "files.txt", "duplicates.csv", "neighbours.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_write_what_one_writes(many, folder, call, tmp_path):
    whole = call(*many).rename(tmp_path / "whole")
    run(tmp_path, "embed.py", *command(folder), *many, "data.workers=1", processes=2)
    assert_same_bytes(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_process_goes_on_where_two_ended(number, many, folder, call, tmp_path):
    whole = call(*many).rename(tmp_path / "whole")
    job = signalled_at(tmp_path, number, batch=1)  # after the first two batches
    ended = run(tmp_path, job, *command(folder), *many, processes=2, check=False)
    assert ended.returncode in (-signal.SIGKILL, 75)
    assert read_state(tmp_path / "out")["rows"] == 256
    assert_same_bytes(call(*many), whole)


def make_table(folder, source="a", fresh=False, names="abcde"):
    os.makedirs(folder, exist_ok=True)
    table = EmbeddingFile(str(folder), (len(names), 3), {"settings": source})
    table.begin(names, fresh)
    return table


def test_a_kill_at_any_moment_leaves_what_goes_on(tmp_path, monkeypatch):
    """At each call that changes a file's name or waits for the disk."""
    rows = torch.arange(15.0).view(5, 3)
    monkeypatch.setattr(embedding_file, "SAVE_SECONDS", -1)
    kinds = "replace", "fsync", "remove"
    real = {kind: getattr(os, kind) for kind in kinds}
    is_killed, moment = True, 0
    while is_killed:
        left, is_killed = [moment], False
        for kind in kinds:
            monkeypatch.setattr(os, kind, killed_after(left, real[kind]))
        folder = str(tmp_path / str(moment))
        try:
            fill(make_table(folder), rows)
        except KeyboardInterrupt:
            is_killed = True
        for kind in kinds:
            monkeypatch.setattr(os, kind, real[kind])
        table = make_table(folder)
        fill(table, rows)
        assert (np.load(table.path) == rows.numpy()).all()
        assert read_state(folder)["rows"] == 5
        moment += 1
    assert moment > 5


def killed_after(left, function):
    def call(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


def fill(table, rows):
    while table.done < 5:
        table.append(rows[table.done : table.done + 2])


# ----------------------------------------------------------------------------------- memory


def fill_within_limit(path, megabytes):
    """In a process of its own: fill a table of 256 MB and go through it, with less memory."""
    with open("/proc/self/status") as f:
        status = dict(line.split(":", 1) for line in f)
    data = 1024 * int(status["VmData"].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (data + 2**20 * megabytes,) * 2)
    torch.set_num_threads(1)
    table = EmbeddingFile(path, (2**16, 1024), {})
    table.begin([""] * len(table), fresh=True)
    rows = torch.eye(1024)
    while table.done < len(table):
        table.append(rows)
    assert table.readable().all()
    assert torch.equal(table[5000:5100], rows[5000 % 1024 :][:100])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_table_takes_less_memory_than_it_is_large(tmp_path):
    process = SERVER.Process(target=fill_within_limit, args=(str(tmp_path), 128))
    process.start()
    process.join()
    assert process.exitcode == 0


# ---------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("most", [10, 1000])
def test_near_duplicates_are_those_of_all_pairs(most, monkeypatch):
    monkeypatch.setattr(embedding_file, "BLOCK_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 4, generator=generator)
    rows[31] = 2 * rows[3]
    rows[20] = 0
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    cosines = (unit @ unit.T).numpy().round(4)
    i, j = np.nonzero(np.triu(cosines >= 0.7, 1))
    expected = sorted(zip(-cosines[i, j], i, j))
    pairs, similarity, count = near_duplicates(rows, 0.7, CPU, most)
    assert count == len(expected) > 30
    got = list(zip(-similarity, *pairs.T))
    assert got == expected[:most]
    assert got[0] == (-1, 3, 31)


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--images", "nowhere"], "--images: there is no folder nowhere"),
        (["--images", "empty"], r"--images: no images \(.*\) under empty"),
        (["--images", "empty", "--out", "empty/out"], "--out empty/out lies within --images empty"),
        (["--out", "file/out"], "file/out cannot be written: Not a directory"),
        (["--out", "foreign"], "foreign/embeddings.npy is there, but not of embed.py; give anoth"),
        (["model.width=16"], "conv1.weight is .* the network's is .*; set model.backbone"),
        (["--feature", "output"], r"backbone.pt has no head.*; give a run's last.pt by --weights"),
        (["--weights", "none.pt"], "none.pt does not exist"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, sentence, call, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/embeddings.npy").touch()
    with pytest.raises(SystemExit, match=sentence):
        call(*arguments)


@pytest.mark.parametrize("word", ["1.5", "-1", "many", "nan"])
def test_duplicates_out_of_range_are_refused(word, call, capsys):
    with pytest.raises(SystemExit):
        call("--duplicates", word)
    assert f"--duplicates: {word} is no cosine above 0 and at most 1" in capsys.readouterr().err


def test_added_images_and_other_vectors_are_refused(folder, call, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder / "images/a", images)
    call("--images", str(images))
    with pytest.raises(SystemExit, match="feature was 'backbone' and is now 'output'"):
        call("--images", str(images), "--weights", str(folder / "last.pt"), "--feature", "output")
    shutil.copy(folder / "images/copy.png", images)
    with pytest.raises(SystemExit, match="other embeddings: number of images was 7 and is now 8"):
        call("--images", str(images))
    assert len(rows_of(call("--images", str(images), "--fresh"))) == 8


def test_other_embeddings_are_kept_unless_started_over(tmp_path):
    table = make_table(tmp_path)
    fill(table, torch.ones(5, 3))
    table.save()
    (tmp_path / "duplicates.csv").touch()
    with pytest.raises(SystemExit, match="holds other embeddings: settings was 'a' and is now 'b'"):
        make_table(tmp_path, "b")
    assert make_table(tmp_path).done == 5 and (tmp_path / "duplicates.csv").exists()
    with open(table.path, "ab") as f:
        f.truncate(100)
    with pytest.raises(SystemExit, match="is gone or of another size; start over with --fresh"):
        make_table(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(SystemExit, match=r"state.json cannot be read .*give another --out"):
        make_table(tmp_path)
    assert make_table(tmp_path, "b", fresh=True).done == 0
    assert not (tmp_path / "duplicates.csv").exists()
