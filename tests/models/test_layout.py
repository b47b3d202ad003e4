"""Narrow networks in channels_last: no fault of oneDNN's is reached; see models/resnet.py."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from models import resnet
from models.resnet import LAYERS, NARROW, ResNet, subsample_first

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

STEPS = """
    import sys
    sys.path.insert(0, {root!r})
    import torch
    from engine import config
    from losses.nce import NCE
    from models.resnet import Encoder

    for name, width in {cases}:
        torch.manual_seed(0)
        host_class = config.method_class(dict(host=name), "model")
        more = dict(mean=(0.5,) * 3, std=(0.2,) * 3) if name == "cmc" else dict()
        encoder = getattr(host_class, "Encoder", Encoder)(
            **more, backbone="resnet10", stem="cifar", width=width, dim=8, precision="fp32")
        n_data = dict() if name == "simclr" else dict(n_data=50)
        settings = dict(queue_size=32) if name == "moco" else dict()
        host = host_class(encoder, **n_data, **settings)
        optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
        for step in range(4):
            views = [torch.randn(16, 3, 16, 16) for _ in range(host.n_views)]
            contrasts = host(encoder, views, torch.arange(16))
            loss = sum(NCE()(contrast, 0.0)[0] for contrast in contrasts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            host.update_memory()
        assert loss.isfinite()
        print(name, width, flush=True)
"""
CASES = [("ir", 2), ("ir", 6), ("cmc", 4), ("cmc", 8), ("cmc", 12), ("moco", 4), ("simclr", 4)]


def test_narrow_networks_train_where_there_is_avx2_alone():
    """Before, the process died, or span for ever, at the first of them."""
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "OMP_NUM_THREADS": "1",
        "MALLOC_PERTURB_": "165",
    }
    script = textwrap.dedent(STEPS).format(root=ROOT, cases=CASES)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{host} {width}" for host, width in CASES]


@pytest.mark.parametrize("name", LAYERS)
def test_no_narrow_pointwise_convolution_has_a_stride(name):
    """And a wide one keeps it, so that its bits are as they were."""
    for width in (1, 3, 4, 8, 15, 16, 64):
        net = ResNet(name, "cifar", width)
        for stage in (net.layer2, net.layer3, net.layer4):
            conv = stage[0].downsample.get_submodule("0")
            assert conv.kernel_size == (1, 1)
            assert conv.stride == ((1, 1) if conv.in_channels < NARROW else (2, 2))
        strided = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
        assert all(m.in_channels >= NARROW for m in strided if m.kernel_size == (1, 1))


@pytest.mark.parametrize("pixels", [8, 7])
def test_a_narrow_shortcut_is_the_same_function_under_the_same_keys(pixels):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8)).double()
    x = torch.randn(3, 4, pixels, pixels, dtype=torch.float64, requires_grad=True)
    y = plain(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *plain.parameters()])
    keys = list(plain.state_dict())
    narrow = subsample_first(plain)
    z = narrow(x)
    assert narrow is not plain
    assert list(narrow.state_dict()) == keys
    # The second pass has the same batch statistics, for these are of the batch alone.
    assert torch.allclose(z, y, rtol=1e-12, atol=1e-12)
    gradients_of_narrow = torch.autograd.grad(z.square().sum(), [x, *narrow.parameters()])
    assert all(
        torch.allclose(a, b, atol=1e-9) for a, b in zip(gradients, gradients_of_narrow, strict=True)
    )
    assert torch.equal(gradients[0] != 0, gradients_of_narrow[0] != 0)


def test_narrow_networks_begin_with_the_random_numbers_of_before(monkeypatch):
    """No weight is drawn again, so that a seed means the network that it meant."""
    drawn = []
    for change in (subsample_first, lambda shortcut: shortcut):
        monkeypatch.setattr(resnet, "subsample_first", change)
        torch.manual_seed(0)
        weights = ResNet("resnet10", "cifar", 4).state_dict()
        drawn.append(
            (list(weights), torch.cat([w.flatten() for w in weights.values()]), torch.rand(3))
        )
    (keys, weights, after), (keys_before, weights_before, after_before) = drawn
    assert keys == keys_before
    assert torch.equal(weights, weights_before)
    assert torch.equal(after, after_before)
