"""Batched augmentation against torchvision's transforms on PIL images.

Each operation with equal parameters, and the statistics of views.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional as TF

from data import augment
from data.augment import RECIPES, Augment, pil_transforms, select_rows
from data.shapes import shapes


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(shapes(24, size=48, seed=3)[0])  # (24, 3, 48, 48) uint8


def pil(x):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in x]


def back(images):
    return torch.stack(
        [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images]
    )


def close(ours, theirs, levels=1.01):
    """Equal up to so many of PIL's 255 levels: PIL rounds, we do not."""
    apart = (ours - theirs).abs().max() * 255
    assert apart <= levels, f"{apart:.2f} levels apart"


@pytest.mark.parametrize(
    "operation,theirs,values,levels",
    [
        ("brightness", TF.adjust_brightness, (0.6, 1.4), 1.01),
        ("contrast", TF.adjust_contrast, (0.6, 1.4), 1.51),  # PIL rounds the mean as well
        ("saturation", TF.adjust_saturation, (0.6, 1.4), 1.51),  # and the grey image
    ],
)
def test_colour_operations_equal_torchvisions(images, operation, theirs, values, levels):
    factor = torch.linspace(*values, len(images))
    ours = getattr(augment, operation)(images.float() / 255, factor.view(-1, 1, 1, 1))
    close(ours, back([theirs(image, f) for image, f in zip(pil(images), factor.tolist())]), levels)


def test_hue_equals_torchvisions_tensor_form(images):
    """PIL's HSV has 256 hues, so the float form is the exact one; PIL agrees on the average."""
    shift = torch.linspace(-0.4, 0.4, len(images))
    ours = augment.hue(images.float() / 255, shift.view(-1, 1, 1, 1))
    exact = torch.stack(
        [TF.adjust_hue(image.float() / 255, s) for image, s in zip(images, shift.tolist())]
    )
    assert (ours - exact).abs().max() < 1e-5
    theirs = [TF.adjust_hue(image, s) for image, s in zip(pil(images), shift.tolist())]
    assert (ours - back(theirs)).abs().mean() < 2 / 255


@pytest.mark.parametrize("size", [32, 96])  # groups by reach; one by one
def test_an_image_alone_is_treated_as_in_a_batch(size):
    """Which images share a call changes rounding alone.

    So it does whether a parameter is a number or a tensor.
    """
    x, aug = torch.rand(9, 3, size, size), Augment("moco_v2", size)
    u = aug.sample_parameters(9, torch.Generator().manual_seed(0))
    del u["crop"]
    whole = aug.colour(x.clone(), u)
    alone = torch.cat(
        [aug.colour(x[i : i + 1].clone(), select_rows(u, slice(i, i + 1))) for i in range(9)]
    )
    assert (whole - alone).abs().max() < 1e-5
    assert (whole - x).abs().max() > 0.1


def test_grey_and_flip_equal_torchvisions(images):
    apply = torch.arange(len(images)) % 2 == 0
    for operation, theirs in (("grey", lambda im: TF.to_grayscale(im, 3)), ("flip", TF.hflip)):
        ours = getattr(augment, operation)(images.float() / 255, apply)
        close(ours, back([theirs(im) if a else im for im, a in zip(pil(images), apply)]))


def test_blur_equals_torchvisions_and_is_near_pils(images):
    sigma, x = torch.linspace(0.1, 2, len(images)), images.float() / 255
    ours = augment.blur(x.clone(), sigma, torch.ones(len(images), dtype=torch.bool))
    exact = torch.cat(
        [
            TF.gaussian_blur(image[None], 2 * math.ceil(3 * s) + 1, s)
            for image, s in zip(x, sigma.tolist())
        ]
    )
    assert (ours - exact).abs().max() < 1e-5
    wide = torch.cat([TF.gaussian_blur(image[None], 31, s) for image, s in zip(x, sigma.tolist())])
    assert (ours - wide).abs().max() < 0.5 / 255  # what lies beyond three sigma
    theirs = back(
        [im.filter(ImageFilter.GaussianBlur(s)) for im, s in zip(pil(images), sigma.tolist())]
    )
    assert (ours - theirs).abs().mean() < 2 / 255  # PIL's is three box filters


@pytest.mark.parametrize("size", [48, 64, 20])  # enlarged always; and where some boxes shrink
def test_crop_equals_pils(images, size):
    """The same boxes through Image.crop + Image.resize. PIL rounds between its two passes."""
    u = augment.sample_crop(len(images), torch.Generator().manual_seed(0), (0.2, 1.0))
    box = augment.crop_box(u, 48, 48)
    theirs = [
        TF.resized_crop(im, *map(int, b), [size, size]) for im, b in zip(pil(images), box.tolist())
    ]
    close(augment.crop(images.float() / 255, box, size), back(theirs), 1.3)
    close(augment.crop(images, box, size), back(theirs), 1.3)  # uint8: for 64 pixels by another way


