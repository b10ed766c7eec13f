#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.14.1): the image processors of Mask2Former, MaskFormer and OneFormer with ignore_index=255,
# given two pictures of two shapes and their maps, as a batch to train on.
#
# One would guess: the smaller picture is padded, its map with 255, which the loss leaves out then, so that the padding
#   teaches nothing; or, as in the papers' code, "no object".
# Behaviour: a map is first made into a mask of 0 and 1 for each class, and it is these masks that are padded with 255.
#   The losses take it for a target between 0 and 1: cross-entropy falls below 0 the surer all masks are of the padding,
#   MaskFormer's focal loss is of the order of 10^9, and nearly all of the gradient stands where no picture is. No word
#   is said. In a small Mask2Former, after 200 steps on one such batch, the loss was at -7 million.
#   - It concerns every batch of several shapes, and pad_size. Pictures of one shape are right.
#   - As meant: mask_labels set to 0 where they exceed 1. Without ignore_index the padding is 0, but 255 is a class.
#   - Mask2FormerConfig has an ignore_value of 255; nothing reads it. (Pixels that a map says to ignore are 0 in all masks,
#     that is "no object"; in the papers' code, too.)
#   (Source: pad in transformers/models/mask2former/image_processing_mask2former.py, called after
#   convert_segmentation_map_to_binary_masks_fast; the same in maskformer and oneformer.)
# Output seen (loss on masks where a network is right on both pictures and has a logit of -5 or 5 on the padding; share of
# its gradient that stands there):
#   Mask2Former, 128 and 128 rows: masks of 0 1
#   Mask2Former, 128 and 96 rows: masks of 0 1 255
#   Mask2Former, -5 on padding: 1.5e+02 (99 %)
#   Mask2Former, 5 on padding: -1.5e+02 (99 %)
#   Mask2Former, -5, padded with 0: 0.043 (10 %)
#   MaskFormer, 128 and 128 rows: masks of 0 1
#   MaskFormer, 128 and 96 rows: masks of 0 1 255
#   MaskFormer, -5 on padding: -1.3e+09 (100 %)
#   MaskFormer, 5 on padding: 1.3e+09 (100 %)
#   MaskFormer, -5, padded with 0: 1.6e-07 (18 %)
#   OneFormer, 128 and 128 rows: masks of 0 1
#   OneFormer, 128 and 96 rows: masks of 0 1 255
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/labels.py" <<'PY'
import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    Mask2FormerConfig,
    Mask2FormerImageProcessor,
    MaskFormerImageProcessor,
    OneFormerImageProcessor,
)
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss
from transformers.models.maskformer.modeling_maskformer import (
    MaskFormerHungarianMatcher,
    MaskFormerLoss,
)

SIDE, ROWS, C = 128, 96, 4
PLAIN = dict(do_resize=False, ignore_index=255)
WEIGHTS = dict.fromkeys(("loss_cross_entropy", "loss_mask", "loss_dice"), 1.0)
labels = np.full((SIDE, SIDE), 1, np.uint8)
labels[:48] = 2
picture = np.zeros((SIDE, SIDE, 3), np.uint8)


def batch(processor, rows):
    """The labels of a picture and of its first rows, as one batch."""
    pictures, maps = [picture, picture[:rows]], [labels, labels[:rows]]
    kwargs = dict(task_inputs=["semantic"] * 2) if hasattr(processor, "num_text") else {}
    return processor(pictures, segmentation_maps=maps, **kwargs)


def trained(loss, found, logit):
    """The loss where a network is right on both pictures and says `logit` below the second one."""
    logits = torch.full((2, 10, SIDE, SIDE), -5.0)
    for query, label in enumerate((1, 2)):
        logits[:, query][:, torch.from_numpy(labels == label)] = 5
    logits[1, :2, ROWS:] = logit
    logits.requires_grad_()
    classes = 20.0 * F.one_hot(torch.tensor([1, 2] + [C] * 8), C + 1).expand(2, -1, -1)
    torch.manual_seed(0)
    value = loss(logits, classes, found["mask_labels"], found["class_labels"])["loss_mask"]
    value.backward()
    share = logits.grad[1, :, ROWS:].abs().sum() / logits.grad.abs().sum()
    return f"{value.item():.2g} ({100 * share:.0f} %)"


losses = {
    "Mask2Former": Mask2FormerLoss(Mask2FormerConfig(num_labels=C), WEIGHTS),
    "MaskFormer": MaskFormerLoss(C, MaskFormerHungarianMatcher(), WEIGHTS, 0.1),
}
processors = {
    "Mask2Former": Mask2FormerImageProcessor(**PLAIN),
    "MaskFormer": MaskFormerImageProcessor(**PLAIN),
    "OneFormer": OneFormerImageProcessor(num_text=C, **PLAIN),
}
metadata = {**dict.fromkeys("0123", "a"), "thing_ids": [], "class_names": "abcd"}
processors["OneFormer"].metadata = metadata
for name, processor in processors.items():
    for rows in (SIDE, ROWS):
        found = batch(processor, rows)
        values = torch.cat(found["mask_labels"]).unique().tolist()
        print(f"{name}, {SIDE} and {rows} rows: masks of {' '.join(f'{x:g}' for x in values)}")
    if name in losses:
        for logit in (-5, 5):
            print(f"{name}, {logit} on padding: {trained(losses[name], found, logit)}")
        found["mask_labels"] = [mask * (mask <= 1) for mask in found["mask_labels"]]
        print(f"{name}, -5, padded with 0: {trained(losses[name], found, -5)}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 scipy
"$folder/env/bin/python" "$folder/labels.py" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
