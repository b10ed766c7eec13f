"""Draws docs/shapes.png: pictures of the generated data set and their labels."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import pictures, shapes
from common.data import FACTS


def rows(count=8, per_row=4):
    """Returns the panels of the first training pictures, image and label side by side."""
    drawn = []
    for i, key in enumerate(shapes.keys("train")[:count]):
        image, label = shapes.draw(key)
        if i % per_row == 0:
            drawn.append({})
        drawn[-1] |= {key: np.asarray(image), f"label {i}": np.asarray(label)}
    return drawn


if __name__ == "__main__":
    palette = np.array(FACTS["shapes"]["palette"], np.uint8)
    sheet = pictures.panels(rows(), palette, height=112)
    sheet.save(Path(__file__).parent / "shapes.png")
