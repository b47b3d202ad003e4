"""Batches of augmented views on the device.

Every random number depends on (seed, epoch, step) alone, and is drawn for the batch of all
processes at once: another number of workers, or of processes, changes no view, and a resumed epoch
is the same epoch.
"""

import math
import os
from typing import Literal

import numpy as np
import torch
from PIL.Image import Resampling

from engine import distributed
from engine.cores import cores_per_process

from .augment import Augment, crop_one_by_one, pil_transforms, select_rows
from .memory import workers_that_fit
from .prefetch import prefetch
from .workers import InputLost, Slots, in_workers, shortage

BILINEAR = Resampling.BILINEAR  # PIL's, which antialiases
# Decoded images that a worker holds at once: of 12 million pixels they take a gigabyte.
HELD_IMAGES = 32


def generator(*key):
    """A CPU generator from a few whole numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def check_image_size(image_size):
    """ValueError unless images of that many pixels a side make sense."""
    if not 8 <= image_size <= 4096:
        raise ValueError(
            f"data.image_size is {image_size}; it must be at least 8, and 4096 at most"
        )


class Loader:
    """Batches of augmented views: `for views, index in loader.epoch(7): ...`.

    views is a list of n_views tensors (b, 3, S, S) of normalised floats, index (b,) holds data-set
    indices.

    Args:
        dataset: an ArraySet or a FolderSet.
        batch_size: global; each process gets its consecutive part.
        n_views: how many views of each image.
        seed: of all random numbers.
        device: where the views are wanted.
        drop_last: the last, smaller batch of an epoch is left out; else it is kept, and as many of
            its images are repeated as make it divide by the processes.
        augment: a recipe of data/augment.py.
        image_size: S.
        augment_backend: `batched`, or `pil`, the reference: torchvision.transforms, one image at a
            time.
        workers: processes that decode JPEGs (and run PIL); null: the cores there are, 8 at most.
            Fewer are started where memory has no room for their batches.

    Attributes:
        broken: row -> what is wrong with its image, which another replaced in this epoch; see
            FolderSet.decode_or_replace.
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
        check_batch_size(batch_size, world, len(dataset), drop_last)
        check_image_size(image_size)
        if workers is not None and not 0 <= workers <= 1024:
            raise ValueError(
                f"data.workers is {workers}; it must be at least 0 and 1024 at most, "
                "or null for as many as there are cores"
            )
        self.dataset, self.device = dataset, device
        self.seed, self.n_views = seed, n_views
        self.batch, self.local = batch_size, batch_size // world
        self.drop_last = drop_last
        self.augment = Augment(augment, image_size, dataset.mean, dataset.std)
        self.backend = augment_backend
        self.workers = default_workers() if workers is None else workers
        self.broken = {}
        self.running, self.in_flight = self.workers, None
        if self.workers and not is_in_memory(dataset, augment_backend):
            reader = Reader(dataset, self.augment, augment_backend, n_views, device)
            self.running, self.in_flight = reader.workers_that_fit(self.workers, self.local)
        if self.running < self.workers:
            distributed.print_main(
                f"memory has room for {self.running} image workers, not {self.workers}; "
                "lower data.workers or batch_size"
            )

    def __len__(self):
        n = len(self.dataset)
        return n // self.batch if self.drop_last else math.ceil(n / self.batch)

    def batch_plan(self, epoch, first_step=0):
        """What an epoch is made of, from a step on: a BatchPlan."""
        return BatchPlan(self, epoch, first_step)

    def sample_parameters(self, n, generator):
        """The random numbers of n views, as Augment.sample_parameters gives them."""
        if self.backend == "pil":
            return {"pil": {"seed": torch.randint(2**31, (n,), generator=generator)}}
        return self.augment.sample_parameters(n, generator)

    def epoch(self, epoch, first_step=0):
        """Yield (views, index) for each step of an epoch, from `first_step` on."""
        self.broken = {}
        steps = batches(
            self.dataset,
            self.augment,
            self.batch_plan(epoch, first_step),
            self.device,
            self.running,
            self.backend,
            self.n_views,
            self.broken,
            self.in_flight,
        )
        # A CPU's cores have the convolutions to do.
        if self.device.type != "cpu":
            steps = prefetch(steps, self.device)
        for views, index in steps:
            yield list(views.chunk(self.n_views)), index

    def replaced(self):
        """What data.on_error=skip replaced in the epoch, on all processes: a sentence, or None.

        Every process calls it.
        """
        if not getattr(self.dataset, "skip", False):
            return None
        replaced = []
        for broken in distributed.all_gather_object(self.broken):
            replaced += broken.items()
        if not replaced:
            return None
        _, sentence = min(replaced)
        return (
            f"{len(replaced)} of {len(self) * self.batch} images were replaced by those after "
            f"them; the first: {sentence}"
        )

    def examples(self, n=8):
        """Some images of the data set, evenly spaced, each beside n - 1 augmented views of it.

        Returns:
            (n * n, 3, S, S) in [0, 1].
        """
        size, count = self.augment.size, min(n, len(self.dataset))
        # A folder's images are sorted by class.
        rows = torch.arange(count) * len(self.dataset) // count
        drawn = self.sample_parameters((n - 1) * count, generator(self.seed))
        plain = ordered_batches(self.dataset, rows, "eval", size, self.device, workers=0)
        plan = [(rows, drawn)]
        views = batches(self.dataset, self.augment, plan, self.device, 0, self.backend, n - 1)
        images = torch.cat([x for part in (plain, views) for x, _ in part])
        images = images.view(n, count, 3, size, size).transpose(0, 1).flatten(0, 1)
        mean = torch.tensor(self.augment.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.augment.std, device=images.device).view(3, 1, 1)
        return (images * std + mean).clamp(0, 1)


