"""Panels: a row of maps for each image, saved as one PNG. Legends of classes."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def colour(array, palette):
    """Returns an (H, W, 3) uint8 picture of one map.

    array: (3, H, W) or (H, W, 3) uint8 is an image; (H, W) integers are classes, coloured by
    palette ((C, 3) uint8; anything outside is white); (H, W) bool or float in [0, 1] is grey.
    """
    array = np.asarray(array)
    if array.ndim == 3:
        return array.transpose(1, 2, 0) if array.shape[0] == 3 else array
    if array.dtype == bool or array.dtype.kind == "f":
        grey = np.clip(array.astype(np.float32), 0, 1) * 255
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    return table[np.where((array < 0) | (array > 255), 255, array)]


def panels(rows, palette, height=160):
    """Returns rows, each a dict {title: map} as `colour` takes it, as one picture with titles.

    A map is at most 4 times as wide as the row is high.
    """
    lines = []
    for row in rows:
        pictures = []
        for array in row.values():
            picture = Image.fromarray(np.ascontiguousarray(colour(array, palette)))
            scale = min(height / picture.height, 4 * height / picture.width)
            size = [max(1, round(side * scale)) for side in picture.size]
            pictures.append(picture.resize(size, Image.Resampling.NEAREST))
        width = sum(picture.width + 4 for picture in pictures)
        line = Image.new("RGB", (width, height + 16), "white")
        x = 0
        for title, picture in zip(row, pictures, strict=True):
            line.paste(picture, (x, 16))
            ImageDraw.Draw(line).text((x, 2), title, fill="black")
            x += picture.width + 4
        lines.append(line)
    sheet = Image.new("RGB", (max(x.width for x in lines), sum(x.height for x in lines)), "white")
    y = 0
    for line in lines:
        sheet.paste(line, (0, y))
        y += line.height
    return sheet


def legend(names, colours, width):
    """Returns a white strip of this width: each name after a square of its colour, in rows."""
    size = max(12, width // 60)
    row = 2 * size
    font = ImageFont.load_default(size)
    places = []
    x = y = 0
    for name in names:
        length = round(font.getlength(name)) + 3 * size
        if x and x + length > width:
            x = 0
            y += row
        places.append((x, y))
        x += length
    strip = Image.new("RGB", (width, y + row), "white")
    pen = ImageDraw.Draw(strip)
    for (x, y), name, colour in zip(places, names, colours, strict=True):
        left = x + size // 2
        top = y + size // 2
        pen.rectangle((left, top, left + size, top + size), tuple(map(int, colour)), "black")
        pen.text((left + size * 3 // 2, top + size // 2), name, "black", font, anchor="lm")
    return strip


def with_legend(picture, names, colours):
    """Returns a PIL picture with the legend of names and colours below it."""
    strip = legend(names, colours, picture.width)
    sheet = Image.new("RGB", (picture.width, picture.height + strip.height))
    sheet.paste(picture, (0, 0))
    sheet.paste(strip, (0, picture.height))
    return sheet
