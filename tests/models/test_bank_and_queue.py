"""The memory bank and the queue, and the part of a bank that stands for the whole."""

import pytest
import torch
from small import moved_rows, unit_vectors
from torch.nn import functional as F

from losses.ring import Ring
from models.memory_bank import MemoryBank
from models.memory_queue import Queue


def test_bank_is_a_moving_average_on_the_sphere():
    bank = MemoryBank(10, 4, momentum=0.5)
    before = bank.rows.clone()
    z, index = unit_vectors(3, 4), torch.tensor([7, 2, 5])
    bank.update(z, index)
    assert torch.allclose(bank.rows[index], moved_rows(before, index, z))
    others = [0, 1, 3, 4, 6, 8, 9]
    assert torch.equal(bank.rows[others], before[others])

    newest = MemoryBank(10, 4, momentum=0.0)
    newest.update(z, index)
    assert torch.allclose(newest.rows[index], z)
    with pytest.raises(ValueError, match="momentum"):
        MemoryBank(10, 4, momentum=1.0)


@pytest.mark.parametrize("sizes", [[3, 3, 3], [4, 4], [7, 1, 9], [8], [25], [5, 30, 2]])
def test_queue_is_first_in_first_out_for_any_batch(sizes):
    """It is a Python list of the last 8, when it wraps, and when a batch is larger than it."""
    queue, history = Queue(8, 4), []
    for size in sizes:
        k, index = unit_vectors(size, 4), torch.randint(100, (size,))
        queue.enqueue(k, index)
        history += list(zip(k, index))
        newest = history[-8:]
        # They stand before the pointer, the oldest first.
        slots = [(int(queue.pointer) - len(newest) + i) % 8 for i in range(len(newest))]
        assert torch.equal(queue.keys[slots], torch.stack([k for k, _ in newest]))
        assert queue.index[slots].tolist() == [int(i) for _, i in newest]
    assert (queue.index == -1).sum() == max(0, 8 - len(history))


@pytest.mark.parametrize("n,m", [(10, 10), (10, 3), (1000, 37)])
def test_a_part_of_the_bank_is_fresh_distinct_uniform_and_without_the_querys_own_row(n, m):
    torch.manual_seed(0)
    bank = MemoryBank(n, 4, 0.5, candidates=m)
    index = torch.arange(0, n, 3)
    z = unit_vectors(len(index), 1, 4)
    n_draws, times = 3000, torch.zeros(n)
    for _ in range(n_draws):
        contrast = bank.contrast(z, z, index)
        *_, self_index = contrast
        assert contrast.negative.shape == (m, 4)
        assert contrast.negative_index.unique().numel() == m
        assert self_index.min() >= 0
        assert self_index.max() < m
        # The own row, where it was drawn, is the one that is left out.
        is_own = index[:, None] == contrast.negative_index  # (N, m)
        assert not is_own.scatter(1, self_index[:, None], False).any()
        times[contrast.negative_index] += 1
    assert torch.equal(contrast.negative, bank.rows[contrast.negative_index])
    assert torch.equal(contrast.positive[:, 0], bank.rows[index])

    expected = n_draws * m / n
    deviation = expected**0.5 * (1 - m / n) ** 0.5
    assert times.sum() == n_draws * m
    assert ((times - expected).abs() < 6 * deviation + 1e-6).all()


def test_the_own_row_may_stay_in_a_part_of_the_bank():
    bank = MemoryBank(10, 4, 0.5, exclude_self=False, candidates=3)
    z = unit_vectors(2, 1, 4)
    *_, self_index = bank.contrast(z, z, torch.tensor([4, 7]))
    assert self_index is None


@pytest.mark.parametrize("candidates", [1, 11])
def test_a_part_that_is_none_is_refused(candidates):
    with pytest.raises(ValueError, match="candidates"):
        MemoryBank(10, 4, 0.5, candidates=candidates)


def ring_thresholds(contrast, inner=0.01, outer=0.1):
    """(2,) the similarities between which the ring lies, the mean over the queries."""
    *_, self_index = contrast
    s = contrast.query @ contrast.negative.T
    s.scatter_(1, self_index[:, None], -1.0)  # the own row, the most similar one, is no negative
    ranks = [round(share * s.shape[1]) for share in (inner, outer)]
    ordered = s.topk(ranks[1], 1).values
    return torch.stack([ordered[:, rank - 1].mean() for rank in ranks])


def test_the_bias_of_a_part_of_the_bank_is_small_beside_the_ring_it_measures():
    """A tenth of 100,001 rows, drawn 100 times, moves the ring's thresholds by 0.001.

    Its loss on 4,095 draws, 1.63, moves by 0.003.
    """
    torch.manual_seed(0)
    # Images lie sorted by class, as in class folders.
    groups = unit_vectors(50, 32).repeat_interleave(2001, 0)[:100001]
    bank = MemoryBank(100001, 32, 0.5)
    bank.rows.copy_(F.normalize(groups + 0.15 * torch.randn(100001, 32), dim=1))
    index = torch.arange(0, 100000, 3125)
    z = F.normalize(bank.rows[index, None] + 0.1 * torch.randn(32, 1, 32), dim=2)
    loss_fn = Ring(1, anneal_epochs=0, n_negatives=4095)

    whole = bank.contrast(z, z, index)
    loss = torch.stack([loss_fn(whole, 1.0)[0] for _ in range(10)]).mean()
    bank.candidates = 10001
    parts = [bank.contrast(z, z, index) for _ in range(100)]
    loss_of_parts = torch.stack([loss_fn(part, 1.0)[0] for part in parts]).mean()
    thresholds_of_parts = torch.stack([ring_thresholds(part) for part in parts[:25]]).mean(0)
    assert abs(loss_of_parts - loss) < 0.008
    assert (thresholds_of_parts - ring_thresholds(whole)).abs().max() < 0.002