def check_batch_size(batch_size, processes, n, drop_last):
    """ValueError where a batch cannot be shared out, or an epoch has no step."""
    if batch_size % processes:
        raise ValueError(f"batch_size {batch_size} does not divide by {processes} processes")
    if batch_size > n and drop_last:
        raise ValueError(f"batch_size {batch_size} is larger than the data set of {n} images")


class BatchPlan:
    """This process's part of each step of an epoch, from `first_step` on.

    plan[i] is a pair: index (b,), and what was drawn for its n_views * b views, views outermost.
    A step can be asked for without those before it, so that the workers draw their own.
    """

    def __init__(self, loader, epoch, first_step=0):
        self.loader, self.epoch, self.first_step = loader, epoch, first_step
        self.order = torch.randperm(len(loader.dataset), generator=generator(loader.seed, epoch))

    def __len__(self):
        return max(0, len(self.loader) - self.first_step)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        loader, step = self.loader, self.first_step + i
        index = self.order[step * loader.batch : (step + 1) * loader.batch]
        world = distributed.world_size()
        batch = math.ceil(len(index) / world) * world  # of the last step perhaps a smaller one
        # Positions in the global batch (b,), and in that of all views (n_views, b).
        positions = torch.arange(batch).chunk(world)[distributed.rank()]
        rows = torch.arange(loader.n_views)[:, None] * batch + positions
        step_generator = generator(loader.seed, self.epoch, step)
        drawn = loader.sample_parameters(loader.n_views * batch, step_generator)
        return index[positions % len(index)], select_rows(drawn, rows.flatten())


def ordered_batches(
    dataset, rows, recipe, image_size, device, batch_size=512, workers=None, broken=None
):
    """The images `rows` (n,) in that order, augmented without randomness.

    Yields (b, 3, S, S), (b,) on the device. broken: see `batches`.
    """
    augment = Augment(recipe, image_size, dataset.mean, dataset.std)
    plan = [
        (index, augment.sample_parameters(len(index), None)) for index in rows.split(batch_size)
    ]
    workers = min(default_workers() if workers is None else workers, len(plan))
    in_flight = None
    if workers and not is_in_memory(dataset):
        reader = Reader(dataset, augment, "batched", 1, device)
        workers, in_flight = reader.workers_that_fit(workers, min(batch_size, len(rows)))
    return batches(dataset, augment, plan, device, workers, broken=broken, in_flight=in_flight)


