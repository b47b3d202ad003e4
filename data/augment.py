"""Augmentation: named recipes, computed for a whole batch at once on the batch's own device, every image with its own parameters.

A recipe is a literal list of (operation, parameters), in the order of the papers' torchvision.transforms.Compose. `Augment`
runs it in two halves, so that JPEG workers can do the first and the device the second:

    u = augment.draw(n, generator)            every random number of n images, on the CPU: reproducible, no device sync
    x = augment.crop(images, u)               (n, 3, H, W) uint8 -> (n, 3, S, S) float in [0, 1]
    x = augment.colour(x, u)                  the rest of the recipe, and the data set's mean and std

The distribution is that of torchvision's transforms on PIL images (tests/data/test_augment.py compares each operation and the
statistics of whole recipes). We differ in one thing: PIL cuts to uint8 after every operation, we do not, so that its jittered views
are about one level of 255 darker.
"""

import math

import torch
from PIL import ImageFilter
from torch.nn import functional as F
from torchvision import transforms as T

# (operation, parameters), applied in this order.  Sources: shared by the released code of the four papers; see each YAML.
RECIPES = {
    # InstDisc / MoCo v1 / Ring: jitter always, hue as strong as the rest
    "moco_v1": [
        ("crop", dict(scale=(0.2, 1.0))),
        ("grey", dict(p=0.2)),
        ("jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, p=1.0)),
        ("flip", dict(p=0.5)),
    ],
    # MoCo v2 / MoCHi / JCL / IFND on ImageNet
    "moco_v2": [
        ("crop", dict(scale=(0.2, 1.0))),
        ("jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)),
        ("grey", dict(p=0.2)),
        ("blur", dict(sigma=(0.1, 2.0), p=0.5)),
        ("flip", dict(p=0.5)),
    ],
    # SupContrast's, for 32 pixels.  No blur
    "cifar": [
        ("crop", dict(scale=(0.2, 1.0))),
        ("flip", dict(p=0.5)),
        ("jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)),
        ("grey", dict(p=0.2)),
    ],
    # moco's CIFAR notebook, for 32 pixels: the same, but with torchvision's own default of the crop
    "moco_cifar": [
        ("crop", dict(scale=(0.08, 1.0))),
        ("flip", dict(p=0.5)),
        ("jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)),
        ("grey", dict(p=0.2)),
    ],
    # data/shapes.py: colour means nothing there, and a small crop would miss the form
    "shapes": [
        ("crop", dict(scale=(0.5, 1.0))),
        ("jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.5, p=1.0)),
        ("grey", dict(p=0.2)),
        ("flip", dict(p=0.5)),
    ],
    # the light ones, for probes, and for CMC, whose streams want the colour
    # moco's linear probe, and CMC on ImageNet
    "crop_flip": [("crop", dict(scale=(0.08, 1.0))), ("flip", dict(p=0.5))],
    # CMC on ImageNet-100, and SupContrast's linear probe
    "crop_flip_20": [("crop", dict(scale=(0.2, 1.0))), ("flip", dict(p=0.5))],
    # no randomness.  An image larger than the wanted size: shorter side to size * 256/224, then the central square
    "eval": [("centre", dict())],
}


def named(recipe):
    """A recipe by its name. ValueError if there is none."""
    if recipe not in RECIPES:
        raise ValueError(f"augment {recipe!r} is not a recipe; there are {', '.join(RECIPES)}")
    return RECIPES[recipe]


class Augment:
    """A recipe bound to an output size S and a data set's normalisation.

    recipe: a name in RECIPES, or such a list.  mean, std: one value a channel, for images in [0, 1].
    """

    def __init__(self, recipe, size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
        if isinstance(recipe, str):
            recipe = named(recipe)
        if recipe[0][0] not in ("crop", "centre"):
            raise ValueError(
                f"a recipe begins with 'crop' or 'centre', which give every image the same size; this one begins with {recipe[0][0]!r}"
            )
        self.recipe, self.size, self.mean, self.std = recipe, size, mean, std

    def draw(self, n, generator):
        """{operation: {name: (n, ...) CPU tensor}}: all the random numbers of n images, whatever size these have."""
        return {name: DRAW[name](n, generator, **p) for name, p in self.recipe if name in DRAW}

    def box(self, u, height, width):
        """(n, 4) float top, left, height, width of the part of each image that is kept, None for all of it.  height, width: ints or (n,) tensors."""
        name, p = self.recipe[0]
        if name == "centre":
            return centre_box(height, width, self.size)
        return (
            crop_box(u["crop"], height, width, **p) if "crop" in u else None
        )  # a worker has cropped it

    def crop(self, images, u):
        """(n, 3, H, W) uint8 (or float in [0, 1]) -> (n, 3, S, S) float."""
        n, _, H, W = images.shape
        box = self.box(u, H, W)
        if box is None:  # already the wanted size
            return images.float().div_(255) if images.dtype == torch.uint8 else images.clone()
        return crop(images, box.expand(n, 4), self.size, beyond=self.recipe[0][0] == "centre")

    def colour(self, x, u):
        """(n, 3, S, S) float in [0, 1] -> the same after the rest of the recipe, normalised.  Overwrites x."""
        for name, _ in self.recipe[1:]:
            x = APPLY[name](x, **u[name])
        return self.normalise(x)

    def normalise(self, x):
        mean, std = (
            torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std)
        )
        return x.sub_(mean).div_(std)

    def apply(self, images, u, out=None):
        """crop, then colour.  On a CPU in pieces that stay in its caches: up to twice as fast, and the same numbers.
        out: where to, (n, 3, S, S).
        """
        n = len(images)
        piece = (
            n if images.is_cuda else max(2, 2**25 // self.size**3)
        )  # 2 at 224 pixels, 37 at 96, 1024 at 32
        y = torch.empty(n, 3, self.size, self.size, device=images.device) if out is None else out
        for some in (slice(i, i + piece) for i in range(0, n, piece)):
            part = pick(u, some)
            y[some] = self.colour(self.crop(images[some], part), part)
        return y

    def __call__(self, images, generator):
        """(n, 3, H, W) uint8 -> one (n, 3, S, S) view of each, normalised, on the images' device."""
        return self.apply(images, self.draw(len(images), generator))


def pick(u, rows):
    """What was drawn for some images of a batch; rows: a slice or indices."""
    return {name: {k: v[rows] for k, v in p.items()} for name, p in u.items()}


# ---------------------------------------------------------------------------------------------------- what is drawn, on the CPU


def uniform(generator, shape, low=0.0, high=1.0):
    return torch.rand(shape, generator=generator) * (high - low) + low


def draw_crop(n, g, scale, ratio=(3 / 4, 4 / 3)):
    # ten tries each, as torchvision's RandomResizedCrop, and where it lies
    return dict(
        area=uniform(g, (n, 10), *scale),
        ratio=uniform(g, (n, 10), math.log(ratio[0]), math.log(ratio[1])).exp(),
        place=uniform(g, (n, 2)),
    )


def draw_jitter(n, g, brightness, contrast, saturation, hue, p):
    factors = [uniform(g, n, 1 - s, 1 + s) for s in (brightness, contrast, saturation)] + [
        uniform(g, n, -hue, hue)
    ]
    return dict(
        factors=torch.stack(factors, 1),
        order=torch.rand(n, 4, generator=g).argsort(1),
        apply=uniform(g, n) < p,
    )


DRAW = {
    "crop": draw_crop,
    "jitter": draw_jitter,
    "flip": lambda n, g, p: dict(apply=uniform(g, n) < p),
    "grey": lambda n, g, p: dict(apply=uniform(g, n) < p),
    "blur": lambda n, g, sigma, p: dict(sigma=uniform(g, n, *sigma), apply=uniform(g, n) < p),
}


# ---------------------------------------------------------------------------------------------------- where the crop lies


def crop_box(u, height, width, scale, ratio=(3 / 4, 4 / 3)):
    """Torchvision's RandomResizedCrop: the first of ten (area, ratio) that fits, else the central crop nearest to it.  -> (n, 4)."""
    n = len(u["area"])
    H, W = (torch.as_tensor(v, dtype=torch.float32).expand(n) for v in (height, width))  # (n,)
    area = u["area"] * (H * W)[:, None]  # (n, 10)
    w, h = (area * u["ratio"]).sqrt().round(), (area / u["ratio"]).sqrt().round()
    fits = (w > 0) & (w <= W[:, None]) & (h > 0) & (h <= H[:, None])
    first = fits.int().argmax(1, keepdim=True)  # (n, 1): 0 where none fits
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    top, left = (u["place"][:, 0] * (H - h + 1)).floor(), (u["place"][:, 1] * (W - w + 1)).floor()
    none = ~fits.any(1)
    w, h = (
        torch.where(none, torch.minimum(W, (H * ratio[1]).round()), w),
        torch.where(none, torch.minimum(H, (W / ratio[0]).round()), h),
    )
    top, left = (
        torch.where(none, ((H - h) / 2).floor(), top),
        torch.where(none, ((W - w) / 2).floor(), left),
    )
    return torch.stack([top, left, h, w], 1)


def centre_box(height, width, size):
    """Shorter side to size * 256/224, then the central square, as one box.  None for an image that has the wanted size.  -> (1, 4) or (n, 4)."""
    H, W = (torch.as_tensor(v, dtype=torch.float32).view(-1) for v in (height, width))
    if (size == H).all() and (size == W).all():
        return None
    side = torch.minimum(H, W) * (size / round(size * 256 / 224))
    side = torch.where((size == H) & (size == W), H, side)
    return torch.stack([(H - side) / 2, (W - side) / 2, side, side], 1)


# ---------------------------------------------------------------------------------------------------- the operations
# x is (n, 3, S, S) in [0, 1], with one parameter an image.  All write into x; `apply` (n,) bool says into which images.


def crop(images, box, size, beyond=False):
    """Cut a box (n, 4) out of each image, uint8 or float in [0, 1], and resize it to size x size with PIL's bilinear filter, which widens
    where the box shrinks. -> (n, 3, S, S) float in [0, 1].

    beyond: resize the whole image, then cut: pixels beyond the box's border count where the filter reaches them.
    """
    n, c, H, W = images.shape
    if size >= 64 and images.dtype == torch.uint8 and not images.is_cuda and not beyond:
        return one_by_one(images, box, size).float().div_(255)
    x = images.float().div_(255) if images.dtype == torch.uint8 else images
    top, left, h, w = box.to(x.device).T[..., None]  # (n, 1) each
    resample = bilinear if max(H, W) <= size else antialiased  # the first only if every box grows
    return resample(
        x,
        *(
            sampling(start, length, pixels, size, beyond)
            for start, length, pixels in ((top, h, H), (left, w, W))
        ),
    )


def one_by_one(images, box, size):
    """(n, 3, size, size) uint8 of n uint8 images (3, H, W), by torch's own uint8 kernel, which rounds as PIL does: for larger images on a
    CPU it beats both of the batched ways.
    """
    y = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for image, (top, left, h, w), into in zip(images, box.int().tolist(), y):
        into.copy_(
            F.interpolate(
                image[None, :, top : top + h, left : left + w],
                (size, size),
                mode="bilinear",
                antialias=True,
            )[0]
        )
    return y


def sampling(start, length, pixels, size, beyond):
    """Along one side: where the output pixels' centres lie, in input pixels (n, S), the step between them (n, 1), and the limits (n, 1)."""
    step = length / size
    centre = start + (torch.arange(size, device=start.device) + 0.5) * step
    return (
        centre,
        step,
        torch.zeros_like(start) if beyond else start,
        torch.full_like(start, pixels) if beyond else start + length,
    )


def bilinear(x, rows, columns):
    """`antialiased` for boxes that grow: grid_sample, four times as fast as the matmuls on a CPU."""
    i, j = (
        torch.minimum(torch.maximum(centre, low + 0.5), high - 0.5) * (2 / pixels)
        - 1  # (n, S), in [-1, 1]
        for (centre, _, low, high), pixels in ((rows, x.shape[2]), (columns, x.shape[3]))
    )
    S = i.shape[1]
    grid = torch.stack(
        [j[:, None].expand(-1, S, -1), i[:, :, None].expand(-1, -1, S)], 3
    )  # (n, S, S, 2)
    return F.grid_sample(x, grid, align_corners=False)


def antialiased(x, rows, columns):
    """Two batched matmuls: with the share of each input pixel in each output column, then row."""
    n, c, H, W = x.shape
    y = (x.reshape(n, c * H, W) @ triangle(*columns, W).transpose(1, 2)).view(
        n, c, H, -1
    )  # (n, 3, H, S)
    return triangle(*rows, H)[:, None] @ y  # (n, 3, S, S)


def triangle(centre, step, low, high, pixels):
    """(n, S, pixels): the triangle filter about each centre, as wide as the step but at least one pixel, nothing from beyond the limits."""
    pixel = torch.arange(pixels, device=centre.device) + 0.5
    weight = (1 - (pixel - centre[..., None]).abs() / step[..., None].clamp(min=1)).clamp_(min=0)
    weight *= (pixel > low[..., None]) & (pixel < high[..., None])
    return weight / weight.sum(2, keepdim=True)


def on(x, some, operation, values=None):
    """Let an operation, which writes into its argument, work on the images `some` (a list) of x. values: (n,) on the CPU, one for each image
    of x; the operation gets them as (m, 1, 1, 1), or the number itself for one image, which needs no copy there and back.
    """
    if len(some) == 1:
        operation(x[some[0] : some[0] + 1], *([] if values is None else [values[some[0]].item()]))
    elif some:
        rows = torch.tensor(some)
        values = (
            [] if values is None else [values[rows].view(-1, 1, 1, 1).to(x.device)]
        )  # lists and values are the CPU's: no device sync
        rows = rows.to(x.device)
        x.index_copy_(0, rows, operation(x[rows], *values))
    return x


def chosen(apply):
    return apply.nonzero()[:, 0].tolist()


def flip(x, apply):
    return on(x, chosen(apply), lambda y: y.copy_(y.flip(3)))


def luma(x):
    r, g, b = x.split(1, 1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)  # (n, 1, S, S), PIL's "L"


def grey(x, apply):
    return on(x, chosen(apply), lambda y: y.copy_(luma(y).expand_as(y)))


def blend(x, other, factor):
    return x.mul_(factor).add_(other * (1 - factor)).clamp_(0, 1)


def brightness(x, factor):
    return x.mul_(factor).clamp_(0, 1)


def contrast(x, factor):
    return blend(
        x, luma(x).mean(3, keepdim=True).mean(2, keepdim=True), factor
    )  # row by row: the same with any number of threads


def saturation(x, factor):
    return blend(x, luma(x), factor)


def hue(x, shift):
    """Turn the hue of HSV by `shift` turns. Which channel is the largest is held as 0 or 1, not as bool: torch.where takes forty additions."""
    r, g, b = x.split(1, 1)  # (n, 1, S, S)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    not_r, not_g = ((value - channel).mul_(1e20).clamp_(max=1) for channel in (r, g))
    h = torch.lerp(
        g - b,
        torch.lerp((b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4), not_g),
        not_r,
    )  # in sixths of a turn, times chroma
    base = torch.sub(value, chroma, alpha=2)
    chroma *= 6
    h.div_(chroma.clamp(min=1e-20)).add_(shift + 1)  # in turns, above 0; a grey has any hue
    for i, k in enumerate(
        (5 / 6, 3 / 6, 1 / 6)
    ):  # value - chroma max(0, min(k', 4 - k', 1)),  k' = 6 frac(h + k)
        torch.addcmul(
            base,
            chroma,
            (h + k).frac_().sub_(1 / 3).abs_().clamp_(1 / 6, 1 / 3),
            out=x[:, i : i + 1],
        )
    return x


JITTER = (brightness, contrast, saturation, hue)


def jitter(x, factors, order, apply):
    """Torchvision's ColorJitter in RandomApply: the four operations, in an order of each image's own.

    factors: (n, 4), one for each of JITTER; order: (n, 4), a permutation of 0..3 a row; apply: (n,) bool.
    """
    groups = [([], [], [], []) for _ in range(4)]  # groups[turn][operation]: which images
    for image, turns in enumerate(order.tolist()):
        for turn, i in enumerate(turns if apply[image] else ()):
            groups[turn][i].append(image)
    for turn in groups:
        for i, (operation, some) in enumerate(zip(JITTER, turn)):
            on(x, some, operation, factors[:, i])
    return x


def blur(x, sigma, apply):
    """Gaussian blur, separable, reflected at the border, cut off at three sigma."""
    reach = (
        (3 * sigma).ceil().clamp(max=x.shape[2] - 1).int()
    )  # (n,) pixels; reflection needs that much image
    if x.is_cuda:  # all at once, as far as the widest: launches cost more than pixels
        groups = [chosen(apply)]
    elif x.shape[2] >= 64:  # one by one: its weights are numbers
        groups = [[image] for image in chosen(apply)]
    else:
        groups = [chosen(apply & (reach == radius)) for radius in reach[apply].unique()]
    for some in groups:
        on(x, some, lambda y, s: gaussian(y, s, int(reach[some].max())), sigma)
    return x


def gaussian(x, sigma, radius):
    """sigma: (n, 1, 1, 1), or a number."""
    w = [(-0.5 * (t / sigma) ** 2) for t in range(radius + 1)]  # both sides share a weight
    w = [math.exp(v) for v in w] if isinstance(sigma, float) else torch.stack(w).exp()
    total = 2 * sum(w) - 1
    for dim in (2, 3):
        padded = F.pad(
            x, (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0), mode="reflect"
        )
        torch.mul(padded.narrow(dim, radius, x.shape[dim]), w[0] / total, out=x)
        for t in range(1, radius + 1):
            for shifted in (
                padded.narrow(dim, radius - t, x.shape[dim]),
                padded.narrow(dim, radius + t, x.shape[dim]),
            ):
                if isinstance(sigma, float):
                    x.add_(shifted, alpha=w[t] / total)
                else:
                    x.addcmul_(shifted, w[t] / total)
    return x


APPLY = {"flip": flip, "grey": grey, "jitter": jitter, "blur": blur}


# ---------------------------------------------------------------------------------------------------- the reference path


class Centre:
    """recipe `eval` on a PIL image."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        if image.size == (self.size, self.size):
            return image
        return T.functional.center_crop(
            T.functional.resize(image, round(self.size * 256 / 224)), self.size
        )


class Blur:
    """moco's GaussianBlur: PIL's own filter."""

    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(*self.sigma))))


def pil_transforms(recipe, size):
    """The same recipe as torchvision.transforms on PIL images, one image at a time: -> PIL image of size x size."""
    make = {
        "crop": lambda scale: T.RandomResizedCrop(size, scale=scale),
        "centre": lambda: Centre(size),
        "flip": lambda p: T.RandomHorizontalFlip(p),
        "grey": lambda p: T.RandomGrayscale(p),
        "jitter": lambda p, **strength: T.RandomApply([T.ColorJitter(**strength)], p),
        "blur": lambda sigma, p: T.RandomApply([Blur(sigma)], p),
    }
    return T.Compose(
        [make[name](**p) for name, p in (RECIPES[recipe] if isinstance(recipe, str) else recipe)]
    )
