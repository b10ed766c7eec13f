#!/usr/bin/env bash
# torchmetrics 1.9.0 (torch 2.14.1): the score of a map of a foreground's probability, of which some value is a little
# above 1 or below 0.
#
# One would guess: a probability of 1.0000001 is one of 1, at threshold 0.5; and a pixel that is ignored has no say.
# Behaviour: where one value of a batch is outside 0..1 the binary and multilabel metrics take the batch for logits and
#   the sigmoid of its values for the probabilities. Of what is above 0 that is above 0.5: all pixels are foreground.
#   Nothing says so. The texts tell of logits, not that rounding makes them of probabilities.
#   - Such values come from bicubic resizing, from classes of a softmax added up, from the mean of ten networks that are
#     all sure. One pixel is enough. F1 and accuracy ask an ignored one too, IoU leaves those out before it asks.
#   - Each batch is judged by itself, so the score of a data set falls by those batches that have such a pixel.
#   - The other way round a batch of logits that all lie within 0..1 is cut at 0.5, not at 0.
#   - So: clamp(0, 1), or hand over pred > 0.5, as what is not of a floating type is taken as it is.
#   (Source: normalize_logits_if_needed in torchmetrics/utilities/compute.py and its call in _binary_stat_scores_format.
#   Of logits within 0..1 it is known as torchmetrics' issues 1604, open, and 3269.)
# Output seen (the map's largest value less 1; its score; that of the map clamped; of pred > 0.5):
#   bilinear, IoU: -1e-02, 1.00, 1.00, 1.00
#   bicubic, IoU: +2e-01, 0.10, 1.00, 1.00
#   sum of a softmax, IoU: +2e-07, 0.10, 1.00, 1.00
#   mean of ten, IoU: +1e-07, 0.10, 1.00, 1.00
#   mean of ten, IoU of several labels: +1e-07, 0.10, 1.00, 1.00
#   one ignored pixel, IoU: +1e-07, 1.00, 1.00, 1.00
#   one ignored pixel, F1: +1e-07, 0.18, 1.00, 1.00
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/iou.py" <<'PY'
import torch
import torch.nn.functional as F
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex, MultilabelJaccardIndex

truth = torch.zeros(2, 64, 64, dtype=torch.long)
truth[:, 10:30, 10:30] = 1
sure = torch.where(truth == 1, 1.0, 0.01)
small = F.interpolate(truth[:, None].float(), (32, 32), mode="area") * 0.98 + 0.01


def larger(mode):
    return F.interpolate(small, (64, 64), mode=mode)[:, 0]


def of_softmax():
    """Eight classes: all but the first are foreground."""
    scores = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    scores[:, 0] += 14.0 * (1 - truth)
    scores[:, 1] += 14.0 * truth
    return scores.softmax(1)[:, 1:].sum(1)


def of_ten():
    return sum(sure * 0.1 for _ in range(10))


ignored = truth.clone()
ignored[0, 0, 0] = 255
with_one = sure.clone()
with_one[0, 0, 0] = 1 + 2**-23
both = torch.stack([truth, truth], 1)
CASES = {
    "bilinear, IoU": (BinaryJaccardIndex(), larger("bilinear"), truth),
    "bicubic, IoU": (BinaryJaccardIndex(), larger("bicubic"), truth),
    "sum of a softmax, IoU": (BinaryJaccardIndex(), of_softmax(), truth),
    "mean of ten, IoU": (BinaryJaccardIndex(), of_ten(), truth),
    "mean of ten, IoU of several labels": (MultilabelJaccardIndex(2), torch.stack([of_ten()] * 2, 1), both),
    "one ignored pixel, IoU": (BinaryJaccardIndex(ignore_index=255), with_one, ignored),
    "one ignored pixel, F1": (BinaryF1Score(ignore_index=255), with_one, ignored),
}
for name, (metric, pred, target) in CASES.items():
    scores = ", ".join(f"{float(metric(x, target)):.2f}" for x in (pred, pred.clamp(0, 1), pred > 0.5))
    print(f"{name}: {float(pred.max()) - 1:+.0e}, {scores}")

few = torch.where(truth == 1, 0.4, 0.1)  # logits of foreground everywhere
assert BinaryJaccardIndex()(few, truth) == 0
assert BinaryJaccardIndex()(few - 1, truth) == 0 and BinaryJaccardIndex()(few + 1, truth) > 0
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 numpy==2.4.6 torchmetrics==1.9.0
"$folder/env/bin/python" -W error "$folder/iou.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
