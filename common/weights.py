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
        except FileNotFoundError:
            raise Refusal(f"--weights {weights}: no such file (or use none, auto)") from None
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise Refusal(f"--weights {weights}: not a readable state dict ({line})") from None
        if not isinstance(state, dict):
            raise Refusal(f"--weights {weights}: holds a {type(state).__name__}, not a state dict")
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    mine = resnet.state_dict()
    # files older than this counter do not have it; it is not read anywhere here
    absent = {k for k in mine if k not in state and not k.endswith("num_batches_tracked")}
    wrong = {k for k in mine if k in state and getattr(state[k], "shape", None) != mine[k].shape}
    extra = set(state) - set(mine)
    for names, what in (
        (absent, "lacks"),
        (extra, "has no place for"),
        (wrong, "another shape of"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise Refusal(f"--weights {weights}: {what} {len(names)} keys of {backbone} ({some})")
    resnet.load_state_dict(state, strict=False)
