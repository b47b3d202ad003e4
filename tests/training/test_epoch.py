"""How far an epoch has come, and what a checkpoint keeps of it."""

import copy

import pytest
import torch
from torch import nn

from training.epoch import EpochProgress


def recorded(rank, **other):
    """What a checkpoint holds of one process that was stopped after its third step."""
    state = {
        "total": {"loss": torch.tensor(3.0 + rank), "K": 5.0},
        "count": {"loss": 3, "K": 1},
        "running": {0: torch.full((2,), float(rank)), 1: torch.ones(2)},
    }
    return {**state, **other}


def stopped(of_each_process):
    return {"images": 10, "step": 3, "seconds": 2.0, "wait": 1.0, "own": of_each_process}


def test_an_epoch_begins_with_nothing():
    progress = EpochProgress(10, "a", nn.BatchNorm1d(2))
    assert progress.begin() == 0
    assert progress.sums == {}
    assert progress.data_seconds == 0


def test_figures_are_means_over_the_steps_in_which_they_were_taken():
    progress = EpochProgress(10, "a")
    progress.begin()
    for step in range(4):
        progress.add({"loss": torch.tensor(float(step))})
    progress.add({"K": 7})
    assert progress.means(torch.device("cpu")) == {"loss": 1.5, "K": 7.0}


def test_the_mean_of_two_processes_goes_on_in_one():
    net = nn.BatchNorm1d(2)
    progress = EpochProgress(10, "a", net)
    progress.load_state_dict(stopped([recorded(0), recorded(1)]))
    assert progress.begin() == 3
    assert 2.0 <= progress.seconds < 60
    assert progress.data_seconds == 1.0
    assert progress.sums == {"loss": 3.5, "K": 5.0}
    assert progress.counts == {"loss": 3, "K": 1}
    assert net.running_mean.tolist() == [0.5, 0.5]
    progress.end({"loss": 1.0})
    assert progress.begin() == 0  # the next epoch


def test_the_state_within_an_epoch_comes_back():
    net = nn.BatchNorm1d(2)
    progress = EpochProgress(10, "a", net)
    progress.begin()
    progress.add({"loss": torch.tensor(2.0)})
    progress.step_done()
    net.running_mean.fill_(3)
    progress.record()
    state = copy.deepcopy(progress.state_dict())
    progress.forget_record()
    assert progress.state_dict()["step"] == 0  # of an epoch's end
    net.running_mean.zero_()
    again = EpochProgress(10, "a", net)
    again.load_state_dict(state)
    assert again.begin() == 1
    assert again.sums == {"loss": 2.0}
    assert net.running_mean.tolist() == [3, 3]


def test_sums_of_an_earlier_version_are_left_out():
    """They had no counts. The weights go on, and the epoch's figures are of its other steps."""
    state = {key: value for key, value in recorded(0).items() if key != "count"}
    progress = EpochProgress(10, "a", nn.BatchNorm1d(2))
    progress.load_state_dict(stopped([state]))
    assert progress.begin() == 3
    assert progress.sums == {}


def test_other_images_are_refused():
    progress = EpochProgress(10, "a")
    with pytest.raises(ValueError, match="it is of 11 images, and now there are 10"):
        progress.load_state_dict({"images": 11})
    with pytest.raises(ValueError, match="of other names or in another order"):
        progress.load_state_dict({"images": 10, "data": "b"})
