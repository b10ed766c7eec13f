#!/usr/bin/env bash
# rasterio 1.4.4, rioxarray 0.19.0: overlapping tiles of predicted classes, of which 0 is background, merged to one map.
#
# One would guess: merge(method="first") takes the first tile where tiles overlap, so it is method="last" of the tiles in
#   reverse; "min" is the smaller of two ids. The files declare no nodata, so all pixels are valid.
# Behaviour: merge asks its own canvas, not the tiles, whether a pixel is still free, and it is where it has the value of
#   nodata, which is 0 where nobody declared one. Background of the first tile is no answer then: any class that a later
#   tile says there is put in. "first" has the foreground of all tiles, each tile's false positives stay, and "min" of 0
#   and 2 is 2.
#   - "first" is the default, and rioxarray's merge_arrays hands it on. "last" is right, as it never asks.
#   - As meant: merge(..., nodata=255), or 255 declared in the files, if 255 is no class; what no tile covers is 255 then.
#   - rasterio 1.5.2 and rioxarray 0.23.0, for Python 3.12, do the same.
#   (Source: rasterio/merge.py, region_mask and "Set nodataval to 0"; its documentation calls "first" reverse painting.)
# Output seen, where both tiles are:
#   first tile: 0 0 0 0 1 1 1 1
#   second tile: 0 2 3 2 0 2 3 2
#   merge: 0 2 3 2 1 1 1 1
#   merge, last, tiles in reverse: 0 0 0 0 1 1 1 1
#   merge, min: 0 2 3 2 0 1 1 1
#   merge, nodata=255: 0 0 0 0 1 1 1 1
#   merge, min, nodata=255: 0 0 0 0 0 1 1 1
#   merge, 255 declared in the files: 0 0 0 0 1 1 1 1
#   rioxarray: 0 2 3 2 1 1 1 1
#   rioxarray, nodata=255: 0 0 0 0 1 1 1 1
# Fails if that changes. Installs into a temporary folder (350 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/tiles.py" <<'PY'
import numpy as np
import rioxarray
from rasterio.io import MemoryFile
from rasterio.merge import merge
from rasterio.transform import from_origin
from rioxarray.merge import merge_arrays

SIZE, SHIFT = 16, 8  # the second tile begins in the middle of the first
first, second = np.zeros((2, SIZE, SIZE), np.uint8)
first[:, SHIFT:] = [0, 0, 0, 0, 1, 1, 1, 1]
second[:, :SHIFT] = [0, 2, 3, 2, 0, 2, 3, 2]


def written(ids, column, nodata=None):
    grid = from_origin(500000 + column, 5000000, 1, 1)
    like = {"driver": "GTiff", "height": SIZE, "width": SIZE, "count": 1, "dtype": "uint8"}
    file = MemoryFile()
    with file.open(**like, crs="EPSG:32633", transform=grid, nodata=nodata) as raster:
        raster.write(ids, 1)
    return file


def show(name, row):
    print(f"{name}: {' '.join(str(value) for value in row)}")


files = written(first, 0), written(second, SHIFT)
tiles = [file.open() for file in files]
declared_files = written(first, 0, 255), written(second, SHIFT, 255)
declared = [file.open() for file in declared_files]
arrays = [rioxarray.open_rasterio(tile) for tile in tiles]
both = (0, 5, slice(SHIFT, SIZE))
show("first tile", first[5, SHIFT:])
show("second tile", second[5, :SHIFT])
show("merge", merge(tiles)[0][both])
show("merge, last, tiles in reverse", merge(tiles[::-1], method="last")[0][both])
show("merge, min", merge(tiles, method="min")[0][both])
show("merge, nodata=255", merge(tiles, nodata=255)[0][both])
show("merge, min, nodata=255", merge(tiles, nodata=255, method="min")[0][both])
show("merge, 255 declared in the files", merge(declared)[0][both])
show("rioxarray", merge_arrays(arrays).values[both])
show("rioxarray, nodata=255", merge_arrays(arrays, nodata=255).values[both])
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q rasterio==1.4.4 rioxarray==0.19.0 numpy
"$folder/env/bin/python" "$folder/tiles.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
