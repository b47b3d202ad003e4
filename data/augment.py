"""Augmentation: named recipes, computed for a whole batch at once on the batch's own device.

Every image has parameters of its own. A recipe is a literal list of (operation, parameters), in the
order of the papers' torchvision.transforms.Compose. `Augment` runs it in two halves, so that JPEG
workers can do the first and the device the second:

    drawn = augment.sample_parameters(n, generator)
                                        every random number of n images, on the CPU: reproducible,
                                        and the device is never waited for
    x = augment.crop(images, drawn)     (n, 3, H, W) uint8 -> (n, 3, S, S) float in [0, 1]
    x = augment.colour(x, drawn)        the rest of the recipe, and the data set's mean and std

The distribution is that of torchvision's transforms on PIL images (tests/data/test_augment.py
compares each operation and the statistics of whole recipes). We differ in one thing: PIL cuts to
uint8 after every operation, we do not, so that its jittered views are about one level of 255
darker.
"""

import math
from functools import partial

import torch
from PIL import ImageFilter
from torch.nn import functional as F
from torchvision import transforms as T

RATIO = 3 / 4, 4 / 3  # the limits of a crop's width / height

# (operation, parameters), applied in this order. Sources: shared by the released code of the four
# papers; see each YAML.
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
    # SupContrast's, for 32 pixels, without blur
    "cifar": [
        ("crop", dict(scale=(0.2, 1.0))),
        ("flip", dict(p=0.5)),
        ("jitter", dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)),
        ("grey", dict(p=0.2)),
    ],
    # moco's CIFAR notebook, for 32 pixels: the same, with the crop that torchvision has by default
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
    # no randomness: the shorter side to size * 256/224, then the central square, except for images
    # of the wanted size
    "eval": [("centre", dict())],
}


def get_recipe(name):
    """A recipe by its name. ValueError if there is none."""
    if name not in RECIPES:
        raise ValueError(f"augment {name!r} is not a recipe; there are {', '.join(RECIPES)}")
    return RECIPES[name]


