"""Every image of a folder as a vector: features for a search, for clusters, for near-duplicates.

    python embed.py --cfg yaml/quickstart.yaml --images PHOTOS --out vectors
    python embed.py --cfg yaml/imagenet_moco.yaml --weights r50.pth --images PHOTOS --out vectors
    torchrun --nproc_per_node 8 embed.py --cfg yaml/imagenet_moco.yaml --images PHOTOS --out DIR

Without --weights they are those of the run that --cfg names. The folder --out gets embeddings.npy
(n, D), which numpy can map while it grows, files.txt in the same order, duplicates.csv,
neighbours.png, and projector/ for TensorBoard: docs/embed.md. What was stopped or killed goes on
when the same line is given again. Several processes write what one writes, byte for byte.
"""

import argparse
import csv
import io
import os
import shutil

from engine import config, signals


def make_parser():
    """The command line."""
    parser = config.command_line(__doc__)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="the encoder's weights; left out: those of the run that --cfg names",
    )
    parser.add_argument(
        "--images", required=True, metavar="FOLDER", help="all images below it are embedded"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the files go")
    parser.add_argument(
        "--feature",
        default="backbone",
        choices=("backbone", "output"),
        help="pooled features, or the unit vectors of the head, which a run's last.pt has "
        "(default: backbone)",
    )
    parser.add_argument(
        "--duplicates",
        type=read_threshold,
        default=0.95,
        metavar="COSINE",
        help="list the pairs of images as similar as this; 0: list none (default: 0.95)",
    )
    parser.add_argument("--fresh", action="store_true", help="start over, whatever is in DIR")
    return parser


def read_threshold(word):
    """The value of --duplicates."""
    try:
        threshold = float(word)
    except ValueError:
        threshold = -1.0
    if not 0 <= threshold <= 1:
        raise argparse.ArgumentTypeError(
            f"{word} is no cosine above 0 and at most 1, nor 0 for no list"
        )
    return threshold


if __name__ == "__main__":  # before torch is imported, which takes seconds
    config.answer_early(make_parser())

import numpy as np
import torch

from data.datasets import IMAGENET, STATISTICS
from data.folders import list_images
from data.image_files import FolderSet, printable, say_if_dark
from data.loader import check_image_size, ordered_batches
from data.statistics import is_auto
from data.workers import say_what_is_kept
from engine import checkpoint, distributed
from engine.distributed import print_main
from engine.progress import progress
from engine.sheet import Row, Tile, draw_sheet
from engine.weights import carried_preprocessing, is_last, load_backbone, of_run, read_safely
from evaluation.embedding_file import EmbeddingFile, near_duplicates, to_line, write_lines
from evaluation.features import eval_mode, nearest
from evaluation.projector import write_projector
from training.build import Builder

# Images that are computed at once, whatever the number of processes: the rounding of a row may
# depend on it.
BATCH = 128
SEED = 0  # of the sample for TensorBoard and of the queries
MOST_THUMBNAILS = 5000
THUMBNAIL = 32  # pixels a side; TensorBoard takes all thumbnails together up to 8192
QUERIES, NEIGHBOURS = 8, 8
TILE = 64  # pixels a side, in neighbours.png


@distributed.say_refusals_once()
@torch.no_grad()
def main():
    """Embed a folder of images."""
    args, cfg = config.read_command_line(make_parser())
    device = distributed.init_distributed(args.device)
    # cuDNN would choose its algorithms by their time, and round otherwise the next time.
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    weights = find_weights(args, cfg)
    preprocessing = find_preprocessing(weights, cfg, args.cfg)
    dataset = find_images(args, cfg, preprocessing)
    encoder = Builder(cfg, args.cfg).encoder(dataset, device).requires_grad_(False)
    load_backbone(weights, encoder.backbone)
    if args.feature == "output":
        load_head(weights, encoder)
    source = {
        "folder": os.path.realpath(args.images),
        "number of images": len(dataset),
        "hash of their names": dataset.fingerprint(),
        "feature": args.feature,
        "hash of the weights": checkpoint.file_digest(weights),
        "model": {key: value for key, value in cfg["model"].items() if key != "precision"},
        "precision": encoder.precision,
        "preprocessing": preprocessing,
    }
    with eval_mode(encoder), checkpoint.lock_run_folder(args.out, choice="--out"):
        embed = Embedding(encoder, args, dataset, preprocessing["image_size"], cfg["data"], device)
        table = EmbeddingFile(args.out, (len(dataset), embed.width()), source)
        signals.say_when_stopped(table.describe)
        with say_what_is_kept(table.describe), table:
            names = Names(dataset.files, args.images)
            table.begin(names, args.fresh)
            say_what_begins(table, args, weights, encoder, preprocessing)
            embed.fill(table)
            results = Results(table, dataset, names, args, cfg["data"]["workers"], device)
            distributed.run_on_first(results.write)
    distributed.cleanup()


# ------------------------------------------------------------------------------------------ set-up


def find_weights(args, cfg):
    """The file of weights: --weights, or what the run left; for the head that is last.pt."""
    run_folder = os.path.join("runs", cfg["name"])
    last = os.path.join(run_folder, "last.pt")
    given = args.weights
    if given is None and args.feature == "output" and os.path.exists(last):
        given = last
    return of_run(given, run_folder, args.cfg, random=False)


def find_preprocessing(weights, cfg, file):
    """How an image becomes input: {"image_size", "mean", "std"}.

    A backbone.pt says it, a last.pt has its run's settings; for other weights those of --cfg hold.
    """
    saved = read_safely(weights)
    known = carried_preprocessing(saved)
    if known is None:
        data = saved["settings"]["data"] if is_last(saved) else cfg["data"]
        mean, std = STATISTICS.get(data["name"], IMAGENET)
        known = {**data, "mean": data["mean"] or mean, "std": data["std"] or std}
    if is_auto(known):
        raise SystemExit(
            f"{weights} does not say by which mean and std its images were normalised, and "
            f"{file} says auto; give the numbers: data.mean=[...] data.std=[...]"
        )
    config.build(check_image_size, {}, file, image_size=known["image_size"])
    return {
        "image_size": known["image_size"],
        "mean": list(known["mean"]),
        "std": list(known["std"]),
    }


def load_head(weights, encoder):
    """Load the head of a run's last.pt. SystemExit where the file has none, or another."""
    saved = read_safely(weights)
    state = saved.get("encoder") if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not any(key.startswith("head.") for key in state):
        raise SystemExit(
            f"{weights} has no head, whose unit vectors --feature output asks for; give a run's "
            "last.pt by --weights, or take --feature backbone"
        )
    checkpoint.load_part(weights, encoder, state)


def find_images(args, cfg, preprocessing):
    """All images below --images, as a FolderSet."""
    folder = args.images
    if not os.path.isdir(folder):
        raise SystemExit(f"--images: there is no folder {printable(folder)}")
    inner, outer = os.path.realpath(args.out), os.path.realpath(folder)
    if os.path.commonpath([inner, outer]) == outer:
        raise SystemExit(
            f"--out {args.out} lies within --images {folder}, whose images would be more by the "
            "pictures that are drawn; choose another --out"
        )
    files = list_images(folder, "--images", empty="drop").paths
    dataset = FolderSet(files, None, None, preprocessing["mean"], preprocessing["std"])
    dataset.skip = cfg["data"]["on_error"] == "skip"
    if len(set(distributed.all_gather_object(dataset.fingerprint()))) > 1:
        raise SystemExit(
            f"--images: the processes see different files in {folder}; start again when no more "
            "are added"
        )
    say_if_dark(dataset)
    return dataset


class Names:
    """The lines of files.txt, made one by one: each file's name below a folder."""

    def __init__(self, files, folder):
        self.files, self.start = files, len(os.path.join(folder, ""))

    def __getitem__(self, row):
        return to_line(self.files[row][self.start :])

    def __iter__(self):
        for file in self.files:
            yield to_line(file[self.start :])


def say_what_begins(table, args, weights, encoder, preprocessing):
    """One sentence on what is computed."""
    n, width = table.shape
    kind = "pooled features" if args.feature == "backbone" else "unit vectors of the head"
    print_main(
        f"{n} images of {printable(args.images)}, {preprocessing['image_size']} pixels a side: "
        f"{kind} of {weights}, {width} numbers an image, in {encoder.precision}, into {table.path}"
    )
    if 0 < table.done < n:
        print_main(f"going on after row {table.done}")
    elif table.done == n:
        print_main("all rows are there")


# ------------------------------------------------------------------------------------------- embed


class Embedding:
    """Computes the rows of a table.

    Batch i is always images i * BATCH to (i + 1) * BATCH, so that a row is computed among the same
    others whatever the number of processes and wherever the last start ended. The processes take
    batches in turn. The last batch is filled up by its last image.

    Args:
        encoder: in eval mode.
        args: the command line.
        dataset: a FolderSet.
        image_size: S.
        data: the settings of section data.
        device: that computes.
    """

    def __init__(self, encoder, args, dataset, image_size, data, device):
        self.encoder, self.feature, self.dataset = encoder, args.feature, dataset
        self.image_size, self.workers, self.device = image_size, data["workers"], device
        self.broken = {}  # row -> what is wrong with its image

    def width(self):
        """D, the numbers of an image."""
        image = torch.zeros(1, 3, self.image_size, self.image_size, device=self.device)
        return self.encoder(image, self.feature).shape[1]

    def batches(self, done):
        """Yield (images (b, 3, S, S), index (b,)) of this process, from row `done` on."""
        rows = rows_of_process(done, len(self.dataset))
        size, device = self.image_size, self.device
        return ordered_batches(
            self.dataset, rows, "eval", size, device, BATCH, self.workers, self.broken
        )

    def fill(self, table):
        """Compute the rows that are missing. Every process calls it."""
        n = len(table)
        if table.done == n:
            return
        shown = progress(description="embedding", total=n, initial=table.done, unit="images")
        # A signal is obeyed between two batches, by all processes.
        with shown as bar, signals.deferred():
            for images, index in self.batches(table.done):
                before = table.done
                table.append(self.embed(images, index))
                bar.update(table.done - before)
                signals.step_finished()
                is_told = signals.stop_requested()
                if any(distributed.any_rank(self.device, is_told)):
                    table.save()
                    distributed.cleanup()
                    signals.raise_once()
        sentences = [
            sentence
            for broken in distributed.all_gather_object(self.broken)
            for sentence in broken.values()
        ]
        if sentences:
            print_main(f"{len(sentences)} images could not be read; the first: {sentences[0]}")

    def embed(self, images, index):
        """Rows (world * BATCH, D) of the batches of all processes; NaN for unreadable images."""
        missing = BATCH - len(images)
        images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        index = torch.cat([index, index[-1:].expand(missing)])
        is_read = [row not in self.broken for row in index.tolist()]
        is_read = torch.tensor(is_read, device=self.device)
        features = self.encoder(images, self.feature)  # (BATCH, D)
        features, is_read = distributed.all_gather(features, is_read)
        if not features[is_read].isfinite().all():
            raise SystemExit(
                "an embedding is not finite: its numbers grow too large for their precision; take "
                "model.precision=fp32, or other weights"
            )
        features[~is_read] = torch.nan
        return features


def rows_of_process(done, n):
    """The rows (m,) that this process computes of n, `done` of which are there.

    Where the last batches are fewer than the processes, the others compute the last row, which is
    left out.
    """
    world, rank = distributed.world_size(), distributed.rank()
    firsts = range(done, n, world * BATCH)
    batches = [torch.arange(0)]
    for first in firsts:
        start = min(first + rank * BATCH, n - 1)
        batches.append(torch.arange(start, min(start + BATCH, n)))
    return torch.cat(batches)


# ------------------------------------------------------------------------------ what came out


class Results:
    """What is made of the rows, by the first process alone.

    Args:
        table: the EmbeddingFile, whole.
        dataset: the FolderSet.
        names: of the files, by row.
        args: the command line.
        workers: image workers.
        device: that computes.
    """

    def __init__(self, table, dataset, names, args, workers, device):
        self.table, self.dataset, self.names = table, dataset, names
        self.folder, self.threshold = args.out, args.duplicates
        self.workers, self.device = workers, device

    def write(self):
        """Write all of it."""
        self.is_readable = self.table.readable()
        self.readable = np.flatnonzero(self.is_readable)
        unreadable = np.flatnonzero(~self.is_readable)
        if len(unreadable):
            path = os.path.join(self.folder, "unreadable.txt")
            write_lines(path, (self.names[row] for row in unreadable))
            print_main(f"{path}: {len(unreadable)} images, whose rows are NaN")
        if len(self.readable):
            self.draw_neighbours()
            self.write_projector()
            if self.threshold > 0:
                self.write_duplicates()

    def draw_neighbours(self):
        """neighbours.png: in each row a query and the images that are most similar to it."""
        n, generator = len(self.readable), np.random.default_rng(SEED)
        count = min(QUERIES, n)
        positions = (np.arange(count) + generator.random(count)) * n / count  # one in each part
        queries = self.readable[positions.astype(int)]
        vectors = self.table.take(queries)
        # A query is its own neighbour, if not the first among its duplicates.
        k = min(NEIGHBOURS + 1, len(self.table))
        ((similarity, rows),) = nearest(self.table, vectors, k, self.device)
        titles = [self.names[query] for query in queries]
        captioned = [
            self.choose_neighbours(*of_query)
            for of_query in zip(queries.tolist(), similarity.tolist(), rows.tolist())
        ]
        images = iter(self.thumbnails([row for line in captioned for row, _ in line], TILE))
        sheet = [
            Row(title, [Tile(next(images), caption) for _, caption in line])
            for title, line in zip(titles, captioned)
        ]
        path = os.path.join(self.folder, "neighbours.png")
        with checkpoint.writing(path):
            draw_sheet(sheet, TILE).save(path)
        print_main(f"{path}: {count} images, and under each neighbour the cosine")

    def choose_neighbours(self, query, cosines, rows):
        """[(row, caption)] of a query and its neighbours, without itself among these."""
        chosen = [(query, "query")]
        for cosine, row in zip(cosines, rows):
            if row != query and self.is_readable[row]:
                chosen.append((row, f"{cosine:.3f}"))
        return chosen[: NEIGHBOURS + 1]

    def thumbnails(self, rows, size):
        """Images of rows (m,) as (m, 3, size, size) uint8."""
        plain = FolderSet(self.dataset.files, None, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        cpu = torch.device("cpu")
        batches = ordered_batches(
            plain, torch.as_tensor(rows), "eval", size, cpu, workers=self.workers
        )
        return torch.cat([(255 * images).round().byte() for images, _ in batches])

    def write_projector(self):
        """projector/: vectors, names and thumbnails, of a sample where there are many."""
        folder = os.path.join(self.folder, "projector")
        rows = self.readable
        if len(rows) > MOST_THUMBNAILS:
            generator = np.random.default_rng(SEED)
            rows = np.sort(generator.choice(rows, MOST_THUMBNAILS, replace=False))
        with checkpoint.writing(folder):
            if os.path.isdir(folder):
                shutil.rmtree(folder)
            os.makedirs(folder)
            write_projector(
                folder,
                self.table.take(rows),
                [self.names[row] for row in rows],
                self.thumbnails(rows, THUMBNAIL),
            )
        print_main(f"{folder}: {len(rows)} images for TensorBoard: tensorboard --logdir {folder}")

    def write_duplicates(self):
        """duplicates.csv: pairs of files, the most similar first."""
        pairs, cosines, count = near_duplicates(self.table, self.threshold, self.device)
        lines = [csv_line("file", "other", "similarity")]
        for (first, second), cosine in zip(pairs, cosines):
            lines.append(csv_line(self.names[first], self.names[second], f"{cosine:.4f}"))
        path = os.path.join(self.folder, "duplicates.csv")
        write_lines(path, lines)
        words = f"{path}: {len(pairs)} pairs with a cosine of {self.threshold:g} and more"
        if count > len(pairs):
            words += f", the most similar of {count}; raise --duplicates for fewer"
        print_main(words)


def csv_line(*cells):
    """Cells as a line of CSV, without its line feed."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


if __name__ == "__main__":
    signals.run(main)
