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
    return table[np.clip(array, 0, 255)]


def save_panels(path, rows, palette, height=160):
    """Saves rows, each a dict {title: map} as `colour` takes it, as one PNG with titles on top."""
    pictures = []
    for row in rows:
        cells = []
        for title, array in row.items():
            image = Image.fromarray(np.ascontiguousarray(colour(array, palette)))
            width = max(1, round(image.width * height / image.height))
            cell = Image.new("RGB", (width + 4, height + 16), "white")
            cell.paste(image.resize((width, height), Image.Resampling.NEAREST), (2, 14))
            ImageDraw.Draw(cell).text((3, 1), title, fill="black")
            cells.append(cell)
        pictures.append(cells)
    sheet = Image.new(
        "RGB",
        (max(sum(c.width for c in cells) for cells in pictures), (height + 16) * len(pictures)),
        "white",
    )
    for i, cells in enumerate(pictures):
        for j, cell in enumerate(cells):
            sheet.paste(cell, (sum(c.width for c in cells[:j]), i * (height + 16)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
