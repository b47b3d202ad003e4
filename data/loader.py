"""Batches of augmented views on the device.

Every random number depends on (seed, epoch, step) alone, and is drawn for the batch of all
processes at once: another number of workers, or of processes, changes no view, and a resumed epoch
is the same epoch.
"""

import math
import os
import queue
import threading
from typing import Literal

import numpy as np
import torch
from PIL.Image import Resampling

from engine import device as devices
from engine import distributed
from engine.cores import cores_per_process

from .augment import Augment, one_by_one, pick, pil_transforms
from .memory import workers_that_fit
from .workers import InputLost, Slots, in_workers, shortage

# PIL's, which antialiases.
BILINEAR = Resampling.BILINEAR
# Decoded images that a worker holds at once: of 12 million pixels they take a gigabyte.
HELD = 32


def generator(*key):
    """A CPU generator from a few whole numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def sensible_size(image_size):
    if not 8 <= image_size <= 4096:
        raise ValueError(
            f"data.image_size is {image_size}; it must be at least 8, and 4096 at most"
        )


class Loader:
    """for views, index in loader.epoch(7): ...

    views is a list of n_views (b, 3, S, S) normalised floats, index (b,) data-set indices.

    batch_size: global; each process gets its consecutive part.
    drop_last: the last, smaller batch of an epoch is left out; else it is kept, and as many of its
        images are repeated as make it divide by the processes.
    augment: a recipe of data/augment.py.
    image_size: S.
    augment_backend: `batched`, or `pil`, the reference: torchvision.transforms, one image at a
        time.
    workers: processes that decode JPEGs (and run PIL); null: the cores there are, 8 at most.
        Fewer are started where memory has no room for their batches.
    broken: row -> what is wrong with its image, which another replaced in this epoch; see
        FolderSet.instead.
    """

    def __init__(
        self,
        dataset,
        batch_size,
        n_views,
        seed,
        device,
        drop_last=True,
        *,
        augment: str,
        image_size: int,
        augment_backend: Literal["batched", "pil"] = "batched",
        workers: int | None = None,
    ):
        world = distributed.world_size()
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} does not divide by {world} processes")
        if batch_size > len(dataset) and drop_last:
            raise ValueError(
                f"batch_size {batch_size} is larger than the data set of {len(dataset)} images"
            )
        sensible_size(image_size)
        if workers is not None and not 0 <= workers <= 1024:
            raise ValueError(
                f"data.workers is {workers}; it must be at least 0 and 1024 at most, "
                "or null for as many as there are cores"
            )
        self.dataset, self.device, self.seed, self.n_views = dataset, device, seed, n_views
        self.batch, self.local, self.drop_last = batch_size, batch_size // world, drop_last
        self.augment = Augment(augment, image_size, dataset.mean, dataset.std)
        self.backend = augment_backend
        self.workers = default_workers() if workers is None else workers
        self.broken = {}
        self.running, self.in_flight = self.workers, None
        if self.workers and not is_in_memory(dataset, augment_backend):
            reader = Reader(dataset, self.augment, augment_backend, n_views, device)
            self.running, self.in_flight = reader.workers_that_fit(self.workers, self.local)
        if self.running < self.workers:
            distributed.say(
                f"memory has room for {self.running} image workers, not {self.workers}; "
                "lower data.workers or batch_size"
            )

    def __len__(self):
        n = len(self.dataset)
        return n // self.batch if self.drop_last else math.ceil(n / self.batch)

    def plan(self, epoch, first=0):
        return EpochPlan(self, epoch, first)

    def draw(self, n, g):
        if self.backend == "pil":
            return {"pil": {"seed": torch.randint(2**31, (n,), generator=g)}}
        return self.augment.draw(n, g)

    def epoch(self, epoch, first=0):
        self.broken = {}
        steps = batches(
            self.dataset,
            self.augment,
            self.plan(epoch, first),
            self.device,
            self.running,
            self.backend,
            self.n_views,
            self.broken,
            self.in_flight,
        )
        # A CPU's cores have the convolutions to do.
        if self.device.type != "cpu":
            steps = ahead(steps)
        for views, index in steps:
            yield list(views.chunk(self.n_views)), index

    def replaced(self):
        """What data.on_error=skip replaced in the epoch, on all processes: a sentence, or None.

        Every process calls it.
        """
        if not getattr(self.dataset, "skip", False):
            return None
        found = sorted(
            row for part in distributed.gather_objects(self.broken) for row in part.items()
        )
        if not found:
            return None
        return (
            f"{len(found)} of {len(self) * self.batch} images were replaced by those after them; "
            f"the first: {found[0][1]}"
        )

    def examples(self, n=8):
        """For a look: the first n images, each beside n - 1 augmented views.

        -> (n * n, 3, S, S) in [0, 1]
        """
        size, rows = self.augment.size, torch.arange(min(n, len(self.dataset)))
        drawn = self.draw((n - 1) * len(rows), generator(self.seed))
        plain = in_order(self.dataset, rows, "eval", size, self.device, workers=0)
        views = batches(
            self.dataset, self.augment, [(rows, drawn)], self.device, 0, self.backend, n - 1
        )
        x = torch.cat([x for part in (plain, views) for x, _ in part])
        x = x.view(n, len(rows), 3, size, size)
        mean, std = (
            torch.tensor(v, device=x.device).view(3, 1, 1)
            for v in (self.augment.mean, self.augment.std)
        )
        return (x.transpose(0, 1).flatten(0, 1) * std + mean).clamp(0, 1)


class EpochPlan:
    """plan[i]: this process's part of the i-th step from `first` on.

    It is a pair: index (b,), and what was drawn for its n_views * b views, views outermost.
    A step can be asked for without those before it, so that the workers draw their own.
    """

    def __init__(self, loader, epoch, first=0):
        self.loader, self.epoch, self.first = loader, epoch, first
        self.order = torch.randperm(len(loader.dataset), generator=generator(loader.seed, epoch))

    def __len__(self):
        return max(0, len(self.loader) - self.first)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        loader, step = self.loader, self.first + i
        index = self.order[step * loader.batch : (step + 1) * loader.batch]
        world = distributed.world_size()
        batch = math.ceil(len(index) / world) * world  # of the last step perhaps a smaller one
        # (b,) places in the global batch, and (n_views, b) in that of all views.
        places = torch.arange(batch).chunk(world)[distributed.rank()]
        rows = torch.arange(loader.n_views)[:, None] * batch + places
        drawn = loader.draw(loader.n_views * batch, generator(loader.seed, self.epoch, step))
        return index[places % len(index)], pick(drawn, rows.flatten())


def in_order(dataset, rows, recipe, image_size, device, batch_size=512, workers=None):
    """The images `rows` (n,) in that order, augmented without randomness: (b, 3, S, S), (b,)."""
    augment = Augment(recipe, image_size, dataset.mean, dataset.std)
    plan = [(part, augment.draw(len(part), None)) for part in rows.split(batch_size)]
    workers = min(default_workers() if workers is None else workers, len(plan))
    in_flight = None
    if workers and not is_in_memory(dataset):
        reader = Reader(dataset, augment, "batched", 1, device)
        workers, in_flight = reader.workers_that_fit(workers, min(batch_size, len(rows)))
    return batches(dataset, augment, plan, device, workers, in_flight=in_flight)


def ahead(items, depth=2):
    """The same items, made by a thread, up to `depth` of them before they are asked for.

    What the thread raises is raised here.
    """
    made, stop = queue.Queue(depth), threading.Event()

    def put(*item):
        while not stop.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work():
        try:
            devices.use_in_this_thread()
            for item in items:
                put(item, None)
                if stop.is_set():
                    return
            put(None, StopIteration())
        # SystemExit too: a broken image.
        except BaseException as error:
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
    # The one who asked may stop early.
    finally:
        stop.set()
        thread.join()


def default_workers():
    # macOS and Windows have no affinity masks.
    return min(8, cores_per_process()) if hasattr(os, "sched_getaffinity") else 2


def is_in_memory(dataset, backend="batched"):
    """Are batches made without decoding anything, and so without workers?"""
    return hasattr(dataset, "images") and backend == "batched"


def batches(
    dataset, augment, plan, device, workers, backend="batched", views=1, broken=None, in_flight=None
):
    """-> pairs ((views * b, 3, S, S), index (b,)) on the device.

    plan: a sequence of pairs (index (b,), what was drawn for views * b images), the first b the
        largest.
    broken: a dict that gets row -> what is wrong with its image, for each that was replaced.
    in_flight: how many batches the workers are asked for at once, at most; None: two each.
    """
    if is_in_memory(dataset, backend):
        for index, u in plan:
            images = dataset.images[index.to(dataset.images.device)]
            yield augment.apply(images.repeat(views, 1, 1, 1).to(device), u), index.to(device)
        return
    workers = min(workers, len(plan))
    in_flight = min(in_flight or 2 * workers, len(plan))
    reader = Reader(dataset, augment, backend, views, device, plan)
    largest = len(plan[0][0]) if len(plan) else 0
    # A batch is handed out only when an earlier one is asked for. Whoever asks still has the one
    # before in hand, and all others are in flight: one place more than these is enough. (Slots says
    # what happens to someone who keeps more.)
    slots = reader.slots = Slots(in_flight + 1 if workers else 0, *reader.batch_of(largest))
    jobs = ((i, slots.take()) for i in range(len(plan)))
    for slot, images, index, colours, replaced in in_workers(reader, jobs, workers, in_flight):
        if broken is not None:
            broken.update(replaced)
        if slot is not None:
            images = slots.received(slot, views * len(index))
        # On other devices a copy that is not waited for may read memory that is free already.
        is_cuda = device.type == "cuda"
        if is_cuda:
            images, index = pinned(images, device), pinned(index, device)
        images = images.to(device, non_blocking=is_cuda)
        index = index.to(device, non_blocking=is_cuda)
        yield images if reader.whole else finish(augment, backend, images, colours), index


def pinned(x, device):
    """A copy from which the GPU can copy by itself. torch keeps its memory until the GPU has."""
    # A thread begins on GPU 0, which is not every process's.
    with torch.cuda.device(device):
        return x.pin_memory()


def finish(augment, backend, views, colours, out=None):
    """(n, 3, S, S) uint8, cropped -> floats, the rest of the recipe done. out: where to."""
    if backend == "batched":
        return augment.apply(views, colours, out)
    floats = views.float() if out is None else out.copy_(views)
    return augment.normalise(floats.div_(255))


class Reader:
    """What a worker does for a whole batch: decode each image once, then crop and resize each of
    its views (or, for `pil`, everything).

    reader((i, slot)): step i of the plan, written into that place of `slots`, or for None returned.
    -> slot, images (V b, 3, S, S) or None, index (b,), colours: what was drawn and is still to be
    done, {row: what is wrong with an image that was replaced}.

    whole: the colours too, which otherwise are the device's to do: two workers with a thread each
    beat one process with two. A recipe that only crops is left to the device even so: what travels
    is uint8 then, a quarter.
    """

    slots = None

    def __init__(self, dataset, augment, backend, views, device, plan=()):
        self.dataset, self.plan, self.views = dataset, plan, views
        self.augment, self.backend = augment, backend
        self.whole = device.type == "cpu" and (backend == "pil" or len(augment.recipe) > 1)
        self.transform = pil_transforms(augment.recipe, augment.size) if backend == "pil" else None

    def batch_of(self, images):
        """Shape and dtype of all views of so many images."""
        shape = self.views * images, 3, self.augment.size, self.augment.size
        return shape, torch.float32 if self.whole else torch.uint8

    def workers_that_fit(self, workers, images):
        """data/memory.py's, for batches of so many images."""
        shape, dtype = self.batch_of(images)
        values = np.prod(shape, dtype=np.int64).item()
        return workers_that_fit(workers, values * dtype.itemsize, values if self.whole else 0)

    def __call__(self, job):
        i, slot = job
        index, drawn = self.plan[i]
        b, V, S = len(index), self.views, self.augment.size
        out = None if slot is None else self.slots.for_writing(slot, V * b)
        views = torch.empty(V * b, 3, S, S, dtype=torch.uint8) if self.whole or out is None else out
        broken, cut = {}, self.pil if self.backend == "pil" else self.crop
        for first in range(0, b, HELD):
            rows = torch.arange(first, min(first + HELD, b))
            u = pick(drawn, (torch.arange(V)[:, None] * b + rows).flatten())
            part = cut([self.decode(row, broken) for row in index[rows].tolist()], u)
            views.view(V, b, 3, S, S)[:, first : first + HELD] = part.unflatten(0, (V, -1))
        colours = {} if self.backend == "pil" else {k: v for k, v in drawn.items() if k != "crop"}
        if self.whole:
            views = finish(self.augment, self.backend, views, colours, out)
        return slot, views if slot is None else None, index, {} if self.whole else colours, broken

    def decode(self, row, broken):
        """Image `row` as PIL's, or the one in its place."""
        try:
            if getattr(self.dataset, "skip", False):
                return self.dataset.instead(row, broken)
            return self.dataset.decode(row)
        except (
            ValueError
        ) as error:  # the sentence names the file, which is whole if something else is short
            raise error if shortage(error) else InputLost(str(error))

    def crop(self, images, u):
        S = self.augment.size
        # (V n, 2) width, height
        sizes = torch.tensor([image.size for image in images]).repeat(self.views, 1)
        box = self.augment.box(u, sizes[:, 1], sizes[:, 0])
        if "crop" in u:
            return one_by_one([pixels(image) for image in images] * self.views, box, S)
        if box is not None:
            images = [
                image.resize((S, S), BILINEAR, box=(left, top, left + w, top + h))
                for image, (top, left, h, w) in zip(images, box.tolist())
            ]
        # Without randomness there is one view.
        return torch.stack([pixels(image) for image in images])

    def pil(self, images, u):
        views = []
        for image, seed in zip(images * self.views, u["pil"]["seed"].tolist()):
            # torchvision's transforms draw from the global generator.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                views.append(pixels(self.transform(image)))
        return torch.stack(views)


def pixels(image):
    """PIL's -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
