#!/usr/bin/env bash
# datumaro 1.13.12 (CVAT's exports go through it): "cityscapes" and "coco_instances".
#
# One would guess: a Cityscapes export has Cityscapes' ids, and iscrowd 1 in COCO marks a crowd.
# Behaviour: gtFine/*_labelIds.png holds the project's own numbers, from 1 in the project's order,
#   beside a label_colors.txt: read as Cityscapes' ids, where 0 to 6 are no classes, six labels are
#   all ignored. And iscrowd is 1 for every mask that is no polygon. (Source: its writers,
#   plugins/data_formats.)
# Output seen:
#   labelIds of pen, big: [1 2] / iscrowd of a polygon 0, of a mask 1 / label_colors.txt: True
# Fails if that changes. Installs into a temporary folder (700 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datumaro==1.13.12
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import json
from pathlib import Path

import numpy as np
from datumaro.components.annotation import Mask, Polygon
from datumaro.components.dataset import Dataset
from datumaro.components.dataset_base import DatasetItem
from datumaro.components.media import Image as Media
from PIL import Image

area = np.zeros((8, 12), bool)
area[1:4, 2:7] = True
shapes = [
    Polygon([1, 1, 5, 1, 5, 7, 1, 7], label=1, id=1, group=1),
    Mask(area, label=0, id=2, group=2, z_order=1),
]
photograph = Media.from_numpy(data=np.zeros((8, 12, 3), np.uint8), ext=".jpg")
item = DatasetItem(id="a", subset="train", media=photograph, annotations=shapes)
data = Dataset.from_iterable([item], categories=["pen", "big"])
data.export("coco", "coco_instances")
content = json.loads(Path("coco/annotations/instances_train.json").read_text())
crowds = {type(a["segmentation"]).__name__: a["iscrowd"] for a in content["annotations"]}
only_masks = Dataset.from_iterable(
    [item.wrap(annotations=[Mask(area, label=1, id=1), Mask(~area, label=0, id=2)])],
    categories=["pen", "big"],
)
only_masks.export("city", "cityscapes")
ids = np.unique(np.asarray(Image.open("city/gtFine/train/a_gtFine_labelIds.png")))
colours = Path("city/label_colors.txt").is_file()
print("labelIds of pen, big:", ids)
print("iscrowd of a polygon", crowds["list"], "of a mask", crowds["dict"])
print("label_colors.txt:", colours)
assert ids.tolist() == [1, 2] and crowds == {"list": 0, "dict": 1} and colours
print("as described")
PY
