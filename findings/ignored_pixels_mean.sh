#!/usr/bin/env bash
# torch 2.14.1, segmentation-models-pytorch 0.6.0, pytorch-toolbelt 0.8.0, kornia 0.9.0, mmsegmentation 1.2.2,
# keras 3.15.1 (on torch), MONAI 1.6.1: the mean of a loss where half of the pixels are ignored, as a pseudo label below
# its threshold is.
#
# One would guess: ignore_index=255 leaves pixels out of the mean, as torch's cross_entropy does, so that the loss of the
#   rest has one value whichever library takes it; and each library has one rule.
# Behaviour: in half of them an ignored pixel counts as a pixel of loss 0. The gradient of an ignored pixel is 0 in all.
#   - torch, keras, mmseg's OHEM and segmentation-models-pytorch's FocalLoss divide by the pixels that are kept;
#     segmentation-models-pytorch's SoftCrossEntropyLoss, both of pytorch-toolbelt, kornia's focal_loss and mmseg's
#     CrossEntropyLoss (unless avg_non_ignore=True) by all. So in one library two losses have two rules.
#   - In supervised training it is a matter of void and padding. With a threshold on pseudo labels it is the method: over
#     all pixels the unsupervised loss grows with the share that passes, as in FixMatch; over those kept it has its full
#     weight from the first sure pixel on, and U2PL's factor (all over kept) acts once or twice.
#   - Where no pixel is kept, as in the first steps, torch and FocalLoss give NaN and the others 0.
#   - MONAI's losses have no ignored class: its one-hot raises on 255.
#   (Source: label_smoothed_nll_loss in segmentation_models_pytorch/losses/_functional.py; focal_loss in
#   kornia/losses/focal.py; cross_entropy in mmseg/models/losses/cross_entropy_loss.py.)
# Output seen (the loss where all pixels count; where half are ignored, of the same losses as the others; where all are):
#   torch cross_entropy: 1.7207 1.7207 nan
#   torch cross_entropy, label_smoothing: 1.7218 1.7218 nan
#   keras SparseCategoricalCrossentropy: 1.7207 1.7207 0.0000
#   segmentation-models-pytorch SoftCrossEntropyLoss: 1.7207 0.8604 0.0000
#   segmentation-models-pytorch FocalLoss: 0.3415 0.3415 nan
#   pytorch-toolbelt SoftCrossEntropyLoss: 1.7207 0.8604 0.0000
#   pytorch-toolbelt CrossEntropyFocalLoss: 0.9876 0.4938 0.0000
#   kornia focal_loss: 0.3105 0.1553 0.0000
#   mmseg CrossEntropyLoss: 1.7207 0.8604 0.0000
#   mmseg CrossEntropyLoss, avg_non_ignore: 1.7207 1.7207 0.0000
#   mmseg OhemCrossEntropy: 1.7273 1.7273 0.0000
#   monai FocalLoss: index 255 is out of bounds for dimension 1 with size 4
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/ignored.py" <<'PY'
import importlib.util
import os
import sys
import types
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import kornia
import monai
import segmentation_models_pytorch.losses as smp
import torch
import torch.nn.functional as F
from pytorch_toolbelt import losses as toolbelt

# mmseg.models as a whole wants mmcv's compiled operations, its losses do not
root = Path(importlib.util.find_spec("mmseg").origin).parent
for name in ("mmseg.models", "mmseg.models.losses"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))]
from mmseg.models.losses.cross_entropy_loss import CrossEntropyLoss
from mmseg.models.losses.ohem_cross_entropy_loss import OhemCrossEntropy

VOID = 255
torch.manual_seed(0)
logits = torch.randn(2, 4, 16, 16)
truth = torch.randint(0, 4, (2, 16, 16))
logits[:, :, 8:], truth[:, 8:] = logits[:, :, :8], truth[:, :8]  # both halves have the same losses
half = truth.clone()
half[:, 8:] = VOID


def of_keras(logits, truth):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=VOID)
    return loss(truth, logits.permute(0, 2, 3, 1))


LOSSES = {
    "torch cross_entropy": lambda x, y: F.cross_entropy(x, y, ignore_index=VOID),
    "torch cross_entropy, label_smoothing": lambda x, y: F.cross_entropy(
        x, y, ignore_index=VOID, label_smoothing=0.1
    ),
    "keras SparseCategoricalCrossentropy": of_keras,
    "segmentation-models-pytorch SoftCrossEntropyLoss": smp.SoftCrossEntropyLoss(
        smooth_factor=0, ignore_index=VOID
    ),
    "segmentation-models-pytorch FocalLoss": smp.FocalLoss("multiclass", ignore_index=VOID),
    "pytorch-toolbelt SoftCrossEntropyLoss": toolbelt.SoftCrossEntropyLoss(ignore_index=VOID),
    "pytorch-toolbelt CrossEntropyFocalLoss": toolbelt.CrossEntropyFocalLoss(ignore_index=VOID),
    "kornia focal_loss": lambda x, y: kornia.losses.focal_loss(
        x, y, alpha=None, reduction="mean", ignore_index=VOID
    ),
    "mmseg CrossEntropyLoss": lambda x, y: CrossEntropyLoss()(x, y, ignore_index=VOID),
    "mmseg CrossEntropyLoss, avg_non_ignore": lambda x, y: CrossEntropyLoss(avg_non_ignore=True)(
        x, y, ignore_index=VOID
    ),
    "mmseg OhemCrossEntropy": OhemCrossEntropy(ignore_label=VOID),
}
for name, loss in LOSSES.items():
    values = [loss(logits, y).item() for y in (truth, half, torch.full_like(truth, VOID))]
    student = logits.clone().requires_grad_()
    loss(student, half).backward()
    assert not student.grad[:, :, 8:].any(), name
    print(f"{name}: {' '.join(f'{value:.4f}' for value in values)}")
try:
    monai.losses.FocalLoss(to_onehot_y=True)(logits, half[:, None])
except RuntimeError as error:
    print(f"monai FocalLoss: {error}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy keras==3.15.1 kornia==0.9.0 monai==1.6.1 \
  segmentation-models-pytorch==0.6.0 pytorch-toolbelt==0.8.0 mmsegmentation==1.2.2 mmcv-lite==2.1.0 \
  mmengine==0.10.7 setuptools
"$folder/env/bin/python" -W ignore "$folder/ignored.py" 2> "$folder/errors" | tee "$folder/seen" ||
  { cat "$folder/errors"; exit 1; }
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
