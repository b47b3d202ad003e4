"""A table of embeddings on the disk: it grows row by row, and is never in memory as a whole.

Rows are written and read by plain calls, not through a map: what a process maps counts as its
memory while it lies in the page cache.
"""

import contextlib
import functools
import json
import os
import shutil
import time

import numpy as np
import torch
from torch.nn import functional as F

from engine import checkpoint, config, distributed
from engine.progress import progress

SAVE_SECONDS = 10  # how much work a kill may cost
# What is made of the rows goes as well when they are made anew.
RESULTS = "unreadable.txt", "duplicates.csv", "neighbours.png", "projector"
MOST_PAIRS = 100_000
BLOCK_ROWS = 2048  # that are compared with so many others at once
# Cosines count in this many parts of 1, so that the rounding of a device does not order pairs.
PARTS = 10_000


class EmbeddingFile:
    """embeddings.npy, (n, D) fp32, in the order of files.txt beside it, and how far it is.

    Every process has one, and the first writes. It is a context, at whose end the state is saved.
    The state says how many rows are there; the rows after them are zeros, or will be written anew.
    So a kill at any moment costs SAVE_SECONDS of work and nothing else.

    Args:
        folder: where the file lies.
        shape: (n, D).
        source: what the rows are made of, as JSON has it; other rows have another source.

    Attributes:
        done: how many rows are written.
        saved: how many of them the state knows.
    """

    def __init__(self, folder, shape, source):
        self.folder, self.shape = folder, shape
        self.source = json.loads(json.dumps(source))
        self.path = os.path.join(folder, "embeddings.npy")
        self.state = os.path.join(folder, "state.json")
        self.done = self.saved = 0
        self.saved_at = time.monotonic()
        self.file = None  # the first process opens it

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.save()
        if self.file:
            self.file.close()

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Rows of a slice, (b, D) fp32 on the CPU. Those of unreadable images are zeros."""
        return torch.from_numpy(np.nan_to_num(self.read(rows)))

    def take(self, rows):
        """The rows (m,) of a list or an array, as (m, D)."""
        return torch.cat([self[row : row + 1] for row in rows])

    def read(self, rows):
        """Rows of a slice, (b, D) of NumPy's, as they are in the file."""
        start, stop, _ = rows.indices(len(self))
        row_bytes = 4 * self.shape[1]
        self.file.seek(self.offset + row_bytes * start)
        data = self.file.read(row_bytes * (stop - start))
        return np.frombuffer(data, "<f4").reshape(-1, self.shape[1])

    def readable(self):
        """(n,) bool, whether the image of each row could be read; if not, the row is NaN."""
        blocks = [slice(i, i + BLOCK_ROWS) for i in range(0, len(self), BLOCK_ROWS)]
        return np.concatenate([~np.isnan(self.read(block)[:, 0]) for block in blocks])

    # ----------------------------------------------------------------------------------- writing

    def begin(self, names, fresh):
        """Go on where the state says, or begin. Every process calls it.

        Args:
            names: of the images, a line each in files.txt.
            fresh: begin, whatever is there.

        Raises:
            SystemExit: where the folder holds other embeddings.
        """
        begin_on_disk = functools.partial(self.begin_on_disk, names, fresh)
        self.done = self.saved = distributed.run_on_first(begin_on_disk)

    def begin_on_disk(self, names, fresh):
        """`begin`, on the first process. -> how many rows are there."""
        done = 0 if fresh else self.rows_on_disk()
        with checkpoint.writing(self.path):
            if done == 0:
                self.remove_results()
                self.write_state(0)
                write_lines(os.path.join(self.folder, "files.txt"), names)
                self.create()
            self.file = open(self.path, "r+b")  # noqa: SIM115 (it stays open)
            np.lib.format.read_magic(self.file)
            np.lib.format.read_array_header_1_0(self.file)
            self.offset = self.file.tell()
        return done

    def rows_on_disk(self):
        """How many rows are there of the same source. SystemExit where there are others."""
        advice = "give another --out, or start over with --fresh"
        if not os.path.exists(self.state):
            if os.path.exists(self.path):
                raise SystemExit(f"{self.path} is there, but not of embed.py; {advice}")
            return 0
        try:
            with open(self.state, encoding="utf-8") as f:
                state = json.load(f)
            rows, source = state["rows"], state["source"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{self.state} cannot be read ({error}); {advice}") from None
        other = config.difference(source, self.source)
        if other:
            raise SystemExit(f"{self.folder} holds other embeddings: {other}; {advice}")
        if rows and not self.is_whole():
            raise SystemExit(f"{self.path} is gone or of another size; start over with --fresh")
        return rows

    def is_whole(self):
        """Whether the file on the disk is an array of this shape."""
        try:
            return np.load(self.path, mmap_mode="r").shape == tuple(self.shape)
        except (OSError, ValueError):
            return False

    def remove_results(self):
        """Remove what was made of other rows, so that nothing takes it for these rows'."""
        for name in RESULTS:
            path = os.path.join(self.folder, name)
            if os.path.isdir(path):
                shutil.rmtree(path)
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    def create(self):
        """Make the file with its final header and size. Rows of zeros take no place on most disks.

        A reader that comes early finds a whole file.
        """
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(self.shape)}
        with open(self.path + ".part", "wb") as f:
            np.lib.format.write_array_header_1_0(f, header)
            f.truncate(f.tell() + 4 * self.shape[0] * self.shape[1])
        os.replace(self.path + ".part", self.path)

    def append(self, rows):
        """Write the next rows (b, D), those beyond the last one left out. Every process calls it.

        Which is the first row is known to all of them, and the first process writes.
        """
        rows = rows[: len(self) - self.done]
        if distributed.is_main():
            with checkpoint.writing(self.path):
                self.file.seek(self.offset + 4 * self.shape[1] * self.done)
                self.file.write(rows.cpu().numpy().astype("<f4").tobytes())
                self.file.flush()
        self.done += len(rows)
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.save()

    def save(self):
        """Let the state say how many rows are there, once they are on the disk."""
        if self.file and self.saved < self.done:
            with checkpoint.writing(self.path):
                os.fsync(self.file.fileno())
            self.write_state(self.done)
        self.saved, self.saved_at = self.done, time.monotonic()

    def write_state(self, rows):
        """Write state.json."""
        state = {"rows": rows, "of": len(self), "source": self.source}
        write_lines(self.state, [json.dumps(state)])

    def describe(self):
        """How far it is, as half a sentence."""
        return (
            f"{self.path} holds {self.saved} of {len(self)} rows, and the same line goes on from "
            "there"
        )


