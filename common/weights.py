"""Pretrained backbones: where they come from, and a strict load."""

import difflib
import os
import re
import warnings

import torch
import torchvision

from common import Refusal

# ImageNet weights of ResNets with the v1c stem, as OpenMMLab publishes them for its PSPNets; the
# file's name holds the beginning of its sha256
V1C = "https://download.openmmlab.com/pretrain/third_party/"
NAMES = {"resnet18": "b5776b93", "resnet50": "2cccc1ad", "resnet101": "e67eebb6"}
# DINOv2 as Meta publishes it, and the file's sha256
META = "https://dl.fbaipublicfiles.com/dinov2/"
DINOV2 = {
    "dinov2_vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "dinov2_vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "dinov2_vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
}
GATED = (
    "is gated, under Meta's DINOv3 License:"
    " https://ai.meta.com/resources/models-and-libraries/dinov3-license"
)
# what timm and transformers call the parts of a DINOv3 -> as Meta does
NAMES_OF_META = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(reg_token|register_tokens)$", "storage_tokens"),
    (r"^layer\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.attn\.([qkv])_bias$", r".attn.\1_proj.bias"),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
GATED_MLP = "a ViT with a gated MLP (DINOv3's S+, L+, H+ and 7B): not built"
REGISTERS = "a DINOv2 with register tokens: give the one without to dinov2_vit{}14"
FAMILIES = (  # keys that only such a state dict has, by Meta, timm, transformers: whose it is
    ({"local_cls_norm.weight"}, "a DINOv3 of satellite images, normalized otherwise: not built"),
    ({"blocks.0.mlp.w1.weight"}, GATED_MLP),
    ({"blocks.0.mlp.fc1_g.weight"}, GATED_MLP),
    ({"layer.0.mlp.gate_proj.weight"}, GATED_MLP),
    ({"storage_tokens"}, "dinov3_vit{}16"),
    ({"reg_token", "blocks.0.gamma_1"}, "dinov3_vit{}16"),
    ({"embeddings.register_tokens", "layer.0.layer_scale1.lambda1"}, "dinov3_vit{}16"),
    ({"register_tokens"}, REGISTERS),
    ({"reg_token"}, REGISTERS),
    ({"pos_embed", "blocks.0.ls1.gamma"}, "dinov2_vit{}14"),
    ({"encoder.layer.0.norm1.weight"}, "a DINOv2 of transformers: give Meta's file or timm's"),
)
# of classifiers in files, whose network here has another or none
HEADS = ("head.", "head_dist.", "fc.", "classifier.", "last_linear.", "AuxLogits.")
FIT = "convnext_tiny, tf_efficientnet_lite0, mobilenetv3_large_100, resnet50d and others fit"


def load_backbone(resnet, weights, backbone, stem):
    """Loads weights into a torchvision-style ResNet without its classifier; every key must fit.

    weights: "none" (random weights stay), "auto" (ImageNet's: torchvision's IMAGENET1K_V1 for the
    classic stem, else the v1c files; downloaded once, hash-checked, cached by torch.hub) or a file
    with a state dict, deep stems as conv1.0 ... bn1 or as stem.0 ... stem.7; it may lie under
    state_dict or model, its keys under module. Raises Refusal.
    """
    if weights == "none":
        return
    if weights == "auto":
        weights = f"{V1C}{backbone}_v1c-{NAMES[backbone]}.pth"
        if stem == "classic":
            weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    state = read_state(weights)
    state = {re.sub(r"^stem\.7\.", "bn1.", k): v for k, v in state.items() if k[:3] != "fc."}
    state = {re.sub(r"^stem\.", "conv1.", k): v for k, v in state.items()}
    if bad := unfit(state, resnet):
        first = (*getattr(state.get("conv1.0.weight"), "shape", ()), 0)[0]
        other = {64: "deep", 32: "v1c"}.get(first, "classic")
        names = ", ".join(sorted(bad)[:3])
        if other != stem:
            names += f"; is it --stem {other}?"
        raise Refusal(f"--weights {weights}: {len(bad)} keys do not fit {backbone} ({names})")
    resnet.load_state_dict(state, strict=False)


def load_dino(vit, weights, backbone):
    """Loads weights into the DINOv2 or DINOv3 of a script; every key must fit.

    weights: "none" (random weights stay), "auto" (Meta's DINOv2, downloaded once, hash-checked,
    cached by torch.hub; DINOv3 is gated) or a file, .pth or .safetensors, of Meta's names or of
    timm's, a DINOv3's also of transformers'. Raises Refusal.
    """
    if weights == "none":
        return
    name = None
    if weights == "auto":
        if backbone not in DINOV2:
            raise Refusal(f"--weights auto: {backbone} {GATED}; give --weights FILE or none")
        weights = f"{META}{backbone}/{backbone}_pretrain.pth"
        # torch.hub takes the hash from the name that it keeps the file by
        name = f"{backbone}_pretrain-{DINOV2[backbone]}.pth"
    state = read_state(weights, name)
    state = {re.sub(r"^(backbone|model)\.", "", key): value for key, value in state.items()}
    state.pop("mask_token", None)  # of pretraining alone
    family = family_of(state)
    if backbone not in DINOV2:
        state = with_defaults(merged(renamed(state)), vit.state_dict())
        state.pop("mask_token", None)
    if bad := unfit(state, vit):
        names = ", ".join(sorted(bad)[:3])
        if family and family != backbone:
            names += f"; it is {family}"
        raise Refusal(f"--weights {weights}: {len(bad)} keys do not fit {backbone} ({names})")
    vit.load_state_dict(state)


