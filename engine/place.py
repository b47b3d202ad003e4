"""Where a run that was told to stop stands within an epoch, and on which data: a part of its checkpoint."""

import torch

from . import distributed


class Place:
    """`step` steps of the epoch are done, 0 at its end.

    images: how many there are. data: the data set's fingerprint, for the rows of banks and labels of clusters are by index. modules: those with
    BatchNorm. Its statistics and the totals of the figures are each process's own until the epoch's end; of another number of processes the
    mean is taken.
    """

    def __init__(self, images, data, *modules):
        self.images, self.data, self.modules = images, data, modules
        self.clear()

    def clear(self):
        self.step, self.seconds, self.wait, self.own = 0, 0.0, 0.0, []

    def keep(self, step, seconds, wait, total):
        """Every process calls it. seconds, wait, total: of the epoch so far."""
        self.step, self.seconds, self.wait = step, seconds, wait
        self.own = distributed.gather_objects(
            {
                "total": {k: v.cpu() if torch.is_tensor(v) else v for k, v in total.items()},
                "running": dict(
                    enumerate(b.cpu() for b in distributed.running_statistics(*self.modules))
                ),
            }
        )

    def take(self):
        """-> step, seconds, wait, total; and the epoch goes on."""
        own, total = self.own, {}
        if own:
            mean = lambda what: {
                k: sum(one[what][k] for one in own) / len(own) for k in own[0][what]
            }
            mine = (
                own[distributed.rank()]
                if len(own) == distributed.world_size()
                else {what: mean(what) for what in own[0]}
            )
            total = dict(mine["total"])
            for i, buffer in enumerate(distributed.running_statistics(*self.modules)):
                buffer.copy_(mine["running"][i])
        found = self.step, self.seconds, self.wait, total
        self.clear()
        return found

    def state_dict(self):
        return {
            "images": self.images,
            "data": self.data,
            "step": self.step,
            "seconds": self.seconds,
            "wait": self.wait,
            "own": self.own,
        }

    def load_state_dict(self, saved):
        """saved: {} of a checkpoint from before there was a place."""
        if saved.get("images", self.images) != self.images:
            raise ValueError(f"it is of {saved['images']} images, and now there are {self.images}")
        if saved.get("data", self.data) != self.data:
            raise ValueError("it is of as many images, but of other names or in another order")
        for name in ("step", "seconds", "wait", "own"):
            setattr(self, name, saved.get(name, getattr(self, name)))
