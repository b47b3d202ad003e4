"""MoCo's momentum encoder, and its shuffled BatchNorm."""

import copy

import pytest
import torch
from small import images, random_step, small_encoder
from torch import nn

from models.momentum import MomentumEncoder, deal_rows


def test_it_is_the_exponential_average_and_carries_no_gradient():
    net = small_encoder()
    key_encoder = MomentumEncoder(net, 0.9)
    before = copy.deepcopy(key_encoder.net.state_dict())
    random_step(net)
    key_encoder.update(net)
    after = key_encoder.net.state_dict()
    for name, theta_q in net.named_parameters():
        assert torch.allclose(after[name], 0.9 * before[name] + 0.1 * theta_q, atol=1e-6)
    assert not key_encoder(images(4)).requires_grad
    assert not any(p.requires_grad for p in key_encoder.parameters())


def test_shuffling_across_split_batch_norm_returns_the_order_and_changes_the_company():
    key_encoder = MomentumEncoder(small_encoder(bn_splits=2), 0.9)
    x = images(8)
    deal = torch.tensor([0, 2, 5, 7, 1, 3, 4, 6])  # each part gets two of each
    k = key_encoder.forward_shuffled(x)
    assert torch.allclose(k, key_encoder(x[deal])[deal.argsort()], atol=1e-6)
    assert not torch.allclose(k, key_encoder(x), atol=1e-4)
    key_encoder.eval()
    assert torch.allclose(key_encoder.forward_shuffled(x), key_encoder(x), atol=1e-6)


@pytest.mark.parametrize("world,splits,n", [(2, 2, 8), (4, 1, 8), (1, 8, 32), (2, 4, 12)])
def test_every_part_gets_rows_of_every_part(world, splits, n):
    """And the deal is the same, whatever share of the parts are processes."""
    order = deal_rows(world, splits, n)
    n_parts = world * splits
    assert order.sort().values.tolist() == list(range(world * n))
    assert torch.equal(order, deal_rows(1, n_parts, world * n))
    part_size = n // splits
    for rows in order.chunk(n_parts):
        sources = (rows // part_size).bincount(minlength=n_parts)
        assert sources.max() - sources.min() <= 1


def test_one_part_is_not_shuffled():
    key_encoder = MomentumEncoder(small_encoder(), 0.9)
    x = images(4)
    assert torch.equal(key_encoder.forward_shuffled(x), copy.deepcopy(key_encoder)(x))


def test_a_momentum_that_is_none_is_refused():
    for m in (-0.1, 1.1):
        with pytest.raises(ValueError, match="momentum .* of the key encoder"):
            MomentumEncoder(nn.Linear(2, 2), m)
