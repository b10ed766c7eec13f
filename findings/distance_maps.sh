#!/usr/bin/env bash
# SciPy 1.17.1, MONAI 1.6.1, torchmetrics 1.9.0, OpenCV 5.0.0.93, edt 3.1.2, kornia 0.9.0: the distance map of a crop's
# class, as boundary losses, weights of borders and watersheds take it.
#
# One would guess: "Euclidean distance transform" is the distance of each pixel of the class to the next pixel that is
#   not of it; where there is none, as in a crop that is all of one class, it is infinite, 0 or an error.
# Behaviour: of a full crop SciPy gives the distance to a pixel above the crop's upper left corner, which does not
#   exist: 1 to 33 in a crop of 24x24, and -1 as its row from return_indices. Nothing says so. MONAI's and torchmetrics'
#   functions that call it hand it on.
#   - The signed map of boundary losses, d(outside) - (d(inside) - 1), weights the pixels of such a crop from 0 to -32:
#     to miss its lower right costs three times what its upper left does. The background's channel of a crop without an
#     object is a full one, and code that asks mask.any() lets it pass. MONAI's own losses leave full masks out.
#   - OpenCV has 3.4e38 or 1.8e19 there, edt inf, kornia 0, and torchmetrics' default engine raises.
#   - OpenCV's maskSize 3 and 5 are approximations: 3 is 4.5 % short along rows. DIST_MASK_PRECISE is exact.
#   - kornia's map is that of the other side: 0 in the class, distances in the background. Of the background in place of
#     the class it is 28 % short along diagonals.
#   - So: skip a mask that is empty or full, or pad the crop by what its image has around it.
#   (Source: distance_transform_edt in scipy/ndimage/_morphology.py, known as SciPy's issue 1616, open;
#   kornia/contrib/distance_transform.py, whose text says "approximates".)
# Output seen (a pixel whose distance is 32.53; one whose distance is 6; a full crop's least and largest):
#   SciPy: 32.53 6.00, full: 1 to 33.2
#   MONAI: 32.53 6.00, full: 1 to 33.2
#   torchmetrics: 32.53 6.00, full: IndexError
#   torchmetrics, engine scipy: 32.53 6.00, full: 1 to 33.2
#   OpenCV, 3: 31.49 5.73, full: 3.4e+38 to 3.4e+38
#   OpenCV, 5: 32.20 6.00, full: 3.4e+38 to 3.4e+38
#   OpenCV, precise: 32.53 6.00, full: 1.84e+19 to 1.84e+19
#   edt: 32.53 6.00, full: inf to inf
#   kornia: 0.00 0.00, full: 0 to 0
#   kornia, of the background: 23.41 5.63, full: 0 to 0
#   row and column of SciPy's nearest background of a full crop: -1 0
#   boundary loss, a full crop's upper left quarter missed: +2.1, lower right: +6.2
#   MONAI BoundaryLoss, a full crop's upper left quarter missed: +0.0, lower right: +0.0
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/distances.py" <<'PY'
import cv2
import edt
import numpy as np
import torch
from kornia.contrib import distance_transform as of_kornia
from monai.losses import BoundaryLoss
from monai.transforms.utils import distance_transform_edt as of_monai
from scipy.ndimage import distance_transform_edt as of_scipy
from torchmetrics.functional.segmentation.utils import distance_transform as of_torchmetrics

SIZE = 24
full = np.ones((SIZE, SIZE), np.uint8)
but_one = full.copy()
but_one[0, 0] = 0
square = np.zeros_like(full)
square[6:18, 6:18] = 1


def as_float(mask):
    return torch.from_numpy(mask).float()


for name, call in {
    "SciPy": of_scipy,
    "MONAI": lambda mask: of_monai(as_float(mask)[None])[0],
    "torchmetrics": lambda mask: of_torchmetrics(torch.from_numpy(mask)),
    "torchmetrics, engine scipy": lambda mask: of_torchmetrics(torch.from_numpy(mask), engine="scipy"),
    "OpenCV, 3": lambda mask: cv2.distanceTransform(mask, cv2.DIST_L2, 3),
    "OpenCV, 5": lambda mask: cv2.distanceTransform(mask, cv2.DIST_L2, 5),
    "OpenCV, precise": lambda mask: cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE),
    "edt": edt.edt,
    "kornia": lambda mask: of_kornia(as_float(mask)[None, None])[0, 0],
    "kornia, of the background": lambda mask: of_kornia(1 - as_float(mask)[None, None])[0, 0],
}.items():
    try:
        found = np.asarray(call(full))
        words = f"{found.min():.3g} to {found.max():.3g}"
    except IndexError as error:
        words = type(error).__name__
    print(f"{name}: {call(but_one)[-1, -1]:.2f} {call(square)[11, 11]:.2f}, full: {words}")
place = of_scipy(full, return_distances=False, return_indices=True)[:, -1, -1]
print("row and column of SciPy's nearest background of a full crop:", *place)

signed = torch.from_numpy(of_scipy(1 - full) * (1 - full) - (of_scipy(full) - 1) * full)
right = torch.ones(SIZE, SIZE)
upper, lower = right.clone(), right.clone()
upper[: SIZE // 2, : SIZE // 2] = 0
lower[SIZE // 2 :, SIZE // 2 :] = 0
monai = BoundaryLoss()
for name, loss in (
    ("boundary loss", lambda pred: (pred * signed).mean()),
    ("MONAI BoundaryLoss", lambda pred: monai(pred[None, None], as_float(full)[None, None])),
):
    first, last = (float(loss(pred) - loss(right)) for pred in (upper, lower))
    print(f"{name}, a full crop's upper left quarter missed: +{first:.1f}, lower right: +{last:.1f}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 numpy==2.4.6 scipy==1.17.1 monai==1.6.1 torchmetrics==1.9.0 \
  opencv-python-headless==5.0.0.93 edt==3.1.2 kornia==0.9.0
"$folder/env/bin/python" -W ignore "$folder/distances.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
