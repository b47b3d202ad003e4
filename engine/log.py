"""What a run leaves to read: one JSON line an epoch, TensorBoard scalars, and pictures."""

import contextlib
import json
import os
import re
import threading

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

from .checkpoint import writing

# Each figure of log.jsonl: its group in TensorBoard, and what it is. In names like
# "ring: inner threshold" and "recall %, k=100" the words between ": " and ", " count.
FIGURES = {
    "loss": (
        "loss",
        "The mean of the loss over the steps of the epoch.",
    ),
    "chance": (
        "loss",
        "The loss of an encoder for which all images are equally similar.",
    ),
    "positive": (
        "loss",
        "The mean cosine similarity of two views of the same image.",
    ),
    "spread": (
        "loss",
        "The spread of the unit vectors: 1 all over the sphere, 0 when collapsed.",
    ),
    "lr": (
        "optimizer",
        "The learning rate of the last step.",
    ),
    "knn": (
        "evaluation",
        "Top-1 accuracy in % of weighted kNN on the test images.",
    ),
    "knn voters": (
        "evaluation",
        "How many of the most similar training images vote in kNN.",
    ),
    "RankMe": (
        "evaluation",
        "The effective rank of a sample's embeddings; no accuracy: a shortcut may have a high one.",
    ),
    "alignment": (
        "evaluation",
        "The mean squared distance of two views of an image: 0 if equal, or if all is collapsed.",
    ),
    "uniformity": (
        "evaluation",
        "How even embeddings are: 0 collapsed, about -4 even, which need not mean accurate.",
    ),
    "train top-1": (
        "evaluation",
        "Top-1 accuracy in % on the augmented training images.",
    ),
    "seconds": (
        "time",
        "How long the epoch took, without its evaluation.",
    ),
    "images/s": (
        "time",
        "Training images a second, of all processes together.",
    ),
    "data wait": (
        "time",
        "The share of the time that was spent waiting for images.",
    ),
    "K": (
        "negatives",
        "How many negatives a query has.",
    ),
    "used %": (
        "negatives",
        "The share of the candidates that serve as negatives.",
    ),
    "false negatives used %": (
        "negatives",
        "The share of the query's own class among the negatives that are used.",
    ),
    "false negatives left out %": (
        "negatives",
        "The share of the query's own class among the candidates that are left out.",
    ),
    "inner %": (
        "ring",
        "Ring leaves out this share of candidates, the most similar ones.",
    ),
    "outer %": (
        "ring",
        "Ring's negatives are within this share of the most similar candidates.",
    ),
    "inner threshold": (
        "ring",
        "The similarity to the query at the inner border of the ring.",
    ),
    "outer threshold": (
        "ring",
        "The similarity to the query at the outer border of the ring.",
    ),
    "oracle": (
        "mochi",
        "1 if true labels keep negatives of the query's own class out, else 0.",
    ),
    "hardest": (
        "mochi",
        "The similarity of the query and its hardest real negative.",
    ),
    "nearest N": (
        "mochi",
        "The mean similarity of the query and its N hardest real negatives.",
    ),
    "mixed": (
        "mochi",
        "The mean similarity of the query and mixes of two hard negatives.",
    ),
    "query mixed": (
        "mochi",
        "The mean similarity of the query and mixes of it and a negative.",
    ),
    "mixed share of partition %": (
        "mochi",
        "The share of mixed points in the loss's partition.",
    ),
    "false mixed %": (
        "mochi",
        "The share of mixes whose two parents are of the query's class.",
    ),
    "false query mixed %": (
        "mochi",
        "The share of mixes of the query and one of its own class.",
    ),
    "Var(q k)": (
        "jcl",
        "The variance of the similarity of a query to the keys of its image.",
    ),
    "lambda": (
        "jcl",
        "The weight of the variance in JCL's loss.",
    ),
    "accepted %": (
        "ifnd",
        "The share of the images whose cluster is accepted as their label.",
    ),
    "precision %": (
        "ifnd",
        "The share of pairs of one class among the pairs of one cluster.",
    ),
    "recall %": (
        "ifnd",
        "The share of pairs of one cluster among the pairs of one class.",
    ),
    "NMI": (
        "ifnd",
        "The mutual information of clusters and classes, from 0 to 1.",
    ),
    "removed %": (
        "ifnd",
        "The share of the candidates left out as false negatives.",
    ),
    "attracted %": (
        "ifnd",
        "The share of the candidates attracted as false negatives.",
    ),
    "loss_classifier": (
        "loss",
        "Detection: cross-entropy of the classes of the proposed boxes.",
    ),
    "loss_box_reg": (
        "loss",
        "Detection: how far the boxes are from the true ones.",
    ),
    "loss_objectness": (
        "loss",
        "Detection: cross-entropy of object or none, of the anchors.",
    ),
    "loss_rpn_box_reg": (
        "loss",
        "Detection: how far the proposals are from the true boxes.",
    ),
    "loss_mask": (
        "loss",
        "Detection: cross-entropy of the masks' pixels.",
    ),
    "loss_keypoint": (
        "loss",
        "Detection: cross-entropy of the places of the keypoints.",
    ),
}
# COCO's figures of detection, for each kind of prediction.
for kind in ("box", "mask", "keypoint"):
    FIGURES |= {
        f"{kind} AP": ("evaluation", f"COCO's average precision of the {kind} predictions, in %."),
        f"{kind} AP50": ("evaluation", f"The {kind} predictions' AP at an overlap of 0.5, in %."),
        f"{kind} AP75": ("evaluation", f"The {kind} predictions' AP at an overlap of 0.75, in %."),
    }
