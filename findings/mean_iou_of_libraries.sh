#!/usr/bin/env bash
# torchmetrics 1.9.0, MONAI 1.6.1, segmentation-models-pytorch 0.6.0: "mean IoU" of the same pixels.
#
# One would guess: mean IoU is one number, that of the papers (counts summed over all images, IoU of each
#   class, mean over classes), whatever library prints it; and a library's mean is the mean of the
#   values that it gives per class.
# Behaviour: on two images of 8 pixels, 4 classes of which the last occurs nowhere, eight numbers from 0.36 to
#   0.86. torchmetrics.segmentation.MeanIoU and MONAI's MeanIoU average image by image (classes of an
#   image, then images), MulticlassJaccardIndex as the papers. MeanIoU(per_class=True) averages each class
#   over the images that have it, so that its own mean is another number than MeanIoU(). What is absent
#   is left out (torchmetrics, MONAI), counted as right (smp: zero_division=1.0 by default; MONAI with
#   ignore_empty=False) or as wrong (smp with zero_division=0; MONAI's mean_batch puts 0 in its place).
#   (Source: the metric classes of the three packages.)
# Output seen:
#   the papers: 0.6709, absent class as 0: 0.5032
#   torchmetrics MulticlassJaccardIndex: 0.6709
#   torchmetrics MeanIoU: 0.7143
#   torchmetrics MeanIoU per_class: 0.8452 0.6667 0.5000 -1.0000, mean of those present 0.6706
#   MONAI MeanIoU: 0.7143
#   MONAI MeanIoU ignore_empty=False: 0.8571
#   MONAI MeanIoU mean_batch: 0.8452 0.6667 0.5000 0.0000
#   smp iou_score micro: 0.7778, zero_division=0: 0.7778
#   smp iou_score macro: 0.7532, zero_division=0: 0.5032
#   smp iou_score macro-imagewise: 0.8571, zero_division=0: 0.3571
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/scores.py" <<'PY'
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from monai.metrics import MeanIoU as OfImages
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

C = 4
truth = torch.tensor([[[0, 0, 0, 0], [0, 0, 1, 1]], [[0, 0, 0, 0], [0, 0, 0, 2]]])
pred = torch.tensor([[[0, 0, 0, 1], [0, 0, 1, 1]], [[0, 0, 0, 0], [0, 0, 2, 2]]])


def say(name, values):
    print(f"{name}:", " ".join(f"{float(v):.4f}" for v in torch.as_tensor(values).flatten()))


matrix = torch.bincount((C * truth + pred).flatten(), minlength=C * C).view(C, C)
hit = matrix.diag()
union = matrix.sum(0) + matrix.sum(1) - hit
iou = hit[union > 0] / union[union > 0]
print(f"the papers: {iou.mean():.4f}, absent class as 0: {iou.sum() / C:.4f}")

say("torchmetrics MulticlassJaccardIndex", MulticlassJaccardIndex(C)(pred, truth))
say("torchmetrics MeanIoU", MeanIoU(C, input_format="index")(pred, truth))
each = MeanIoU(C, per_class=True, input_format="index")(pred, truth)
numbers = " ".join(f"{v:.4f}" for v in each.tolist())
mean = each[each >= 0].mean()
print(f"torchmetrics MeanIoU per_class: {numbers}, mean of those present {mean:.4f}")

hot = [F.one_hot(x, C).movedim(-1, 1) for x in (pred, truth)]
for words, flags in (
    ("", {}),
    (" ignore_empty=False", {"ignore_empty": False}),
    (" mean_batch", {"reduction": "mean_batch"}),
):
    metric = OfImages(**flags)
    metric(*hot)
    say(f"MONAI MeanIoU{words}", metric.aggregate())

counts = smp.metrics.get_stats(pred, truth, mode="multiclass", num_classes=C)
for reduction in ("micro", "macro", "macro-imagewise"):
    one = smp.metrics.iou_score(*counts, reduction=reduction)
    nothing = smp.metrics.iou_score(*counts, reduction=reduction, zero_division=0)
    print(f"smp iou_score {reduction}: {one:.4f}, zero_division=0: {nothing:.4f}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy torchmetrics==1.9.0 \
  monai==1.6.1 segmentation-models-pytorch==0.6.0
"$folder/env/bin/python" "$folder/scores.py" 2> "$folder/errors" | tee "$folder/seen" ||
  { cat "$folder/errors"; exit 1; }
diff "$folder/seen" <(sed -n 's/^#   \(\(the papers\|torchmetrics\|MONAI\|smp\).*: [0-9].*\)/\1/p' "$0")
