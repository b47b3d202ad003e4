"""Encoders, bank, queue, momentum encoder, and the hosts IR and MoCo."""
import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from models.ir import IR
from models.memory import MemoryBank, Queue
from models.moco import MoCo
from models.momentum import MomentumEncoder
from models.resnet import Encoder, ResNet, SplitBatchNorm


def small(**settings):
    torch.manual_seed(0)
    return Encoder(**{**dict(backbone="resnet10", stem="cifar", width=8, dim=16, precision="fp32"), **settings})


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_resnets_are_torchvisions(name):
    """Same keys, same function: ours loads into torchvision's with only fc missing, and gives its pooled features."""
    ours, theirs = ResNet(name).eval(), getattr(torchvision.models, name)().eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x)) and ours(x).shape[1] == ours.features


def test_cifar_stem_keeps_the_resolution_and_width_scales():
    net = ResNet("resnet18", "cifar", width=16)
    x = net.maxpool(net.bn1(net.conv1(torch.randn(2, 3, 32, 32))))
    assert x.shape == (2, 16, 32, 32) and net(torch.randn(2, 3, 32, 32)).shape == (2, 128)
    assert sum(p.numel() for p in net.parameters()) < 0.8e6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_outputs_are_unit_fp32_in_any_precision(precision, head):
    net = small(head=head, precision=precision)
    z, h = net(torch.randn(4, 3, 32, 32)), net(torch.randn(4, 3, 32, 32), "backbone")
    assert z.dtype == h.dtype == torch.float32 and z.shape == (4, 16) and h.shape == (4, 64)
    assert (z.norm(dim=1) - 1).abs().max() < 1e-5


def test_sizes_without_meaning_are_refused():
    for name in ("dim", "width", "bn_splits"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            small(**{name: 0})


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="fp16 is for GPUs"):
        small(precision="fp16")


def test_split_batch_norm_is_batch_norm_of_each_part():
    torch.manual_seed(0)
    x, split, parts = torch.randn(12, 5, 4, 4), SplitBatchNorm(5, 3), [nn.BatchNorm2d(5) for _ in range(3)]
    assert torch.allclose(split(x), torch.cat([bn(part) for bn, part in zip(parts, x.chunk(3))]), atol=1e-6)
    assert torch.allclose(split.running_var, torch.stack([bn.running_var for bn in parts]).mean(0), atol=1e-6)
    split.eval()
    plain = nn.BatchNorm2d(5).eval()
    plain.load_state_dict(split.state_dict())
    assert torch.equal(split(x), plain(x))
    with pytest.raises(ValueError, match="does not divide into model.bn_splits"):
        split.train()(x[:10])


def test_bank_is_a_moving_average_on_the_sphere():
    bank = MemoryBank(10, 4, momentum=0.5)
    before, z, index = bank.rows.clone(), unit(3, 4), torch.tensor([7, 2, 5])
    bank.update(z, index)
    for row in range(10):
        expected = F.normalize(0.5 * before[row] + 0.5 * z[(index == row).nonzero()[0, 0]], dim=0) if row in index else before[row]
        assert torch.allclose(bank.rows[row], expected)
    newest = MemoryBank(10, 4, momentum=0.0)
    newest.update(z, index)
    assert torch.allclose(newest.rows[index], z)
    with pytest.raises(ValueError, match="momentum"):
        MemoryBank(10, 4, momentum=1.0)


@pytest.mark.parametrize("sizes", [[3, 3, 3], [4, 4], [7, 1, 9], [8], [25], [5, 30, 2]])
def test_queue_is_first_in_first_out_for_any_batch(sizes):
    """Against a Python list, K = 8: wrapping, and batches larger than the queue."""
    queue, history = Queue(8, 4), []
    for size in sizes:
        k, index = unit(size, 4), torch.randint(100, (size,))
        queue.enqueue(k, index)
        history += list(zip(k, index))
        kept = history[-8:]
        order = [(int(queue.pointer) - len(kept) + i) % 8 for i in range(len(kept))]   # oldest first, ending before the pointer
        assert torch.equal(queue.keys[order], torch.stack([k for k, _ in kept]))
        assert queue.index[order].tolist() == [int(i) for _, i in kept]
    assert (queue.index == -1).sum() == max(0, 8 - len(history))


