#!/usr/bin/env bash
# timm 1.0.31 (torch 2.14.1): features at stride 16 of one picture, cut to sizes that differ by a few pixels on the right
# and below; each network with its own random weights.
#
# One would guess: a column more on the right changes what stands on the right. Features of the middle stay as they are:
#   they look where they looked, as those of a ResNet do.
# Behaviour: networks named tf_ (EfficientNets, MixNets, MobileNetV3s with weights from TensorFlow) pad as TensorFlow does:
#   how much stands on the left depends on whether the size at that layer is even. From 1025 to 1024 pixels all features
#   move by 15 pixels, nearly a stride, with the same weights; what was trained on crops of 513 and scored on images of
#   512 sees everything shifted. The same network without tf_ does not.
#   - At 16 k + 1 pixels the two rules of padding are one.
#   - Nothing moves between sizes of one remainder modulo 16, the stride (pad the picture on the right and below).
#   (Source: timm/layers/padding.py, pad_same.)
# Output seen (pixels by which the middle's features look further right and down than at 1025):
#   resnet18: 1024: 0, 1026: 0, 1028: 0, 1032: 0
#   mobilenetv2_100: 1024: 0, 1026: 0, 1028: 0, 1032: 0
#   efficientnet_lite0: 1024: 0, 1026: 0, 1028: 0, 1032: 0
#   tf_efficientnet_lite0: 1024: 15, 1026: 1, 1028: 3, 1032: 7
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/places.py" <<'PY'
import timm
import torch

torch.manual_seed(0)
torch.set_num_threads(1)
picture = torch.rand(1, 3, 1060, 1060)


@torch.no_grad()
def middle(net, first, size):
    """Features at stride 16 of a square that begins at pixel `first`, far from its edges."""
    part = picture[..., first : first + size, first : first + size]
    return net(part)[-2][0, :, 20:45, 20:45]


def same(one, other):
    return torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


for name in ("resnet18", "mobilenetv2_100", "efficientnet_lite0", "tf_efficientnet_lite0"):
    net = timm.create_model(name, features_only=True).eval()
    moved = [middle(net, first, 1025) for first in range(16)]
    found = []
    for size in (1024, 1026, 1028, 1032):
        own = middle(net, 0, size)
        found.append(f"{size}: {' '.join(str(n) for n, x in enumerate(moved) if same(own, x))}")
    print(f"{name}: {', '.join(found)}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31
"$folder/env/bin/python" "$folder/places.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
