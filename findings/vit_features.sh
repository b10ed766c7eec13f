# timm 1.0.31, segmentation-models-pytorch 0.6.0, transformers 5.24.0 (torch 2.14.1): the maps of a DINOv2 for a DPT head.
#
# One would guess: a DPT on blocks 2, 5, 8 and 11 of a DINOv2 gets one and the same four maps from every library, those
#   of Meta's get_intermediate_layers: tokens after the last norm.
# Behaviour: timm's features_only=True takes the blocks' output before that norm, and takes the norm out of the network:
#   a strict load of a whole file then names norm.weight as unexpected, and no argument of create_model brings it back
#   (forward_intermediates(norm=True) of a whole network does). The ViT encoders of segmentation-models-pytorch, which
#   its DPT stands on, take the same maps and leave the norm unused. transformers' backbone normalizes, and counts from
#   1: stage12 is block 11, and stage2, stage5, stage8, stage11 of its docstring are each a block too early.
#   (Source: timm/models/_features.py, FeatureGetterNet; segmentation_models_pytorch/encoders/timm_vit.py,
#   _forward_with_prefix_tokens; transformers/models/dinov2/modeling_dinov2.py, Dinov2Backbone.)
# Output seen, norm of the difference to the last normalized tokens of the same network, of their norm (random weights):
#   timm, features_only: 0.38
#   timm, forward_intermediates(norm=True): 0.00
#   smp, ViT encoder: 0.38
#   transformers, stage12: 0.00
#   transformers, stage11: 0.28
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/maps.py" <<'PY'
import timm
import torch
from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder
from transformers import Dinov2Config, Dinov2Model
from transformers.models.dinov2 import Dinov2Backbone

NAME, SIDE = "vit_small_patch14_dinov2", 518
BLOCKS = (2, 5, 8, 11)  # from 0
SIZES = dict(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=SIDE)


def stirred(net):
    """Returns net with random weights of which the norms' say something too."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net.eval()


def printed(name, feature_map, tokens):
    found = feature_map.flatten(2).transpose(1, 2)
    apart = ((found - tokens).norm() / tokens.norm()).item()
    print(f"{name}: {apart:.2f}")
    return apart


torch.manual_seed(0)
torch.set_grad_enabled(False)
image = torch.randn(1, 3, SIDE, SIDE)
whole = stirred(timm.create_model(NAME, num_classes=0))
state = whole.state_dict()
last = whole.forward_features(image)[:, 1:]

net = timm.create_model(NAME, features_only=True, out_indices=BLOCKS).eval()
prefixed = {f"model.{key}": value for key, value in state.items()}
keys = net.load_state_dict(prefixed, strict=False)
assert keys.unexpected_keys == ["model.norm.weight", "model.norm.bias"]
assert not keys.missing_keys
assert printed("timm, features_only", net(image)[-1], last) > 0.1
maps = whole.forward_intermediates(image, BLOCKS, norm=True, intermediates_only=True)
assert printed("timm, forward_intermediates(norm=True)", maps[-1], last) < 1e-5
net = TimmViTEncoder(NAME, pretrained=False, output_indices=list(BLOCKS)).eval()
net.model.load_state_dict(state)
assert printed("smp, ViT encoder", net(image)[0][-1], last) > 0.1

whole = stirred(Dinov2Model(Dinov2Config(**SIZES)))
last = whole(image).last_hidden_state[:, 1:]
for stage, expected in (("stage12", True), ("stage11", False)):
    net = Dinov2Backbone(Dinov2Config(**SIZES, out_features=[stage])).eval()
    net.load_state_dict(whole.state_dict())
    apart = printed(f"transformers, {stage}", net(image).feature_maps[0], last)
    assert (apart < 1e-5) == expected
assert '"stage2", "stage5", "stage8", "stage11"' in Dinov2Backbone.forward.__doc__
PY
python -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0 \
    segmentation-models-pytorch==0.6.0
"$folder/venv/bin/python" "$folder/maps.py"
