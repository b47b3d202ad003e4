"""Sheets of small pictures with captions, drawn by PIL alone."""

from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

GAP = 6  # pixels between tiles
FRAME = 3  # the width of a frame
FONT_SIZE = 13
LINE = 17  # the height of a line of text


class Tile(NamedTuple):
    """One picture, what stands under it, and the colour of its frame."""

    image: Tensor  # (3, H, W) uint8
    caption: str = ""
    frame: str | None = None  # a colour by a name that PIL knows, such as "red"


class Row(NamedTuple):
    """Tiles beside one another, below a title."""

    title: str
    tiles: list[Tile]


def draw_sheet(rows, size=64):
    """Draw rows of tiles below one another. The same rows give the same pixels.

    Args:
        rows: list of Row. They may be of different lengths; an empty title takes no space.
        size: the side of a tile in pixels. Images are fitted into it, small ones enlarged without
            smoothing.

    Returns:
        a PIL.Image, RGB.
    """
    font = ImageFont.load_default(FONT_SIZE)
    column = size + 2 * FRAME + GAP
    titles = [font.getlength(drawable(row.title)) for row in rows]
    width = max([column * len(row.tiles) for row in rows] + [int(t) + 1 for t in titles])
    heights = [row_height(row, size) for row in rows]
    page = Image.new("RGB", (width + GAP, sum(heights) + GAP), "white")
    pen = ImageDraw.Draw(page)
    top = GAP
    for row, height in zip(rows, heights):
        y = top
        if row.title:
            pen.text((GAP, y), drawable(row.title), "black", font)
            y += LINE
        for i, tile in enumerate(row.tiles):
            draw_tile(page, pen, font, tile, (GAP + i * column, y), size)
        top += height
    return page


def row_height(row, size):
    """How many pixels a row takes, with the gap below it."""
    lines = max((len(tile.caption.splitlines()) for tile in row.tiles), default=0)
    tiles = size + 2 * FRAME if row.tiles else 0
    return LINE * bool(row.title) + tiles + LINE * lines + GAP


def draw_tile(page, pen, font, tile, corner, size):
    """Draw one tile, its frame and its caption, with its upper left corner there."""
    x, y = corner
    side = size + 2 * FRAME
    if tile.frame is not None:
        pen.rectangle((x, y, x + side - 1, y + side - 1), tile.frame)
    image = fit(tile.image, size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    page.paste(image, (x + left, y + top))
    for i, line in enumerate(tile.caption.splitlines()):
        middle = x + side / 2, y + side + i * LINE
        pen.text(middle, drawable(line), "black", font, anchor="ma")


def drawable(text):
    r"""Text with "\xe4" for a letter that PIL's own font has not, instead of an empty box."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def fit(image, size):
    """Fit an image (3, H, W) uint8 into a square of that many pixels, as PIL's."""
    _, H, W = image.shape
    scale = size / max(H, W)
    shape = max(1, round(H * scale)), max(1, round(W * scale))
    if scale > 1:
        fitted = F.interpolate(image[None].float(), shape, mode="nearest-exact")
    else:
        fitted = F.interpolate(
            image[None].float(), shape, mode="bilinear", antialias=True, align_corners=False
        )
    pixels = fitted[0].round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