def default_workers():
    """How many image workers: the cores of this process, 8 at most."""
    # macOS and Windows have no affinity masks.
    return min(8, cores_per_process()) if hasattr(os, "sched_getaffinity") else 2


def is_in_memory(dataset, backend="batched"):
    """Are batches made without decoding anything, and so without workers?"""
    return hasattr(dataset, "images") and backend == "batched"


def batches(
    dataset, augment, plan, device, workers, backend="batched", views=1, broken=None, in_flight=None
):
    """Yield ((views * b, 3, S, S), index (b,)) on the device, for each step of a plan.

    Args:
        dataset: an ArraySet or a FolderSet.
        augment: an Augment.
        plan: a sequence of pairs (index (b,), what was drawn for views * b images), the first b the
            largest.
        device: where the views are wanted.
        workers: how many processes; 0 for this one.
        backend: `batched` or `pil`.
        views: how many of each image.
        broken: a dict that gets row -> what is wrong with its image, for each that was replaced.
        in_flight: how many batches the workers are asked for at once, at most; None: two each.
    """
    if is_in_memory(dataset, backend):
        yield from batches_from_memory(dataset, augment, plan, device, views)
        return
    workers = min(workers, len(plan))
    in_flight = min(in_flight or 2 * workers, len(plan))
    reader = Reader(dataset, augment, backend, views, device, plan)
    largest = len(plan[0][0]) if len(plan) else 0
    # A batch is handed out only when an earlier one is asked for. Whoever asks still has the one
    # before in hand, and all others are in flight: one slot more than these is enough. (Slots says
    # what happens to someone who keeps more.)
    slots = reader.slots = Slots(in_flight + 1 if workers else 0, *reader.shape_and_dtype(largest))
    jobs = ((i, slots.take()) for i in range(len(plan)))
    for slot, images, index, colours, replaced in in_workers(reader, jobs, workers, in_flight):
        if broken is not None:
            broken.update(replaced)
        if slot is not None:
            images = slots.received(slot, views * len(index))
        images, index = move(images, device), move(index, device)
        if not reader.does_colours:
            images = finish(augment, backend, images, colours)
        yield images, index


def batches_from_memory(dataset, augment, plan, device, views):
    """`batches` of an ArraySet."""
    for index, drawn in plan:
        images = dataset.images[index.to(dataset.images.device)]
        images = images.repeat(views, 1, 1, 1).to(device)
        yield augment.apply(images, drawn), index.to(device)


