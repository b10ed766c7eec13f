#!/usr/bin/env bash
# ome-zarr 0.18.0 (zarr 3.1.6): a disc written by write_image and by write_labels, and their pyramids.
#
# One would guess: image and labels of one level lie on each other, in pixels and in the coordinates of
#   their metadata, which are the same.
# Behaviour: a level of labels keeps the last pixel of each block, 2 x 2 at level 1 and 4 x 4 at level 2,
#   but its translation is that of the middle of the block: the labels move to the upper left, by 0.5,
#   1.5, 3.5 pixels of level 0 at levels 1, 2, 3. The image's levels stay where they are. Level 0 alone
#   is the labels that one has drawn. (Source: ome_zarr/scale.py, Methods.NEAREST: skimage's resize
#   with order 0.)
# Output seen, the middle of the disc in the coordinates of the metadata, image and labels:
#   level 0: 200.00, 300.00 and 200.00, 300.00
#   level 1: 200.00, 300.00 and 199.50, 299.50
#   level 2: 200.00, 300.00 and 198.42, 298.42
#   level 3: 200.00, 300.00 and 196.32, 296.54
# Fails if that changes. Installs into a temporary folder (500 MB).
set -euo pipefail
here=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ome-zarr==0.18.0 zarr==3.1.6 numpy==2.2.6
cd "$folder"
venv/bin/python -W ignore - > seen <<'PY'
import numpy as np
import zarr
from ome_zarr import writer

y, x = np.mgrid[:512, :512]
disc = (y - 200) ** 2 + (x - 300) ** 2 < 90**2
group = zarr.open_group("cells.zarr", mode="w")
writer.write_image((disc * 1000).astype(np.uint16), group, axes="yx")
writer.write_labels(disc.astype(np.uint16), group, "cells", axes="yx")


def middles(part):
    """Returns the middle of the disc at every level, by the metadata of an image or of labels."""
    found = []
    for level in part.attrs["ome"]["multiscales"][0]["datasets"]:
        weight = np.asarray(part[level["path"]], float)
        scale, translation = level["coordinateTransformations"]
        pixel = (np.indices(weight.shape) * weight).sum((1, 2)) / weight.sum()
        found.append(pixel * scale["scale"] + translation["translation"])
    return found


both = zip(middles(group), middles(group["labels/cells"]), strict=True)
for level, (image, labels) in enumerate([*both][:4]):
    text = "level {}: {:.2f}, {:.2f} and {:.2f}, {:.2f}"
    print(text.format(level, *image, *labels))
PY
cat seen
diff seen <(sed -n 's/^#   \(level [0-9]: .*\)/\1/p' "$here")
echo "as described"
