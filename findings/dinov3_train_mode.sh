# transformers 5.24.0, timm 1.0.31 (torch 2.14.1): DINOv3's ViT in training mode, dropout and stochastic depth 0.
#
# One would guess: a ViT without BN whose dropout rates are all 0 computes the same in training and evaluation mode, so
#   that train() on a frozen or fine-tuned backbone changes nothing, and a student and its teacher with equal weights
#   agree.
# Behaviour: in training mode transformers multiplies the coordinates of all patches by one random factor between 1/2
#   and 2 at every pass (config.pos_embed_rescale, 2.0 by default and in the published configurations), frozen or not.
#   It is an augmentation of pretraining, in Meta's code drawn anew for every block. timm's port does not rescale.
#   pos_embed_rescale=None turns it off.
#   (Source: transformers/models/dinov3_vit/modeling_dinov3_vit.py, augment_patches_center_coordinates, called where
#   self.training; timm/models/eva.py, vit_small_patch16_dinov3, whose rope_rescale_coords is left out.)
# Output seen, norm of the difference between two passes of one image, of the norm of the features (random weights):
#   transformers, training: 0.033
#   transformers, training, frozen: 0.033
#   transformers, training, pos_embed_rescale=None: 0.000
#   transformers, evaluation: 0.000
#   timm, training: 0.000
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/twice.py" <<'PY'
import timm
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

WIDTH, DEPTH, HEADS = 64, 4, 2


def of_transformers(**options):
    """Returns a small DINOv3 of transformers."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS)
    options |= dict(intermediate_size=4 * WIDTH, num_register_tokens=4)
    return DINOv3ViTModel(DINOv3ViTConfig(**sizes, **options))


def of_timm():
    """Returns a small DINOv3 of timm."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0)
    return timm.create_model("vit_small_patch16_dinov3", **sizes)


def apart(net, features):
    """Returns how far two passes of one image are apart, of the size of the features."""
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        first, second = features(image), features(image)
    return ((first - second).norm() / first.norm()).item()


def printed(name, net, training=True):
    net.train(training)
    if "timm" in name:
        found = apart(net, net.forward_features)
    else:
        assert net.config.attention_dropout == net.config.drop_path_rate == 0
        found = apart(net, lambda image: net(image).last_hidden_state)
    print(f"{name}: {found:.3f}")
    return found


assert printed("transformers, training", of_transformers()) > 0.01
assert printed("transformers, training, frozen", of_transformers().requires_grad_(False)) > 0.01
off = of_transformers(pos_embed_rescale=None)
assert printed("transformers, training, pos_embed_rescale=None", off) == 0
assert printed("transformers, evaluation", of_transformers(), training=False) == 0
assert printed("timm, training", of_timm()) == 0
PY
python -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0
"$folder/venv/bin/python" "$folder/twice.py"
