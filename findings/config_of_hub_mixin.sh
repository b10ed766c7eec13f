#!/usr/bin/env bash
# huggingface_hub 2.4.0 (PyTorchModelHubMixin), segmentation_models_pytorch 0.6.0, hydra-core 1.3.8 (torch 2.14.1):
# networks saved by save_pretrained and loaded again by from_pretrained.
#
# One would guess: the mixin saves what a network was built of, and an argument that it cannot save is an error, or is
#   missed when it loads: the network that comes back is the one that was trained, or none.
# Behaviour: an argument that is no JSON is left out, without a word at either end, and the file has the default of
#   the class in its place. Where that changes no shape (activations, eps of a norm, dilation, slopes), each weight
#   fits, a strict load passes, and another network answers.
#   - Classes and functions (nn.GELU, partial(nn.BatchNorm2d, eps=...)), numpy's numbers but float64.
#   - Lists of an OmegaConf configuration, which hydra's instantiate hands over as they are: a DeepLabV3+ trained with
#     rates 6, 12, 18 comes back with 12, 24, 36, and config.json says so. _convert_="all" makes plain lists of them.
#   - As meant: strings and plain numbers for arguments, or a pair of coders for the type (class ..., coders={...}).
#   (Source: ModelHubMixin.__new__ and _is_jsonable in huggingface_hub/hub_mixin.py; the mixin of
#   segmentation_models_pytorch/base/hub_mixin.py stands on it. Issue 2212 asked for OmegaConf's.)
# Output seen (norm of the difference of the outputs before and after, of their norm, in evaluation mode):
#   classes=5, slope=0.5: weights equal, output 0.000
#   act=nn.GELU: weights equal, output 0.160
#   norm of eps 0.1: weights equal, output 0.060
#   slope=np.float32(0.5): weights equal, output 0.151
#   smp's Unet, activation='sigmoid': weights equal, output 0.000
#   smp's Unet, activation=nn.Sigmoid: weights equal, output 0.465
#   smp's DeepLabV3Plus by hydra, _convert_=none: weights equal, output 0.121
#   smp's DeepLabV3Plus by hydra, _convert_=all: weights equal, output 0.000
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/saved.py" <<'PY'
import tempfile
from functools import partial

import numpy as np
import segmentation_models_pytorch as smp
import torch
from huggingface_hub import PyTorchModelHubMixin
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

torch.manual_seed(0)


class Net(nn.Module, PyTorchModelHubMixin):
    def __init__(self, classes=21, norm=nn.BatchNorm2d, act=nn.ReLU, slope=0.01):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.LeakyReLU(slope))
        self.last = nn.Sequential(nn.Conv2d(8, 8, 3), act(), nn.Conv2d(8, classes, 1))

    def forward(self, x):
        return self.last(self.first(x))


@torch.no_grad()
def compare(name, net, load=Net.from_pretrained):
    x = torch.rand(2, 3, 128, 128)
    for _ in range(20):
        net(x)  # running statistics near those of x
    with tempfile.TemporaryDirectory() as folder:
        net.eval().save_pretrained(folder)
        loaded = load(folder, strict=True).eval()
    weights = zip(net.state_dict().values(), loaded.state_dict().values(), strict=True)
    equal = "equal" if all(torch.equal(one, other) for one, other in weights) else "other"
    before, after = net(x), loaded(x)
    print(f"{name}: weights {equal}, output {float((after - before).norm() / before.norm()):.3f}")


compare("classes=5, slope=0.5", Net(5, slope=0.5))
compare("act=nn.GELU", Net(act=nn.GELU))
compare("norm of eps 0.1", Net(norm=partial(nn.BatchNorm2d, eps=0.1)))
compare("slope=np.float32(0.5)", Net(slope=np.float32(0.5)))
for name, activation in {"'sigmoid'": "sigmoid", "nn.Sigmoid": nn.Sigmoid}.items():
    net = smp.Unet("resnet18", encoder_weights=None, activation=activation)
    compare(f"smp's Unet, activation={name}", net, smp.from_pretrained)
config = OmegaConf.create(
    {
        "_target_": "segmentation_models_pytorch.DeepLabV3Plus",
        "encoder_name": "resnet18",
        "encoder_weights": None,
        "decoder_atrous_rates": [6, 12, 18],
    }
)
for how in ("none", "all"):
    net = instantiate(config, _convert_=how)
    compare(f"smp's DeepLabV3Plus by hydra, _convert_={how}", net, smp.from_pretrained)
PY
export PYTHONWARNINGS=ignore
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 huggingface_hub==2.4.0 safetensors==0.8.0 \
  segmentation-models-pytorch==0.6.0 timm==1.0.31 hydra-core==1.3.8
"$folder/env/bin/python" "$folder/saved.py" 2> "$folder/errors" | grep -v '^Loading' | tee "$folder/seen" ||
  cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
