"""Batches of augmented views on the device. Every random number depends on (seed, epoch, step) alone, and is drawn for the batch of all
processes at once: another number of workers, or of processes, changes no view, and a resumed epoch is the same epoch."""
import os
import queue
import threading
from typing import Literal

import numpy as np
import torch
from PIL.Image import Resampling
from torch.utils.data import DataLoader

from engine import distributed

from .augment import Augment, one_by_one, pick, pil_transforms

BILINEAR = Resampling.BILINEAR                             # PIL's, which antialiases
HELD = 32                                                  # decoded images that a worker holds at once: of 12 million pixels they take a gigabyte


def generator(*key):
    """A CPU generator from a few whole numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def sensible_size(image_size):
    if not 8 <= image_size <= 4096:
        raise ValueError(f"data.image_size is {image_size}; it must be at least 8, and 4096 at most")


class Loader:
    """for views, index in loader.epoch(7): views is a list of n_views (b, 3, S, S) normalised floats, index (b,) data-set indices.

    batch_size is global; each process gets its consecutive part. drop_last: the last, smaller batch
    of an epoch is left out; else it is kept, and as many of its images are repeated as make it
    divide by the processes.
    augment: a recipe of data/augment.py. image_size: S. augment_backend: `batched`, or `pil`, the reference: torchvision.transforms, one
    image at a time. workers: processes that decode JPEGs (and run PIL); null: the cores there are, 8 at most.
    broken: row -> what is wrong with its image, which another replaced in this epoch; see FolderSet.instead.
    """

    def __init__(self, dataset, batch_size, n_views, seed, device, drop_last=True, *,
                 augment: str, image_size: int,
                 augment_backend: Literal["batched", "pil"] = "batched", workers: int | None = None):
        world = distributed.world_size()
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} does not divide by {world} processes")
        if batch_size > len(dataset) and drop_last:
            raise ValueError(f"batch_size {batch_size} is larger than the data set of {len(dataset)} images")
        sensible_size(image_size)
        if workers is not None and not 0 <= workers <= 1024:
            raise ValueError(f"data.workers is {workers}; it must be at least 0 and 1024 at most, or null for as many as there are cores")
        self.dataset, self.device, self.seed, self.n_views = dataset, device, seed, n_views
        self.batch, self.local, self.drop_last = batch_size, batch_size // world, drop_last
        self.augment, self.backend = Augment(augment, image_size, dataset.mean, dataset.std), augment_backend
        self.workers, self.broken = default_workers() if workers is None else workers, {}

    def __len__(self):
        n = len(self.dataset)
        return n // self.batch if self.drop_last else -(-n // self.batch)

    def plan(self, epoch, first=0):
        """This process's part of each step from the first on: (index (b,), what was drawn for its n_views * b views, views outermost)."""
        order = torch.randperm(len(self.dataset), generator=generator(self.seed, epoch))
        world = distributed.world_size()
        for step in range(first, len(self)):
            index = order[step * self.batch:(step + 1) * self.batch]
            batch = -(-len(index) // world) * world        # of the last step perhaps fewer
            places = torch.arange(batch).chunk(world)[distributed.rank()]              # (b,) in it
            rows = torch.arange(self.n_views)[:, None] * batch + places  # (n_views, b)
            drawn = self.draw(self.n_views * batch, generator(self.seed, epoch, step))
            yield index[places % len(index)], pick(drawn, rows.flatten())

    def draw(self, n, g):
        return {"pil": {"seed": torch.randint(2 ** 31, (n,), generator=g)}} if self.backend == "pil" else self.augment.draw(n, g)

    def epoch(self, epoch, first=0):
        self.broken = {}
        steps = batches(self.dataset, self.augment, self.plan(epoch, first), self.device, self.workers, self.backend, self.n_views, self.broken)
        for views, index in steps if self.device.type == "cpu" else ahead(steps):      # a CPU's cores have the convolutions to do
            yield list(views.chunk(self.n_views)), index

    def replaced(self):
        """What data.on_error=skip replaced in the epoch, on all processes: a sentence, or None. Every process calls it."""
        found = [x for part in distributed.gather_objects(self.broken) for x in part.items()] if getattr(self.dataset, "skip", False) else []
        return f"{len(found)} of {len(self) * self.batch} images were replaced by those after them; the first: {min(found)[1]}" if found else None

    def examples(self, n=8):
        """The first n images, each beside n - 1 augmented views: (n * n, 3, S, S) in [0, 1], for a look."""
        rows, g = torch.arange(min(n, len(self.dataset))), generator(self.seed)
        drawn = self.draw((n - 1) * len(rows), g)
        plain = in_order(self.dataset, rows, "eval", self.augment.size, self.device, workers=0)
        views = batches(self.dataset, self.augment, [(rows, drawn)], self.device, 0, self.backend, n - 1)
        x = torch.cat([x for part in (plain, views) for x, _ in part]).view(n, len(rows), 3, self.augment.size, self.augment.size)
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.augment.mean, self.augment.std))
        return (x.transpose(0, 1).flatten(0, 1) * std + mean).clamp(0, 1)


