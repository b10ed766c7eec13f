#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3) and rioxarray 0.19.0 on a Python before 3.12, rasterio 1.5.2 (GDAL 3.12.2) and rioxarray
# 0.23.0 from there on: a raster of the ids 0, 1, 2 and 255, which declares no nodata,
# warped to a grid whose pixels are twice as large.
#
# One would guess: `nearest` and `mode` pick ids that are there; dst_nodata names the value of pixels that no source pixel
#   reaches, and changes no other.
# Behaviour: GDAL keeps valid pixels apart from dst_nodata: one that has this value, and is not declared as nodata in the
#   source, gets the value next to it. By rasterio 1.5.2 dst_nodata=0 makes all background class 1, and dst_nodata=255
#   makes what is 255, which a loss ignores, class 254, whatever the resampling; 1.4.4 does the latter but for `nearest`.
#   - rioxarray's reproject, and so its reproject_match, hands over 255 for any uint8 array without nodata: 255 becomes 254
#     by default. The same script changed its masks with the update, as `nearest` is the usual choice for them.
#   - GDAL warns since 3.11, but rasterio passes that to a logger, which shows nothing unless logging is set up.
#   - As meant: the same value as src_nodata, or write_nodata(255) before rioxarray's reproject; or no nodata in reproject().
#   (Source: GDAL's alg/gdalwarpkernel.cpp and its issue 11711; rioxarray/raster_array.py, _get_dst_nodata.)
# Output seen (ids by nearest; by mode):
#   1.4.4, reproject: 0 1 2 255; 0 1 2 255
#   1.4.4, reproject, dst_nodata=0: 0 1 2 255; 0 1 2 255
#   1.4.4, reproject, dst_nodata=255: 0 1 2 255; 0 1 2 254
#   1.4.4, reproject, src_nodata=255 dst_nodata=255: 0 1 2 255; 0 1 2 255
#   1.4.4, rioxarray: 0 1 2 255; 0 1 2 254
#   1.4.4, rioxarray, write_nodata(255): 0 1 2 255; 0 1 2 255
#   1.5.2, reproject: 0 1 2 255; 0 1 2 255
#   1.5.2, reproject, dst_nodata=0: 1 1 2 255; 1 1 2 255
#   1.5.2, reproject, dst_nodata=255: 0 1 2 254; 0 1 2 254
#   1.5.2, reproject, src_nodata=255 dst_nodata=255: 0 1 2 255; 0 1 2 255
#   1.5.2, rioxarray: 0 1 2 254; 0 1 2 254
#   1.5.2, rioxarray, write_nodata(255): 0 1 2 255; 0 1 2 255
# Fails if that changes. Installs into a temporary folder (350 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/warp.py" <<'PY'
import numpy as np
import rasterio
import rioxarray  # noqa: F401
import xarray as xr
from rasterio.transform import from_origin
from rasterio.warp import Resampling, reproject

CRS = "EPSG:32633"
FINE, COARSE = (from_origin(500000, 5000000, size, size) for size in (10, 20))
METHODS = (Resampling.nearest, Resampling.mode)
ids = np.array([[0, 1], [2, 255]], np.uint8).repeat(30, 0).repeat(30, 1)
centres = {"y": 4999995 - 10.0 * np.arange(60), "x": 500005 + 10.0 * np.arange(60)}
array = xr.DataArray(ids, dims=("y", "x"), coords=centres).rio.write_crs(CRS)


def warped(method, **nodata):
    grids = {"src_transform": FINE, "src_crs": CRS, "dst_transform": COARSE, "dst_crs": CRS}
    return reproject(ids, np.zeros((30, 30), np.uint8), resampling=method, **grids, **nodata)[0]


def by_rioxarray(method, nodata=None):
    one = array if nodata is None else array.rio.write_nodata(nodata)
    return one.rio.reproject(CRS, transform=COARSE, shape=(30, 30), resampling=method).values


def show(name, function, **arguments):
    """What stands in the middle of each quarter, where 0, 1, 2 and 255 stood."""
    found = [function(method, **arguments)[8::15, 8::15].ravel() for method in METHODS]
    rows = [" ".join(str(value) for value in row) for row in found]
    print(f"{rasterio.__version__}, {name}: {'; '.join(rows)}")


show("reproject", warped)
for nodata in (
    {"dst_nodata": 0},
    {"dst_nodata": 255},
    {"src_nodata": 255, "dst_nodata": 255},
):
    show(f"reproject, {' '.join(f'{k}={v}' for k, v in nodata.items())}", warped, **nodata)
show("rioxarray", by_rioxarray)
show("rioxarray, write_nodata(255)", by_rioxarray, nodata=255)
PY
if python3 -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
  packages=(rasterio==1.4.4 rioxarray==0.19.0) version=1.4.4
else
  packages=(rasterio==1.5.2 rioxarray==0.23.0) version=1.5.2
fi
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "${packages[@]}" numpy xarray
"$folder/env/bin/python" "$folder/warp.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0" | grep "^$version")
