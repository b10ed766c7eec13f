# OpenCV 5.0.0.93, pycocotools 2.0.11, scikit-image 0.26.0, rasterio 1.4.4: masks written as COCO polygons.
#
# One would guess: a mask that goes through cv2.findContours into COCO's "segmentation", as most scripts
#   and export buttons do it, comes back from pycocotools but for single pixels of its outline.
# Behaviour: the contour joins the centres of the outermost pixels, and pycocotools takes the numbers for
#   the borders of pixels: the mask comes back without its last row and column, a pole of one pixel not at
#   all, one of two pixels at half its width; and each further trip takes as much again. Adding 0.5 does
#   not help. The outlines of skimage.measure.find_contours (at 0.5, of a mask with a
#   border of nothing, plus 0.5) and of rasterio.features.shapes come back whole.
#   (Source: pycocotools' common/maskApi.c, rleFrPoly.)
# Output seen, pixels of the mask, and what comes back by each way:
#   pole of 1: 40, OpenCV 0, OpenCV plus 0.5 0, skimage 40, rasterio 40
#   pole of 2: 80, OpenCV 39, OpenCV plus 0.5 39, skimage 80, rasterio 80
#   pole of 4: 160, OpenCV 117, OpenCV plus 0.5 117, skimage 160, rasterio 160
#   disc of 4: 49, OpenCV 38, OpenCV plus 0.5 38, skimage 49, rasterio 49
#   disc of 16: 797, OpenCV 752, OpenCV plus 0.5 752, skimage 797, rasterio 797
#   disc of 16, five trips: 752 708 664 620 576
# Fails if that changes. Installs into a temporary folder (400 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/trips.py" <<'PY'
import cv2
import numpy as np
from pycocotools import mask as coco
from rasterio import features
from skimage import measure

SIZE = 64


def filled(outlines):
    """Returns the mask that pycocotools makes of outlines, each (points, 2) as x, y."""
    lists = [outline.reshape(-1).tolist() for outline in outlines if outline.size >= 6]
    if not lists:
        return np.zeros((SIZE, SIZE), np.uint8)
    return coco.decode(coco.merge(coco.frPyObjects(lists, SIZE, SIZE)))


def by_opencv(mask, shift=0.0):
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return filled([outline + shift for outline in outlines])


def by_skimage(mask):
    outlines = measure.find_contours(np.pad(mask, 1), 0.5)
    return filled([outline[:-1, ::-1] - 1 + 0.5 for outline in outlines])


def by_rasterio(mask):
    shapes = features.shapes(mask, mask=mask.astype(bool))
    return filled([np.array(shape["coordinates"][0]) for shape, _ in shapes])


y, x = np.mgrid[:SIZE, :SIZE]
masks = {f"pole of {w}": (x >= 20) & (x < 20 + w) & (y >= 10) & (y < 50) for w in (1, 2, 4)}
masks |= {f"disc of {r}": (y - 32) ** 2 + (x - 32) ** 2 <= r * r for r in (4, 16)}
for name, mask in masks.items():
    mask = mask.astype(np.uint8)
    ways = {
        "OpenCV": by_opencv(mask),
        "OpenCV plus 0.5": by_opencv(mask, 0.5),
        "skimage": by_skimage(mask),
        "rasterio": by_rasterio(mask),
    }
    for way in ("skimage", "rasterio"):
        assert (ways[way] == mask).all()
    print(f"{name}: {mask.sum()},", ", ".join(f"{w} {back.sum()}" for w, back in ways.items()))
left = []
for _ in range(5):
    mask = by_opencv(mask)
    left.append(int(mask.sum()))
print(f"{name}, five trips:", *left)
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q opencv-python-headless==5.0.0.93 pycocotools==2.0.11 \
  scikit-image==0.26.0 rasterio==1.4.4 numpy==2.4.6 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
"$folder/env/bin/python" "$folder/trips.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   \(\(pole\|disc\) of [0-9]*[:,].*\)/\1/p' "$0")
