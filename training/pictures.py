"""Pictures of what a method does: a few queries, and the candidates that it takes or leaves out.

A batch of fixed images goes through the host once, as in a training step. Nothing of the run
changes: the networks are copies, and random numbers are put back.
"""

import contextlib
import copy
import os
import warnings

import torch

from data.augment import select_rows
from data.loader import batches, generator, ordered_batches
from engine import checkpoint, config, distributed
from engine import device as devices
from engine.distributed import print_main
from engine.schedule import Schedule
from engine.sheet import Row, Tile, draw_sheet
from losses import positive_similarity
from losses.base import same_class
from losses.diagnostics import QUERIES, percentage
from losses.jcl import JCL, key_variance
from losses.together import Together

from .build import Builder
from .epoch import EpochProgress
from .negatives import NONE, QUERY, candidate_bands, select_queries

FILE = "negatives.png"
# Images of the batch, of each process; and columns of the picture.
BATCH, COLUMNS = 256, 8
# Keys of JCL that are shown, at most.
KEYS = 5
NAME_LENGTH = 11
BLUE, RED = "royalblue", "red"


# --------------------------------------------------------------------------------- during training


def draw_if_due(run, epoch, encoder, host, loss_fn, loader):
    """Draw RUN/negatives.png, and into TensorBoard, where the run has a picture after this epoch.

    Every process calls it. A picture that cannot be drawn costs a warning and no run.

    Args:
        run: a training.run.Run.
        epoch: how many epochs are done.
        encoder, host, loss_fn, loader: of the run.
    """
    if not run.is_picture_due(epoch):
        return
    with own_random_numbers(loader.seed):
        batch, problem = attempt(fixed_batch, loader, encoder.bn_splits)
        problems = distributed.all_gather_object(problem)
        contrasts = None
        if not any(problems):
            contrasts, problem = attempt(meet_candidates, encoder, host, *batch)
            problems = distributed.all_gather_object(problem)
        if run.log and not any(problems):
            now = epoch - 1 / len(loader)  # of the last step
            parts = contrasts, batch, loss_fn, loader, now, describe(run.settings, epoch)
            _, problem = attempt(write, run.log, epoch, *parts)
            problems = [problem]
    problem = next(filter(None, problems), None)
    if problem:
        print_main(f"WARNING: no picture of the negatives: {problem}")


def write(log, epoch, *parts):
    """Write the sheet of `draw` into a run's folder and TensorBoard."""
    path = os.path.join(os.path.dirname(log.path), FILE)
    log.sheet(path, draw(*parts), epoch)


def attempt(function, *arguments):
    """Call a function. Returns what it returns and None; or None and what went wrong, in words."""
    try:
        return function(*arguments), None
    except (Exception, SystemExit) as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def own_random_numbers(seed):
    """Draw from a seed within the block, and go on afterwards as if nothing had been drawn."""
    state = devices.rng_state()
    torch.manual_seed(seed + distributed.rank())
    try:
        yield
    finally:
        devices.set_rng_state(state)


# ------------------------------------------------------------------------------ a run on the disk


def picture_of_run(folder, device):
    """Draw the picture of a run that is on the disk, of which no file is changed.

    Args:
        folder: the run's.
        device: that computes it.

    Returns:
        a PIL.Image.

    Raises:
        SystemExit: it is no run, is not trained, or its data set has gone.
    """
    file, last = (os.path.join(folder, name) for name in ("config.yaml", "last.pt"))
    if not os.path.exists(file):
        raise SystemExit(
            f"{folder} is no run: it has no config.yaml; name a folder that train_pretrain.py "
            "wrote, such as runs/NAME"
        )
    if not os.path.exists(last):
        raise SystemExit(
            f"{folder} has no last.pt, the state of which the picture is; train the run first"
        )
    cfg = config.load(file)
    if cfg["model"].get("precision") == "fp16" and device.type == "cpu":
        cfg["model"]["precision"] = "auto"
    saved = checkpoint.read_checkpoint(last)
    for part in ("epoch", "encoder", "host", "loss"):
        if part not in saved:
            raise SystemExit(f"{last} is not a checkpoint of train_pretrain.py: it has no {part}")

    warnings.simplefilter("ignore")  # on settings: training has said them
    build = Builder(cfg, file)
    dataset = build.dataset("pretrain")
    encoder, host = build.host(dataset, device)
    loss_fn = build.loss(dataset, host, device)
    loader = build.loader(dataset, host, encoder, build("optim", Schedule), device)
    progress = EpochProgress(len(dataset), dataset.fingerprint(), encoder, host)
    parts = {"place": progress, "encoder": encoder, "host": host, "loss": loss_fn}
    for name, part in parts.items():
        checkpoint.load_part(last, part, saved.get(name, {}))

    done = saved["epoch"] + progress.step / len(loader)  # epochs
    if done == 0:
        raise SystemExit(f"{last} is of an untrained run; train it first")
    with own_random_numbers(loader.seed):
        batch = fixed_batch(loader, encoder.bn_splits)
        contrasts = meet_candidates(encoder, host, *batch)
        now = done - 1 / len(loader)
        return draw(contrasts, batch, loss_fn, loader, now, describe(cfg, done))


