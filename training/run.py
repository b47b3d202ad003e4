"""A training run on disk: its folder and lock, its checkpoints and its log, and how it ends.

All scripts that train epochs keep their state by this class, so that all of them are stopped,
killed and resumed in the same way.
"""

import contextlib
import functools
import json
import os
import time

from data.workers import say_what_is_kept
from engine import checkpoint, config, distributed, signals
from engine.distributed import print_main
from engine.log import Log, lines
from engine.progress import progress

from .divergence import DivergenceCheck

# Only at every so many steps a process waits for its device, and for the other processes, which
# must stop at the same step.
SYNC_EVERY = 20
# A save at an epoch's end that takes longer than both is left out: the last one's duration in
# seconds, and the share of the time that saving may take.
CHEAP_SAVE = 1.0
SAVE_SHARE = 0.02


class Run:
    """A folder that is one training run's alone, and the run's state in it.

    It is a context: meanwhile no second process trains in the folder, and whatever ends the run
    early says which checkpoint holds what.

    Args:
        folder: is made where it is missing.
        settings: those that a checkpoint must have been written with to be resumed.
        epochs: of the whole run.
        fresh: start over, though there is a checkpoint.
        may_change: which settings may differ on resuming.
        advice: what to try where the run diverges.
        train_on: train_on(path, old settings, settings) is asked whether a checkpoint of other
            settings is one of this run with fewer epochs; None: it never is.
        save_minutes: how old the last checkpoint may become. It is written at the end of an epoch
            (unless that took over a second and over 2 % of the time), within an epoch when the last
            one is so old, when the run is told to stop, and at the end.
        pictures: epochs between pictures of the negatives (training/pictures.py), and one at the
            end; null: at the end alone; 0: none.

    Attributes:
        log: the Log, on the first process; None on the others.
        progress: the EpochProgress of the running epoch.
        start_epoch: how many epochs are done at the start.
        is_resumed: whether there is a checkpoint to go on from.
        is_longer: whether that is of fewer epochs than the run is to have.
    """

    def __init__(
        self,
        folder,
        settings,
        epochs,
        fresh=False,
        may_change=checkpoint.MAY_CHANGE,
        advice="try a lower optim.lr, with --fresh or another name=...",
        train_on=None,
        *,
        save_minutes: float = 10.0,
        pictures: int | None = None,
    ):
        if save_minutes <= 0:
            raise ValueError(f"save_minutes is {save_minutes}; it must be above 0")
        if pictures is not None and pictures < 0:
            raise ValueError(
                f"pictures is {pictures}; it must be at least 0, or null for one at the end"
            )
        self.folder, self.settings, self.epochs = folder, settings, epochs
        self.fresh, self.may_change, self.advice = fresh, may_change, advice
        self.train_on = train_on
        self.is_resumed = self.is_longer = False
        self.last = os.path.join(folder, "last.pt")
        self.save_every = 60 * save_minutes
        self.pictures = pictures
        self.saved = None  # (epochs, steps) of the last checkpoint
        self.saved_at, self.save_took = time.monotonic(), 0.0
        self.log = None

    def __enter__(self):
        self.contexts = contextlib.ExitStack()
        self.contexts.enter_context(checkpoint.lock_run_folder(self.folder))
        self.contexts.enter_context(say_what_is_kept(self.describe_saved))
        signals.say_when_stopped(self.describe_saved)
        self.is_resumed = self.may_resume() and checkpoint.exists(self.last)
        return self

    def __exit__(self, kind, error, trace):
        self.contexts.__exit__(kind, error, trace)

    # ------------------------------------------------------------------------------------- resume

    def resume(self, progress, steps, device, **state):
        """Load the last checkpoint, if there is one, into `state`: modules, optimizer, scaler.

        Args:
            progress: an EpochProgress.
            steps: of an epoch.
            device: that of the losses.
            state: the weights of `encoder` or `model` are looked at, whether they are finite.
        """
        self.progress, self.steps, self.device = progress, steps, device
        self.state = {"place": progress, **state}
        network = state.get("encoder", state.get("model"))
        self.parameters = list(network.parameters()) if network else []
        self.start_epoch = 0
        if self.is_resumed:
            self.start_epoch = checkpoint.resume(
                self.last, self.settings, self.may_change, self.goes_on_longer, **self.state
            )
            self.saved = self.start_epoch, progress.step
        self.saved_at = time.monotonic()

    def may_resume(self):
        """Whether a checkpoint may be resumed: --fresh forbids it.

        Not where torchrun or SLURM start the run again: they use the same line, --fresh and all.
        """
        if not self.fresh:
            return True
        launchers = "TORCHELASTIC", "SLURM"
        names = [f"{launcher}_RESTART_COUNT" for launcher in launchers]
        name = next((name for name in names if os.environ.get(name, "0") != "0"), None)
        if name and checkpoint.exists(self.last):
            print_main(f"--fresh was obeyed at the first start; this is restart {os.environ[name]}")
        return name is not None

    def goes_on_longer(self, path, old_settings):
        """Whether the run goes on from a checkpoint that was to end earlier: see train_on."""
        train_on = self.train_on
        self.is_longer = train_on is not None and train_on(path, old_settings, self.settings)
        return self.is_longer

    def saved_statistics(self):
        """{"mean", "std"} of the images' normalisation in the checkpoint to go on from.

        None for each where there is no checkpoint. Every process calls it.
        """
        if not self.is_resumed:
            return {"mean": None, "std": None}
        return distributed.run_on_first(functools.partial(checkpoint.statistics_of, self.last))

    def open_log(self, cfg=None):
        """Begin or go on with log.jsonl and TensorBoard, on the first process.

        Of a run that starts over, whatever the old weights left is moved aside before; of one that
        is trained on, what it left at its end.

        Args:
            cfg: the resolved settings, for config.yaml; None writes none.
        """
        if not distributed.is_main():
            return
        with checkpoint.writing(self.folder):
            if not self.is_resumed:
                checkpoint.move_aside(self.folder)
            elif self.is_longer:
                checkpoint.move_results_aside(self.folder)
            if cfg is not None:
                with open(os.path.join(self.folder, "config.yaml"), "w") as f:
                    f.write(config.to_yaml(cfg))
            self.log = Log(self.folder, self.start_epoch, within=self.progress.step > 0)

    def unlogged_figures(self):
        """The figures of the last epoch, if the run was ended between its save and its log line."""
        figures = self.progress.finished
        is_logged = self.log and any(
            line["epoch"] == self.start_epoch for line in lines(self.log.path)
        )
        is_logged = distributed.all_gather_object(bool(is_logged))[0]
        return None if is_logged else figures

    # ------------------------------------------------------------------------------ during training

    def begin_epoch(self, epoch):
        """Begin an epoch, or go on with it. Returns its first step."""
        self.epoch = epoch
        first_step = self.progress.begin()
        self.divergence = DivergenceCheck(self.parameters, first_step, self.device)
        return first_step

    def progress_bar(self, batches):
        """A progress bar over the batches of the epoch."""
        description = f"epoch {self.epoch + 1}/{self.epochs}"
        return progress(batches, description, self.steps, initial=self.progress.step)

    def is_figure_step(self, step):
        """Whether the negatives' figures are taken at this step: at every 20th, or ten an epoch."""
        every = min(SYNC_EVERY, max(1, self.steps // 10))
        return step % every == 0 or step == self.steps - 1

    def is_sync_step(self, step):
        """Whether the device is waited for at this step of an epoch, and the other processes."""
        return step % SYNC_EVERY == 0 or step == self.steps - 1

    def after_step(self, step, bar):
        """Count a step. At some of them: stop if the run diverged or is told to, and save.

        Every process must stop at the same step. So several of them look only at sync steps, and
        one alone looks for signals after every step.
        """
        sum_of_losses = self.progress.sums["loss"]
        self.divergence.count(sum_of_losses)
        self.progress.step_done()
        signals.step_finished()
        is_told = signals.stop_requested()
        if not self.is_sync_step(step) and not (is_told and distributed.world_size() == 1):
            return
        mean_loss = float(sum_of_losses) / self.progress.counts["loss"]
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
        has_diverged = self.divergence.has_diverged(sum_of_losses)
        is_last = step == self.steps - 1  # the end of the epoch saves, too
        is_due = distributed.is_main() and self.save_is_due() and not is_last
        diverged, stop, save = distributed.any_rank(self.device, has_diverged, is_told, is_due)
        if diverged:
            saved = self.describe_saved(how_on=False) or "nothing was saved yet"
            what_now = f"{saved}; {self.advice}"
            self.divergence.exit(self.epoch, step, self.steps, sum_of_losses, what_now)
        if stop or save:
            self.progress.record()
            self.save(self.epoch, step + 1)
        if stop:
            distributed.cleanup()
            signals.raise_once()

    def save_is_due(self):
        """Whether the last checkpoint is older than log.save_minutes."""
        return time.monotonic() - self.saved_at > self.save_every

    def is_picture_due(self, epoch):
        """Whether there is a picture of the negatives after so many epochs."""
        if self.pictures == 0:
            return False
        return epoch == self.epochs or bool(self.pictures) and epoch % self.pictures == 0

    def end_epoch(self, figures):
        """Save at the end of an epoch.

        Args:
            figures: the epoch's line for the log, whatever is evaluated aside.
        """
        done = self.epoch + 1
        self.progress.end(figures)
        cost = SAVE_SHARE * (time.monotonic() - self.saved_at)
        is_cheap = self.save_took <= max(CHEAP_SAVE, cost)
        is_due = is_cheap or done == self.epochs or self.save_is_due()
        if distributed.all_gather_object(is_due)[0]:
            self.save(done)

    @property
    def is_finished(self):
        """Whether the run that is resumed has its figures: see mark_finished."""
        return self.start_epoch == self.epochs and self.progress.is_evaluated

    def mark_finished(self):
        """Note in the checkpoint that nothing is left to do."""
        self.progress.is_evaluated = True
        self.save(self.epochs)

    def remove_checkpoints(self):
        """Forget the state of a run that has its figures, so that the next one begins anew."""
        if distributed.is_main():
            for path in (checkpoint.previous_checkpoint(self.last), self.last):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)

    # ---------------------------------------------------------------------------------- checkpoints

    def save(self, epoch, step=0):
        """Write the checkpoint after `epoch` epochs and `step` steps. Every process calls it."""
        began = time.monotonic()
        with signals.deferred(signals.PATIENCE_OF_A_SAVE):
            checkpoint.save(self.last, self.settings, epoch, **self.state)
            self.saved = epoch, step
        self.progress.forget_record()
        self.saved_at = time.monotonic()
        self.save_took = self.saved_at - began

    def position(self, epoch, step=0):
        """A place in the run, in words."""
        if step:
            return f"step {step} of {self.steps} of epoch {epoch + 1}"
        return f"epoch {epoch} of {self.epochs}"

    def describe_saved(self, how_on=True):
        """Which checkpoint holds what, as half a sentence; None where there is none yet."""
        if self.saved is None:
            return None
        state = f"{self.last} holds the state after {self.position(*self.saved)}"
        return state + (", and the same line goes on from there" if how_on else "")


def append_line(path, line):
    """Append a dict to a file of JSON lines, on the first process."""
    if distributed.is_main():
        with checkpoint.writing(path), open(path, "a") as f:
            f.write(json.dumps(line) + "\n")
