"""Encoders, bank, queue, momentum encoder, and the hosts."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from losses.base import valid_candidates
from losses.diagnostics import step_diagnostics
from losses.ring import Ring
from models.cmc import CMC, XYZ, LabEncoder, lab
from models.ir import IR
from models.memory import MemoryBank, Queue
from models.moco import MoCo
from models.momentum import MomentumEncoder
from models.resnet import Encoder, ResNet, SplitBatchNorm
from models.simclr import SimCLR


def small(**settings):
    torch.manual_seed(0)
    return Encoder(
        **{**dict(backbone="resnet10", stem="cifar", width=8, dim=16, precision="fp32"), **settings}
    )


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
    x, split, parts = (
        torch.randn(12, 5, 4, 4),
        SplitBatchNorm(5, 3),
        [nn.BatchNorm2d(5) for _ in range(3)],
    )
    assert torch.allclose(
        split(x), torch.cat([bn(part) for bn, part in zip(parts, x.chunk(3))]), atol=1e-6
    )
    assert torch.allclose(
        split.running_var, torch.stack([bn.running_var for bn in parts]).mean(0), atol=1e-6
    )
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
        expected = (
            F.normalize(0.5 * before[row] + 0.5 * z[(index == row).nonzero()[0, 0]], dim=0)
            if row in index
            else before[row]
        )
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
        order = [
            (int(queue.pointer) - len(kept) + i) % 8 for i in range(len(kept))
        ]  # oldest first, ending before the pointer
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
    assert not key(torch.randn(4, 3, 32, 32)).requires_grad and not any(
        p.requires_grad for p in key.parameters()
    )


def test_shuffling_across_split_batch_norm_returns_the_order_and_changes_the_company():
    key, x = MomentumEncoder(small(bn_splits=2), 0.9), torch.randn(8, 3, 32, 32)
    deal = torch.tensor([0, 2, 5, 7, 1, 3, 4, 6])  # each part gets two of each
    k = key.shuffled(x)
    assert torch.allclose(k, key(x[deal])[deal.argsort()], atol=1e-6) and not torch.allclose(
        k, key(x), atol=1e-4
    )
    key.eval()
    assert torch.allclose(key.shuffled(x), key(x), atol=1e-6)


@pytest.mark.parametrize("exclude_self", [True, False])
def test_ir(exclude_self):
    net, index = small(), torch.tensor([4, 0, 9])
    host, x = IR(net, 10, exclude_self=exclude_self), torch.randn(3, 3, 32, 32)
    before = host.bank.rows.clone()
    (c,) = host(net, [x], index)
    assert (
        torch.equal(c.positive[:, 0], before[index])
        and torch.equal(c.negative, before)
        and torch.equal(c.negative_index, torch.arange(10))
    )
    if exclude_self:
        assert (
            valid_candidates(c).sum() == 27
            and not valid_candidates(c)[torch.arange(3), index].any()
        )
    else:
        assert valid_candidates(c).all()
    assert c.query.requires_grad and not c.positive.requires_grad and not c.negative.requires_grad
    assert torch.equal(host.bank.rows, before)  # the loss sees the bank as it was
    host.after_step()
    assert torch.allclose(
        host.bank.rows[index],
        F.normalize(0.5 * before[index] + 0.5 * c.query.detach(), dim=1),
        atol=1e-6,
    )


@pytest.mark.parametrize("n,m", [(10, 10), (10, 3), (1000, 37)])
def test_a_part_of_the_bank_is_fresh_distinct_uniform_and_without_the_querys_own_row(n, m):
    torch.manual_seed(0)
    bank, index, times = MemoryBank(n, 4, 0.5, candidates=m), torch.arange(0, n, 3), torch.zeros(n)
    z = F.normalize(torch.randn(len(index), 1, 4), dim=2)
    draws = 3000
    for _ in range(draws):
        c = bank.contrast(z, z, index)
        assert (
            c.negative.shape == (m, 4)
            and c.negative_index.unique().numel() == m
            and c.self_index.min() >= 0
            and c.self_index.max() < m
        )
        there = index[:, None] == c.negative_index  # (N, m)
        assert not there.scatter(
            1, c.self_index[:, None], False
        ).any()  # the own row, where it was drawn, is the one left out
        times[c.negative_index] += 1
    assert torch.equal(c.negative, bank.rows[c.negative_index]) and torch.equal(
        c.positive[:, 0], bank.rows[index]
    )
    expected = draws * m / n
    assert (times.sum() == draws * m) and (
        (times - expected).abs() < 6 * expected**0.5 * (1 - m / n) ** 0.5 + 1e-6
    ).all()
    assert (
        MemoryBank(n, 4, 0.5, exclude_self=False, candidates=m).contrast(z, z, index).self_index
        is None
    )
    for wrong in (1, n + 1):
        with pytest.raises(ValueError, match="candidates"):
            MemoryBank(n, 4, 0.5, candidates=wrong)


def test_the_bias_of_a_part_of_the_bank_is_small_beside_the_ring_it_measures():
    """A tenth of 100,001 rows, drawn 100 times: the ring's thresholds are off by 0.001 in similarity, its loss on 4,095 draws by 0.003 of 1.63."""
    torch.manual_seed(0)
    groups = F.normalize(torch.randn(50, 32), dim=1).repeat_interleave(2001, 0)[
        :100001
    ]  # sorted, as class folders are
    bank = MemoryBank(100001, 32, 0.5)
    bank.rows.copy_(F.normalize(groups + 0.15 * torch.randn(100001, 32), dim=1))
    index = torch.arange(0, 100000, 3125)
    z = F.normalize(bank.rows[index, None] + 0.1 * torch.randn(32, 1, 32), dim=2)
    loss_fn = Ring(1, anneal_epochs=0, n_negatives=4095)

    def measure(times):
        names = "loss", "inner threshold", "outer threshold"
        runs = []
        for _ in range(times):
            contrast = bank.contrast(z, z, index)
            output = loss_fn(contrast, 1.0)
            figures = step_diagnostics(loss_fn, [contrast], [output], None, 1.0)
            runs.append([figures[name] for name in names])
        return torch.tensor(runs).mean(0)

    whole = measure(10)
    bank.candidates = 10001
    off = (measure(100) - whole).abs()
    assert off[0] < 0.008 and off[1:].max() < 0.002, off