def test_bilinear_is_antialiased_where_boxes_grow(images):
    drawn = augment.sample_crop(len(images), torch.Generator().manual_seed(1), (0.2, 1.0))
    box = augment.crop_box(drawn, 48, 48)
    x = images.float() / 255
    arguments = [
        augment.sampling(s, length, 48, 48, False)
        for s, length in ((box[:, :1], box[:, 2:3]), (box[:, 1:2], box[:, 3:]))
    ]
    assert (augment.bilinear(x, *arguments) - augment.antialiased(x, *arguments)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "height,width,size", [(48, 48, 28), (48, 48, 48), (48, 48, 56), (40, 60, 28)]
)
def test_eval_equals_resize_and_centre_crop(height, width, size):
    image = torch.from_numpy(shapes(1, size=60, seed=5)[0])[:, :, :height, :width]
    ours = Augment("eval", size)(image, None)
    theirs = back([pil_transforms("eval", size)(im) for im in pil(image)])
    close(ours, theirs, 1e-6 if (height, width) == (size, size) else 1.3)


def test_crop_boxes_follow_torchvisions_distribution():
    """Means and quantiles of 20,000 boxes against RandomResizedCrop.get_params.

    The image is so oblong that the fallback is met.
    """
    from torchvision.transforms import RandomResizedCrop

    n, H, W = 20000, 20, 100
    drawn = augment.sample_crop(n, torch.Generator().manual_seed(0), (0.2, 1.0))
    ours = augment.crop_box(drawn, H, W)
    torch.manual_seed(0)
    image = torch.zeros(1, H, W)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    ).float()
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 0.35
    shares = torch.tensor([0.1, 0.5, 0.9])
    difference = ours.quantile(shares, 0) - theirs.quantile(shares, 0)
    assert difference.abs().max() <= 1.5
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= H).all()
    assert (ours[:, 1] + ours[:, 3] <= W).all()


@pytest.mark.parametrize(
    "recipe",
    [
        "moco_v2",
        *(
            pytest.param(recipe, marks=pytest.mark.slow)
            for recipe in ("moco_v1", "cifar", "crop_flip")
        ),
    ],
)
def test_views_have_the_statistics_of_torchvisions(images, recipe):
    """4,000 views of one image by each path.

    Every pixel's mean and spread, how many are grey, and how sharp they are, agree.
    """
    n, image = 4000, images[:1]
    ours = Augment(recipe, 24)(image.expand(n, -1, -1, -1), torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    transform, picture = pil_transforms(recipe, 24), pil(image)[0]
    theirs = back([transform(picture) for _ in range(n)])
    # Five standard errors of the difference of two means of values that are spread by 0.3.
    error = 5 * 0.3 * (2 / n) ** 0.5
    for figure in (
        lambda v: v.mean((0, 2, 3)),
        lambda v: v.std(0).mean((1, 2)),
        lambda v: v.mean(0),
        lambda v: v.mean(1).std((1, 2)).mean(),
        lambda v: (v.amax(1) - v.amin(1)).amax((1, 2)).lt(0.02).float().mean(),
        lambda v: (v[..., 1:] - v[..., :-1]).abs().mean(),
    ):
        assert (figure(ours) - figure(theirs)).abs().max() < error


def test_jitter_draws_every_order_and_applies_it():
    drawn = augment.sample_jitter(24000, torch.Generator().manual_seed(0), 0.4, 0.4, 0.4, 0.1, 0.8)
    orders, counts = drawn["order"].unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 850
    assert counts.max() < 1150
    assert abs(drawn["apply"].float().mean() - 0.8) < 0.01
    x = torch.rand(24, 3, 8, 8)
    factors = drawn["factors"][:24]
    ours = augment.jitter(x.clone(), factors, orders, torch.ones(24, dtype=torch.bool))
    for i, order in enumerate(orders.tolist()):
        one = x[i : i + 1]
        for operation in order:
            one = augment.JITTER[operation](one, factors[i : i + 1, operation])
        assert torch.equal(ours[i : i + 1], one)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_same_generator_same_views_and_pieces_change_nothing(images, recipe):
    a = Augment(recipe, 48, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    u = a.sample_parameters(len(images), torch.Generator().manual_seed(7))
    assert torch.equal(a(images, torch.Generator().manual_seed(7)), a.apply(images, u))
    halves = [a.apply(images[s], select_rows(u, s)) for s in (slice(0, 10), slice(10, 24))]
    assert torch.allclose(torch.cat(halves), a.apply(images, u), atol=1e-6)


def test_unknown_recipes_are_refused():
    with pytest.raises(ValueError, match="moco_v3.*moco_v2"):
        Augment("moco_v3", 32)
    with pytest.raises(ValueError, match="begins with"):
        Augment([("flip", dict(p=1))], 32)
