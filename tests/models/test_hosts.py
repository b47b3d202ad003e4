"""Who is contrasted with whom: the hosts, and what they remember."""

import copy

import pytest
import torch
from small import (
    images,
    moved_rows,
    random_step,
    small_encoder,
    small_lab_encoder,
    valid_mask,
)

from losses.nce import NCE
from models.cmc import CMC
from models.ir import IR
from models.moco import MoCo
from models.simclr import SimCLR

pytestmark = pytest.mark.filterwarnings("ignore:MoCo's shuffled BatchNorm")

MEMORY = {"ir": "bank.rows", "moco": "queue.keys"}


@pytest.mark.parametrize("exclude_self", [True, False])
def test_ir(exclude_self):
    net, index = small_encoder(), torch.tensor([4, 0, 9])
    host = IR(net, 10, exclude_self=exclude_self)
    before = host.bank.rows.clone()
    (contrast,) = host(net, [images(3)], index)
    assert torch.equal(contrast.positive[:, 0], before[index])
    assert torch.equal(contrast.negative, before)
    assert torch.equal(contrast.negative_index, torch.arange(10))
    valid = valid_mask(contrast)
    if exclude_self:
        assert valid.sum() == 27
        assert not valid[torch.arange(3), index].any()
    else:
        assert valid.all()
    assert contrast.query.requires_grad
    assert not contrast.positive.requires_grad
    assert not contrast.negative.requires_grad

    assert torch.equal(host.bank.rows, before)  # the loss sees the bank as it was
    host.update_memory()
    expected = moved_rows(before, index, contrast.query)
    assert torch.allclose(host.bank.rows[index], expected, atol=1e-6)


@pytest.mark.parametrize("V", [2, 3])
def test_ir_with_several_views_has_the_row_and_the_other_views_as_keys(V):
    net, index = small_encoder(), torch.tensor([4, 0, 9])
    host, views = IR(net, 10, n_views=V), [images(3) for _ in range(V)]
    before = host.bank.rows.clone()
    (contrast,) = host(net, views, index)
    z = net(torch.stack(views, 1).flatten(0, 1)).view(3, V, 16)
    assert host.n_keys == V
    assert contrast.query.shape == (3 * V, 16)
    assert contrast.positive.shape == (3 * V, V, 16)
    assert not contrast.positive.requires_grad
    for i in range(3):
        for v in range(V):
            row = i * V + v
            first, *others = contrast.positive[row]
            assert torch.equal(first, before[index[i]])
            expected = [z[i, w] for w in range(V) if w != v]
            for key in others:
                assert min((key - other).abs().max() for other in expected) < 1e-5
            assert len(contrast.positive[row].unique(dim=0)) == V
            assert contrast.index[row] == index[i]
            assert valid_mask(contrast)[row].sum() == 9
    host.update_memory()
    expected = moved_rows(before, index, z.mean(1))
    assert torch.allclose(host.bank.rows[index], expected, atol=1e-5)


@pytest.mark.parametrize("V", [1, 2])
def test_cmc_each_stream_meets_the_others_bank(V):
    net, index = small_lab_encoder(), torch.tensor([4, 0, 9])
    host, views = CMC(net, 10, n_views=V), [images(3) for _ in range(V)]
    L_before, ab_before = host.L.rows.clone(), host.ab.rows.clone()
    of_L, of_ab = host(net, views, index)
    L, ab = net(torch.stack(views, 1).flatten(0, 1)).view(3, V, 32).chunk(2, 2)

    assert torch.allclose(of_L.query, L.flatten(0, 1), atol=1e-5)
    assert torch.equal(of_L.negative, ab_before)
    assert torch.equal(of_L.positive[0, 0], ab_before[4])
    assert torch.allclose(of_ab.query, ab.flatten(0, 1), atol=1e-5)
    assert torch.equal(of_ab.negative, L_before)
    assert torch.equal(of_ab.positive[0, 0], L_before[4])
    assert of_L.positive.shape == (3 * V, V, 16)
    assert not of_L.positive.requires_grad
    assert valid_mask(of_L).sum() == 27 * V
    if V == 2:  # the other view's embedding by the other stream
        assert torch.allclose(of_L.positive[0, 1], ab[0, 1], atol=1e-5)
        assert torch.allclose(of_ab.positive[1, 1], L[0, 0], atol=1e-5)

    host.update_memory()
    L_expected = moved_rows(L_before, index, L.mean(1))
    ab_expected = moved_rows(ab_before, index, ab.mean(1))
    assert torch.allclose(host.L.rows[index], L_expected, atol=1e-5)
    assert torch.allclose(host.ab.rows[index], ab_expected, atol=1e-5)
    assert {"L.rows", "ab.rows"} == set(host.state_dict())


