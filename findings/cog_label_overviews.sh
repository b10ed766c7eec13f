#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3): a raster of class ids written as COG, and a reduced read of it.
#
# One would guess: read(out_shape=a quarter, resampling=nearest or mode) picks ids that are there.
# Behaviour: a reduced read takes the overviews of the file, whatever its resampling, and the COG driver
#   has made these by cubic interpolation, as it does for every raster without a colour map: ids appear
#   that no pixel of the raster has, so classes that lie between two others in number. A read at full
#   size, reduced by oneself, is right. (Source: GDAL's COG driver, OVERVIEW_RESAMPLING; its
#   RasterIO.)
# Output seen:
#   ids: [0, 2, 5, 9]
#   nearest: 7 others, mode: 7 others
#   full size, every fourth pixel: [0, 2, 5, 9]
#   a COG with OVERVIEW_RESAMPLING=NEAREST, nearest: 0 others
# Fails if that changes. Installs into a temporary folder (150 MB).
set -euo pipefail
here=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.2.6
cd "$folder"
venv/bin/python - > seen <<'PY'
import numpy as np
import rasterio
from rasterio.enums import Resampling

IDS = [0, 2, 5, 9]
rng = np.random.default_rng(0)
fields = np.zeros((1024, 1024), np.uint8)
for _ in range(60):
    y, x = rng.integers(0, 900, 2)
    fields[y : y + rng.integers(20, 120), x : x + rng.integers(20, 120)] = rng.choice(IDS[1:])
grid = dict(driver="COG", height=1024, width=1024, count=1, dtype="uint8", crs="EPSG:32633")
grid["transform"] = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)


def others(path, resampling):
    """Returns how many ids a read at a quarter has that the raster has not."""
    with rasterio.open(path) as file:
        assert set(np.unique(file.read(1))) == set(IDS)
        small = file.read(1, out_shape=(256, 256), resampling=resampling)
    return len(set(np.unique(small)) - set(IDS))


with rasterio.open("labels.tif", "w", **grid) as file:
    file.write(fields, 1)
with rasterio.open("nearest.tif", "w", overview_resampling="NEAREST", **grid) as file:
    file.write(fields, 1)
print("ids:", np.unique(fields).tolist())
found = [others("labels.tif", kind) for kind in (Resampling.nearest, Resampling.mode)]
print("nearest: {} others, mode: {} others".format(*found))
print("full size, every fourth pixel:", np.unique(fields[::4, ::4]).tolist())
left = others("nearest.tif", Resampling.nearest)
print(f"a COG with OVERVIEW_RESAMPLING=NEAREST, nearest: {left} others")
PY
cat seen
diff seen <(sed -n '/^# Output seen:/,/^# Fails/s/^#   //p' "$here")
echo "as described"
