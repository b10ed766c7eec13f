#!/usr/bin/env bash
# albumentations 1.4.24 and 2.0.8 and its successor albumentationsx 2.5.1 (imported under the same name): the padding of a
# mask, asked to be 255 as many a repository of this field writes it.
#
# One would guess: an argument that a library no longer has is a TypeError, so that mask_value=255 gives 255 or an end; and
#   what pads, left at its defaults, does so in one way over versions.
# Behaviour: from 2.0 on arguments that a transform does not know are dropped with a UserWarning, at the building of the
#   pipeline, where loaders and progress bars hide it: padding is class 0 then, and is learned as such.
#   - 1.4.24 warns too, that the name is deprecated, and still obeys. The new names are fill and fill_mask (in 1.4.24 as
#     well); they alone give 255 in all three.
#   - The defaults changed: padding and rotation mirrored image and mask up to 1.4, so each pixel had its class; from 2.0
#     on they fill both with 0. Affine always did, so did RandomCrop's pad_if_needed.
#   (Source: BaseTransformInitSchema and apply_to_mask in albumentations/core; each transform's default of border_mode.)
# Output seen (a mask of class 3 alone; what is in it afterwards, and whether a word was said):
#   1.4.24 PadIfNeeded mask_value=255: 3 and 255, a warning
#   1.4.24 PadIfNeeded fill_mask=255: 3 and 255
#   1.4.24 PadIfNeeded: 3
#   1.4.24 Rotate mask_value=255: 3 and 255, a warning
#   1.4.24 Rotate: 3
#   1.4.24 Affine cval_mask=255: 3 and 255, a warning
#   1.4.24 Affine: 0 and 3
#   1.4.24 RandomCrop pad_if_needed: 0 and 3
#   2.0.8 PadIfNeeded mask_value=255: 0 and 3, a warning
#   2.0.8 PadIfNeeded fill_mask=255: 3 and 255
#   2.0.8 PadIfNeeded: 0 and 3
#   2.0.8 Rotate mask_value=255: 0 and 3, a warning
#   2.0.8 Rotate: 0 and 3
#   2.0.8 Affine cval_mask=255: 0 and 3, a warning
#   2.0.8 Affine: 0 and 3
#   2.0.8 RandomCrop pad_if_needed: 0 and 3
#   2.5.1 PadIfNeeded mask_value=255: 0 and 3, a warning
#   2.5.1 PadIfNeeded fill_mask=255: 3 and 255
#   2.5.1 PadIfNeeded: 0 and 3
#   2.5.1 Rotate mask_value=255: 0 and 3, a warning
#   2.5.1 Rotate: 0 and 3
#   2.5.1 Affine cval_mask=255: 0 and 3, a warning
#   2.5.1 Affine: 0 and 3
#   2.5.1 RandomCrop pad_if_needed: 0 and 3
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/padding.py" <<'PY'
import warnings

import albumentations as A
import numpy as np

image, mask = np.full((20, 20, 3), 100, np.uint8), np.full((20, 20), 3, np.uint8)
CONSTANT = {"border_mode": 0}
TRANSFORMS = {
    "PadIfNeeded mask_value=255": (A.PadIfNeeded, (32, 32), CONSTANT | {"value": 0, "mask_value": 255}),
    "PadIfNeeded fill_mask=255": (A.PadIfNeeded, (32, 32), CONSTANT | {"fill": 0, "fill_mask": 255}),
    "PadIfNeeded": (A.PadIfNeeded, (32, 32), {}),
    "Rotate mask_value=255": (A.Rotate, ((45, 45),), CONSTANT | {"value": 0, "mask_value": 255, "p": 1}),
    "Rotate": (A.Rotate, ((45, 45),), {"p": 1}),
    "Affine cval_mask=255": (A.Affine, ((0.5, 0.5),), {"cval": 0, "cval_mask": 255, "p": 1}),
    "Affine": (A.Affine, ((0.5, 0.5),), {"p": 1}),
    "RandomCrop pad_if_needed": (A.RandomCrop, (32, 32), {"pad_if_needed": True}),
}
for name, (make, sizes, words) in TRANSFORMS.items():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = A.Compose([make(*sizes, **words)])(image=image, mask=mask)["mask"]
    classes = " and ".join(map(str, np.unique(made)))
    print(f"{A.__version__} {name}: {classes}{', a warning' if said else ''}")
PY
for packages in albumentations==1.4.24 albumentations==2.0.8 "albumentationsx==2.5.1 torch==2.14.1"; do
  rm -rf "$folder/env"
  python3 -m venv "$folder/env"
  # shellcheck disable=SC2086
  "$folder/env/bin/pip" install -q $packages opencv-python-headless==5.0.0.93
  NO_ALBUMENTATIONS_UPDATE=1 "$folder/env/bin/python" "$folder/padding.py" 2> "$folder/errors" ||
    { cat "$folder/errors" >&2; exit 1; }
done | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