@pytest.mark.parametrize("host", ["ir", "moco"])
def test_a_step_in_parts_leaves_the_memory_as_a_step_at_once(host):
    """Without BatchNorm's company (eval mode): f_k moves once, the loss of every part sees the old memory, which then takes all of them."""
    states = []
    for parts in (1, 3):
        torch.manual_seed(0)
        net = small().eval()
        memory = IR(net, 20) if host == "ir" else MoCo(net, queue_size=8, momentum=0.5)
        memory.eval()
        with torch.no_grad():
            [p.add_(0.1 * torch.randn_like(p)) for p in net.parameters()]
        views, index = torch.randn(memory.n_views, 6, 3, 32, 32), torch.tensor([7, 3, 11, 0, 19, 5])
        before = copy.deepcopy(memory.state_dict())
        for some, rows in zip(views.chunk(parts, 1), index.chunk(parts)):
            (c,) = memory(net, list(some), rows)
            assert torch.equal(c.negative, before["bank.rows" if host == "ir" else "queue.keys"])
        memory.after_step()
        assert memory.news == []
        states.append(memory.state_dict())
    assert all(
        torch.allclose(a.float(), b.float(), atol=1e-5)
        for a, b in zip(states[0].values(), states[1].values())
    )
    assert not torch.equal(
        states[0]["bank.rows" if host == "ir" else "queue.keys"],
        before["bank.rows" if host == "ir" else "queue.keys"],
    )


