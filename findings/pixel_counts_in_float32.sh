#!/usr/bin/env bash
# torch 2.14.1, segmentation-models-pytorch 0.6.0, mmsegmentation 1.2.2, torchmetrics 1.9.0: the pixels of one large
# image, or of many images, counted on a CPU.
#
# One would guess: a count of pixels is a whole number, and a sum of ones in float32 is right to seven digits.
# Behaviour: torch's histc, scatter_add_, index_add_, index_put_(accumulate=True) and bincount with weights add one
#   value after the other in the type of their input. A count in float32 stops at 2^24 = 16,777,216, as the next number
#   is two further; index_add_ in bf16 stops at 256. sum, which adds in parts, is right. Nothing says so.
#   - segmentation-models-pytorch's get_stats and mmseg's IoUMetric count the pixels of an image by histc of float32.
#     Beyond 2^24 pixels (4096x4096) of one class its hits are all its pixels: below, IoU 1 where it is 0.89.
#   - Where histc shares out its work each thread counts to 2^24: with two it is right here. torchrun sets one thread
#     where it starts several processes.
#   - torchmetrics' calibration errors add up the confidences of all pixels so. From two million pixels on, which is
#     one image of Cityscapes, those near 1 are rounded to 1; beyond 2^24 in a bin the network is calibrated perfectly.
#   - Right: bincount without weights; int64 or float64 to add in; stats of tiles, added up; binary_calibration_error of
#     float64. The multiclass one makes float32 of that.
#   (Source: _get_stats_multiclass in segmentation_models_pytorch/metrics/functional.py; intersect_and_union in
#   mmseg/evaluation/metrics/iou_metric.py; _binning_bucketize in torchmetrics/functional/classification/
#   calibration_error.py.)
# Output seen (20 million ones; an image of 5000x5000 of two classes, where 2.5 million pixels of the first are missed;
# confidences from 0.94 to 1, of which 90 % are right):
#   histc: 16777216
#   histc, two threads: 20000000
#   histc, float64: 20000000
#   scatter_add_: 16777216
#   index_add_: 16777216
#   index_add_, bf16: 256
#   index_put_, accumulate: 16777216
#   bincount, weights: 16777216
#   bincount: 20000000
#   sum: 20000000
#   IoU by hand: 0.889 0.500
#   get_stats: 1.000 0.500
#   get_stats of ten tiles, added up: 0.889 0.500
#   IoUMetric: 1.000 0.500
#   calibration error of 1 million pixels: 0.070, in float64 0.070
#   calibration error of 2 million pixels: 0.084, in float64 0.070
#   calibration error of 8 million pixels: 0.096, in float64 0.070
#   calibration error of 20 million pixels: 0.000, in float64 0.070
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/counts.py" <<'PY'
import torch
from mmseg.evaluation.metrics.iou_metric import IoUMetric
from segmentation_models_pytorch.metrics import get_stats
from torchmetrics.functional.classification import binary_calibration_error

torch.set_num_threads(1)
PIXELS = 20_000_000
ones, places = torch.ones(PIXELS), torch.zeros(PIXELS, dtype=torch.long)


def say(name, counts):
    print(f"{name}: {int(counts.max())}")


def into(dtype=torch.float32):
    return torch.zeros(2, dtype=dtype)


say("histc", torch.histc(ones, 2, 0, 1))
torch.set_num_threads(2)
say("histc, two threads", torch.histc(ones, 2, 0, 1))
torch.set_num_threads(1)
say("histc, float64", torch.histc(ones.double(), 2, 0, 1))
say("scatter_add_", into().scatter_add_(0, places, ones))
say("index_add_", into().index_add_(0, places, ones))
say("index_add_, bf16", into(torch.bfloat16).index_add_(0, places, ones.bfloat16()))
say("index_put_, accumulate", into().index_put_((places,), ones, accumulate=True))
say("bincount, weights", torch.bincount(places, weights=ones))
say("bincount", torch.bincount(places))
say("sum", ones.sum())
del ones, places

truth = torch.zeros(1, 5000, 5000, dtype=torch.long)
truth[:, :500] = 1
pred = truth.clone()
pred[:, 500:1000] = 1


def show(name, hits, unions):
    print(f"{name}:", " ".join(f"{hit / union:.3f}" for hit, union in zip(hits, unions)))


def of_stats(name, stats):
    hits, wrong, missed, _ = (counts.sum(0).tolist() for counts in stats)
    show(name, hits, [sum(counts) for counts in zip(hits, wrong, missed)])


matrix = torch.bincount((2 * truth + pred).flatten(), minlength=4).view(2, 2)
show("IoU by hand", matrix.diag().tolist(), (matrix.sum(0) + matrix.sum(1) - matrix.diag()).tolist())
of_stats("get_stats", get_stats(pred, truth, mode="multiclass", num_classes=2))
tiles = [x.view(10, 500, 5000) for x in (pred, truth)]
of_stats("get_stats of ten tiles, added up", get_stats(*tiles, mode="multiclass", num_classes=2))
hits, unions, _, _ = IoUMetric.intersect_and_union(pred[0], truth[0], 2, 255)
show("IoUMetric", hits.tolist(), unions.tolist())

draw = torch.Generator().manual_seed(0)
confidence = torch.rand(PIXELS, generator=draw) * 0.06 + 0.94
right = (torch.rand(PIXELS, generator=draw) < 0.9).long()
for millions in (1, 2, 8, 20):
    seen = slice(millions * 1_000_000)
    error = binary_calibration_error(confidence[seen], right[seen])
    exact = binary_calibration_error(confidence[seen].double(), right[seen])
    print(f"calibration error of {millions} million pixels: {error:.3f}, in float64 {exact:.3f}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 torchmetrics==1.9.0 \
  segmentation-models-pytorch==0.6.0 mmsegmentation==1.2.2 mmcv-lite==2.1.0 mmengine==0.10.7 ftfy regex setuptools
"$folder/env/bin/python" -W ignore "$folder/counts.py" 2> "$folder/errors" | tee "$folder/seen" ||
  { cat "$folder/errors"; exit 1; }
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
