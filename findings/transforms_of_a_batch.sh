#!/usr/bin/env bash
# torchvision 0.29.1 with torch 2.14.1, and 0.21.0 with 2.6.0: transforms.v2 on what a DataLoader gives.
#
# One would guess: v2's transforms move an image and its tv_tensors.Mask together; so they do for the batch that a
#   DataLoader makes of such pairs, as where one augments on the GPU.
# Behaviour: the loader's collate stacks tensors, and what is stacked is a plain tensor: no Image, no Mask. In a sample
#   without images v2 takes the first plain tensor, in the order of the dict, for the image, and lets all others pass.
#   So a flip, a rotation or a shift moves the images and leaves the masks where they were, in silence. Where the masks
#   come first in the dict, they are moved alone, and interpolated as an image: ids appear that no mask has.
#   To do: image = tv_tensors.Image(batch["image"]), mask = tv_tensors.Mask(batch["mask"]) before the transform. (The
#   whole batch is then moved alike: one draw.)
#   (Source: default_collate; Transform._needs_transform_list in torchvision/transforms/v2/_transform.py.)
# Output seen, for both; a row of each, and all values after a rotation by 30 degrees, bilinear for images:
#   sample, flipped: image 0 0 0 0 200 200, mask 0 0 0 0 7 7
#   batch: image Tensor, mask Tensor
#   batch, flipped: image 0 0 0 0 200 200, mask 7 7 0 0 0 0
#   batch, annotation first, flipped: annotation 0 0 0 0 7 7, image 200 200 0 0 0 0
#   batch, annotation first, turned: annotation 0 1 2 4 5 7, image 0 200
#   batch, wrapped again, flipped: image 0 0 0 0 200 200, mask 0 0 0 0 7 7
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/batch.py" <<'PY'
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

torch.set_num_threads(1)
image = torch.zeros(3, 4, 6, dtype=torch.uint8)
image[:, :, :2] = 200
mask = torch.zeros(4, 6, dtype=torch.uint8)
mask[:, :2] = 7
image, mask = tv_tensors.Image(image), tv_tensors.Mask(mask)
flip = v2.RandomHorizontalFlip(p=1)
turn = v2.RandomRotation((30, 30), interpolation=v2.InterpolationMode.BILINEAR)


def shown(what, sample, words):
    print(f"{what}: " + ", ".join(f"{name} {words(x)}" for name, x in sample.items()))


def row(x):
    return " ".join(map(str, x.flatten(0, -2)[0].tolist()))


def values(x):
    return " ".join(map(str, sorted(set(x.flatten().tolist()))))


pair = {"image": image, "mask": mask}
shown("sample, flipped", flip(pair), row)
batch = next(iter(DataLoader([pair, pair], batch_size=2)))
shown("batch", batch, lambda x: type(x).__name__)
shown("batch, flipped", flip(batch), row)
pair = {"annotation": mask, "image": image}
other = next(iter(DataLoader([pair, pair], batch_size=2)))
shown("batch, annotation first, flipped", flip(other), row)
shown("batch, annotation first, turned", turn(other), values)
wrapped = {"image": tv_tensors.Image(batch["image"]), "mask": tv_tensors.Mask(batch["mask"])}
shown("batch, wrapped again, flipped", flip(wrapped), row)
PY
for versions in "2.14.1 0.29.1" "2.6.0 0.21.0"; do
  read -r torch vision <<< "$versions"
  python3 -m venv "$folder/$torch"
  "$folder/$torch/bin/pip" install -q "torch==$torch" "torchvision==$vision" numpy==2.2.6
  "$folder/$torch/bin/python" "$folder/batch.py" | tee "$folder/seen"
  diff "$folder/seen" <(sed -n 's/^#   \(\(sample\|batch\)[^:]*: .*\)$/\1/p' "$0")
  rm -rf "${folder:?}/$torch"
done
