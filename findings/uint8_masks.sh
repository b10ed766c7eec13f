#!/usr/bin/env bash
# torch 2.14.1, torchvision 0.29.1, NumPy 2.4.6 and 1.26.4: masks of uint8, as readers give them, beside the numbers
# -1, -100, 256 and 65536 that code of segmentation has.
#
# One would guess: an id is compared as a number, in torch as in NumPy: no byte is -1, and all are below 256. A result
#   that needs more than a byte gets another type, or raises.
# Behaviour: torch turns the Python number into a byte before it computes or compares: -1 is 255, -100 is 156, 256 is
#   0. Nothing says so. A tensor of one number, torch.tensor(256), does the same; torch.tensor([256]) does not.
#   - mask > -1 ("is labelled") and mask < 256 are False everywhere; mask == -1 finds 255; mask == -100, the ignored
#     index of torch's losses, finds class 156 of COCO-Stuff. torch.where(mask == 255, -1, mask) leaves 255.
#   - The id of a panoptic PNG, R + 256 G + 65536 B, is R where torchvision read the image: segments flow into one.
#   - NumPy compares rightly, and since 2.0 raises where a number does not fit a byte, but not in where: there 255
#     stays 255 and 1000 becomes 232. NumPy 1 gave a wider type, on which older code counts. Neither warns.
#   - So: mask.long(), or astype(np.int64), as soon as a mask is read. torch's cross_entropy and one_hot want it anyway.
#   (Source: torch.result_type: a Python number changes a tensor's type only where its kind, such as float, is higher;
#   NumPy's NEP 50. Known as torch's issue 101653, open since 2023.)
# Output seen (torch, of the ids 0 1 156 255, as uint8 and as int64; a segment of colour 4, 3, 2):
#   mask > -1: False False False False, int64: True True True True
#   mask < 256: False False False False, int64: True True True True
#   mask == 256: True False False False, int64: False False False False
#   mask == -1: False False False True, int64: False False False False
#   mask == -100: False False True False, int64: False False False False
#   isin 256: True False False False, int64: False False False False
#   where 255, -1: 0 1 156 255, int64: 0 1 156 -1
#   panoptic id: 4, int64: 131844
#   NumPy 2.4.6 mask > -1: True True True True
#   NumPy 2.4.6 where 255, -1: 0 1 156 255
#   NumPy 2.4.6 where 255, 1000: 0 1 156 232
#   NumPy 2.4.6 panoptic id: OverflowError
#   NumPy 1.26.4 mask > -1: True True True True
#   NumPy 1.26.4 where 255, -1: 0 1 156 -1
#   NumPy 1.26.4 where 255, 1000: 0 1 156 1000
#   NumPy 1.26.4 panoptic id: 131844
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/in_torch.py" <<'PY'
import warnings

import torch
from torchvision.io import decode_image, encode_png

mask = torch.tensor([0, 1, 156, 255], dtype=torch.uint8)
picture = torch.tensor([4, 3, 2], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8).contiguous()
read = decode_image(encode_png(picture))
warnings.simplefilter("error")


def number(colours):
    red, green, blue = colours[:, 0, 0]
    return red + 256 * green + 65536 * blue


for name, call, data in (
    ("mask > -1", lambda ids: ids > -1, mask),
    ("mask < 256", lambda ids: ids < 256, mask),
    ("mask == 256", lambda ids: ids == 256, mask),
    ("mask == -1", lambda ids: ids == -1, mask),
    ("mask == -100", lambda ids: ids == -100, mask),
    ("isin 256", lambda ids: torch.isin(ids, 256), mask),
    ("where 255, -1", lambda ids: torch.where(ids == 255, -1, ids), mask),
    ("panoptic id", number, read),
):
    byte, whole = (" ".join(map(str, call(ids).view(-1).tolist())) for ids in (data, data.long()))
    print(f"{name}: {byte}, int64: {whole}")
assert torch.equal(mask < torch.tensor(256), mask < 256)
assert (mask < torch.tensor([256])).all()
PY
cat > "$folder/in_numpy.py" <<'PY'
import warnings

import numpy as np

warnings.simplefilter("error")
mask = np.array([0, 1, 156, 255], np.uint8)
red, green, blue = np.array([[4], [3], [2]], np.uint8)
for name, call in (
    ("mask > -1", lambda: mask > -1),
    ("where 255, -1", lambda: np.where(mask == 255, -1, mask)),
    ("where 255, 1000", lambda: np.where(mask == 255, 1000, mask)),
    ("panoptic id", lambda: red + 256 * green + 65536 * blue),
):
    try:
        result = " ".join(map(str, call().tolist()))
    except OverflowError as error:
        result = type(error).__name__
    print(f"NumPy {np.__version__} {name}: {result}")
PY
for version in 2.4.6 1.26.4; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q numpy==$version
done
"$folder/2.4.6/bin/pip" install -q torch==2.14.1 torchvision==0.29.1
{
  "$folder/2.4.6/bin/python" -W ignore "$folder/in_torch.py"
  for version in 2.4.6 1.26.4; do "$folder/$version/bin/python" "$folder/in_numpy.py"; done
} | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
