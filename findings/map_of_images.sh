#!/usr/bin/env bash
# datasets 5.2.0, Pillow 13.0.0: Dataset.map with a function that changes an image in place, or only looks at it.
#
# One would guess: what the function gives back is what is stored, and an image that it leaves alone stays as it is.
# Behaviour: an image that was opened from a file is stored as the path of that file, whatever has happened to its pixels
#   since. What changes a Pillow image in place is lost without a word: ImageDraw, paste, putpixel, thumbnail. The same
#   function works on the same images held in memory (from a Parquet file or the Hub). There, an image that was decoded
#   is encoded anew: a JPEG at Pillow's quality of 75, each map a little worse, even if the function has only read its
#   size.
#   - Right: give back another image (copy, resize, Image.fromarray). It is stored as PNG, without loss.
#   - Kept: map with input_columns without the image, or after cast_column("image", Image(decode=False)), which gives the
#     bytes.
#   - litdata 0.2.76 stores the file of a JPEG that was changed in place, too (streaming/serializers.py, JPEGSerializer).
#   (Source: datasets/features/image.py, encode_pil_image asks for image.filename, image_to_bytes keeps image.format.)
# Output seen:
#   in files, mask drawn on: 1
#   in files, copy of the mask drawn on: 1 255
#   in files, thumbnail: 256 pixels wide
#   in files, JPEG measured once, twice, three times: off by 0.0 0.0 0.0
#   in memory, mask drawn on: 1 255
#   in memory, copy of the mask drawn on: 1 255
#   in memory, thumbnail: 64 pixels wide
#   in memory, JPEG measured once, twice, three times: off by 4.7 5.6 6.5
#   in memory, bytes measured: off by 0.0
# Fails if that changes. Installs into a temporary folder (400 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/mapped.py" <<'PY'
import io
import sys

import datasets
import numpy as np
from PIL import Image, ImageDraw

datasets.disable_progress_bars()
rng = np.random.default_rng(0)
mask_path, photo_path = f"{sys.argv[1]}/mask.png", f"{sys.argv[1]}/photo.jpg"
Image.fromarray(np.ones((192, 256), np.uint8)).save(mask_path)
grain = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
grain.resize((256, 192), Image.Resampling.BICUBIC).save(photo_path, quality=95)


def contents(path):
    with open(path, "rb") as file:
        return {"path": None, "bytes": file.read()}


def made(mask, photo):
    features = datasets.Features({"mask": datasets.Image(), "photo": datasets.Image()})
    return datasets.Dataset.from_dict({"mask": [mask], "photo": [photo]}, features=features)


def ignore_corner(example):
    ImageDraw.Draw(example["mask"]).rectangle((0, 0, 63, 63), fill=255)
    return example


def ignore_corner_of_copy(example):
    return ignore_corner({"mask": example["mask"].copy()})


def made_smaller(example):
    example["photo"].thumbnail((64, 64))
    return example


def measured(example):
    return {"width": example["photo"].width}


def bytes_measured(example):
    return {"width": Image.open(io.BytesIO(example["photo"]["bytes"])).width}


def ids(data):
    return " ".join(str(value) for value in np.unique(data[0]["mask"]))


def pixels(data):
    return np.asarray(data[0]["photo"], float)


places = {
    "in files": made(mask_path, photo_path),
    "in memory": made(contents(mask_path), contents(photo_path)),
}
for place, data in places.items():
    print(f"{place}, mask drawn on: {ids(data.map(ignore_corner))}")
    print(f"{place}, copy of the mask drawn on: {ids(data.map(ignore_corner_of_copy))}")
    print(f"{place}, thumbnail: {data.map(made_smaller)[0]['photo'].width} pixels wide")
    errors, mapped = [], data
    for _ in range(3):
        mapped = mapped.map(measured)
        errors.append(f"{abs(pixels(mapped) - pixels(data)).mean():.1f}")
    print(f"{place}, JPEG measured once, twice, three times: off by {' '.join(errors)}")
data = places["in memory"]
raw = data.cast_column("photo", datasets.Image(decode=False)).map(bytes_measured)
kept = raw.cast_column("photo", datasets.Image())
print(f"in memory, bytes measured: off by {abs(pixels(kept) - pixels(data)).mean():.1f}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q datasets==5.2.0 pillow==13.0.0
"$folder/env/bin/python" "$folder/mapped.py" "$folder" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
