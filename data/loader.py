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

from .augment import Augment, pick, pil_transforms

BILINEAR = Resampling.BILINEAR                             # PIL's, which antialiases


def generator(*key):
    """A CPU generator from a few whole numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


class Loader:
    """for views, index in loader.epoch(7): views is a list of n_views (b, 3, S, S) normalised floats, index (b,) data-set indices.

    batch_size is global; each process gets its consecutive part. The last, smaller batch of an epoch is left out.
    augment: a recipe of data/augment.py. image_size: S. augment_backend: `batched`, or `pil`, the reference: torchvision.transforms, one
    image at a time. workers: processes that decode JPEGs (and run PIL); null: the cores there are, 8 at most.
    """

    def __init__(self, dataset, batch_size, n_views, seed, device, *, augment: str, image_size: int,
                 augment_backend: Literal["batched", "pil"] = "batched", workers: int | None = None):
        world = distributed.world_size()
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} does not divide by {world} processes")
        if batch_size > len(dataset):
            raise ValueError(f"batch_size {batch_size} is larger than the data set of {len(dataset)} images")
        if image_size < 8:
            raise ValueError(f"data.image_size is {image_size}; it must be at least 8")
        if workers is not None and workers < 0:
            raise ValueError(f"data.workers is {workers}; it must be at least 0, or null for as many as there are cores")
        self.dataset, self.device, self.seed, self.n_views = dataset, device, seed, n_views
        self.batch, self.local = batch_size, batch_size // world
        self.augment, self.backend = Augment(augment, image_size, dataset.mean, dataset.std), augment_backend
        self.workers = default_workers() if workers is None else workers

    def __len__(self):
        return len(self.dataset) // self.batch

    def plan(self, epoch):
        """This process's part of each step: (index (b,), what was drawn for its n_views * b views, views outermost)."""
        order = torch.randperm(len(self.dataset), generator=generator(self.seed, epoch))
        mine = torch.arange(self.local) + distributed.rank() * self.local              # (b,) places in the global batch
        rows = (torch.arange(self.n_views)[:, None] * self.batch + mine).flatten()     # (n_views b,)
        for step in range(len(self)):
            g, n = generator(self.seed, epoch, step), self.n_views * self.batch
            yield order[step * self.batch + mine], pick(self.draw(n, g), rows)

    def draw(self, n, g):
        return {"pil": {"seed": torch.randint(2 ** 31, (n,), generator=g)}} if self.backend == "pil" else self.augment.draw(n, g)

    def epoch(self, epoch):
        steps = batches(self.dataset, self.augment, self.plan(epoch), self.device, self.workers, self.backend, self.n_views)
        for views, index in steps if self.device.type == "cpu" else ahead(steps):      # a CPU's cores have the convolutions to do
            yield list(views.chunk(self.n_views)), index

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


def batches(dataset, augment, plan, device, workers, backend="batched", views=1):
    """plan: pairs (index (b,), what was drawn for views * b images). -> pairs ((views * b, 3, S, S), index (b,)) on the device."""
    if hasattr(dataset, "images") and backend == "batched":                            # in memory: no workers at all
        for index, u in plan:
            yield augment.apply(dataset.images[index.to(dataset.images.device)].repeat(views, 1, 1, 1).to(device), u), index.to(device)
        return
    loader = DataLoader(Reader(dataset, augment, backend, views), batch_sampler=plan, num_workers=workers, collate_fn=as_it_is,
                        pin_memory=device.type == "cuda", generator=torch.Generator())  # a generator of its own: leave the global one alone
    for images, index, u, problem in loader:
        if problem:
            raise SystemExit(problem)
        x = images.to(device, non_blocking=True).float().div_(255)
        yield augment.normalise(x) if backend == "pil" else augment.colour(x, u), index.to(device, non_blocking=True)


def as_it_is(batch):
    return batch


class Reader(torch.utils.data.Dataset):
    """What a worker does for a whole batch: decode each image once, then crop and resize each of its views (or, for `pil`, everything)."""

    def __init__(self, dataset, augment, backend, views):
        self.dataset, self.augment, self.backend, self.views = dataset, augment, backend, views
        self.transform = pil_transforms(augment.recipe, augment.size) if backend == "pil" else None

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, step):
        index, drawn = step
        try:
            images = [self.dataset.decode(i) for i in index.tolist()]                  # b of PIL's
        except ValueError as error:                        # a message: an exception would arrive wrapped in the worker's traceback
            return torch.empty(0), index, {}, str(error)
        crop_and_resize = self.pil if self.backend == "pil" else self.crop
        views = [torch.from_numpy(np.array(v)).permute(2, 0, 1) for v in crop_and_resize(images * self.views, drawn)]
        colours = {} if self.backend == "pil" else {k: v for k, v in drawn.items() if k != "crop"}
        return torch.stack(views), index, colours, None    # (V b, 3, S, S) uint8

    def crop(self, images, u):
        S = self.augment.size
        box = self.augment.box(u, *(torch.tensor([image.size[side] for image in images]) for side in (1, 0)))
        for row, image in enumerate(images):
            if box is None or image.size == (S, S) and not u:                          # has the wanted size already
                yield image
            elif "crop" in u:
                top, left, h, w = box[row].int().tolist()
                yield image.crop((left, top, left + w, top + h)).resize((S, S), BILINEAR)
            else:
                top, left, h, w = box[row].tolist()
                yield image.resize((S, S), BILINEAR, box=(left, top, left + w, top + h))

    def pil(self, images, u):
        for image, seed in zip(images, u["pil"]["seed"].tolist()):
            with torch.random.fork_rng(devices=[]):        # torchvision's transforms draw from the global generator
                torch.manual_seed(seed)
                yield self.transform(image)
