"""ResNets are torchvision's, encoders give unit vectors in any precision, BatchNorm splits."""

import pytest
import torch
import torchvision
from small import images, small_encoder, small_lab_encoder
from torch import nn

from models.cmc import XYZ, rgb_to_lab
from models.resnet import ResNet, SplitBatchNorm


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_resnets_are_torchvisions(name):
    """They have the same keys, except for fc, and give torchvision's pooled features."""
    ours = ResNet(name).eval()
    theirs = getattr(torchvision.models, name)().eval()
    keys = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert not keys.unexpected_keys
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = ours(x)
        assert torch.equal(features, theirs(x))
    assert features.shape[1] == ours.features


def test_cifar_stem_keeps_the_resolution_and_width_scales():
    net = ResNet("resnet18", "cifar", width=16)
    x = images(2)
    assert net.maxpool(net.bn1(net.conv1(x))).shape == (2, 16, 32, 32)
    assert net(x).shape == (2, 128)
    assert n_parameters(net) < 0.8e6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_outputs_are_unit_fp32_in_any_precision(precision, head):
    net = small_encoder(head=head, precision=precision)
    z = net(images(4))
    h = net(images(4), "backbone")
    assert z.dtype == h.dtype == torch.float32
    assert z.shape == (4, 16)
    assert h.shape == (4, 64)
    assert (z.norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["dim", "width", "bn_splits"])
def test_sizes_without_meaning_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        small_encoder(**{name: 0})


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="fp16 is for GPUs"):
        small_encoder(precision="fp16")


def test_split_batch_norm_is_batch_norm_of_each_part():
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 4)
    split = SplitBatchNorm(5, 3)
    parts = [nn.BatchNorm2d(5) for _ in range(3)]
    expected = torch.cat([norm(part) for norm, part in zip(parts, x.chunk(3))])
    assert torch.allclose(split(x), expected, atol=1e-6)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in parts]).mean(0)
        assert torch.allclose(getattr(split, name), mean, atol=1e-6)

    split.eval()
    plain = nn.BatchNorm2d(5).eval()
    plain.load_state_dict(split.state_dict())
    assert torch.equal(split(x), plain(x))
    with pytest.raises(ValueError, match="does not divide into model.bn_splits"):
        split.train()(x[:10])


def lab_of_one_pixel(rgb):
    """CIE Lab by its definition, in Python's float64."""
    linear = [((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in rgb]
    f = []
    for row in XYZ:
        t = sum(weight * value for weight, value in zip(row, linear))
        f.append(t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116)
    return torch.tensor([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_lab_is_cie_lab():
    """The corners of sRGB are the published values (D65), and other colours the definition's."""
    published = {
        (1, 1, 1): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (1, 0, 0): (53.24, 80.09, 67.20),
        (0, 1, 0): (87.74, -86.18, 83.18),
        (0, 0, 1): (32.30, 79.19, -107.86),
    }
    for rgb, expected in published.items():
        lab = rgb_to_lab(torch.tensor(rgb).float().view(1, 3, 1, 1)).flatten()
        assert torch.allclose(lab, torch.tensor(expected).float(), atol=0.03)
    x = torch.rand(20, 3, 1, 1)
    for rgb, lab in zip(x.flatten(1).tolist(), rgb_to_lab(x).flatten(1)):
        assert torch.allclose(lab, lab_of_one_pixel(rgb), atol=1e-3)


def test_cmcs_encoder_keeps_the_streams_apart():
    """L depends on lightness alone, ab on colour alone; both are unit vectors."""
    net = small_lab_encoder().eval()
    grey = torch.rand(4, 1, 32, 32).expand(-1, 3, -1, -1)
    other_grey = grey.flip(0) * 0.5
    z, other_z = (net((x - net.mean) / net.std) for x in (grey, other_grey))
    L, ab = z.chunk(2, 1)
    other_L, other_ab = other_z.chunk(2, 1)
    assert torch.allclose(ab, other_ab, atol=1e-3)  # grey has no colour that could tell them apart
    assert not torch.allclose(L, other_L, atol=1e-3)
    assert torch.allclose(z.view(4, 2, 16).norm(dim=2), torch.ones(4, 2), atol=1e-5)


def test_cmcs_encoder_is_as_wide_as_one_resnet_and_half_as_large():
    net = small_lab_encoder().eval()
    assert net(images(4), "backbone").shape == (4, 64)
    assert 0.4 < n_parameters(net.backbone) / n_parameters(small_encoder().backbone) < 0.6
    other = small_lab_encoder(bn_splits=2, head="mlp", precision="bf16")
    assert other(images(4)).dtype == torch.float32
    with pytest.raises(ValueError, match="cmc halves it"):
        small_lab_encoder(width=1)
