"""Panels: a row of maps for each image, saved as one PNG."""

import numpy as np
from PIL import Image, ImageDraw


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
    """Returns rows, each a dict {title: map} as `colour` takes it, as one picture with titles."""
    lines = []
    for row in rows:
        images = [Image.fromarray(np.ascontiguousarray(colour(a, palette))) for a in row.values()]
        widths = [max(1, round(image.width * height / image.height)) + 4 for image in images]
        line = Image.new("RGB", (sum(widths), height + 16), "white")
        for i, (title, image) in enumerate(zip(row, images, strict=True)):
            picture = image.resize((widths[i] - 4, height), Image.Resampling.NEAREST)
            line.paste(picture, (sum(widths[:i]), 16))
            ImageDraw.Draw(line).text((sum(widths[:i]), 2), title, fill="black")
        lines.append(line)
    sheet = Image.new("RGB", (max(x.width for x in lines), sum(x.height for x in lines)), "white")
    for i, line in enumerate(lines):
        sheet.paste(line, (0, sum(x.height for x in lines[:i])))
    return sheet


def save_panels(path, rows, palette, height=160):
    """Saves what `panels` returns as a PNG."""
    sheet = panels(rows, palette, height)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