def describe(cfg, epoch):
    """The run and how far it is, in words."""
    names = [loss["name"] for loss in config.loss_settings(cfg["loss"])]
    methods = " + ".join([cfg["model"]["host"], *names])
    return f"{cfg['name']} ({methods}), epoch {epoch:.4g} of {cfg['optim']['epochs']}"


# ----------------------------------------------------------------------------------- the candidates


def fixed_batch(loader, bn_splits):
    """Views of images that are the same whenever it is called, a part for each process.

    Args:
        loader: a data.loader.Loader.
        bn_splits: by which the number of images must divide.

    Returns:
        views, a list of (n, 3, S, S); index (n,).
    """
    n = min(BATCH, loader.local) // bn_splits * bn_splits
    world, rank = distributed.world_size(), distributed.rank()
    order = torch.randperm(len(loader.dataset), generator=generator(loader.seed))
    rows = order[rank * n : (rank + 1) * n]
    n_drawn = loader.n_views * n
    drawn = loader.sample_parameters(world * n_drawn, generator(loader.seed))
    drawn = select_rows(drawn, torch.arange(n_drawn) + rank * n_drawn)
    ((views, index),) = batches(
        loader.dataset,
        loader.augment,
        [(rows, drawn)],
        loader.device,
        workers=0,
        backend=loader.backend,
        views=loader.n_views,
    )
    return list(views.chunk(loader.n_views)), index


@torch.no_grad()
def meet_candidates(encoder, host, views, index):
    """The host's Contrasts, as in a training step: in train mode, with statistics of the batch.

    Copies go through it, so that neither these statistics nor the momentum encoder move.
    """
    encoder, host = copy.deepcopy((encoder, host))
    encoder.train()
    host.train()
    return host(encoder, views, index)


def choose_queries(contrast, n_images):
    """Rows of the first view of some images, at most QUERIES.

    Those whose own image is a candidate (an old key in a queue) come last.
    """
    views_per_image = len(contrast.query) // n_images
    rows = torch.arange(0, len(contrast.query), views_per_image, device=contrast.index.device)
    if contrast.mask is None and contrast.self_index is None:
        is_candidate = torch.isin(contrast.index[rows], contrast.negative_index)
        rows = rows[is_candidate.int().argsort(stable=True)]
    return rows[:QUERIES]


# --------------------------------------------------------------------------------------- the sheet


@torch.no_grad()
def draw(contrasts, batch, loss_fn, loader, now, title):
    """Draw the candidates of some queries, as the loss takes them.

    Args:
        contrasts: what the host returned; of several the first is drawn.
        batch: of `fixed_batch`.
        loss_fn: the loss.
        loader: of the batch.
        now: what the loss is called with.
        title: the run, in words.

    Returns:
        a PIL.Image.
    """
    views, index = batch
    rows = choose_queries(contrasts[0], len(index))
    contrast = select_queries(contrasts[0], rows)
    bands = candidate_bands(loss_fn, contrast, now)
    images = SheetImages(contrast, bands, loader)
    labels = loader.dataset.labels
    is_false = None
    if labels is not None:
        is_false = same_class(contrast, labels.to(rows.device)).cpu()  # (n, K)

    one_of = f" (the first of its {len(contrasts)} contrasts)" if len(contrasts) > 1 else ""
    sheet = [
        Row(f"{title}{one_of}. Each column is a query and some of its candidates.", []),
        Row(f"Figures: similarity to the query's view. {legend(labels)}", []),
        query_row(contrast, images, loader.dataset),
    ]
    methods = loss_fn.losses.values() if isinstance(loss_fn, Together) else [loss_fn]
    if any(isinstance(method, JCL) for method in methods):
        image = rows * len(index) // len(contrasts[0].query)  # which image of the batch
        sheet += key_rows(contrast, [to_pixels(x[image], loader) for x in views], images)
    for band in bands:
        sheet += band_rows(band, images, is_false)
    return draw_sheet(sheet)


def legend(labels):
    """What the frames mean."""
    if labels is None:
        return "Blue: its own image. Without labels no false negative is framed."
    return "Blue: its own image. Red: a false negative, by the labels."


