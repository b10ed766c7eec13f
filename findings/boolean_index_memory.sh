#!/usr/bin/env bash
# torch 2.14.1 and 2.6.0 (CPU), numpy 2.2.6: what it takes to pick pixels by a boolean mask of the same shape, with one thread.
#
# One would guess: scores[mask] needs its result, as in NumPy, and that its shape does not matter; and that
#   scores[mask] = x is no cheaper or dearer for another x.
# Behaviour: torch makes an int64 index of every picked element for each dimension (nonzero) and picks by these. Of
#   float32 maps (B, C, H, W) they are eight times the maps themselves; the backward pass makes them again. Of the
#   same maps flattened they are twice. masked_select counts the mask in int64, which is twice the maps whatever is
#   picked (and with several threads five times), where needs nothing. To set picked elements to a number is a fill and
#   needs nothing, to set them to other picked ones makes the indices
#   twice over. So a loss that takes the pixels of one kind out of its maps and puts their losses back, as some
#   released codes do, holds up to nine times its logits for a moment, by the share that it takes; torch.where says
#   the same with one.
#   (Source: index and expandTensors in aten/src/ATen/native/TensorAdvancedIndexing.cpp and IndexingUtils.h.)
# Output seen, memory at the peak above the inputs, in maps of float32, all elements picked; for both versions:
#   numpy, scores[mask]: 1.0
#   scores[mask]: 9.0
#   scores[mask] and backward: 9.0
#   scores.flatten()[mask.flatten()]: 3.0
#   scores.masked_select(mask): 2.0
#   torch.where(mask, scores, 0): 1.0
#   scores[mask] = 0: 0.0
#   scores[mask] = other[mask]: 9.0
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/pick.py" <<'PY'
import tracemalloc

import torch
from torch.profiler import ProfilerActivity, profile

torch.set_num_threads(1)
scores = torch.randn(2, 20, 250, 100)
other = torch.randn_like(scores)
mask = torch.ones_like(scores, dtype=torch.bool)
with_gradient = scores.clone().requires_grad_()


def peak(call):
    """Returns the most memory that is held at a time, in maps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / scores.nbytes


def fill():
    scores[mask] = 0


def move():
    scores[mask] = other[mask]


a = scores.numpy()
b = mask.numpy()
tracemalloc.start()
a[b]
print(f"numpy, scores[mask]: {tracemalloc.get_traced_memory()[1] / a.nbytes:.1f}")
tracemalloc.stop()
for words, call in {
    "scores[mask]": lambda: scores[mask],
    "scores[mask] and backward": lambda: with_gradient[mask].sum().backward(),
    "scores.flatten()[mask.flatten()]": lambda: scores.flatten()[mask.flatten()],
    "scores.masked_select(mask)": lambda: scores.masked_select(mask),
    "torch.where(mask, scores, 0)": lambda: torch.where(mask, scores, 0),
    "scores[mask] = 0": fill,
    "scores[mask] = other[mask]": move,
}.items():
    print(f"{words}: {peak(call):.1f}")
PY
for version in 2.14.1 2.6.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "torch==$version" numpy==2.2.6
  "$folder/$version/bin/python" "$folder/pick.py" 2> /dev/null | tee "$folder/seen"
  diff "$folder/seen" <(sed -n 's/^#   \(.*: [0-9.]*\)$/\1/p' "$0")
  rm -rf "${folder:?}/$version"
done