@pytest.mark.parametrize("n_views", [2, 4])
def test_moco_in_the_order_of_its_code(n_views):
    net = small()
    host = MoCo(net, queue_size=8, momentum=0.5, n_views=n_views)
    with torch.no_grad():
        [p.add_(0.1 * torch.randn_like(p)) for p in net.parameters()]
    expected = copy.deepcopy(host.key_encoder)
    expected.update(net)
    x, index, before = (
        [torch.randn(3, 3, 32, 32) for _ in range(n_views)],
        torch.tensor([5, 6, 7]),
        host.queue.keys.clone(),
    )
    (c,) = host(net, x, index)
    keys = expected(torch.cat(x[1:])).view(n_views - 1, 3, 16)  # f_k moves before it makes keys
    assert c.positive.shape == (3, n_views - 1, 16) and torch.allclose(
        c.positive.transpose(0, 1), keys, atol=1e-5
    )
    assert (
        torch.equal(c.negative, before) and (c.negative_index == -1).all()
    )  # this batch is not yet in the queue
    host.after_step()
    assert (
        torch.allclose(host.queue.keys[:3], keys.mean(0), atol=1e-5)
        and host.queue.index.tolist() == [5, 6, 7] + [-1] * 5
    )
    with pytest.raises(ValueError, match="n_views"):
        MoCo(net, n_views=1)
    with pytest.raises(ValueError, match="queue_size"):
        MoCo(net, queue_size=0)


def test_all_state_is_in_the_state_dict():
    net = small()
    assert {"bank.rows"} == set(IR(net, 10).state_dict())
    keys = set(MoCo(net, queue_size=8).state_dict())
    assert {"queue.keys", "queue.index", "queue.pointer"} <= keys and any(
        k.startswith("key_encoder.net.") for k in keys
    )


@pytest.mark.parametrize("V", [2, 3])
def test_ir_with_several_views_has_the_row_and_the_other_views_as_keys(V):
    net, index = small(), torch.tensor([4, 0, 9])
    host, x = IR(net, 10, n_views=V), [torch.randn(3, 3, 32, 32) for _ in range(V)]
    before = host.bank.rows.clone()
    (c,) = host(net, x, index)
    z = net(torch.stack(x, 1).flatten(0, 1)).view(3, V, 16)
    assert (
        c.query.shape == (3 * V, 16)
        and c.positive.shape == (3 * V, V, 16)
        and host.n_keys == V
        and not c.positive.requires_grad
    )
    for i in range(3):
        for v in range(V):
            others = {tuple(z[i, w].tolist()) for w in range(V) if w != v}
            got = c.positive[i * V + v]
            assert torch.equal(got[0], before[index[i]]) and all(
                min((g - torch.tensor(o)).abs().max() for o in others) < 1e-5 for g in got[1:]
            )
            assert (
                len({tuple(g.tolist()) for g in got}) == V
                and c.index[i * V + v] == index[i]
                and valid_candidates(c)[i * V + v].sum() == 9
            )
    host.after_step()
    assert torch.allclose(
        host.bank.rows[index], F.normalize(0.5 * before[index] + 0.5 * z.mean(1), dim=1), atol=1e-5
    )


def test_simclr_every_view_meets_every_other():
    """Against the loops of the paper: 2N queries, the other view positive, 2N - 2 negatives; and with the gradient through all of them."""
    from losses.nce import NCE

    net, index = small(), torch.tensor([4, 0, 9, 2])
    x = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    (c,) = SimCLR(net)(net, x, index)
    loss = NCE(temperature=0.5)(c, 0.0).loss
    z = net(torch.stack(x, 1).flatten(0, 1))  # (8, D), 2i and 2i + 1 are of image i
    total = 0
    for a in range(8):
        b = a ^ 1
        e = [torch.exp(z[a] @ z[j] / 0.5) for j in range(8)]
        total = total - torch.log(e[b] / sum(e[j] for j in range(8) if j != a)) / 8
    assert abs(loss - total) < 1e-5
    ours, theirs = (torch.autograd.grad(v, list(net.parameters())) for v in (loss, total))
    assert (
        all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))
        and c.negative.requires_grad
        and c.positive.requires_grad
    )
    (c,) = SimCLR(net, n_views=3)(net, [*x, torch.randn(4, 3, 32, 32)], index)
    assert c.positive.shape == (12, 2, 16) and valid_candidates(c).sum(1).tolist() == [9] * 12
    with pytest.raises(ValueError, match="n_views"):
        SimCLR(net, n_views=1)


