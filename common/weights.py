"""Pretrained backbones: where they come from, and a strict load."""

import torch
import torchvision

from common import Refusal


def load_backbone(resnet, weights, backbone, stem):
    """Loads weights into a torchvision-style ResNet without its classifier; every key must fit.

    weights: "none" (random weights stay), "auto" (torchvision's IMAGENET1K_V1, classic stem only;
    downloaded once and hash-checked by torchvision) or a file with a state dict. Raises Refusal.
    """
    if weights == "none":
        return
    if weights == "auto" and stem != "classic":
        raise Refusal("--weights auto: torchvision has the classic stem only; give a FILE or none")
    try:
        if weights == "auto":
            weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
            state = torch.hub.load_state_dict_from_url(weights, check_hash=True, weights_only=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        line += "; give --weights FILE, or --weights none for random ones"
        raise Refusal(f"--weights {weights}: no readable state dict: {line}") from None
    mine, counter = resnet.state_dict(), "num_batches_tracked"  # older files lack it; unused here
    bad = {k for k in set(state) ^ set(mine) if not k.endswith(counter)}
    bad |= {k for k in set(state) & set(mine) if getattr(state[k], "shape", 0) != mine[k].shape}
    if bad:
        some = ", ".join(sorted(bad)[:3])
        raise Refusal(f"--weights {weights}: {len(bad)} keys do not fit {backbone} ({some})")
    resnet.load_state_dict(state, strict=False)
