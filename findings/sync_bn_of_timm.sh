#!/usr/bin/env bash
# timm 1.0.31, segmentation_models_pytorch 0.6.0, lightning 2.6.6 (torch 2.14.1): networks made ready for several GPUs.
#
# One would guess: SyncBatchNorm.convert_sync_batchnorm, which guides to DDP call, changes where BN's statistics come from
#   and nothing else; in eval mode, where running statistics count, a network computes what it computed.
# Behaviour: many networks of timm (EfficientNets, MobileNets, Xception, RegNets, DenseNets) have a BN that holds the
#   activation behind it, BatchNormAct2d. torch makes a plain SyncBatchNorm of it, and these activations are gone: keys
#   and shapes fit, nothing is said, weights load, and what trains on several GPUs lacks some of its nonlinearities, an
#   EfficientNet-Lite0 all. One GPU or a CPU shows nothing of it, as there nobody converts.
#   - timm.layers.convert_sync_batchnorm keeps them. Networks whose activations are modules of their own, ResNets and
#     ResNeSts, are as before with either.
#   - segmentation_models_pytorch has the same networks as encoders ("tu-..."; its own efficientnet-b0 is another);
#     sync_batchnorm=True of lightning's Trainer converts as torch does.
#   (Source: torch/nn/modules/batchnorm.py; timm/layers/norm_act.py.)
# Output seen (BNs that hold an activation; outputs in eval mode after the conversion of torch, of timm, of lightning):
#   timm resnet50: 0; same, same, same
#   timm tf_efficientnet_lite0: 32; other, same, other
#   timm mobilenetv3_large_100: 30; other, same, other
#   timm xception65: 2; other, same, other
#   timm regnety_004: 33; other, same, other
#   smp resnet50: 0; same, same, same
#   smp efficientnet-b0: 0; same, same, same
#   smp tu-tf_efficientnet_lite0: 32; other, same, other
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/convert.py" <<'PY'
from copy import deepcopy

import segmentation_models_pytorch as smp
import timm
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

CONVERSIONS = (
    nn.SyncBatchNorm.convert_sync_batchnorm,
    convert_sync_batchnorm,
    TorchSyncBatchNorm().apply,
)
torch.manual_seed(0)
x = torch.randn(1, 3, 64, 64)


def holds(module):
    return isinstance(module, BatchNormAct2d) and not isinstance(module.act, nn.Identity)


@torch.no_grad()
def last(net):
    found = net.eval()(x)
    return found if torch.is_tensor(found) else found[-1]


def show(name, net):
    before = last(net)
    count = sum(holds(module) for module in net.modules())
    same = [torch.equal(last(convert(deepcopy(net))), before) for convert in CONVERSIONS]
    print(f"{name}: {count}; {', '.join('same' if one else 'other' for one in same)}")


names = "resnet50 tf_efficientnet_lite0 mobilenetv3_large_100 xception65 regnety_004".split()
for name in names:
    show(f"timm {name}", timm.create_model(name, features_only=True))
for name in ("resnet50", "efficientnet-b0", "tu-tf_efficientnet_lite0"):
    show(f"smp {name}", smp.Unet(name, encoder_weights=None, classes=5))
PY
export PYTHONWARNINGS=ignore
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 \
  segmentation-models-pytorch==0.6.0 lightning==2.6.6
"$folder/env/bin/python" "$folder/convert.py" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
