#!/usr/bin/env bash
# Pillow 13.0.0, torchvision 0.29.1 (torch 2.14.1), opencv-python-headless 5.0.0.93: an augmentation's bilinear warp.
#
# One would guess: bilinear is bilinear: Image.rotate and Image.transform, torchvision's rotate and affine and OpenCV's
#   warpAffine give values rounded to whole grey levels; and torchvision's functions give the
#   same picture of a PIL image as of the tensor made of it.
# Behaviour: Pillow's warps cut the fraction off, so a picture becomes half a grey level darker in the mean, each time it
#   is warped, and torchvision does the same with a PIL image, as it calls Pillow. Of a tensor torchvision rounds, as
#   OpenCV does. A chain of warps (RandAugment) on PIL images darkens what is trained on, not what is evaluated. (Source:
#   Pillow's src/libImaging/Geometry.c; its Image.resize, in Resample.c, rounds.)
# Output seen: mean grey level less that of exact bilinear, in the middle of a random picture
#   Pillow, rotate by 15 degrees: -0.5, never brighter
#   Pillow, transform by the same affine map: -0.5, never brighter
#   torchvision, rotate a PIL image: -0.5, never brighter
#   torchvision, rotate a tensor: 0.0, rounded
#   OpenCV, warpAffine: 0.0, rounded
#   A smooth picture, turned to and fro by 3 degrees four times: Pillow -3.8, torchvision with a tensor 0.0
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
here=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 opencv-python-headless==5.0.0.93 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - > seen <<'PY'
import math

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

SIDE = 64
ANGLE = 15
LINEAR = InterpolationMode.BILINEAR


def middle(picture):
    """The middle of a picture (H, W, 3) in floats, which no warp here fills up."""
    values = np.asarray(picture, np.float64)
    inset = len(values) // 3
    return values[inset:-inset, inset:-inset]


def told(name, picture, exact):
    """Prints how far a picture is from the exact values, and how its values were made whole."""
    error = middle(picture) - exact
    if np.abs(error).max() < 0.52:
        how = "rounded"
    elif error.max() < 0.02:
        how = "never brighter"
    else:
        how = "neither cut off nor rounded"
    print(f"{name}: {error.mean().round(1) + 0:.1f}, {how}")


def tensor(values):
    """(H, W, 3) as (3, H, W)."""
    return torch.from_numpy(values).permute(2, 0, 1)


def array(maps):
    """(3, H, W) as (H, W, 3)."""
    return maps.permute(1, 2, 0).numpy()


rng = np.random.default_rng(0)
values = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
image = Image.fromarray(values)
cos = math.cos(math.radians(ANGLE))
sin = math.sin(math.radians(ANGLE))
offset = SIDE / 2 * (1 - cos + sin)
inverse = (cos, -sin, offset, sin, cos, SIDE / 2 * (1 - cos - sin))  # of the result in the picture
exact = middle(array(transforms.rotate(tensor(values).double(), ANGLE, LINEAR)))
told("Pillow, rotate by 15 degrees", image.rotate(ANGLE, Image.Resampling.BILINEAR), exact)
warped = image.transform((SIDE, SIDE), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
told("Pillow, transform by the same affine map", warped, exact)
told("torchvision, rotate a PIL image", transforms.rotate(image, ANGLE, LINEAR), exact)
told("torchvision, rotate a tensor", array(transforms.rotate(tensor(values), ANGLE, LINEAR)), exact)
matrix = cv2.getRotationMatrix2D(((SIDE - 1) / 2, (SIDE - 1) / 2), ANGLE, 1)
turned = cv2.warpAffine(values, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR)
told("OpenCV, warpAffine", turned, exact)

smooth = Image.fromarray(rng.integers(60, 200, (8, 8, 3), np.uint8)).resize((256, 256))
before = middle(smooth).mean()
picture = smooth
maps = tensor(np.array(smooth))
for angle in 4 * (3, -3):
    picture = picture.rotate(angle, Image.Resampling.BILINEAR)
    maps = transforms.rotate(maps, angle, LINEAR)
lost = middle(picture).mean() - before
kept = middle(array(maps)).mean() - before
print(
    f"A smooth picture, turned to and fro by 3 degrees four times: Pillow {lost:.1f},"
    f" torchvision with a tensor {kept + 0:.1f}"
)
PY
cat seen
diff seen <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$here")
echo "as described"
