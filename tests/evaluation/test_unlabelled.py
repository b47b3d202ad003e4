"""RankMe, alignment and uniformity: the papers' formulas, and a sample that never changes."""

import math
import os

import pytest
import torch
from torch.nn import functional as F

from data.datasets import ArraySet
from data.loader import Loader
from data.shapes import shapes
from evaluation import unlabelled
from evaluation.unlabelled import Unlabelled, alignment, rankme, uniformity
from models.cmc import LabEncoder
from models.resnet import Encoder
from processes import run

CPU = torch.device("cpu")
STATISTICS = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def unit_vectors(n, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=generator), dim=1)


def make_loader(n=50, n_views=2, seed=0, **settings):
    images = torch.from_numpy(shapes(n)[0])
    dataset = ArraySet(images, None, None, *STATISTICS)
    settings = {"augment": "shapes", "image_size": 16, "workers": 0} | settings
    return Loader(dataset, 8, n_views, seed, CPU, **settings)


def tiny_encoder():
    torch.manual_seed(0)
    return Encoder(backbone="resnet10", stem="cifar", width=4, dim=8, precision="fp32")


# ---------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("n, width", [(40, 8), (5, 8)])
def test_rankme_is_its_formula(n, width):
    z = unit_vectors(n, width)
    squares = torch.linalg.eigvalsh(z.double() @ z.double().T)[-min(n, width) :]
    sigma = [math.sqrt(square) for square in squares.tolist()]
    entropy = 0.0
    for value in sigma:
        p = value / sum(sigma) + 1e-7
        entropy -= p * math.log(p)
    assert rankme(z) == pytest.approx(math.exp(entropy), rel=1e-6)


def test_alignment_and_uniformity_are_their_formulas(monkeypatch):
    monkeypatch.setattr(unlabelled, "ROWS", 7)  # so that there are several blocks
    n, width = 23, 6
    x, y = unit_vectors(n, width), unit_vectors(n, width, seed=1)
    distances = [sum((x[i, k] - y[i, k]).item() ** 2 for k in range(width)) for i in range(n)]
    assert alignment(x, y) == pytest.approx(sum(distances) / n, rel=1e-5)
    kernel = [
        math.exp(-2 * sum((x[i, k] - x[j, k]).item() ** 2 for k in range(width)))
        for i in range(n)
        for j in range(n)
        if i != j
    ]
    assert uniformity(x) == pytest.approx(math.log(sum(kernel) / len(kernel)), rel=1e-5)


def test_orthonormal_embeddings():
    z = torch.eye(16)
    assert rankme(z) == pytest.approx(16, rel=1e-4)
    assert rankme(z.repeat(5, 1)) == pytest.approx(16, rel=1e-4)
    assert alignment(z, z) == 0
    assert alignment(z, -z) == 4
    assert uniformity(z) == pytest.approx(-4)  # all distances are 2


def test_collapsed_embeddings():
    z = unit_vectors(1, 16).expand(40, 16)
    assert rankme(z) == pytest.approx(1, abs=1e-3)
    assert uniformity(z) == pytest.approx(0, abs=1e-5)
    assert rankme(torch.zeros(40, 16)) == pytest.approx(1, abs=1e-3)


def test_uniformity_of_many_images_needs_a_block_of_them(monkeypatch):
    sizes = []
    triu = torch.Tensor.triu
    monkeypatch.setattr(
        torch.Tensor, "triu", lambda x, diagonal: sizes.append(x.numel()) or triu(x, diagonal)
    )
    uniformity(unit_vectors(3_000, 2))
    assert max(sizes) <= 256 * 3_000


# ---------------------------------------------------------------------------- the sample


def test_figures_are_those_of_the_sample_s_views():
    """They are the same at the next call, whatever else draws random numbers."""
    loader, encoder = make_loader(n_views=1), tiny_encoder().train()
    monitor = Unlabelled(loader, sample=30)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    figures = monitor(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    torch.manual_seed(7)
    assert monitor(encoder) == figures

    encoder.eval()
    images = loader.dataset.images[monitor.rows]
    views = loader.augment.apply(images.repeat(2, 1, 1, 1), monitor.parameters)
    first, second = encoder(views).detach().chunk(2)
    assert not torch.allclose(first, second)
    assert figures["RankMe"] == pytest.approx(rankme(first), rel=1e-4)
    assert figures["alignment"] == pytest.approx(alignment(first, second), rel=1e-4)
    assert figures["uniformity"] == pytest.approx(uniformity(first), rel=1e-4)


def test_the_sample_is_one_for_all_seeds():
    one, other = (Unlabelled(make_loader(seed=seed), sample=20) for seed in (0, 5))
    assert torch.equal(one.rows, other.rows)
    assert len(one.rows.unique()) == 20
    parameters = zip(one.parameters["crop"].values(), other.parameters["crop"].values())
    assert all(torch.equal(a, b) for a, b in parameters)
    assert torch.equal(Unlabelled(make_loader()).rows, torch.arange(50))


def test_a_sample_by_pil():
    monitor = Unlabelled(make_loader(augment_backend="pil"), sample=9)
    assert monitor(tiny_encoder()) == monitor(tiny_encoder())


def test_the_two_streams_of_cmc_are_one_unit_vector():
    torch.manual_seed(0)
    network = {"backbone": "resnet10", "stem": "cifar", "width": 4, "dim": 8, "precision": "fp32"}
    encoder = LabEncoder(*STATISTICS, **network)
    z = Unlabelled(make_loader(), sample=10).embed(encoder)
    assert z.shape == (10, 2, 16)
    assert torch.allclose(z.norm(dim=2), torch.ones(10, 2))


def test_no_sample_and_embeddings_that_are_not_finite(capsys):
    assert Unlabelled(make_loader(), sample=0)(None) == {}
    encoder = tiny_encoder()
    encoder.backbone.bn1.running_mean.fill_(float("nan"))
    assert Unlabelled(make_loader())(encoder) == {}
    assert "some embeddings are not finite" in capsys.readouterr().out


@pytest.mark.parametrize("sample", [-1, 1, 10_001])
def test_a_sample_that_makes_no_sense_is_refused(sample):
    with pytest.raises(ValueError, match=f"^sample is {sample}; it must be from 2 to 10000"):
        Unlabelled(make_loader(), sample=sample)


# ---------------------------------------------------------------------------- two processes

JOB = """
from engine import distributed
from evaluation.unlabelled import Unlabelled
from test_unlabelled import make_loader, tiny_encoder

distributed.init_distributed()
print(*Unlabelled(make_loader(), sample=33)(tiny_encoder()).values())
"""


def test_two_processes_find_what_one_finds(tmp_path):
    job = f"import sys\nsys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})\n{JOB}"
    (tmp_path / "job.py").write_text(job)
    two = run(tmp_path, tmp_path / "job.py", processes=2).stdout.split()
    one = Unlabelled(make_loader(), sample=33)(tiny_encoder())
    assert [float(value) for value in two] == pytest.approx(list(one.values()), rel=1e-4)
