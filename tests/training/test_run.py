"""A run on disk: when it saves, and what it says of a restart."""

import functools
import signal

import pytest

from test_faults import (  # noqa: F401
    PAIRS,
    assert_equal,
    at,
    images,
    log,
    run,
    send,
    send_at,
    state,
    undisturbed,
)
from training.run import Run

MANY_STEPS = [*PAIRS["moco-ifnd"], "optim.batch_size=4", "optim.epochs=2"]  # 25 an epoch


@pytest.mark.parametrize(
    ("minutes", "epoch", "step"), [("1e-9", 1, 21), ("10", 1, 0)], ids=["always due", "not due"]
)
def test_within_an_epoch_a_checkpoint_is_written_when_the_last_is_old(
    minutes,
    epoch,
    step,
    undisturbed,  # noqa: F811
    images,  # noqa: F811
    tmp_path,
):
    """SIGKILL after the 22nd step of the second epoch; the 21st is a sync step."""
    whole, _ = undisturbed(*MANY_STEPS)
    settings = [images, *MANY_STEPS, f"log.save_minutes={minutes}"]
    fault = send_at(signal.SIGKILL, 1, 22)
    run(tmp_path, "cut", *settings, fault=fault, code=-signal.SIGKILL)
    saved = state(tmp_path, "cut")
    assert (saved["epoch"], saved["place"]["step"]) == (epoch, step)
    run(tmp_path, "cut", *settings)
    a, b = state(whole, "whole"), state(tmp_path, "cut")
    del a["settings"]["log"], b["settings"]["log"]
    assert log(whole, "whole") == log(tmp_path, "cut")


def test_a_long_save_at_an_epochs_end_is_left_out_and_the_last_one_is_not(tmp_path, monkeypatch):
    """A save of 5 s is left out while it is more than 2 % of the time since the last one."""
    moment = [1000.0]
    monkeypatch.setattr("training.run.time.monotonic", lambda: moment[0])

    class Progress:
        def end(self, figures):
            pass

    saves = []
    training = Run(str(tmp_path), {}, epochs=20, save_minutes=10.0)
    training.progress = Progress()
    training.save_took = 5.0
    monkeypatch.setattr(training, "save", saves.append)
    for epoch, seconds in ((0, 100), (1, 240), (2, 251), (19, 1)):
        training.epoch = epoch
        moment[0] = training.saved_at + seconds
        training.end_epoch({})
    assert saves == [3, 20]
    training.save_took, training.epoch = 0.5, 4
    training.end_epoch({})
    assert saves == [3, 20, 5]  # a short one is never left out


@pytest.mark.parametrize("value", ["0", "-1"])
def test_save_minutes_must_be_above_0(value, tmp_path):
    with pytest.raises(ValueError, match="save_minutes is .*; it must be above 0"):
        Run(str(tmp_path), {}, 1, save_minutes=float(value))


def test_fresh_is_for_the_first_start_alone_and_a_restart_says_so(images, tmp_path):  # noqa: F811
    """SLURM starts a job again by the same line, --fresh and all."""
    settings = [images, *PAIRS["ir-ring"], "--fresh"]
    told = functools.partial(at, 1, 3, functools.partial(send, signal.SIGTERM))
    run(tmp_path, "a", *settings, fault=told, code=75)
    said = run(tmp_path, "a", *settings, SLURM_RESTART_COUNT="1")
    assert "--fresh was obeyed at the first start; this is restart 1" in said
    assert "going on after step 4 of 8 of epoch 2" in said
