#!/usr/bin/env bash
# TorchIO 1.2.1 (torch 2.14.1): a CT scan and its label map, padded by the value of air.
#
# One would guess: a library that knows label maps from images pads an image by the value that is given and a label map
#   by background; or a value that no label can have is refused. RandomAffine of the same library treats them so:
#   default_pad_value is of images, default_pad_label of labels.
# Behaviour: Pad, CropOrPad and GridSampler give padding_mode to both. Labels are uint8, and the number is made a byte:
#   -1000 is class 24, of which nothing is said. -1024, the other number that CT has for air, is 0 by chance.
#   - Of 25 classes or more, as labels of a whole body are, the network learns padding as class 24. With fewer torch's
#     cross-entropy raises, far from here.
#   - "linear_ramp" and "mean" compute labels as numbers: between background and class 4 there are classes 1 and 2. Only
#     "mean" warns, of truncation.
#   - So: Pad(n, padding_mode=-1000, exclude=["seg"]) and then Pad(n, include=["seg"]); or pad both by "edge".
#   (Source: Pad.apply_transform in torchio/transforms/preprocessing/spatial/pad.py pads all images of a subject alike.)
# Output seen (labels after padding; the scan's least value):
#   Pad by -1000: 0 4 24, scan: -1000
#   Pad by -1024: 0 4, scan: -1024
#   CropOrPad by -1000: 0 4 24, scan: -1000
#   GridSampler by -1000: 0 4 24, scan: -1000
#   Pad by mean: 0 2 4, scan: 50
#   Pad by linear_ramp: 0 1 2 4, scan: 0
#   Pad by edge: 0 4, scan: 50
#   Pad, one after the other: 0 4, scan: -1000
#   RandomAffine by -1000: 0 4, scan: -1000
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/pad.py" <<'PY'
import torch
import torchio as tio

labels = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
labels[:, 1:3] = 4
scan = torch.full((1, 4, 4, 4), 50.0)


def subject():
    return tio.Subject(ct=tio.ScalarImage(tensor=scan.clone()), seg=tio.LabelMap(tensor=labels.clone()))


def show(name, patches):
    found = torch.cat([patch["seg"].data.flatten() for patch in patches]).unique()
    least = min(float(patch["ct"].data.min()) for patch in patches)
    print(f"{name}: {' '.join(str(int(label)) for label in found)}, scan: {least:.0f}")


apart = [tio.Pad(2, padding_mode=-1000, exclude=["seg"]), tio.Pad(2, include=["seg"])]
move = dict(scales=0, degrees=0, translation=(2, 2, 0, 0, 0, 0))
show("Pad by -1000", [tio.Pad(2, padding_mode=-1000)(subject())])
show("Pad by -1024", [tio.Pad(2, padding_mode=-1024)(subject())])
show("CropOrPad by -1000", [tio.CropOrPad(8, padding_mode=-1000)(subject())])
sampler = tio.data.GridSampler(subject(), patch_size=4, patch_overlap=2, padding_mode=-1000)
show("GridSampler by -1000", list(sampler))
for mode in ("mean", "linear_ramp", "edge"):
    show(f"Pad by {mode}", [tio.Pad(2, padding_mode=mode)(subject())])
show("Pad, one after the other", [tio.Compose(apart)(subject())])
show("RandomAffine by -1000", [tio.RandomAffine(**move, default_pad_value=-1000)(subject())])
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchio==1.2.1 numpy==2.4.6
"$folder/env/bin/python" -W ignore "$folder/pad.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
