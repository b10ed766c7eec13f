#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.14.1): post_process_semantic_segmentation of Mask2Former, MaskFormer, OneFormer and DETR, of
# a network that is right: its masks, at a quarter of its input's size, are the colours of what it was given.
#
# One would guess: a picture has one result, alone or in a batch; target_sizes brings it back to the picture's size; and
#   what stands between network and result is what the papers' code does.
# Behaviour: pictures of a batch are padded on the right and below to one size, and the processor hands out a pixel_mask
#   of that. The way back knows neither: the padded map, not the picture's part of it, is resized to target_sizes. A
#   picture that is not the largest comes back shrunk into its upper left corner, as far as its neighbours will have it.
#   - Mask2Former's own code cuts the padding off first. As meant: logits of one picture, cut by its pixel_mask, or pictures
#     one by one or of one shape.
#   - Mask2Former's masks go through 384x384 pixels first ("for all models"), whatever the picture: at 1024x2048 that is
#     384 columns out of 512, and thin things suffer, of a single picture, too. Its own code has no such step.
#   (Source: the method in transformers/models/*/image_processing_*.py. Issue 39382 has scores that a batch changes, 44901
#   wishes for another number than 384.)
# Output seen (IoU of the poles; a lying picture of 480x640, processors as they are by default):
#   Mask2Former: alone 0.97, beside an upright one 0.64, cut first 0.97
#   MaskFormer: alone 0.94, beside an upright one 0.62, cut first 0.94
#   OneFormer: alone 0.92, beside an upright one 0.64, cut first 0.92
#   DETR: alone 0.92, beside an upright one 0.64, cut first 0.92
#   1024x2048, poles of 16 pixels: Mask2Former 0.90, MaskFormer 0.94
#   1024x2048, poles of 8 pixels: Mask2Former 0.80, MaskFormer 0.88
#   1024x2048, poles of 6 pixels: Mask2Former 0.74, MaskFormer 0.84
#   1024x2048, poles of 4 pixels: Mask2Former 0.30, MaskFormer 0.56
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/results.py" <<'PY'
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    DetrImageProcessor,
    Mask2FormerImageProcessor,
    MaskFormerImageProcessor,
    OneFormerImageProcessor,
)

PROCESSORS = {
    "Mask2Former": Mask2FormerImageProcessor(do_normalize=False),
    "MaskFormer": MaskFormerImageProcessor(do_normalize=False),
    "OneFormer": OneFormerImageProcessor(do_normalize=False, num_text=0),
    "DETR": DetrImageProcessor(do_normalize=False),
}


def street(height, width, pole):
    """A map of three classes (1: poles, 2: a disc), and the picture with these as colours."""
    y, x = np.mgrid[:height, :width]
    labels = np.where(x % (5 * pole + 3) < pole, 1, 0)
    labels[(y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 5) ** 2] = 2
    return labels, 255 * np.eye(3, dtype=np.uint8)[labels]


def network(seen):
    """What a network gives that has one query a class and is right everywhere."""
    masks = 20 * (F.avg_pool2d(seen, 4) - 0.5)
    classes = (40 * torch.eye(3, 4) - 20).expand(len(seen), 3, 4)
    names = "class_queries_logits", "masks_queries_logits", "logits", "pred_masks"
    return SimpleNamespace(**dict(zip(names, (classes, masks) * 2, strict=True)))


def score(processor, seen, streets):
    sizes = [labels.shape for labels, _ in streets]
    found = processor.post_process_semantic_segmentation(network(seen), target_sizes=sizes)
    ours, poles = found[0].numpy() == 1, streets[0][0] == 1
    return f"{(ours & poles).sum() / (ours | poles).sum():.2f}"


lying, upright = street(480, 640, 16), street(640, 480, 16)
for name, processor in PROCESSORS.items():
    tries = []
    for streets in ([lying], [lying, upright]):
        kwargs = dict(task_inputs=["semantic"] * len(streets)) if name == "OneFormer" else {}
        inputs = processor([picture for _, picture in streets], return_tensors="pt", **kwargs)
        tries.append(score(processor, inputs["pixel_values"], streets))
    real = inputs["pixel_mask"][0]
    cut = inputs["pixel_values"][:1, :, : int(real.any(1).sum()), : int(real.any(0).sum())]
    tries.append(score(processor, cut, [lying]))
    print(f"{name}: alone {tries[0]}, beside an upright one {tries[1]}, cut first {tries[2]}")
for pole in (16, 8, 6, 4):
    large = street(1024, 2048, pole)
    seen = torch.from_numpy(large[1]).permute(2, 0, 1)[None] / 255
    tries = [f"{name} {score(PROCESSORS[name], seen, [large])}" for name in list(PROCESSORS)[:2]]
    print(f"1024x2048, poles of {pole} pixels: {', '.join(tries)}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 scipy
"$folder/env/bin/python" "$folder/results.py" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
