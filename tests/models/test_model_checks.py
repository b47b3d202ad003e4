"""What is refused or warned of before training; and a host that is a stranger's."""

import textwrap
import warnings

import pytest
import torch
from small import images, small_encoder, small_lab_encoder
from torch import nn

import models
from engine import config, distributed
from losses.nce import NCE
from models.checks import check_batch
from models.cmc import CMC
from models.ir import IR
from models.moco import MoCo
from models.resnet import ResNet
from models.simclr import SimCLR

OPTIM, FINETUNE = "optim.batch_size", "finetune.batch_size"
IDLE = "MoCo's shuffled BatchNorm does nothing with one process and model.bn_splits 1"


class Flat(nn.Module):
    """An encoder without BatchNorm."""

    dim, bn_splits = 8, 1


# ---------------------------------------------------------------------------------- shuffled BN


def test_shuffling_that_can_do_nothing_is_said_with_both_ways_out():
    message = f"{IDLE}: .*; set model.bn_splits=8, .*, or start several processes by torchrun"
    with pytest.warns(UserWarning, match=message):
        MoCo(small_encoder(), 24, queue_size=8)


def test_nothing_is_said_where_shuffling_does_something(monkeypatch):
    warnings.simplefilter("error")
    MoCo(small_encoder(bn_splits=8), 24, queue_size=8)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    MoCo(small_encoder(), 24, queue_size=8)


def test_nothing_is_said_without_batch_norm_or_of_other_hosts():
    warnings.simplefilter("error")
    MoCo(Flat(), 24, queue_size=24)
    IR(small_encoder(), 24)
    SimCLR(small_encoder())
    CMC(small_lab_encoder(), 24)


def test_a_queue_longer_than_the_data_set_is_said():
    message = (
        "queue_size 25 is larger than the data set of 24 images, so that a query's own image is "
        "always among its negatives; lower it"
    )
    with pytest.warns(UserWarning, match=message):
        MoCo(Flat(), 24, queue_size=25)


# ------------------------------------------------------------------------------------ the batch


@pytest.mark.parametrize(
    "batch_size,processes,bn_splits,accumulate",
    [(2, 1, 1, 1), (32, 2, 8, 1), (32, 2, 4, 2), (256, 8, 1, 16)],
)
def test_groups_of_two_images_and_more_suit_batch_norm(
    batch_size, processes, bn_splits, accumulate
):
    check_batch(OPTIM, batch_size, processes, bn_splits, accumulate)


@pytest.mark.parametrize(
    "settings,message",
    [
        (
            (OPTIM, 1, 1, 1, 1),
            "optim.batch_size 1 leaves BatchNorm one image at a time, with 1 process and "
            "optim.accumulate 1 times model.bn_splits 1; it needs two, so raise optim.batch_size",
        ),
        ((OPTIM, 8, 8, 1, 1), "optim.batch_size 8 .* with 8 processes and"),
        ((OPTIM, 8, 1, 8, 1), "optim.batch_size 8 .* optim.accumulate 1 times model.bn_splits 8"),
        ((OPTIM, 8, 1, 1, 8), "optim.batch_size 8 .* optim.accumulate 8 times model.bn_splits 1"),
        (
            (FINETUNE, 8, 2, 4),
            "finetune.batch_size 8 leaves BatchNorm one image at a time, with 2 processes and "
            "model.bn_splits 4; it needs two",
        ),
        (
            (OPTIM, 32, 1, 7, 1),
            "optim.batch_size 32 gives each process 32 images, which optim.accumulate 1 times "
            "model.bn_splits 7 does not divide",
        ),
        (
            (FINETUNE, 32, 1, 7),
            "finetune.batch_size 32 gives each process 32 images, which model.bn_splits 7 does "
            "not divide; set another batch_size, or model.bn_splits=1",
        ),
        ((OPTIM, 4, 1, 8, 1), "optim.batch_size 4 gives each process 4 images"),
    ],
)
def test_a_batch_that_leaves_batch_norm_one_image_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_batch(*settings)


@pytest.mark.parametrize("bn_splits", [1, 2])
def test_one_image_a_group_is_what_batch_norm_cannot_bear(bn_splits):
    """Where the last feature map is one pixel: torch would stop the run at its first step."""
    encoder = small_encoder(stem="imagenet", bn_splits=bn_splits)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        encoder(images(bn_splits)[..., :8, :8])
    with pytest.raises(ValueError, match="one image at a time"):
        check_batch(OPTIM, bn_splits, 1, bn_splits)
    encoder(images(2 * bn_splits)[..., :8, :8])
    check_batch(OPTIM, 2 * bn_splits, 1, bn_splits)


def test_the_smallest_image_size_leaves_every_resnet_a_pixel():
    """8 pixels, see data/loader.py: two images a group are enough for every network."""
    for name in ("resnet10", "resnet50"):
        assert ResNet(name, width=8)(torch.randn(2, 3, 8, 8)).isfinite().all()


# --------------------------------------------------------------------------------- a new host

PREVIOUS = '''
    """The candidates are the last batch: one file, and nothing else is touched."""

    import torch
    from torch import nn

    from losses import Contrast


    class Previous(nn.Module):
        n_views, n_keys = 2, 1

        def __init__(self, encoder, n_data, *, size: int = 6):
            super().__init__()
            self.register_buffer("z", torch.zeros(size, encoder.dim))
            self.register_buffer("index", torch.full((size,), -1))
            self.pending = []

        def forward(self, encoder, views, index):
            q, k = encoder(torch.cat(views)).chunk(2)
            self.pending.append((k.detach(), index))
            return [Contrast(q, k[:, None], self.z, index, self.index)]

        def update_memory(self):
            for z, index in self.pending:
                self.z.copy_(z)
                self.index.copy_(index)
            self.pending.clear()
'''


@pytest.fixture
def yaml_of_previous(tmp_path, monkeypatch):
    """A YAML that chooses a host which is a file beside ours."""
    (tmp_path / "previous.py").write_text(textwrap.dedent(PREVIOUS))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.setattr(config, "modules", lambda package: ["nce", "previous"])
    path = tmp_path / "a.yaml"
    path.write_text(
        "data: {name: shapes, augment: shapes, image_size: 32}\n"
        "model: {host: previous, size: 4, backbone: resnet10, width: 8, dim: 16}\n"
        "loss: {name: nce}\n"
        "optim: {epochs: 1, batch_size: 4, lr: 0.1}\n"
    )
    return str(path)


def test_a_host_is_one_file_and_one_yaml(yaml_of_previous):
    cfg = config.load(yaml_of_previous)
    host_class = config.method_class(cfg["model"], "model")
    net = small_encoder()
    host = config.build(host_class, cfg["model"], "a.yaml: model", encoder=net, n_data=24)
    index = torch.arange(4)
    for expected in ([-1] * 4, [0, 1, 2, 3]):
        (contrast,) = host(net, [images(4), images(4)], index)
        assert contrast.negative_index.tolist() == expected
        NCE()(contrast, 0.0)[0].backward()
        host.update_memory()
    assert set(host.state_dict()) == {"z", "index"}
    with pytest.raises(SystemExit, match="queue_size is not a setting"):
        config.load(yaml_of_previous, ["model.queue_size=8"])