def test_lab_is_cie_lab():
    """The corners of sRGB, by the published values (D65), and the definition in float64, one pixel at a time."""
    known = {
        (1, 1, 1): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (1, 0, 0): (53.24, 80.09, 67.20),
        (0, 1, 0): (87.74, -86.18, 83.18),
        (0, 0, 1): (32.30, 79.19, -107.86),
    }
    for rgb, expected in known.items():
        assert torch.allclose(
            lab(torch.tensor(rgb).float().view(1, 3, 1, 1)).flatten(),
            torch.tensor(expected).float(),
            atol=0.03,
        )
    x = torch.rand(20, 3, 1, 1)
    for rgb, ours in zip(x.flatten(1).tolist(), lab(x).flatten(1)):
        linear = [((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in rgb]
        f = [
            (lambda t: t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116)(
                sum(w * v for w, v in zip(row, linear))
            )
            for row in XYZ
        ]
        assert torch.allclose(
            ours,
            torch.tensor([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]),
            atol=1e-3,
        )


def two_streams(**settings):
    torch.manual_seed(0)
    return LabEncoder(
        (0.5, 0.4, 0.3),
        (0.2, 0.2, 0.1),
        **{
            **dict(backbone="resnet10", stem="cifar", width=8, dim=16, precision="fp32"),
            **settings,
        },
    )


def test_cmcs_encoder_keeps_the_streams_apart():
    """L depends on lightness alone, ab on colour alone; both are unit, as wide together as one encoder."""
    net = two_streams().eval()
    size = lambda module: sum(p.numel() for p in module.parameters())
    assert 0.4 < size(net.backbone) / size(small().backbone) < 0.6
    grey = torch.rand(4, 1, 32, 32).expand(-1, 3, -1, -1)
    normal = lambda x: (x - net.mean) / net.std
    a, b = (
        net(normal(v)) for v in (grey, grey.flip(0) * 0.5)
    )  # no colour at all: ab cannot tell them apart
    assert torch.allclose(a[:, 16:], b[:, 16:], atol=1e-3) and not torch.allclose(
        a[:, :16], b[:, :16], atol=1e-3
    )
    assert torch.allclose(a.view(4, 2, 16).norm(dim=2), torch.ones(4, 2), atol=1e-5) and net(
        normal(grey), "backbone"
    ).shape == (4, 64)
    assert (
        two_streams(bn_splits=2, head="mlp", precision="bf16")(normal(grey)).dtype == torch.float32
    )
    with pytest.raises(ValueError, match="cmc halves it"):
        two_streams(width=1)


@pytest.mark.parametrize("V", [1, 2])
def test_cmc_each_stream_meets_the_others_bank(V):
    net, index = two_streams(), torch.tensor([4, 0, 9])
    host, x = CMC(net, 10, n_views=V), [torch.randn(3, 3, 32, 32) for _ in range(V)]
    L_before, ab_before = host.L.rows.clone(), host.ab.rows.clone()
    of_L, of_ab = host(net, x, index)
    L, ab = net(torch.stack(x, 1).flatten(0, 1)).view(3, V, 32).chunk(2, 2)
    assert (
        torch.allclose(of_L.query, L.flatten(0, 1), atol=1e-5)
        and torch.equal(of_L.negative, ab_before)
        and torch.equal(of_L.positive[0, 0], ab_before[4])
    )
    assert (
        torch.allclose(of_ab.query, ab.flatten(0, 1), atol=1e-5)
        and torch.equal(of_ab.negative, L_before)
        and torch.equal(of_ab.positive[0, 0], L_before[4])
    )
    assert (
        of_L.positive.shape == (3 * V, V, 16)
        and not of_L.positive.requires_grad
        and valid_candidates(of_L).sum() == 27 * V
    )
    if V == 2:  # the other view's embedding by the other stream
        assert torch.allclose(of_L.positive[0, 1], ab[0, 1], atol=1e-5) and torch.allclose(
            of_ab.positive[1, 1], L[0, 0], atol=1e-5
        )
    host.after_step()
    assert torch.allclose(
        host.L.rows[index], F.normalize(0.5 * L_before[index] + 0.5 * L.mean(1), dim=1), atol=1e-5
    )
    assert torch.allclose(
        host.ab.rows[index],
        F.normalize(0.5 * ab_before[index] + 0.5 * ab.mean(1), dim=1),
        atol=1e-5,
    )
    assert {"L.rows", "ab.rows"} == set(host.state_dict())
