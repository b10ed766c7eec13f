#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93, scikit-image 0.26.0, scipy 1.17.1: a predicted mask, cleaned by closing and opening.
#
# One would guess: closing fills gaps and loses no pixel of a mask, opening takes specks away and adds no pixel, and
#   neither moves anything, whatever the kernel; one operation, one result in each library.
# Behaviour: OpenCV's morphologyEx with a kernel of an even size, as np.ones((4, 4)), moves the whole mask by a pixel down and
#   to the right, once for each of `iterations`; closing and opening after each other move it by two. A line of 3 pixels
#   has an IoU of 0.49 with itself then. An even kernel has no middle, so dilation is off by half a pixel; OpenCV's erosion
#   is off to the same side, where scikit-image and SciPy turn the kernel round for one of the two, and the halves cancel.
#   - The even ellipses of getStructuringElement move it, too; odd kernels do not.
#   - `anchor` of morphologyEx is no help, as both passes get the same. Top and black hat are made of the two operations.
#   - As meant, with np.ones((size, size)): an anchor of its own for the second pass, "two anchors" below.
#   (Source: modules/imgproc/src/morph.dispatch.cpp, morphologyEx; its issues 10571 and 22042.)
# Output seen (pixels by which a square moves down and to the right, and those that opening adds to it; pixels that closing
# takes from six lines of 3 pixels, and their IoU with what they were):
#   3x3, OpenCV: closing moves 0.0 0.0, opening 0.0 0.0 and adds 0; lines: 0 of 1440 lost, IoU 1.00
#   3x3, skimage: closing moves 0.0 0.0, opening 0.0 0.0 and adds 0; lines: 0 of 1440 lost, IoU 1.00
#   3x3, scipy: closing moves 0.0 0.0, opening 0.0 0.0 and adds 0; lines: 0 of 1440 lost, IoU 1.00
#   2x2, OpenCV: closing moves 1.0 1.0, opening 1.0 1.0 and adds 79; lines: 492 of 1440 lost, IoU 0.49
#   2x2, OpenCV, 3 iterations: closing moves 3.0 3.0, opening 3.0 3.0 and adds 231; lines: 1440 of 1440 lost, IoU 0.00
#   2x2, skimage: closing moves 0.0 0.0, opening 0.0 0.0 and adds 0; lines: 0 of 1440 lost, IoU 1.00
#   2x2, scipy: closing moves 0.0 0.0, opening 0.0 0.0 and adds 0; lines: 0 of 1440 lost, IoU 1.00
#   4x4, OpenCV: closing moves 1.0 1.0, opening 1.0 1.0 and adds 79; lines: 492 of 1440 lost, IoU 0.49
#   4x4, OpenCV, two anchors: closing moves 0.0 0.0, opening 0.0 0.0 and adds 0; lines: 0 of 1440 lost, IoU 1.00
#   4x4, skimage: closing moves 0.0 0.0, opening 0.0 0.0 and adds 0; lines: 0 of 1440 lost, IoU 1.00
#   4x4, scipy: closing moves 0.0 0.0, opening 0.0 0.0 and adds 0; lines: 0 of 1440 lost, IoU 1.00
#   ellipse of 6, OpenCV: closing moves 0.9 1.0, opening 0.9 1.0 and adds 72; lines: 492 of 1440 lost, IoU 0.50
#   ellipse of 6, skimage: closing moves 0.0 0.0, opening 0.1 0.0 and adds 0; lines: 0 of 1440 lost, IoU 1.00
#   ellipse of 6, scipy: closing moves 0.0 0.0, opening 0.1 0.0 and adds 0; lines: 0 of 1440 lost, IoU 1.00
# Fails if that changes. Installs into a temporary folder (500 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/clean.py" <<'PY'
import cv2
import numpy as np
from scipy import ndimage
from skimage import morphology

lines, square = np.zeros((2, 120, 120), np.uint8)
for row in range(20, 90, 12):
    lines[row : row + 3, 20:100] = 1
square[40:80, 40:80] = 1
KERNELS = {f"{size}x{size}": np.ones((size, size), np.uint8) for size in (3, 2, 4)}
KERNELS["ellipse of 6"] = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (6, 6))


def of_opencv(**options):
    def closing(mask, kernel):
        return cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel, **options)

    def opening(mask, kernel):
        return cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel, **options)

    return closing, opening


def closing_by_hand(mask, kernel):
    second = ((len(kernel) - 1) // 2,) * 2  # that of the first is len(kernel) // 2
    return cv2.erode(cv2.dilate(mask, kernel), kernel, anchor=second)


def opening_by_hand(mask, kernel):
    second = ((len(kernel) - 1) // 2,) * 2
    return cv2.dilate(cv2.erode(mask, kernel), kernel, anchor=second)


def moved(mask):
    return " ".join(f"{places.mean() - 59.5:.1f}" for places in np.nonzero(mask))


def show(name, kernel, closing, opening):
    closed, opened = closing(square, kernel), np.asarray(opening(square, kernel), bool)
    closed_lines, ours = np.asarray(closing(lines, kernel), bool), lines.astype(bool)
    iou = (closed_lines & ours).sum() / (closed_lines | ours).sum()
    print(
        f"{name}: closing moves {moved(closed)}, opening {moved(opened)}"
        f" and adds {(opened & (square == 0)).sum()}; lines:"
        f" {(ours & ~closed_lines).sum()} of {ours.sum()} lost, IoU {iou:.2f}"
    )


for name, kernel in KERNELS.items():
    show(f"{name}, OpenCV", kernel, *of_opencv())
    if name == "2x2":
        show(f"{name}, OpenCV, 3 iterations", kernel, *of_opencv(iterations=3))
    if name == "4x4":
        show(f"{name}, OpenCV, two anchors", kernel, closing_by_hand, opening_by_hand)
    show(f"{name}, skimage", kernel, morphology.closing, morphology.opening)
    show(f"{name}, scipy", kernel, ndimage.binary_closing, ndimage.binary_opening)
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q opencv-python-headless==5.0.0.93 scikit-image==0.26.0 scipy==1.17.1 numpy
"$folder/env/bin/python" "$folder/clean.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