@pytest.mark.parametrize("n_views", [2, 4])
def test_moco_in_the_order_of_its_code(n_views):
    net = small_encoder()
    host = MoCo(net, queue_size=8, momentum=0.5, n_views=n_views)
    random_step(net)
    expected = copy.deepcopy(host.key_encoder)
    expected.update(net)  # f_k moves before it makes keys
    views, index = [images(3) for _ in range(n_views)], torch.tensor([5, 6, 7])
    before = host.queue.keys.clone()
    (contrast,) = host(net, views, index)
    keys = expected(torch.cat(views[1:])).view(n_views - 1, 3, 16)
    assert contrast.positive.shape == (3, n_views - 1, 16)
    assert torch.allclose(contrast.positive.transpose(0, 1), keys, atol=1e-5)
    # This batch is not yet in the queue.
    assert torch.equal(contrast.negative, before)
    assert (contrast.negative_index == -1).all()
    host.update_memory()
    assert torch.allclose(host.queue.keys[:3], keys.mean(0), atol=1e-5)
    assert host.queue.index.tolist() == [5, 6, 7] + [-1] * 5


def test_moco_refuses_settings_without_meaning():
    net = small_encoder()
    with pytest.raises(ValueError, match="n_views"):
        MoCo(net, n_views=1)
    with pytest.raises(ValueError, match="queue_size"):
        MoCo(net, queue_size=0)


@pytest.mark.parametrize("name", ["ir", "moco"])
def test_a_step_in_parts_leaves_the_memory_as_a_step_at_once(name):
    """F_k moves once, the loss of every part sees the old memory, which then takes all of them.

    BatchNorm is in eval mode, where the company of an image does not matter.
    """
    states = []
    for n_parts in (1, 3):
        torch.manual_seed(0)
        net = small_encoder().eval()
        host = IR(net, 20) if name == "ir" else MoCo(net, queue_size=8, momentum=0.5)
        host.eval()
        random_step(net)
        views = torch.randn(host.n_views, 6, 3, 32, 32)
        index = torch.tensor([7, 3, 11, 0, 19, 5])
        before = host.state_dict()[MEMORY[name]].clone()
        for part, part_index in zip(views.chunk(n_parts, 1), index.chunk(n_parts)):
            (contrast,) = host(net, list(part), part_index)
            assert torch.equal(contrast.negative, before)
        host.update_memory()
        assert host.pending == []
        states.append(host.state_dict())
    at_once, in_parts = states
    for key, value in at_once.items():
        assert torch.allclose(value.float(), in_parts[key].float(), atol=1e-5), key
    assert not torch.equal(at_once[MEMORY[name]], before)


def test_all_state_is_in_the_state_dict():
    net = small_encoder()
    assert {"bank.rows"} == set(IR(net, 10).state_dict())
    keys = set(MoCo(net, queue_size=8).state_dict())
    assert {"queue.keys", "queue.index", "queue.pointer"} <= keys
    assert any(key.startswith("key_encoder.net.") for key in keys)


def test_simclr_every_view_meets_every_other():
    """It is the paper's loop over 2N queries, and so is the gradient through all of them."""
    net, index = small_encoder(), torch.tensor([4, 0, 9, 2])
    views = [images(4) for _ in range(2)]
    (contrast,) = SimCLR(net)(net, views, index)
    loss = NCE(temperature=0.5)(contrast, 0.0)[0]

    z = net(torch.stack(views, 1).flatten(0, 1))  # (8, D), 2i and 2i + 1 are of image i
    expected = 0
    for i in range(8):
        j = i ^ 1  # the other view
        e = [torch.exp(z[i] @ z[k] / 0.5) for k in range(8)]
        expected -= torch.log(e[j] / sum(e[k] for k in range(8) if k != i)) / 8
    assert abs(loss - expected) < 1e-5
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, parameters)):
        assert torch.allclose(gradient, other, atol=1e-5)
    assert contrast.negative.requires_grad
    assert contrast.positive.requires_grad


def test_simclr_with_three_views():
    net, index = small_encoder(), torch.tensor([4, 0, 9, 2])
    (contrast,) = SimCLR(net, n_views=3)(net, [images(4) for _ in range(3)], index)
    assert contrast.positive.shape == (12, 2, 16)
    assert valid_mask(contrast).sum(1).tolist() == [9] * 12
    with pytest.raises(ValueError, match="n_views"):
        SimCLR(net, n_views=1)
