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
    if weights == "auto":
        if stem != "classic":
            raise Refusal(
                "--weights auto: torchvision has the classic stem only; give a FILE or none"
            )
        enum = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
        try:
            state = enum.get_state_dict(progress=False, check_hash=True)
        except OSError as error:  # URLError is one
            raise Refusal(
                f"--weights auto: {enum.url} cannot be reached ({error}); "
                "give --weights FILE, or --weights none for random weights"
            ) from None
    else:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            state = dict(state)
        except Exception as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise Refusal(
                f"--weights {weights}: none, auto or a state dict's file ({line})"
            ) from None
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    mine = resnet.state_dict()
    counter = "num_batches_tracked"  # older files lack it; nothing here reads it
    absent = {k for k in mine if k not in state and not k.endswith(counter)}
    extra = set(state) - set(mine)
    wrong = {k for k in state if k in mine and getattr(state[k], "shape", 0) != mine[k].shape}
    for names, what in (
        (absent, "lacks"),
        (extra, "has no place for"),
        (wrong, "another shape of"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise Refusal(f"--weights {weights}: {what} {len(names)} keys of {backbone} ({some})")
    resnet.load_state_dict(state, strict=False)
