"""How far an epoch has come: its steps, its time, its figures. It is a part of the checkpoint.

A run that is stopped within an epoch goes on with them, so that the epoch's line in the log is that
of an epoch without a stop.
"""

import time

import torch

from engine import distributed


class EpochProgress:
    """The running epoch.

    Figures are summed on the device, so that adding one never waits for it. These sums and the
    running statistics of BatchNorm are each process's own until the epoch's end. A run that goes on
    with another number of processes takes their mean.

    Attributes:
        step: how many steps are done; 0 at the end of an epoch.
        sums, counts: of each figure, and of how many steps.
        finished: the figures of an epoch that is finished and not yet in the log, or None: the
            checkpoint is written before kNN, which may take minutes.
        is_evaluated: whether the run has its figures, and nothing is left to do.

    Args:
        n_images: of the data set.
        fingerprint: of the data set's files; rows of banks and labels of clusters are by index.
        modules: those with BatchNorm.
    """

    def __init__(self, n_images, fingerprint, *modules):
        self.n_images, self.fingerprint, self.modules = n_images, fingerprint, modules
        self.of_each_process = []  # recorded: {"total", "count", "running"}
        self.finished = None
        self.is_evaluated = False
        self.clear()

    def clear(self):
        """Forget the last epoch."""
        self.step = 0
        self.sums, self.counts = {}, {}
        self.data_seconds = self.earlier_seconds = 0.0
        self.start = self.batch_requested = time.time()

    @property
    def seconds(self):
        """Since the epoch began, without the time in which the run was stopped."""
        return self.earlier_seconds + time.time() - self.start

    def batch_arrived(self):
        """Note that the data are there: on a CPU, the time since `step_done` is augmentation's."""
        self.data_seconds += time.time() - self.batch_requested

    def step_done(self):
        """Note the end of a step."""
        self.step += 1
        self.batch_requested = time.time()

    @torch.no_grad()
    def add(self, figures):
        """Add the figures {name: scalar} of a step, or of a part of it."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self, device):
        """{name: mean of a figure over the epoch's steps and over all processes}, as floats."""
        means = [torch.as_tensor(self.sums[name] / n).to(device) for name, n in self.counts.items()]
        means = distributed.all_reduce_mean(torch.stack([mean.float() for mean in means]))
        return dict(zip(self.counts, means.tolist()))

    # -------------------------------------------------------------------------------- checkpoints

    def record(self):
        """Prepare state_dict() within an epoch. Every process calls it."""
        running = distributed.running_statistics(*self.modules)
        state = {
            "total": {name: torch.as_tensor(value).cpu() for name, value in self.sums.items()},
            "count": self.counts,
            "running": {i: buffer.cpu() for i, buffer in enumerate(running)},
        }
        self.of_each_process = distributed.all_gather_object(state)

    def forget_record(self):
        """Let state_dict() be of an epoch's end again."""
        self.of_each_process = []

    def begin(self):
        """Begin an epoch, or go on with a recorded one. Returns the number of its steps done."""
        states, self.of_each_process = self.of_each_process, []
        self.finished, self.is_evaluated = None, False
        if not states:
            self.clear()
            return 0
        is_same = len(states) == distributed.world_size()
        state = states[distributed.rank()] if is_same else mean_state(states)
        self.sums, self.counts = dict(state["total"]), dict(state["count"])
        for i, buffer in enumerate(distributed.running_statistics(*self.modules)):
            buffer.copy_(state["running"][i])
        self.start = self.batch_requested = time.time()
        return self.step

    def end(self, figures):
        """Note that the epoch is over, whose figures are not in the log yet."""
        self.step, self.finished = 0, figures

    def state_dict(self):
        """The checkpoint's part, under the names of its first version."""
        within = bool(self.of_each_process)
        return {
            "images": self.n_images,
            "data": self.fingerprint,
            "step": self.step if within else 0,
            "seconds": self.seconds if within else 0.0,
            "wait": self.data_seconds if within else 0.0,
            "own": self.of_each_process,
            "finished": self.finished,
            "evaluated": self.is_evaluated,
        }

    def load_state_dict(self, state):
        """Take a checkpoint's part; {} of a checkpoint that is older than this class.

        Raises:
            ValueError: if it is of other images.
        """
        if state.get("images", self.n_images) != self.n_images:
            raise ValueError(
                f"it is of {state['images']} images, and now there are {self.n_images}"
            )
        if state.get("data", self.fingerprint) != self.fingerprint:
            raise ValueError("it is of as many images, but of other names or in another order")
        self.clear()
        self.step = state.get("step", 0)
        self.earlier_seconds = state.get("seconds", 0.0)
        self.data_seconds = state.get("wait", 0.0)
        self.of_each_process = [counted(part) for part in state.get("own", [])]
        self.finished = state.get("finished")
        self.is_evaluated = state.get("evaluated", not state)  # older ones were saved at the end


def counted(state):
    """A process's recorded state. Sums without counts, of an earlier version, are left out."""
    return state if "count" in state else {**state, "total": {}, "count": {}}


def mean_state(states):
    """The mean of the states of several processes; their counts are equal."""
    mean = {"count": states[0]["count"]}
    for part in ("total", "running"):
        mean[part] = {
            name: sum(state[part][name] for state in states) / len(states)
            for name in states[0][part]
        }
    return mean