def move(x, device):
    """A CPU tensor on the device. Only CUDA copies while the CPU goes on."""
    # On other devices a copy that is not waited for may read memory that is free already.
    if device.type != "cuda":
        return x.to(device)
    return pinned(x, device).to(device, non_blocking=True)


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
    """What a worker does for a batch.

    It decodes each image once, then crops and resizes each of its views (or, for `pil`, does
    everything).

    Args:
        dataset: a FolderSet, or for `pil` an ArraySet.
        augment: an Augment.
        backend: `batched` or `pil`.
        views: V, how many of each image.
        device: where the views will be wanted.
        plan: see `batches`.

    Attributes:
        slots: where the batches are written to, a Slots.
        does_colours: the rest of the recipe too, which otherwise is the device's to do: two workers
            with a thread each beat one process with two. A recipe that only crops is left to the
            device even so: what travels is uint8 then, a quarter.
    """

    slots = None

    def __init__(self, dataset, augment, backend, views, device, plan=()):
        self.dataset, self.plan, self.views = dataset, plan, views
        self.augment, self.backend = augment, backend
        has_colours = backend == "pil" or len(augment.recipe) > 1
        self.does_colours = device.type == "cpu" and has_colours
        self.transform = pil_transforms(augment.recipe, augment.size) if backend == "pil" else None

    def shape_and_dtype(self, images):
        """The shape and dtype of all views of so many images."""
        shape = self.views * images, 3, self.augment.size, self.augment.size
        return shape, torch.float32 if self.does_colours else torch.uint8

    def workers_that_fit(self, workers, images):
        """memory.workers_that_fit, for batches of so many images."""
        shape, dtype = self.shape_and_dtype(images)
        values = np.prod(shape, dtype=np.int64).item()
        scratch = values if self.does_colours else 0
        return workers_that_fit(workers, values * dtype.itemsize, scratch)

    def __call__(self, job):
        """One step of the plan.

        Args:
            job: which step, and the slot that the views are written into; None returns them.

        Returns:
            The slot; the views (V b, 3, S, S), or None where they are in the slot; index (b,); what
            was drawn and is still to be done; {row: what is wrong with an image that was replaced}.
        """
        step, slot = job
        index, drawn = self.plan[step]
        b, V, S = len(index), self.views, self.augment.size
        out = None if slot is None else self.slots.for_writing(slot, V * b)
        if self.does_colours or out is None:
            views = torch.empty(V * b, 3, S, S, dtype=torch.uint8)
        else:
            views = out
        broken = {}
        for first in range(0, b, HELD_IMAGES):
            rows = torch.arange(first, min(first + HELD_IMAGES, b))
            of_all_views = torch.arange(V)[:, None] * b + rows  # (V, rows)
            parameters = select_rows(drawn, of_all_views.flatten())
            part = self.cut_views(index[rows].tolist(), parameters, broken)
            views.view(V, b, 3, S, S)[:, first : first + HELD_IMAGES] = part
        colours = {} if self.backend == "pil" else {k: v for k, v in drawn.items() if k != "crop"}
        if self.does_colours:
            views, colours = finish(self.augment, self.backend, views, colours, out), {}
        return slot, views if slot is None else None, index, colours, broken

    def cut_views(self, rows, drawn, broken):
        """All views of some images of the data set: (V, n, 3, S, S) uint8."""
        images = [self.decode(row, broken) for row in rows]
        cut = self.transform_by_pil if self.backend == "pil" else self.crop
        return cut(images, drawn).unflatten(0, (self.views, -1))

    def decode(self, row, broken):
        """Image `row` as PIL's, or the one that takes its place."""
        try:
            if getattr(self.dataset, "skip", False):
                return self.dataset.decode_or_replace(row, broken)
            return self.dataset.decode(row)
        except ValueError as error:
            # The sentence names the file, which is whole if something else is short.
            if shortage(error):
                raise
            raise InputLost(str(error)) from error

    def crop(self, images, drawn):
        """All views of n PIL images: (V n, 3, S, S) uint8, views outermost."""
        S = self.augment.size
        sizes = torch.tensor([image.size for image in images])  # (n, 2) width, height
        widths, heights = sizes.repeat(self.views, 1).T
        box = self.augment.box(drawn, heights, widths)
        if "crop" in drawn:
            return crop_one_by_one([pixels(image) for image in images] * self.views, box, S)
        if box is not None:
            corners = [(left, top, left + w, top + h) for top, left, h, w in box.tolist()]
            images = [
                image.resize((S, S), BILINEAR, box=corner) for image, corner in zip(images, corners)
            ]
        # Without randomness there is one view.
        return torch.stack([pixels(image) for image in images])

    def transform_by_pil(self, images, drawn):
        """All views of n PIL images, by torchvision's transforms: (V n, 3, S, S) uint8."""
        views = []
        for image, seed in zip(images * self.views, drawn["pil"]["seed"].tolist()):
            # The transforms draw from the global generator.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                views.append(pixels(self.transform(image)))
        return torch.stack(views)


def pixels(image):
    """An image of PIL's -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