# Of a figure that is not listed, such as those of a loss of your own.
UNKNOWN = "method", "A figure of the method's own; see its file in losses/."


def explain(figure):
    """Look up a figure of log.jsonl. -> (its group in TensorBoard, what it is in a sentence)."""
    if figure in FIGURES:
        return FIGURES[figure]
    return FIGURES.get(figure.split(": ")[-1].split(", ")[0], UNKNOWN)


def tensorboard_tag(figure):
    """The name of a figure in TensorBoard: `knn` -> evaluation/knn, `used %` -> used_percent."""
    group, _ = explain(figure)
    name = figure.replace(" %", "_percent").replace("/s", "_per_second")
    return group + "/" + re.sub(r"[^-.=()\w]+", "_", name)


def figures_page(figures):
    """A page in Markdown that explains figures of log.jsonl."""
    rows = [
        f"| {tensorboard_tag(figure)} | {explain(figure)[1]} |"
        for figure in sorted(figures, key=tensorboard_tag)
    ]
    return "\n".join(["| figure | what it is |", "|---|---|", *rows])


def ignore_tensorboard_thread(error, other_hook=threading.excepthook):
    """Print no traceback of TensorBoard's writer thread.

    What fails there is raised again where the log is written, and told in a sentence.
    """
    if type(error.thread).__name__ != "_AsyncWriterThread":
        other_hook(error)


threading.excepthook = ignore_tensorboard_thread


class Log:
    """folder/log.jsonl, a line an epoch, and TensorBoard's events.

    In log.jsonl figures have flat names; in TensorBoard they stand in groups, and a page of text
    explains them.

    Args:
        folder: the run's.
        epoch: how many epochs are done. Lines from here on, which a killed run wrote but never
            saved, are dropped; of a run that begins all are.
        within: does the run go on within epoch 0, so that it keeps a line of before it?
    """

    def __init__(self, folder, epoch=0, within=False):
        self.path = os.path.join(folder, "log.jsonl")
        self.explained = set()
        kept = []
        if epoch or within:
            kept = [line for line in lines(self.path) if line["epoch"] <= epoch]
        aside = self.path + ".part"
        with writing(self.path):
            with open(aside, "w") as f:
                f.writelines(json.dumps(line) + "\n" for line in kept)
            os.replace(aside, self.path)
            self.board = SummaryWriter(folder, purge_step=epoch + 1)

    def write(self, epoch, figures):
        """Write {name: figure} of an epoch. Words, as of the hardware, stay out of TensorBoard."""
        numbers = {
            name: value for name, value in figures.items() if isinstance(value, (int, float))
        }
        with writing(self.path):
            with open(self.path, "a") as f:
                f.write(json.dumps({"epoch": epoch, **figures}) + "\n")
            for name, value in numbers.items():
                self.board.add_scalar(tensorboard_tag(name), value, epoch)
            if not set(numbers) <= self.explained:
                self.explained |= set(numbers)
                self.board.add_text("figures", figures_page(self.explained), epoch)
            self.board.flush()

    def picture(self, path, images, columns):
        """Write images (n, 3, S, S) in [0, 1] as one PNG and to TensorBoard, small ones larger."""
        scale = max(1, 80 // images.shape[2])
        images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        grid = make_grid(images, columns, padding=2)
        with writing(path):
            save_image(grid, path)
            self.board.add_image(os.path.basename(path).split(".")[0], grid)
            self.board.flush()

    def sheet(self, path, page, epoch):
        """Write a page of PIL's as a PNG, and to TensorBoard as that of an epoch."""
        with writing(path):
            page.save(path)
            name = os.path.basename(path).split(".")[0]
            self.board.add_image(name, np.array(page), epoch, dataformats="HWC")
            self.board.flush()


def round_figures(figures):
    """The figures {name: number} to six digits."""
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


def lines(path):
    """Read the JSON lines of a log; one that was cut off by a kill is left out."""
    read = []
    if os.path.exists(path):
        with open(path) as f:
            for line in f:
                with contextlib.suppress(json.JSONDecodeError):
                    read.append(json.loads(line))
    return read
