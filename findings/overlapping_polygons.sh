#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93, pycocotools 2.0.11, rasterio 1.4.4: polygons of one class that overlap, as those of
# neighbouring cars or trees do, drawn into a mask of classes.
#
# One would guess: cv2.fillPoly(mask, polygons, class) gives that class to all that lies in some polygon: it takes a list,
#   and one call for each polygon would be the same, only slower.
# Behaviour: all polygons of a call are one shape, filled by the even-odd rule: where two overlap is a hole, which keeps
#   what was in the mask before, background or another class; where three overlap is filled again. Only the outlines,
#   which are drawn as well, stand in the hole. No error, and pictures without overlaps are right.
#   - drawContours(mask, polygons, -1, class, FILLED) does the same; with one index after another it does not.
#   - pycocotools (merge of frPyObjects, as annToMask does for the parts of one object) and rasterio take the union.
#   - Right: a call for each polygon. One call for all parts is right only for holes, which the rule is made for.
#   (Source: modules/imgproc/src/drawing.cpp, fillPoly collects the edges of all contours for one FillEdgeCollection;
#   opencv/opencv#5256, "rather a feature than a bug".)
# Output seen (pixels of class 1 where one, two and three polygons are, and how many pixels these are):
#   covered: 2300 1100 100
#   fillPoly of all: 2300 98 100
#   fillPoly of each: 2300 1100 100
#   drawContours of all: 2300 98 100
#   drawContours of each: 2300 1100 100
#   pycocotools: 2300 1100 100
#   rasterio: 2300 1100 100
# Fails if that changes. Installs into a temporary folder (500 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/polygons.py" <<'PY'
import cv2
import numpy as np
from pycocotools import mask as coco
from rasterio.features import rasterize

SIZE = 100
square = np.array([[10, 10], [50, 10], [50, 50], [10, 50]])
polygons = [square, square + 20, square + 30]


def by_opencv(draw):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    draw(mask)
    return mask


def each(mask):
    for polygon in polygons:
        cv2.fillPoly(mask, [polygon], 1)


def each_contour(mask):
    for index in range(len(polygons)):
        cv2.drawContours(mask, polygons, index, 1, cv2.FILLED)


def merged():
    parts = coco.frPyObjects([polygon.ravel().tolist() for polygon in polygons], SIZE, SIZE)
    return coco.decode(coco.merge(parts))


def burnt():
    rings = [[*polygon.tolist(), polygon[0].tolist()] for polygon in polygons]
    shapes = [{"type": "Polygon", "coordinates": [ring]} for ring in rings]
    return rasterize(shapes, (SIZE, SIZE))


# The middles of the pixels that one, two and three polygons cover.
middles = np.arange(SIZE) + 0.5
inside = [(middles > polygon[0, 0]) & (middles < polygon[2, 0]) for polygon in polygons]
covered = sum(np.outer(row, row).astype(int) for row in inside)
ways = {
    "fillPoly of all": by_opencv(lambda mask: cv2.fillPoly(mask, polygons, 1)),
    "fillPoly of each": by_opencv(each),
    "drawContours of all": by_opencv(
        lambda mask: cv2.drawContours(mask, polygons, -1, 1, cv2.FILLED)
    ),
    "drawContours of each": by_opencv(each_contour),
    "pycocotools": merged(),
    "rasterio": burnt(),
}
print(f"covered: {' '.join(str((covered == n).sum()) for n in (1, 2, 3))}")
for name, mask in ways.items():
    print(f"{name}: {' '.join(str(int(mask[covered == n].sum())) for n in (1, 2, 3))}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q opencv-python-headless==5.0.0.93 pycocotools==2.0.11 rasterio==1.4.4 numpy==2.4.6
"$folder/env/bin/python" "$folder/polygons.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
