#!/usr/bin/env bash
# torchmetrics 1.9.0 (torch 2.14.1): two metrics of one kind in a MetricCollection, mIoU with and without a class, and the
# accuracy of pseudo labels above two thresholds.
#
# One would guess: each metric of a collection is computed as if it stood alone; that some share their counts
#   (compute_groups, on by default) is decided by what they count.
# Behaviour: it is decided by the numbers after the first batch. If these are equal, one of the two (the first by name) is
#   updated from then on, and its counts are the other's: a first batch without background, or of sure predictions alone,
#   makes one of two metrics wrong for good. reset() does not undo it: a sanity check before training decides for a run.
#   - compute_groups=False, or a list of groups, is what one would guess; single metrics are right.
#   (Source: torchmetrics/collections.py, _merge_compute_groups; known in part as torchmetrics' issue 2596.)
# Output seen (in a collection; alone):
#   mIoU of all classes: 0.640 0.640
#   mIoU without class 0, first batch lacks it: 0.642 0.665
#   mIoU without class 0, first batch has it: 0.664 0.664
#   IoU at threshold 0.5, first batch is sure: 0.371 0.667
#   IoU at threshold 0.5, after reset() and batches that are not: 0.048 0.495
#   IoU at threshold 0.5, these batches alone: 0.499 0.499
#   IoU at threshold 0.5, compute_groups=False: 0.667 0.667
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/groups.py" <<'PY'
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryJaccardIndex, MulticlassJaccardIndex

C = 4
SHAPE = (1, 64, 64)


def maps(lowest):
    """A prediction that is right at 3 of 4 pixels, and the truth, of the classes from lowest on."""
    truth = torch.randint(lowest, C, SHAPE)
    other = torch.randint(lowest, C, SHAPE)
    return torch.where(torch.rand(SHAPE) < 0.7, truth, other), truth


def probabilities(sure):
    """Of a thing, at half of the pixels: all above 0.96, or from 0 to 1."""
    truth = torch.randint(0, 2, SHAPE)
    of_thing = 0.96 + 0.04 * torch.rand(SHAPE) if sure else torch.rand(SHAPE)
    return torch.where(truth == 1, of_thing, 0.3 * torch.rand(SHAPE)), truth


def scores(make, batches, restart=None, **options):
    """Returns {name: (score in the collection, alone)}."""
    torch.manual_seed(0)
    together = MetricCollection(make(), **options)
    alone = make()
    for number, (draw, how) in enumerate(batches):
        if number == restart:
            together.reset()
            for metric in alone.values():
                metric.reset()
        batch = draw(how)
        together.update(*batch)
        for metric in alone.values():
            metric.update(*batch)
    found = together.compute()
    return {name: (float(found[name]), float(alone[name].compute())) for name in alone}


def show(what, pair):
    print(f"{what}: {pair[0]:.3f} {pair[1]:.3f}")


def classes():
    return {"all": MulticlassJaccardIndex(C), "things": MulticlassJaccardIndex(C, ignore_index=0)}


def thresholds():
    return {"low": BinaryJaccardIndex(0.5), "high": BinaryJaccardIndex(0.95)}


found = scores(classes, [(maps, 1), (maps, 0), (maps, 0)])
show("mIoU of all classes", found["all"])
show("mIoU without class 0, first batch lacks it", found["things"])
found = scores(classes, [(maps, 0), (maps, 0)])
show("mIoU without class 0, first batch has it", found["things"])
mixed = [(probabilities, True), (probabilities, False), (probabilities, False)]
found = scores(thresholds, mixed)
show("IoU at threshold 0.5, first batch is sure", found["low"])
found = scores(thresholds, mixed, restart=1)
show("IoU at threshold 0.5, after reset() and batches that are not", found["low"])
found = scores(thresholds, mixed[1:])
show("IoU at threshold 0.5, these batches alone", found["low"])
found = scores(thresholds, mixed, compute_groups=False)
show("IoU at threshold 0.5, compute_groups=False", found["low"])
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchmetrics==1.9.0
"$folder/env/bin/python" "$folder/groups.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