def test_momentum_encoder_is_the_exponential_average_and_carries_no_gradient():
    net = small()
    key = MomentumEncoder(net, 0.9)
    before = copy.deepcopy(key.net.state_dict())
    with torch.no_grad():
        [p.add_(torch.randn_like(p)) for p in net.parameters()]
    key.update(net)
    for name, p in net.named_parameters():
        assert torch.allclose(key.net.state_dict()[name], 0.9 * before[name] + 0.1 * p, atol=1e-6)
    assert not key(torch.randn(4, 3, 32, 32)).requires_grad and not any(p.requires_grad for p in key.parameters())


def test_shuffling_across_split_batch_norm_returns_the_order_and_changes_the_company():
    net = small(bn_splits=2)
    key, x = MomentumEncoder(net, 0.9), torch.randn(8, 3, 32, 32)
    torch.manual_seed(1)
    deal = torch.randperm(8)
    torch.manual_seed(1)
    k = key.shuffled(x)
    assert torch.allclose(k, key(x[deal])[deal.argsort()]) and not torch.allclose(k, key(x), atol=1e-4)
    key.eval()
    assert torch.allclose(key.shuffled(x), key(x), atol=1e-6)


@pytest.mark.parametrize("exclude_self", [True, False])
def test_ir(exclude_self):
    net, index = small(), torch.tensor([4, 0, 9])
    host, x = IR(net, 10, exclude_self=exclude_self), torch.randn(3, 3, 32, 32)
    before = host.bank.rows.clone()
    (c,) = host(net, [x], index)
    assert torch.equal(c.positive[:, 0], before[index]) and torch.equal(c.negative, before) and torch.equal(c.negative_index, torch.arange(10))
    if exclude_self:
        assert c.mask.sum() == 27 and not c.mask[torch.arange(3), index].any()
    else:
        assert c.mask is None
    assert c.query.requires_grad and not c.positive.requires_grad and not c.negative.requires_grad
    assert torch.equal(host.bank.rows, before)             # the loss sees the bank as it was
    host.after_step()
    assert torch.allclose(host.bank.rows[index], F.normalize(0.5 * before[index] + 0.5 * c.query.detach(), dim=1), atol=1e-6)


@pytest.mark.parametrize("n_views", [2, 4])
def test_moco_in_the_order_of_its_code(n_views):
    net = small()
    host = MoCo(net, queue_size=8, momentum=0.5, n_views=n_views)
    with torch.no_grad():
        [p.add_(0.1 * torch.randn_like(p)) for p in net.parameters()]
    expected = copy.deepcopy(host.key_encoder)
    expected.update(net)
    x, index, before = [torch.randn(3, 3, 32, 32) for _ in range(n_views)], torch.tensor([5, 6, 7]), host.queue.keys.clone()
    (c,) = host(net, x, index)
    keys = expected(torch.cat(x[1:])).view(n_views - 1, 3, 16)                         # f_k moves before it makes keys
    assert c.positive.shape == (3, n_views - 1, 16) and torch.allclose(c.positive.transpose(0, 1), keys, atol=1e-6)
    assert torch.equal(c.negative, before) and (c.negative_index == -1).all()          # this batch is not yet in the queue
    host.after_step()
    assert torch.allclose(host.queue.keys[:3], keys.mean(0), atol=1e-6) and host.queue.index.tolist() == [5, 6, 7] + [-1] * 5
    with pytest.raises(ValueError, match="n_views"):
        MoCo(net, n_views=1)
    with pytest.raises(ValueError, match="queue_size"):
        MoCo(net, queue_size=0)


def test_all_state_is_in_the_state_dict():
    net = small()
    assert {"bank.rows"} == set(IR(net, 10).state_dict())
    keys = set(MoCo(net, queue_size=8).state_dict())
    assert {"queue.keys", "queue.index", "queue.pointer"} <= keys and any(k.startswith("key_encoder.net.") for k in keys)
