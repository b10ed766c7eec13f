#!/usr/bin/env bash
# openslide-python 1.4.7 (OpenSlide 4.0.1), tiffslide 3.0.1: squares of a mask and of a picture, read at a reduced level.
#
# One would guess: read_region gives stored pixels of that level, from the one that `location` lies in: ids of a mask, and
#   pictures as sharp at one place as at another.
# Behaviour: `location` is in pixels of level 0 and is divided by the level's downsample. What falls between two pixels of
#   the level is interpolated linearly: a mask gets ids that no pixel has, at each border of classes. The downsample is
#   the ratio of the levels' sizes: where these do not divide evenly it is 3.9961 or 4.0002, not 4, and nearly all
#   squares but those at 0 lie between pixels, on a grid of multiples of 4 as well. Pictures are in their place then, but
#   blurred, one patch more than another.
#   - tiffslide, made as OpenSlide's replacement, interpolates nothing: it begins at the pixel that `location` lies in.
#   - Right for masks: tiffslide or tifffile; level 0; or locations that are whole pixels of the level, if there are any.
#   (Source: openslide.c, read_region; openslide-grid.c, read_tiles hands the fraction to cairo_translate. Asked about in
#   openslide/openslide-python#182, "Artefacts in slide.read_region", of a mask, open since 2022.)
# Output seen (squares of 100 x 100 pixels of level 1 of a mask with the ids 0 and 5; the location of both axes):
#   2048 and 512 pixels wide: downsample 4.0000
#     from 0: openslide 0 5, 0 % no id; tiffslide 0 5
#     from 1024: openslide 0 5, 0 % no id; tiffslide 0 5
#     from 1025: openslide 0 1 2 3 4 5, 12 % no id; tiffslide 0 5
#     from 1026: openslide 0 1 2 3 5, 12 % no id; tiffslide 0 5
#   2046 and 512 pixels wide: downsample 3.9961
#     from 0: openslide 0 5, 0 % no id; tiffslide 0 5
#     from 1024: openslide 0 1 2 3 4 5, 12 % no id; tiffslide 0 5
#   spread of grey levels of a picture, from 1024: 74, 1025: 46, 1026: 37
# Fails if that changes. Installs into a temporary folder (300 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/slide.py" <<'PY'
import sys

import numpy as np
import openslide
import tifffile
import tiffslide

IDS, FACTORS = (0, 5), (1, 4)
rng = np.random.default_rng(0)


def written(picture):
    path = f"{sys.argv[1]}/slide.tif"
    with tifffile.TiffWriter(path) as file:
        for factor in FACTORS:
            level = np.repeat(picture[::factor, ::factor, None], 3, axis=2)
            file.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                subfiletype=int(factor > 1),
            )
    return path


def read(library, path, first, size=100):
    """A square of level 1 that begins at pixel `first` of level 0."""
    with library.open_slide(path) as slide:
        patch = slide.read_region((first, first), 1, (size, size))
    return np.asarray(patch)[..., 0]


blocks = np.kron(rng.choice(IDS, size=(64, 64)), np.ones((32, 32), int)).astype(np.uint8)
noise = rng.integers(0, 256, blocks.shape).astype(np.uint8)
for width, places in ((2048, (0, 1024, 1025, 1026)), (2046, (0, 1024))):
    mask = written(blocks[:width, :width])
    with openslide.OpenSlide(mask) as slide:
        print(f"{slide.dimensions[0]} and {slide.level_dimensions[1][0]} pixels wide:", end=" ")
        print(f"downsample {slide.level_downsamples[1]:.4f}")
    for first in places:
        found = read(openslide, mask, first)
        other = read(tiffslide, mask, first)
        wrong = 100 * (~np.isin(found, IDS)).mean()
        print(f"  from {first}: openslide {' '.join(map(str, np.unique(found)))},", end=" ")
        print(f"{wrong:.0f} % no id; tiffslide {' '.join(map(str, np.unique(other)))}")
path = written(noise)
spread = [f"{first}: {read(openslide, path, first).std():.0f}" for first in (1024, 1025, 1026)]
print(f"spread of grey levels of a picture, from {', '.join(spread)}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q openslide-python==1.4.7 openslide-bin==4.0.1.2 tiffslide==3.0.1 \
  tifffile==2026.3.3 numpy==2.4.6
"$folder/env/bin/python" "$folder/slide.py" "$folder" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
