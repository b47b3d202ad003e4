"""Sheets of pictures: where tiles, frames and captions come to stand."""

import numpy as np
import torch

from engine.sheet import FRAME, GAP, LINE, Row, Tile, draw_sheet


def plain(colour, height=8, width=8):
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, height, width)


def test_tiles_frames_and_rows_stand_where_they_should():
    blue, green = (0, 0, 255), (0, 128, 0)
    rows = [
        Row("first", [Tile(plain(blue), "0.91", "red"), Tile(plain(green), "0.90")]),
        Row("", [Tile(plain(green))]),
    ]
    sheet = draw_sheet(rows, size=16)
    side = 16 + 2 * FRAME
    top = GAP + LINE
    assert sheet.getpixel((GAP, top)) == (255, 0, 0)
    assert sheet.getpixel((GAP + side // 2, top + side // 2)) == blue
    second = GAP + side + GAP
    assert sheet.getpixel((second, top)) == (255, 255, 255)  # no frame
    assert sheet.getpixel((second + side // 2, top + side // 2)) == green
    below = top + side + LINE + GAP  # the second row has no title
    assert sheet.getpixel((GAP + side // 2, below + side // 2)) == green
    caption = np.asarray(sheet)[top + side : top + side + LINE, GAP : GAP + side]
    assert caption.min() < 100  # something is written there


def test_images_of_any_shape_are_fitted_whole():
    sheet = draw_sheet([Row("", [Tile(plain((9, 9, 9), 100, 50))])], size=20)
    dark = (np.asarray(sheet) == 9).all(2)
    assert dark.any(1).sum() == 20  # its height
    assert dark.any(0).sum() == 10  # its width


def test_the_same_rows_give_the_same_bytes_and_a_long_title_is_whole():
    rows = [Row("a title that is much longer than its one tile is wide", [Tile(plain((1, 2, 3)))])]
    first, second = draw_sheet(rows, 16), draw_sheet(rows, 16)
    assert first.tobytes() == second.tobytes()
    assert first.width > 200


def test_no_tiles_are_a_title_alone():
    sheet = draw_sheet([Row("there are none", [])], 16)
    assert np.asarray(sheet).min() < 100


def test_letters_that_the_font_has_not_are_escaped():
    photo = [Tile(plain((1, 2, 3)), "b\xe4r")]
    escaped = [Tile(plain((1, 2, 3)), r"b\xe4r")]
    first = draw_sheet([Row("Gr\xf6\xdfe \u65e5", photo)], 16)
    second = draw_sheet([Row(r"Gr\xf6\xdfe \u65e5", escaped)], 16)
    assert first.tobytes() == second.tobytes()