def write_lines(path, lines):
    """Write a text file, all or nothing."""
    with checkpoint.writing(path):
        with open(path + ".part", "w", encoding="utf-8", newline="") as f:
            f.writelines(f"{line}\n" for line in lines)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".part", path)


# ------------------------------------------------------------------------------------------- names


def to_line(name):
    r"""A file's name as a line of text.

    That is the name itself, unless it holds what is not printable (a line feed, bytes that are not
    UTF-8) or a backslash: then it is written with Python's escapes, in ASCII. So a line with a
    backslash is an escaped one, and every name comes back by `from_line`.
    """
    if name.isprintable() and "\\" not in name:
        return name
    return name.encode("unicode_escape").decode("ascii")


def from_line(line):
    """The name in a line of files.txt, without its line feed, as the system's calls take it."""
    if "\\" not in line:
        return line
    return line.encode("ascii").decode("unicode_escape")


# --------------------------------------------------------------------------------- near-duplicates


@torch.no_grad()
def near_duplicates(table, threshold, device, most=MOST_PAIRS):
    """The pairs of rows with a cosine of `threshold` and more, the most similar first.

    Each block of rows is compared with itself and with those after it. In memory are two blocks,
    their cosines, and twice the pairs that are kept.

    Args:
        table: (n, D), an EmbeddingFile or a tensor.
        threshold: in (0, 1]; it counts to four decimals, as the cosines do.
        device: that computes.
        most: of more pairs, the most similar are kept; of equally similar ones those first met.

    Returns:
        Rows (p, 2), the first below the second; cosines (p,); and how many pairs there are.
    """
    n, level = len(table), max(1, round(PARTS * threshold))
    kept, count, floor = np.zeros((0, 3), np.int64), 0, level
    starts = range(0, n, BLOCK_ROWS)
    blocks = len(starts) * (len(starts) + 1) // 2
    with progress(description="near-duplicates", total=blocks, unit="blocks") as bar:
        for first_start in starts:
            first = PARTS * unit_rows(table, first_start, device)  # (b, D)
            for second_start in range(first_start, n, BLOCK_ROWS):
                second = unit_rows(table, second_start, device)  # (c, D)
                similarity = first @ second.T  # (b, c)
                if second_start == first_start:
                    similarity = similarity.triu(1)
                near = int((similarity > level - 0.5).sum())  # they are rounded below
                count += near
                if near:
                    i, j = (similarity > floor - 0.5).nonzero(as_tuple=True)
                    cosines = similarity[i, j].round().long()
                    pairs = torch.stack([cosines, i + first_start, j + second_start], 1)
                    kept = np.concatenate([kept, pairs.cpu().numpy()])
                if len(kept) > 2 * most:
                    kept = most_similar(kept, most)
                    floor = kept[-1, 0] + 1
                bar.update()
    kept = most_similar(kept, most)
    return kept[:, 1:], kept[:, 0].clip(max=PARTS) / PARTS, count


def unit_rows(table, start, device):
    """A block of rows, made unit length, on a device."""
    return F.normalize(table[start : start + BLOCK_ROWS].to(device), dim=1)


def most_similar(pairs, most):
    """The first `most` of pairs (p, 3) of similarity, row and row, by falling similarity."""
    order = np.lexsort((pairs[:, 2], pairs[:, 1], -pairs[:, 0]))
    return pairs[order[:most]]