def in_order(dataset, rows, recipe, image_size, device, batch_size=512, workers=None):
    """The images `rows` (n,) in that order, augmented without randomness: (b, 3, S, S), (b,)."""
    augment = Augment(recipe, image_size, dataset.mean, dataset.std)
    plan = ((part, augment.draw(len(part), None)) for part in rows.split(batch_size))
    return batches(dataset, augment, plan, device, default_workers() if workers is None else workers)


def ahead(items, depth=2):
    """The same items, made by a thread, up to `depth` of them before they are asked for. What the thread raises is raised here."""
    made, stop = queue.Queue(depth), threading.Event()

    def put(*item):
        while not stop.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work():
        try:
            for item in items:
                put(item, None)
                if stop.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:                     # SystemExit too: a broken image
            put(None, error)

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error:
                if isinstance(error, StopIteration):
                    return
                raise error
            yield item
    finally:                                               # the one who asked may stop early
        stop.set()
        thread.join()


def default_workers():
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(1, len(os.sched_getaffinity(0)) // here)) if hasattr(os, "sched_getaffinity") else 2


def batches(dataset, augment, plan, device, workers, backend="batched", views=1, broken=None):
    """plan: pairs (index (b,), what was drawn for views * b images). -> pairs ((views * b, 3, S, S), index (b,)) on the device.
    broken: a dict that gets row -> what is wrong with its image, for each that was replaced."""
    if hasattr(dataset, "images") and backend == "batched":                            # in memory: no workers at all
        for index, u in plan:
            yield augment.apply(dataset.images[index.to(dataset.images.device)].repeat(views, 1, 1, 1).to(device), u), index.to(device)
        return
    loader = DataLoader(Reader(dataset, augment, backend, views, whole=device.type == "cpu"), batch_sampler=plan, num_workers=workers, collate_fn=as_it_is,
                        pin_memory=device.type == "cuda", generator=torch.Generator(),  # a generator of its own: leave the global one alone
                        multiprocessing_context="fork" if workers and hasattr(os, "fork") else None)         # Python 3.14's own would import torch anew in each
    for images, index, u, problem, replaced in loader:
        if problem:
            raise SystemExit(problem)
        if broken is not None:
            broken.update(replaced)
        x = images.to(device, non_blocking=True)
        yield x if device.type == "cpu" else finish(augment, backend, x, u), index.to(device, non_blocking=True)


def finish(augment, backend, views, colours):
    """(n, 3, S, S) uint8, cropped -> floats, the rest of the recipe done."""
    return augment.normalise(views.float().div_(255)) if backend == "pil" else augment.apply(views, colours)


def as_it_is(batch):
    return batch


class Reader(torch.utils.data.Dataset):
    """What a worker does for a whole batch: decode each image once, then crop and resize each of its views (or, for `pil`, everything).

    whole: the colours too, which otherwise are the device's to do: two workers with a thread each beat one process with two."""

    def __init__(self, dataset, augment, backend, views, whole):
        self.dataset, self.augment, self.backend, self.views, self.whole = dataset, augment, backend, views, whole
        self.transform = pil_transforms(augment.recipe, augment.size) if backend == "pil" else None

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, step):
        (index, drawn), broken, views = step, {}, []
        decode = (lambda i: self.dataset.instead(i, broken)) if getattr(self.dataset, "skip", False) else self.dataset.decode
        cut = self.pil if self.backend == "pil" else self.crop
        try:
            for rows in torch.arange(len(index)).split(HELD):
                u = pick(drawn, (torch.arange(self.views)[:, None] * len(index) + rows).flatten())             # views outermost
                views.append(cut([decode(i) for i in index[rows].tolist()], u).unflatten(0, (self.views, -1)))
        except ValueError as error:                        # a message: an exception would arrive wrapped in the worker's traceback
            return torch.empty(0), index, {}, str(error), {}
        views = torch.cat(views, 1).flatten(0, 1)          # (V b, 3, S, S) uint8
        colours = {} if self.backend == "pil" else {k: v for k, v in drawn.items() if k != "crop"}
        return finish(self.augment, self.backend, views, colours) if self.whole else views, index, colours, None, broken

    def crop(self, images, u):
        S, sizes = self.augment.size, torch.tensor([image.size for image in images]).repeat(self.views, 1)                   # (V n, 2) width, height
        box = self.augment.box(u, sizes[:, 1], sizes[:, 0])
        if "crop" in u:
            return one_by_one([pixels(image) for image in images] * self.views, box, S)
        if box is not None:
            images = [image.resize((S, S), BILINEAR, box=(left, top, left + w, top + h)) for image, (top, left, h, w) in zip(images, box.tolist())]
        return torch.stack([pixels(image) for image in images])                        # without randomness there is one view

    def pil(self, images, u):
        views = []
        for image, seed in zip(images * self.views, u["pil"]["seed"].tolist()):
            with torch.random.fork_rng(devices=[]):        # torchvision's transforms draw from the global generator
                torch.manual_seed(seed)
                views.append(pixels(self.transform(image)))
        return torch.stack(views)


def pixels(image):
    """PIL's -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
