"""What a run leaves to read: one JSON line an epoch, TensorBoard scalars, and pictures."""

import json
import os
import threading

from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

from .checkpoint import writing


def quiet(error, plain=threading.excepthook):
    """TensorBoard writes in a thread of its own. What fails there is raised again where the log is written, so its traceback would be a second word."""
    if type(error.thread).__name__ != "_AsyncWriterThread":
        plain(error)


threading.excepthook = quiet


class Log:
    """folder/log.jsonl and TensorBoard's events. Lines from `epoch` on, which a killed run wrote but never saved, are dropped; of a run that
    begins (epoch 0, unless it goes on within its first epoch: `within`) all are.
    """

    def __init__(self, folder, epoch=0, within=False):
        self.path = os.path.join(folder, "log.jsonl")
        kept = (
            [line for line in lines(self.path) if line["epoch"] <= epoch] if epoch or within else []
        )
        aside = self.path + ".part"
        with writing(self.path):
            with open(aside, "w") as f:
                f.writelines(json.dumps(line) + "\n" for line in kept)
            os.replace(aside, self.path)
            self.board = SummaryWriter(folder, purge_step=epoch + 1)

    def write(self, epoch, figures):
        with writing(self.path):
            with open(self.path, "a") as f:
                f.write(json.dumps({"epoch": epoch, **figures}) + "\n")
            for name, value in figures.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(
                        name.replace(" %", "_percent").replace(" ", "_"), value, epoch
                    )
            self.board.flush()

    def picture(self, path, images, columns):
        """images: (n, 3, S, S) in [0, 1], as one PNG and in TensorBoard; small ones enlarged, to be seen."""
        scale = max(1, 80 // images.shape[2])
        grid = make_grid(
            images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), columns, padding=2
        )
        save_image(grid, path)
        self.board.add_image(os.path.basename(path).split(".")[0], grid)
        self.board.flush()


def lines(path):
    """The JSON lines of a log; one that was cut off by a kill is left out."""
    found = []
    if os.path.exists(path):
        with open(path) as f:
            for line in f:
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError:
                    pass
    return found