class Augment:
    """A recipe bound to an output size and a data set's normalisation.

    Args:
        recipe: a name in RECIPES, or such a list.
        size: S, of the views.
        mean: of each channel, for images in [0, 1].
        std: likewise.
    """

    def __init__(self, recipe, size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
        if isinstance(recipe, str):
            recipe = get_recipe(recipe)
        if recipe[0][0] not in ("crop", "centre"):
            raise ValueError(
                "a recipe begins with 'crop' or 'centre', which give every image the same size; "
                f"this one begins with {recipe[0][0]!r}"
            )
        self.recipe, self.size = recipe, size
        self.mean, self.std = mean, std

    def sample_parameters(self, n, generator):
        """All the random numbers of n images, whatever size these have.

        Returns:
            {operation: {name: (n, ...) CPU tensor}}.
        """
        drawn = {}
        for name, settings in self.recipe:
            if name in SAMPLERS:
                drawn[name] = SAMPLERS[name](n, generator, **settings)
        return drawn

    def box(self, drawn, height, width):
        """The part of each image that is kept.

        Args:
            drawn: what sample_parameters gave.
            height: of the images, an int or (n,).
            width: likewise.

        Returns:
            (n, 4) float, top, left, height, width; None for all of the image.
        """
        if self.recipe[0][0] == "centre":
            return centre_box(height, width, self.size)
        if "crop" not in drawn:  # a worker has cropped it
            return None
        return crop_box(drawn["crop"], height, width)

    def crop(self, images, drawn):
        """(n, 3, H, W) uint8 (or float in [0, 1]) -> (n, 3, S, S) float in [0, 1]."""
        n, _, H, W = images.shape
        box = self.box(drawn, H, W)
        if box is None:  # they have the wanted size already
            return images.float().div_(255) if images.dtype == torch.uint8 else images.clone()
        return crop(images, box.expand(n, 4), self.size, beyond=self.recipe[0][0] == "centre")

    def colour(self, x, drawn):
        """(n, 3, S, S) float in [0, 1] -> the same after the rest of the recipe, normalised.

        It overwrites x.
        """
        for name, _ in self.recipe[1:]:
            x = OPERATIONS[name](x, **drawn[name])
        return self.normalise(x)

    def normalise(self, x):
        """(n, 3, S, S) float in [0, 1] -> (x - mean) / std. It overwrites x."""
        mean = torch.tensor(self.mean, device=x.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(1, 3, 1, 1)
        return x.sub_(mean).div_(std)

    def apply(self, images, drawn, out=None):
        """Crop, then colour: the views (n, 3, S, S).

        On a CPU in pieces that stay in its caches: up to twice as fast, and the same numbers.
        out: where to, (n, 3, S, S).
        """
        n, S = len(images), self.size
        # 2 images at 224 pixels, 37 at 96, 1024 at 32.
        piece = n if images.is_cuda else max(2, 2**25 // S**3)
        y = torch.empty(n, 3, S, S, device=images.device) if out is None else out
        for first in range(0, n, piece):
            rows = slice(first, first + piece)
            part = select_rows(drawn, rows)
            y[rows] = self.colour(self.crop(images[rows], part), part)
        return y

    def __call__(self, images, generator):
        """One view of each image.

        (n, 3, H, W) uint8 -> (n, 3, S, S) float, normalised, on the images' device.
        """
        return self.apply(images, self.sample_parameters(len(images), generator))


def select_rows(drawn, rows):
    """What was drawn for some images of a batch; rows: a slice or indices."""
    selected = {}
    for name, values in drawn.items():
        selected[name] = {key: value[rows] for key, value in values.items()}
    return selected


# ------------------------------------------------------------------ what is drawn, on the CPU


def uniform(generator, shape, low=0.0, high=1.0):
    """Random numbers in [low, high)."""
    return torch.rand(shape, generator=generator) * (high - low) + low


def sample_apply(n, generator, p):
    """Whether the operation is applied to each of n images."""
    return {"apply": uniform(generator, n) < p}


def sample_crop(n, generator, scale):
    """Ten tries for each image, as torchvision's RandomResizedCrop, and where the crop lies."""
    low, high = map(math.log, RATIO)
    return {
        "area": uniform(generator, (n, 10), *scale),
        "ratio": uniform(generator, (n, 10), low, high).exp(),
        "position": uniform(generator, (n, 2)),
    }


def sample_jitter(n, generator, brightness, contrast, saturation, hue, p):
    """The four factors of each image, their order, and whether they are applied."""
    factors = [
        uniform(generator, n, 1 - strength, 1 + strength)
        for strength in (brightness, contrast, saturation)
    ]
    factors.append(uniform(generator, n, -hue, hue))
    return {
        "factors": torch.stack(factors, 1),
        "order": torch.rand(n, 4, generator=generator).argsort(1),
        "apply": uniform(generator, n) < p,
    }


def sample_blur(n, generator, sigma, p):
    """The width of each image's blur, and whether it is applied."""
    return {
        "sigma": uniform(generator, n, *sigma),
        "apply": uniform(generator, n) < p,
    }


SAMPLERS = {
    "crop": sample_crop,
    "jitter": sample_jitter,
    "flip": sample_apply,
    "grey": sample_apply,
    "blur": sample_blur,
}


# ------------------------------------------------------------------ where the crop lies


def crop_box(drawn, height, width):
    """The box of torchvision's RandomResizedCrop.

    It is the first of ten (area, ratio) that fits, else the central crop nearest to that.

    Args:
        drawn: of sample_crop.
        height: of the images, an int or (n,).
        width: likewise.

    Returns:
        (n, 4) float, top, left, height, width.
    """
    n = len(drawn["area"])
    H = torch.as_tensor(height, dtype=torch.float32).expand(n)
    W = torch.as_tensor(width, dtype=torch.float32).expand(n)
    area = drawn["area"] * (H * W)[:, None]  # (n, 10)
    w = (area * drawn["ratio"]).sqrt().round()
    h = (area / drawn["ratio"]).sqrt().round()
    fits = (w > 0) & (w <= W[:, None]) & (h > 0) & (h <= H[:, None])
    first = fits.int().argmax(1, keepdim=True)  # (n, 1), 0 where none fits
    w = w.gather(1, first)[:, 0]  # (n,)
    h = h.gather(1, first)[:, 0]
    top = (drawn["position"][:, 0] * (H - h + 1)).floor()
    left = (drawn["position"][:, 1] * (W - w + 1)).floor()
    none = ~fits.any(1)
    w = torch.where(none, torch.minimum(W, (H * RATIO[1]).round()), w)
    h = torch.where(none, torch.minimum(H, (W / RATIO[0]).round()), h)
    top = torch.where(none, ((H - h) / 2).floor(), top)
    left = torch.where(none, ((W - w) / 2).floor(), left)
    return torch.stack([top, left, h, w], 1)


def centre_box(height, width, size):
    """Shorter side to size * 256/224, then the central square, as one box.

    Returns:
        (1, 4) or (n, 4) float, top, left, height, width; None for images of the wanted size.
    """
    H = torch.as_tensor(height, dtype=torch.float32).view(-1)
    W = torch.as_tensor(width, dtype=torch.float32).view(-1)
    if (size == H).all() and (size == W).all():
        return None
    side = torch.minimum(H, W) * (size / round(size * 256 / 224))
    side = torch.where((size == H) & (size == W), H, side)
    return torch.stack([(H - side) / 2, (W - side) / 2, side, side], 1)


# ------------------------------------------------------------------ crop and resize
# x is (n, 3, H, W) in [0, 1].


def crop(images, box, size, beyond=False):
    """Cut a box out of each image and resize it with PIL's bilinear filter.

    The filter widens where the box shrinks.

    Args:
        images: (n, 3, H, W) uint8, or float in [0, 1].
        box: (n, 4) float, top, left, height, width.
        size: S.
        beyond: resize the whole image, then cut: pixels beyond the box's border count where the
            filter reaches them.

    Returns:
        (n, 3, S, S) float in [0, 1].
    """
    n, c, H, W = images.shape
    is_uint8 = images.dtype == torch.uint8
    if size >= 64 and is_uint8 and not images.is_cuda and not beyond:
        return crop_one_by_one(images, box, size).float().div_(255)
    x = images.float().div_(255) if is_uint8 else images
    top, left, h, w = box.to(x.device).T[..., None]  # (n, 1) each
    rows = sampling(top, h, H, size, beyond)
    columns = sampling(left, w, W, size, beyond)
    if max(H, W) <= size:  # every box grows
        return bilinear(x, rows, columns)
    return antialiased(x, rows, columns)


def crop_one_by_one(images, box, size):
    """`crop` by torch's own uint8 kernel, which rounds as PIL does.

    For larger images on a CPU it beats both of the batched ways.

    Args:
        images: n times (3, H, W) uint8, of any sizes.
        box: (n, 4).
        size: S.

    Returns:
        (n, 3, S, S) uint8.
    """
    y = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for row, (top, left, h, w) in enumerate(box.int().tolist()):
        part = images[row][None, :, top : top + h, left : left + w]
        y[row] = F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]
    return y


def sampling(start, length, pixels, size, beyond):
    """Where the output pixels lie along one side, in input pixels.

    Returns:
        Their centres (n, S), the step between them (n, 1), and the limits (n, 1) of the input
        pixels that count.
    """
    step = length / size
    centre = start + (torch.arange(size, device=start.device) + 0.5) * step
    if beyond:
        return centre, step, torch.zeros_like(start), torch.full_like(start, pixels)
    return centre, step, start, start + length


def bilinear(x, rows, columns):
    """`antialiased` for boxes that grow.

    grid_sample is four times as fast as the matmuls on a CPU.
    """
    H, W = x.shape[2:]
    i = grid_coordinates(rows, H)  # (n, S)
    j = grid_coordinates(columns, W)
    S = i.shape[1]
    i = i[:, :, None].expand(-1, -1, S)
    j = j[:, None].expand(-1, S, -1)
    grid = torch.stack([j, i], 3)  # (n, S, S, 2)
    return F.grid_sample(x, grid, align_corners=False)


def grid_coordinates(along, pixels):
    """Centres of output pixels, of `sampling` -> (n, S) in [-1, 1], as grid_sample has them."""
    centre, _, low, high = along
    centre = torch.minimum(torch.maximum(centre, low + 0.5), high - 0.5)
    return centre * (2 / pixels) - 1


def antialiased(x, rows, columns):
    """Two batched matmuls: with the share of each input pixel in each output column, then row."""
    n, c, H, W = x.shape
    y = x.reshape(n, c * H, W) @ triangle(*columns, W).transpose(1, 2)
    y = y.view(n, c, H, -1)  # (n, 3, H, S)
    return triangle(*rows, H)[:, None] @ y  # (n, 3, S, S)


def triangle(centre, step, low, high, pixels):
    """The share of each input pixel in each output pixel: (n, S, pixels).

    It is a triangle about each centre, as wide as the step but at least one pixel. Nothing comes
    from beyond the limits.
    """
    pixel = torch.arange(pixels, device=centre.device) + 0.5
    weight = (1 - (pixel - centre[..., None]).abs() / step[..., None].clamp(min=1)).clamp_(min=0)
    weight *= (pixel > low[..., None]) & (pixel < high[..., None])
    return weight / weight.sum(2, keepdim=True)


# ------------------------------------------------------------------ the other operations
# x is (n, 3, S, S) in [0, 1], with one parameter for each image. All write into x; `apply`, (n,)
# bool, says into which images.


def apply_to_rows(x, rows, operation, values=None):
    """Let an operation, which writes into its argument, work on some images of x.

    Args:
        x: (n, 3, S, S).
        rows: a list of m rows.
        operation: (images (m, 3, S, S), values (m, 1, 1, 1)) -> images. For one image the value is
            a number, which needs no copy there and back.
        values: (n,) on the CPU, one for each image of x; None for an operation that takes none.
    """
    if len(rows) == 1:
        row = rows[0]
        arguments = [] if values is None else [values[row].item()]
        operation(x[row : row + 1], *arguments)
    elif rows:
        # Lists and values are the CPU's: the device is not waited for.
        rows = torch.tensor(rows)
        arguments = []
        if values is not None:
            arguments = [values[rows].view(-1, 1, 1, 1).to(x.device)]
        rows = rows.to(x.device)
        x.index_copy_(0, rows, operation(x[rows], *arguments))
    return x


def true_rows(apply):
    """(n,) bool on the CPU -> the list of rows that are True."""
    return apply.nonzero()[:, 0].tolist()


def flip(x, apply):
    """Mirror left and right."""
    return apply_to_rows(x, true_rows(apply), mirror)


def mirror(x):
    """Mirror all images."""
    return x.copy_(x.flip(3))


def luma(x):
    """PIL's mode L: (n, 1, S, S)."""
    r, g, b = x.split(1, 1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def grey(x, apply):
    """Take the colours out."""
    return apply_to_rows(x, true_rows(apply), remove_colours)


def remove_colours(x):
    """Take the colours out of all images."""
    return x.copy_(luma(x).expand_as(x))


def blend(x, other, factor):
    """Weighted mean of two images: factor * x + (1 - factor) * other."""
    return x.mul_(factor).add_(other * (1 - factor)).clamp_(0, 1)


def brightness(x, factor):
    """Blend with black."""
    return x.mul_(factor).clamp_(0, 1)


def contrast(x, factor):
    """Blend with the mean grey of the image."""
    # Row by row, which is the same with any number of threads.
    mean = luma(x).mean(3, keepdim=True).mean(2, keepdim=True)
    return blend(x, mean, factor)


def saturation(x, factor):
    """Blend with the image without its colours."""
    return blend(x, luma(x), factor)


def hue(x, shift):
    """Turn the hue of HSV by `shift` turns."""
    r, g, b = x.split(1, 1)  # (n, 1, S, S)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # Which channel is the largest is held as 0 or 1, not as bool: torch.where takes forty
    # additions.
    not_r = (value - r).mul_(1e20).clamp_(max=1)
    not_g = (value - g).mul_(1e20).clamp_(max=1)
    # The hue in sixths of a turn, times chroma, by which channel is the largest.
    h_of_g = (b - r).add_(chroma, alpha=2)
    h_of_b = (r - g).add_(chroma, alpha=4)
    h = torch.lerp(g - b, torch.lerp(h_of_g, h_of_b, not_g), not_r)
    base = torch.sub(value, chroma, alpha=2)
    chroma *= 6
    h.div_(chroma.clamp(min=1e-20)).add_(shift + 1)  # in turns, above 0; a grey has any hue
    # value - chroma max(0, min(k', 4 - k', 1)), where k' = 6 frac(h + k)
    for channel, k in enumerate((5 / 6, 3 / 6, 1 / 6)):
        share = (h + k).frac_().sub_(1 / 3).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(base, chroma, share, out=x[:, channel : channel + 1])
    return x


JITTER = brightness, contrast, saturation, hue


def jitter(x, factors, order, apply):
    """What torchvision's ColorJitter does: four operations, for each image in its own order.

    Args:
        x: (n, 3, S, S).
        factors: (n, 4), one for each of JITTER.
        order: (n, 4), a permutation of 0..3 in each row.
        apply: (n,) bool.
    """
    # groups[turn][operation] lists the images that have this operation in this turn.
    groups = [([], [], [], []) for _ in JITTER]
    for image, (operations, is_applied) in enumerate(zip(order.tolist(), apply.tolist())):
        for turn, i in enumerate(operations if is_applied else ()):
            groups[turn][i].append(image)
    for group in groups:
        for i, operation in enumerate(JITTER):
            apply_to_rows(x, group[i], operation, factors[:, i])
    return x


def blur(x, sigma, apply):
    """Gaussian blur, separable, reflected at the border, cut off at three sigma."""
    # In pixels (n,); reflection needs that much image.
    reach = (3 * sigma).ceil().clamp(max=x.shape[2] - 1).int()
    if x.is_cuda:  # all at once, as far as the widest: launches cost more than pixels
        groups = [true_rows(apply)]
    elif x.shape[2] >= 64:  # one by one: the weights are numbers then
        groups = [[image] for image in true_rows(apply)]
    else:
        groups = [true_rows(apply & (reach == radius)) for radius in reach[apply].unique()]
    for rows in groups:
        if rows:
            radius = int(reach[rows].max())
            apply_to_rows(x, rows, partial(gaussian, radius=radius), sigma)
    return x


def gaussian(x, sigma, radius):
    """Blur all images. sigma: (n, 1, 1, 1), or a number."""
    w = [-0.5 * (t / sigma) ** 2 for t in range(radius + 1)]  # both sides share a weight
    w = [math.exp(v) for v in w] if isinstance(sigma, float) else torch.stack(w).exp()
    total = 2 * sum(w) - 1
    for dim in (2, 3):
        border = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        padded = F.pad(x, border, mode="reflect")
        length = x.shape[dim]
        torch.mul(padded.narrow(dim, radius, length), w[0] / total, out=x)
        for t in range(1, radius + 1):
            for start in (radius - t, radius + t):
                shifted = padded.narrow(dim, start, length)
                if isinstance(sigma, float):
                    x.add_(shifted, alpha=w[t] / total)
                else:
                    x.addcmul_(shifted, w[t] / total)
    return x


OPERATIONS = {"flip": flip, "grey": grey, "jitter": jitter, "blur": blur}


# ------------------------------------------------------------------ the reference path


class Centre:
    """The recipe `eval` on an image of PIL's."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        """Image of PIL's -> image of PIL's, size x size."""
        if image.size == (self.size, self.size):
            return image
        image = T.functional.resize(image, round(self.size * 256 / 224))
        return T.functional.center_crop(image, self.size)


class Blur:
    """moco's GaussianBlur: PIL's own filter."""

    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, image):
        """Image of PIL's -> the same, blurred."""
        sigma = float(torch.empty(1).uniform_(*self.sigma))
        return image.filter(ImageFilter.GaussianBlur(sigma))


def pil_transforms(recipe, size):
    """The same recipe as torchvision.transforms on PIL images, one image at a time.

    recipe: a name in RECIPES, or such a list. -> PIL image -> PIL image of size x size.
    """
    if isinstance(recipe, str):
        recipe = RECIPES[recipe]
    return T.Compose([pil_transform(name, size, **settings) for name, settings in recipe])


def pil_transform(name, size, **settings):
    """One operation of a recipe as a transform of torchvision's."""
    if name == "centre":
        return Centre(size)
    if name == "crop":
        return T.RandomResizedCrop(size, **settings)
    if name == "flip":
        return T.RandomHorizontalFlip(**settings)
    if name == "grey":
        return T.RandomGrayscale(**settings)
    p = settings.pop("p")
    transform = T.ColorJitter(**settings) if name == "jitter" else Blur(**settings)
    return T.RandomApply([transform], p)
