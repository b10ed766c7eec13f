# torchvision 0.29.1 (torch 2.14.1), albumentations 2.0.8, Pillow 12.3.0: one mask made smaller by "nearest".
#
# One would guess: v2.Resize(size, NEAREST) takes the same pixels of a mask whether that is a PIL image or a
#   tv_tensors.Mask, and the mask stays under its image, which is resized centre on centre.
# Behaviour: "nearest" of a tensor, and of OpenCV, which albumentations takes, is floor(i * scale): the upper
#   left of the pixels that an output pixel covers. Pillow takes the one at their centre. At a third of the
#   size the labels lie one pixel of the original off their image, at a quarter 1.5, and the same 40 discs
#   of radius 6 overlap with those of Pillow by 75 and 54 % only. NEAREST_EXACT is Pillow's nearest. Made
#   larger by a whole number all agree, so a test that enlarges sees nothing.
#   (Source: the documentation of F.interpolate; torchvision/transforms/v2/functional/_geometry.py.)
# Output seen:
#   1/3, PIL image: +0.0 pixels from the centre, IoU 1.00
#   1/3, Mask: -1.0 pixels from the centre, IoU 0.75
#   1/3, Mask, NEAREST_EXACT: +0.0 pixels from the centre, IoU 1.00
#   1/3, albumentations: -1.0 pixels from the centre, IoU 0.75
#   1/4, PIL image: +0.5 pixels from the centre, IoU 1.00
#   1/4, Mask: -1.5 pixels from the centre, IoU 0.54
#   1/4, Mask, NEAREST_EXACT: +0.5 pixels from the centre, IoU 1.00
#   1/4, albumentations: -1.5 pixels from the centre, IoU 0.54
#   3 times the size, equal: True
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/resize.py" <<'PY'
import albumentations
import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

SIDE = 480
NEAREST = v2.InterpolationMode.NEAREST
EXACT = v2.InterpolationMode.NEAREST_EXACT


def resized(mask, side):
    """Returns {way: mask resized to side x side}."""
    size = (side, side)
    tensor = tv_tensors.Mask(torch.from_numpy(mask))
    by_opencv = albumentations.Resize(side, side)
    blank = np.zeros((*mask.shape, 3), np.uint8)
    return {
        "PIL image": np.asarray(v2.Resize(size, NEAREST)(Image.fromarray(mask))),
        "Mask": v2.Resize(size, NEAREST)(tensor).numpy(),
        "Mask, NEAREST_EXACT": v2.Resize(size, EXACT)(tensor).numpy(),
        "albumentations": by_opencv(image=blank, mask=mask)["mask"],
    }


y, x = np.mgrid[:SIDE, :SIDE]
columns = (x % 240).astype(np.uint8)  # where a pixel of the result comes from
discs = np.zeros((SIDE, SIDE), np.uint8)
for centre_x, centre_y in np.random.default_rng(0).integers(20, SIDE - 20, (40, 2)):
    discs[(x - centre_x) ** 2 + (y - centre_y) ** 2 <= 36] = 1
for part in (3, 4):
    side = SIDE // part
    count = side // 2 - 1  # columns below 240
    centres = (np.arange(count) + 0.5) * part - 0.5
    masks = resized(discs, side)
    right = masks["PIL image"]
    for way, taken in resized(columns, side).items():
        shift = (taken[0, :count] - centres).mean()
        iou = (right & masks[way]).sum() / (right | masks[way]).sum()
        print(f"1/{part}, {way}: {shift:+.1f} pixels from the centre, IoU {iou:.2f}")
first, *others = resized(discs, 3 * SIDE).values()
print("3 times the size, equal:", all((other == first).all() for other in others))
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 albumentations==2.0.8 \
  pillow==12.3.0 numpy 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
"$folder/env/bin/python" "$folder/resize.py" 2> "$folder/errors" | tee "$folder/seen" ||
  { cat "$folder/errors"; exit 1; }
diff "$folder/seen" <(sed -n 's/^#   \(\(1\/\|3 times\).*\)/\1/p' "$0")
