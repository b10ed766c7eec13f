#!/usr/bin/env bash
# nibabel 5.4.2: a map of classes 0, 1, 2, as float, saved with the header's type uint8.
#
# One would guess: 0, 1 and 2 fit into uint8, so the file holds 0, 1, 2, and get_fdata().astype(uint8)
#   gives them back.
# Behaviour: floats that go into an integer type are stretched over all of it: the file holds 0, 127,
#   255 and a slope of 2/255, class 1 reads back as 0.996, and astype cuts that to 0. Whether a class
#   survives depends on the largest one: with 3 classes more than 0 none is lost, with 4 two are. The
#   same array as int16 goes in as it is. (Source: nibabel/arraywriters.py, SlopeArrayWriter.)
# Output seen:
#   largest class 2: slope 0.0078, lost [1]
#   largest class 3: slope 0.0118, lost []
#   largest class 4: slope 0.0157, lost [2, 3]
#   largest class 13: slope 0.0510, lost [2, 4, 5, 7, 10, 12]
#   as int16, largest class 13: slope 1.0000, lost []
# np.rint first gives every class back. Fails if that changes. Installs into a temporary folder (100 MB).
set -euo pipefail
here=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q nibabel==5.4.2 numpy==2.2.6
cd "$folder"
venv/bin/python - > seen <<'PY'
import nibabel
import numpy as np


def saved(values):
    """Returns the slope of a file of uint8 with these classes, and which astype loses."""
    image = nibabel.Nifti1Image(values.reshape(-1, 1, 1), np.eye(4))
    image.set_data_dtype(np.uint8)
    nibabel.save(image, "labels.nii.gz")
    again = nibabel.load("labels.nii.gz")
    assert again.get_data_dtype() == np.uint8
    read = again.get_fdata().ravel()
    assert (np.rint(read) == values).all()
    return again.dataobj.slope, np.flatnonzero(read.astype(np.uint8) != values).tolist()


for largest in (2, 3, 4, 13):
    slope, lost = saved(np.arange(largest + 1, dtype=np.float32))
    print(f"largest class {largest}: slope {slope:.4f}, lost {lost}")
slope, lost = saved(np.arange(14, dtype=np.int16))
print(f"as int16, largest class 13: slope {slope:.4f}, lost {lost}")
PY
cat seen
diff seen <(sed -n 's/^#   \(.*: slope .*\)/\1/p' "$here")
echo "as described"