def family_of(state):
    """Returns whose weights a state dict has, by its names: a backbone, or words; or None."""
    token = state.get("cls_token", state.get("embeddings.cls_token"))
    size = {384: "s", 768: "b", 1024: "l"}.get(getattr(token, "shape", (0,))[-1], "")
    for keys, words in FAMILIES:
        if keys <= state.keys():
            return words.format(size)
    return None


def renamed(state):
    """Returns a DINOv3's state dict of timm or transformers under Meta's names."""
    for pattern, name in NAMES_OF_META:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    return state


def merged(state):
    """Returns it with queries, keys and values in one, as Meta has them; keys have no bias."""
    state = dict(state)
    for key in [key for key in state if ".attn.q_proj." in key]:
        parts = [key.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
        if key.endswith("bias") and parts[2] in state:
            state.setdefault(parts[1], torch.zeros_like(state[key]))
            if state[parts[1]].any():
                continue  # such keys are of another network
        if all(part in state for part in parts):
            whole = torch.cat([state.pop(part) for part in parts])
            state[key.replace("q_proj", "qkv")] = whole
    return state


def with_defaults(state, own):
    """Returns it with what timm and transformers leave out, from the network's own.

    Constants, and all biases of queries, keys and values, which are 0, or none.
    """
    left_out = []
    if not any(key.endswith("bias_mask") for key in state):
        left_out += [key for key in own if key.endswith(("bias_mask", "periods"))]
    if not any(re.search(r"\.attn\.(qkv|[qkv]_proj)\.bias$", key) for key in state):
        left_out += [key for key in own if key.endswith("qkv.bias")]
    return {key: own[key] for key in left_out} | state


def read_state(weights, name=None):
    """Returns the state dict of a file or of an address, whose file's name has the hash in it.

    It may lie under state_dict or model, its keys under module. name: in place of that in the
    address. Raises Refusal.
    """
    try:
        if "://" in weights:
            load = torch.hub.load_state_dict_from_url
            checked = {"check_hash": True, "weights_only": True, "file_name": name}
            first = os.environ.get("RANK", "0") == "0"
            state = load(weights, map_location="cpu", progress=first, **checked)
        elif weights.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the pickle's protocol
                state = torch.load(weights, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state.get("model", state))
        return {re.sub(r"^module\.", "", k): v for k, v in state.items()}  # of a parallel network
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        line += "; give --weights FILE, or --weights none for random ones"
        raise Refusal(f"--weights {weights}: no readable state dict: {line}") from None


def unfit(state, net):
    """Returns the keys of a state dict and a network that only one has, or in other shapes."""
    own = net.state_dict()
    counter = "num_batches_tracked"  # older files lack it; unused here
    bad = [key for key in set(state) ^ set(own) if not key.endswith(counter)]
    for key in set(state) & set(own):
        if getattr(state[key], "shape", 0) != own[key].shape:
            bad.append(key)
    return bad


def check_keys(timm, name, path):
    """Raises Refusal if a file lacks a weight of a network of timm, or has more; heads excepted.

    timm itself leaves random what a file for features does not have, and drops what is too much: a
    ResNet-50's file has all that a ResNet-26 wants.
    """
    net = timm.create_model(name.partition(".")[0])
    classifier = net.default_cfg["classifier"]
    if isinstance(classifier, str):
        classifier = (classifier,)
    spared = tuple(f"{part}." for part in classifier)
    counter = "num_batches_tracked"  # older files lack it
    wanted = [key for key in net.state_dict() if not key.endswith(counter)]
    there = [key for key in read_state(path) if not key.endswith(counter)]
    missing = [key for key in wanted if key not in there and not key.startswith(spared)]
    if missing:
        lacks = f"it lacks {len(missing)} of {len(wanted)} weights of {name}, such as {missing[0]}"
        raise Refusal(f"--weights {path}: {lacks}; another network's, or no whole file")
    more = [key for key in there if key not in wanted and not key.startswith((*spared, *HEADS))]
    if more:
        has = f"it has {len(more)} weights that {name} lacks, such as {more[0]}"
        raise Refusal(f"--weights {path}: {has}; a larger network's?")


def load_timm(backbone, weights, output_stride):
    """Returns the features of a network of timm at strides 4, 8, 16 and output_stride.

    backbone: timm/NAME. weights: none, auto (those of timm, downloaded and cached by it) or a file
    as timm publishes them, .safetensors or .pth; every key must fit. Raises Refusal.
    """
    try:
        import timm
    except ImportError:
        raise Refusal(f"--backbone {backbone}: timm is not installed; pip install timm") from None
    name = backbone.removeprefix("timm/")
    if name.partition(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise Refusal(f"--backbone {backbone}: timm has no such network; near: {', '.join(near)}")
    options = {}
    if weights != "none":
        options["pretrained"] = True
    if weights not in ("none", "auto"):
        check_keys(timm, name, weights)  # first: timm would print what is too much
        options["pretrained_cfg_overlay"] = {"file": weights}
    strides = [4, 8, min(16, output_stride), output_stride]
    try:
        net = timm.create_model(
            name,
            features_only=True,
            out_indices=(-4, -3, -2, -1),
            output_stride=output_stride,
            **options,
        )
        found = net.feature_info.reduction()
    except Exception as error:  # whatever timm raises, of networks as of files
        line = " ".join(str(error).split())[:200]
        raise Refusal(f"--backbone {backbone} --weights {weights}: {line}; {FIT}") from None
    if found != strides:
        wrong = f"features at strides {found}, not {strides}"
        raise Refusal(f"--backbone {backbone}: {wrong}; {FIT}")
    return net
