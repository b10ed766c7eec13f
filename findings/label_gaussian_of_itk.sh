#!/usr/bin/env bash
# SimpleITK 2.5.7, antspyx 0.6.3: a map of labels, resampled to the grid that it has and to one of half the spacing, by the
# interpolators that are made for labels.
#
# One would guess: an interpolator for labels does what nearest does, with smoother outlines: where nothing is moved each
#   voxel keeps its label, and a small lesion or a thin vessel is as large afterwards as before.
# Behaviour: sitkLabelGaussian, and multiLabel of ANTs, blur each label with a Gaussian of one voxel and take the largest,
#   at the centres of voxels, too. What has less than half of the weight around its own voxels is gone: lesions of up to
#   2x2x2 voxels, vessels and walls one voxel thick, by ANTs vessels of two as well; larger lesions shrink. The blur is
#   counted in voxels of the map, so that a finer grid brings nothing back.
#   - sitkLabelLinear, and genericLabel of ANTs, give on the grid itself what nearest gives, and round off corners on a
#     finer one. The four names do not tell which two these are.
#   - TorchIO 1 takes it as label_interpolation="label_gaussian".
#   (Source: ITK's itkLabelImageGaussianInterpolateImageFunction.h, "for sigma=0, this is just nearest neighbor";
#   SimpleITK's sitkInterpolator.h, "sigma is set to 1.0 input pixels and alpha is 1.0".)
# Output seen (of lesions of 1x1x1, 2x2x2 and 3x3x3 voxels, vessels of 14x1x1 and 14x2x2, a wall of 14x14x1: their voxels
# on the grid itself; on the finer one, where eight count as one):
#   drawn: 1 8 27 14 56 196
#   sitkNearestNeighbor: 1 8 27 14 56 196; 1 8 27 14 56 196
#   sitkLabelLinear: 1 8 27 14 56 196; 0 7 26 13 55 195
#   sitkLabelGaussian: 0 0 19 0 48 0; 0 0 16 0 36 0
#   genericLabel: 1 8 27 14 56 196; 0 7 26 13 55 195
#   multiLabel: 0 0 7 0 0 0; 0 0 4 0 0 0
# Fails if that changes. Installs into a temporary folder (900 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/labels.py" <<'PY'
import ants
import numpy as np
import SimpleITK as sitk

OBJECTS = ((1, 1, 1), (2, 2, 2), (3, 3, 3), (14, 1, 1), (14, 2, 2), (14, 14, 1))


def by_simpleitk(labels, name, finer):
    image = sitk.GetImageFromArray(labels)
    grid = sitk.Image(*[size * finer for size in image.GetSize()], sitk.sitkUInt8)
    grid.SetSpacing([1 / finer] * 3)
    grid.SetOrigin([(1 / finer - 1) / 2] * 3)  # the corners of both grids are in one place
    found = sitk.Resample(image, grid, sitk.Transform(), getattr(sitk, name))
    return sitk.GetArrayFromImage(found).sum() / finer**3


def by_ants(labels, name, finer):
    image = ants.from_numpy(labels.astype(np.float32))
    shape = [size * finer for size in labels.shape]
    grid = ants.from_numpy(
        np.zeros(shape, np.float32), spacing=[1 / finer] * 3, origin=[(1 / finer - 1) / 2] * 3
    )
    found = ants.apply_transforms(fixed=grid, moving=image, transformlist=[], interpolator=name)
    return found.numpy().sum() / finer**3


WAYS = [
    (by_simpleitk, name) for name in ("sitkNearestNeighbor", "sitkLabelLinear", "sitkLabelGaussian")
]
WAYS += [(by_ants, name) for name in ("genericLabel", "multiLabel")]
print(f"drawn: {' '.join(str(np.prod(size)) for size in OBJECTS)}")
for way, name in WAYS:
    found = {1: [], 2: []}
    for size in OBJECTS:
        labels = np.zeros((24, 24, 24), np.uint8)
        labels[tuple(slice(5, 5 + one) for one in size)] = 1
        for finer, row in found.items():
            row.append(f"{way(labels, name, finer):.0f}")
    print(f"{name}: {'; '.join(' '.join(row) for row in found.values())}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q simpleitk==2.5.7 antspyx==0.6.3 numpy
"$folder/env/bin/python" "$folder/labels.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