class SheetImages:
    """The images of the queries and candidates that are shown.

    Args:
        contrast: of the queries.
        bands: what is shown of their candidates.
        loader: of the data set.
    """

    def __init__(self, contrast, bands, loader):
        self.query = contrast.index[:COLUMNS].tolist()
        self.candidate = contrast.negative_index.cpu()
        shown = [band.candidate[:COLUMNS].cpu() for band in bands]
        shown += [band.partner[:COLUMNS].cpu() for band in bands if band.partner is not None]
        rows = torch.cat([x.flatten() for x in shown])
        wanted = self.candidate[rows[rows >= 0].unique()]
        wanted = torch.cat([wanted, torch.tensor(self.query)]).unique()
        wanted = wanted[wanted >= 0]
        size, dataset = loader.augment.size, loader.dataset
        parts = ordered_batches(dataset, wanted, "eval", size, loader.device, workers=0)
        pixels = torch.cat([to_pixels(x, loader) for x, _ in parts])
        self.of_index = dict(zip(wanted.tolist(), pixels))
        self.blank = torch.full_like(pixels[0], 255)

    def of_candidate(self, row, query):
        """The image of a candidate, or None where it has none. query: the column's."""
        if row == QUERY:
            return self.of_index[self.query[query]]
        return None if row == NONE else self.of_index.get(int(self.candidate[row]))


def to_pixels(x, loader):
    """Undo the normalisation of images (n, 3, S, S): uint8, on the CPU."""
    mean = torch.tensor(loader.augment.mean, device=x.device).view(3, 1, 1)
    std = torch.tensor(loader.augment.std, device=x.device).view(3, 1, 1)
    return (255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8).cpu()


def query_row(contrast, images, dataset):
    """The queries, their classes, and how similar their keys are."""
    tiles = []
    positive = positive_similarity(contrast).tolist()
    for index, similarity in zip(images.query, positive):
        lines = [f"key {two_digits(similarity)}"]
        if dataset.labels is not None and dataset.classes is not None:
            lines.insert(0, str(dataset.classes[int(dataset.labels[index])])[:NAME_LENGTH])
        tiles.append(Tile(images.of_index[index], "\n".join(lines), BLUE))
    return Row("The queries, and how similar their own keys are", tiles)


def key_rows(contrast, views, images):
    """The query's view, and its M keys, the most similar first.

    Args:
        contrast: of n queries, each of which is its image's first view.
        views: V of (n, 3, S, S) uint8. Where there are as many keys as views, the first key is the
            image's row of a memory bank; the others are the other views: see models/.
        images: the SheetImages.
    """
    q, k = contrast.query, contrast.positive  # (n, D), (n, M, D)
    M = k.shape[1]
    s = (q[:, None] * k).sum(2)  # (n, M)
    ranked, order = s.sort(1, descending=True)
    of_query, of_keys = [], [[] for _ in range(min(M, KEYS))]
    for query, index in enumerate(images.query):
        first, *others = (view[query] for view in views)
        of_query.append(Tile(first, "", BLUE))
        of_key = [images.of_index[index], *others][-M:]
        for i, tiles in enumerate(of_keys):
            tiles.append(Tile(of_key[order[query, i]], two_digits(ranked[query, i])))
    deviation = key_variance(q, k, k.mean(1)).sqrt().mean()
    title = f"Its {M} keys: other views of the same image, the most similar first. JCL takes them"
    title_end = f"for draws of a Gaussian: mean {s.mean():.2f}, standard deviation {deviation:.2f}"
    sheet = [Row("The view that is the query", of_query), Row("", []), Row(title, [])]
    return sheet + [Row("" if i else title_end, tiles) for i, tiles in enumerate(of_keys)]


def band_rows(band, images, is_false):
    """The rows of a band. is_false: (n, K) bool, of the query's class; None without labels."""
    title = band.title
    if band.members is not None and is_false is not None:
        members = band.members.cpu()
        title += f" ({percentage(members & is_false, members):.0f} % of the query's class)"
    tiles_of_row = [[] for _ in range(band.candidate.shape[1])]
    for query in range(len(images.query)):
        for i, tiles in enumerate(tiles_of_row):
            tiles.append(band_tile(band, images, is_false, query, i))
    if not tiles_of_row:
        return [Row("", []), Row(title, [])]
    rows = [Row("" if i else title, tiles) for i, tiles in enumerate(tiles_of_row)]
    return [Row("", []), *rows] if band.title else rows  # a gap before each title


def two_digits(similarity):
    """A similarity with two digits, and 0.00 without a sign."""
    return f"{round(float(similarity), 2) + 0.0:.2f}"


def band_tile(band, images, is_false, query, i):
    """The tile of a query's i-th candidate in a band, or of what it is mixed into."""
    parents = [int(band.candidate[query, i])]
    if band.partner is not None:
        parents.append(int(band.partner[query, i]))
    pixels = [images.of_candidate(row, query) for row in parents]
    if parents[0] == NONE or any(image is None for image in pixels):
        return Tile(images.blank)
    image = torch.stack(pixels).float().mean(0).round().to(torch.uint8)
    caption = two_digits(band.similarity[query, i])
    if band.place is not None:
        caption += f"\nsurest {band.place[query, i]:.0f} %"
    frame = None
    if is_false is not None and all(row == QUERY or is_false[query, row] for row in parents):
        frame = RED
    if images.candidate[parents[0]] == images.query[query]:  # an old key of the query's image
        frame = BLUE
    return Tile(image, caption, frame)
