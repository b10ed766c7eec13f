# segmentation-models-pytorch 0.6.0, timm 1.0.31, torchvision 0.29.1 (torch 2.14.1): strides replaced by dilation.
#
# One would guess: a ResNet-50 at output stride 16 or 8 with given weights is one network, whichever library
#   dilates it: at every second or fourth pixel it has the features of the strided one (the algorithme a trous).
# Behaviour: torchvision and timm keep the first 3x3 convolution of a stage at the dilation of the stage before,
#   whose pixels it reads, and dilate the rest: there, equal. smp's own encoders dilate the first one too, by
#   the rate of its stage, so all of layer4 sees other places than the weights were trained for; so do its
#   other encoders, as one function dilates all. smp's "tu-" encoders are timm's. Weights load without a word
#   in all three, and a published number of one is not that of another. timm's ResNet-d has the same in small
#   at stride 8: its shortcuts average two neighbouring pixels, which were two apart.
#   (Source: segmentation_models_pytorch/encoders/_utils.py, replace_strides_with_dilation;
#   torchvision/models/resnet.py, previous_dilation; timm/models/resnet.py, first_dilation, downsample_avg.)
# Output seen, the largest difference at the pixels that both have, of the largest feature (random weights):
#   stride 16: torchvision resnet50 0.00, timm resnet50 0.00, smp tu-resnet50 0.00, smp resnet50 0.13, timm resnet50d 0.00
#   stride 8: torchvision resnet50 0.00, timm resnet50 0.00, smp tu-resnet50 0.00, smp resnet50 0.17, timm resnet50d 0.06
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/dilated.py" <<'PY'
import timm
import torch
import torchvision
from segmentation_models_pytorch.encoders import get_encoder

NAMES = {  # what is dilated: whose strided network it should be
    "torchvision resnet50": "resnet50",
    "timm resnet50": "resnet50",
    "smp tu-resnet50": "resnet50",
    "smp resnet50": "resnet50",
    "timm resnet50d": "resnet50d",
}


def network(name, stride):
    """Returns a network by name, dilated to a stride: 32 is not at all."""
    package, kind = name.split()
    if package == "torchvision":
        dilated = [False, stride < 16, stride < 32]
        return torchvision.models.resnet50(replace_stride_with_dilation=dilated)
    if package == "smp":
        return get_encoder(kind, weights=None, output_stride=stride)
    return timm.create_model(kind, features_only=True, output_stride=stride)


def last(net, image):
    """Returns the features after layer4."""
    if not isinstance(net, torchvision.models.ResNet) or hasattr(net, "get_stages"):
        return net(image)[-1]
    x = net.maxpool(net.relu(net.bn1(net.conv1(image))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def difference(name, stride, state, strided, image):
    """Returns the largest difference at the pixels of the strided network, but near the border."""
    net = network(name, stride).eval()
    own = {key.split("model.")[-1]: key for key in net.state_dict()}
    assert [key for key in own if key not in state and "fc." not in key] == []
    net.load_state_dict({own[k]: x for k, x in state.items() if k in own}, strict=False)
    every = 32 // stride
    found = last(net, image)[..., ::every, ::every]
    assert found.shape == strided.shape
    apart = (found - strided)[..., 2:-2, 2:-2].abs().max()
    return (apart / strided.abs().max()).item()


torch.manual_seed(0)
image = torch.randn(1, 3, 256, 256)
with torch.no_grad():
    states = {}
    for kind in ("resnet50", "resnet50d"):
        net = network(f"timm {kind}", 32).eval()
        for part in net.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.fill_(1)  # timm begins with blocks that add nothing
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
        states[kind] = net.state_dict(), last(net, image)
    for stride in (16, 8):
        found = {}
        for name, kind in NAMES.items():
            found[name] = difference(name, stride, *states[kind], image)
        print(f"stride {stride}:", ", ".join(f"{name} {x:.2f}" for name, x in found.items()))
        assert all(found[name] < 1e-4 for name in list(NAMES)[:3])
        assert found["smp resnet50"] > 0.1
        assert (found["timm resnet50d"] > 0.02) == (stride == 8)
PY
python -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 segmentation-models-pytorch==0.6.0
"$folder/venv/bin/python" "$folder/dilated.py"
