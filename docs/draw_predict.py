"""Draws docs/predict.png: three pictures of shapes and what predict.py makes of them.

python docs/draw_predict.py RUN   # of cps_fpl.py on shapes; left out: that of its bare command
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import predict
from common import pictures, shapes

RUN = "runs/cps_fpl-shapes-1_16-s0"


def row(source, key):
    """Returns the panels of one picture."""
    image, label = shapes.draw(key)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    (found,) = predict.segment(source, pixels[None], maps=True)
    return {
        "image": np.asarray(image),
        "truth": np.asarray(label),
        "classes": found["classes"],
        "confidence": found["confidence"] / 255,
        "entropy": found["entropy"] / 255,
        "K: 1, 2, 3 or more": (found["K"] - 1) / 2,
    }


if __name__ == "__main__":
    source = predict.open_source((sys.argv[1:] or [RUN])[0])
    rows = [row(source, key) for key in shapes.keys("test")[:3]]
    sheet = pictures.panels(rows, source.data.palette)
    sheet.save(Path(__file__).parent / "predict.png")
