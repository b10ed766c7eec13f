#!/usr/bin/env bash
# MONAI 1.6.1 (torch 2.14.1): crops around positive voxels of a mask that has one channel for each kind of object, as
# objects that overlap need it. Each of the three channels has one object of the same size.
#
# One would guess: RandCropByPosNegLabeld with pos=1 and neg=0 centres each crop on a voxel that some channel marks. The
#   documentation says of the label "Non-zero indicates foreground", and names no channel that is left out.
# Behaviour: of two or more channels the first is dropped, as the background of a one-hot mask, whatever is in it. No crop
#   is centred on an object of channel 0; for pos=neg these are places for negative crops, as all background is. So the
#   order of the channels decides what is hardly seen in training; nothing is said, except where no other channel marks
#   anything ("Num foregrounds 0"). MONAI's losses and metrics leave channel 0 out only if include_background=False.
#   - FgBgToIndicesd does the same (both call map_binary_to_indices).
#   - As meant: a label_key of one channel, which is the largest of all channels; or a channel of zeros in front; or
#     RandCropByLabelClassesd, which takes all channels, each with the same share of the crops.
#   (Source: monai/transforms/utils.py, map_binary_to_indices, "for One-Hot format data, remove the background channel".)
# Output seen (of 1000 crops, those that show some of the object of channel 0, 1, 2):
#   positive: 0 515 485
#   positive, channels in reverse: 515 485 0
#   positive and negative: 16 270 259
#   positive, one channel of all: 348 312 340
#   positive and negative, one channel of all: 173 176 206
#   positive, a channel of zeros in front: 348 312 340
#   RandCropByLabelClassesd: 338 331 331
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/crops.py" <<'PY'
import numpy as np
from monai.transforms import RandCropByLabelClassesd, RandCropByPosNegLabeld

CROPS = {"keys": ["image"], "label_key": "label", "spatial_size": (32, 32), "num_samples": 1000}
objects = np.zeros((3, 256, 256), np.float32)
for channel, place in enumerate((40, 120, 200)):
    objects[channel, place : place + 16, place : place + 16] = 1


def show(name, label, crop):
    crop.set_random_state(0)
    found = [part["image"] for part in crop({"image": objects, "label": label})]
    seen = [sum(bool(part[channel].any()) for part in found) for channel in range(3)]
    print(f"{name}: {' '.join(str(count) for count in seen)}")


positive = RandCropByPosNegLabeld(**CROPS, pos=1, neg=0)
balanced = RandCropByPosNegLabeld(**CROPS, pos=1, neg=1)
empty = np.zeros_like(objects[:1])
union = objects.max(axis=0, keepdims=True)
show("positive", objects, positive)
show("positive, channels in reverse", objects[::-1].copy(), positive)
show("positive and negative", objects, balanced)
show("positive, one channel of all", union, positive)
show("positive and negative, one channel of all", union, balanced)
show("positive, a channel of zeros in front", np.concatenate([empty, objects]), positive)
show("RandCropByLabelClassesd", objects, RandCropByLabelClassesd(**CROPS))
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 monai==1.6.1 numpy==2.4.6
"$folder/env/bin/python" "$folder/crops.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
