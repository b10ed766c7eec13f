#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93, imageio 2.38.1, scikit-image 0.26.0, matplotlib 3.11.2, rasterio 1.4.4,
# SimpleITK 2.5.7, webdataset 1.0.2, datasets 5.2.0, Pillow 13.0.0: a mask of ids with a palette, as VOC's are.
#
# One would guess: a reader that is told to change nothing (cv2.IMREAD_UNCHANGED), or to give one channel of 8
#   bits (webdataset's "l8", datasets' Image(mode="L")), gives the stored ids; a library does with a TIFF what
#   it does with a PNG; and a mask written in a lossless format has the numbers that it had.
# Behaviour: of the PNG six of nine readers make colours, UNCHANGED too, and "one channel" is the colours'
#   luminance: class 1 of VOC is 38, class 2 is 75. With imageio and scikit-image, which hand a TIFF to
#   tifffile, the same mask as TIFF gives ids; SimpleITK gives its colours times 256 then. Pillow numbers the
#   colours that occur anew where it writes a GIF, unless optimize=False; of a grey mask with the values 0, 5
#   and 7 too, which comes back as a palette image with 0, 1 and 2.
#   (Source: webdataset/autodecode.py, ImageHandler; PIL/GifImagePlugin.py, _normalize_palette.)
# Output seen, of the ids 0 1 2 1 15 20 255 0:
#   PIL png: ids
#   cv2, UNCHANGED png: colours
#   cv2, GRAYSCALE png: 0 38 75 38 147 52 220 0
#   imageio png: colours
#   scikit-image png: colours
#   matplotlib png: colours
#   rasterio png: ids
#   SimpleITK png: colours
#   PIL tif: ids
#   cv2, UNCHANGED tif: colours
#   cv2, GRAYSCALE tif: 0 38 75 38 147 52 220 0
#   imageio tif: ids
#   scikit-image tif: ids
#   matplotlib tif: colours
#   rasterio tif: ids
#   SimpleITK tif: colours times 256
#   webdataset, pil png: colours
#   webdataset, l8 png: 0 38 75 38 147 52 220 0
#   datasets, Image() png: ids
#   datasets, Image(mode="L") png: 0 38 75 38 147 52 220 0
#   Pillow, a gif: 0 1 2 1 3 4 5 0
#   Pillow, a gif with optimize=False: ids
#   Pillow, a gif of grey 0 5 7: 0 1 2
# Fails if that changes. Installs into a temporary folder (800 MB).
set -euo pipefail
here=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 numpy==2.4.6 opencv-python-headless==5.0.0.93 imageio==2.38.1 \
  tifffile==2026.3.3 scikit-image==0.26.0 matplotlib==3.11.2 rasterio==1.4.4 SimpleITK==2.5.7 webdataset==1.0.2 \
  datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - > seen <<'PY'
import warnings

import cv2
import datasets
import imageio.v3
import matplotlib.image
import numpy as np
import rasterio
import SimpleITK
import skimage.io
from PIL import Image
from webdataset.autodecode import imagehandler

warnings.simplefilter("ignore")  # rasterio: a picture has no place on the earth
IDS = np.array([[0, 1, 2, 1], [15, 20, 255, 0]], np.uint8)
numbers = np.arange(256)
bits = (numbers[:, None] >> (3 * np.arange(8))[None, :])[..., None] >> np.arange(3) & 1
PALETTE = (bits << (7 - np.arange(8))[None, :, None]).sum(1).astype(np.uint8)  # VOC's


def told(name, found):
    """Prints what a reader has made of the mask."""
    found = np.asarray(found).squeeze()
    colours = found[..., :3].astype(float) if found.ndim == 3 else None
    if colours is None:
        text = "ids" if np.array_equal(found, IDS) else " ".join(map(str, found.ravel().tolist()))
    else:
        scale = round(colours.max() / PALETTE[255].max(), 2)
        rgb = colours[..., ::-1] if name.startswith("cv2") else colours
        assert np.allclose(rgb / max(scale, 1 / 255), PALETTE[IDS], atol=1)
        text = f"colours times {scale:g}" if scale > 1 else "colours"
    print(f"{name}: {text}")


mask = Image.frombytes("P", IDS.shape[::-1], IDS.tobytes())
mask.putpalette(PALETTE.tobytes())
for kind in ("png", "tif"):
    file = f"mask.{kind}"
    mask.save(file)
    told(f"PIL {kind}", Image.open(file))
    told(f"cv2, UNCHANGED {kind}", cv2.imread(file, cv2.IMREAD_UNCHANGED))
    told(f"cv2, GRAYSCALE {kind}", cv2.imread(file, cv2.IMREAD_GRAYSCALE))
    told(f"imageio {kind}", imageio.v3.imread(file))
    told(f"scikit-image {kind}", skimage.io.imread(file))
    told(f"matplotlib {kind}", matplotlib.image.imread(file))
    told(f"rasterio {kind}", rasterio.open(file).read(1))
    told(f"SimpleITK {kind}", SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file)))
with open("mask.png", "rb") as file:
    stored = file.read()
for kind in ("pil", "l8"):
    told(f"webdataset, {kind} png", imagehandler(kind)("png", stored))
rows = datasets.Dataset.from_dict({"mask": ["mask.png"]})
for name, feature in (("Image()", datasets.Image()), ('Image(mode="L")', datasets.Image(mode="L"))):
    told(f"datasets, {name} png", rows.cast_column("mask", feature)[0]["mask"])
mask.save("mask.gif")
told("Pillow, a gif", Image.open("mask.gif"))
mask.save("mask.gif", optimize=False)
told("Pillow, a gif with optimize=False", Image.open("mask.gif"))
Image.fromarray(np.array([[0, 5, 7]], np.uint8)).save("grey.gif")
told("Pillow, a gif of grey 0 5 7", Image.open("grey.gif"))
PY
cat seen
diff seen <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$here")
echo "as described"
