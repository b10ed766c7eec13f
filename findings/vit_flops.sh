# torch 2.14.1, fvcore 0.1.5.post20221221, thop 0.1.1.post2209072238, ptflops 0.7.5, torchinfo 1.8.0: the operations
# of one DINOv2-S (timm 1.0.31) at 518x518, as a table of methods with its backbone prints them.
#
# One would guess: the counters differ by the factor two between multiply-adds and operations, and agree on a plain
#   ViT, which is matrix products alone.
# Behaviour: attention is 17.3 of its 46.7 billion multiply-adds at 1,370 tokens, and six counters give numbers
#   from 0.3 to 37.2. Attention is one fused operation there, of which fvcore, thop and ptflops (aten) count
#   nothing, and torch's own counter nothing on a CPU, as it has formulas for CUDA's operations alone.
#   ptflops (pytorch) counts it, and leaves out the projections of the same block in return. torchinfo counts
#   a linear layer once an image, not once a token. With fused attention off (timm.layers.set_fused_attn) torch and
#   fvcore are right; thop, which looks at modules, never is. At a side of 798 attention is 58 % of all.
#   (Source: torch/utils/flop_counter.py, flop_registry; fvcore/nn/flop_count.py; thop/profile.py;
#   ptflops/pytorch_ops.py, timm_attention_counter_hook; torchinfo/layer_info.py, calculate_macs.)
# Output seen, 10^9 multiply-adds (torch's operations are halved):
#   by hand: 46.7, of it attention 17.3
#   fused: torch 29.4, fvcore 29.5, thop 29.4, ptflops pytorch 37.2, ptflops aten 29.5, torchinfo 0.3
#   not fused: torch 46.7, fvcore 46.8
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/count.py" <<'PY'
import logging
import warnings

import thop
import timm
import torch
import torchinfo
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from timm.layers import set_fused_attn
from torch.utils.flop_counter import FlopCounterMode

SIDE, WIDTH, DEPTH, PATCH = 518, 384, 12, 14
warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)
image = torch.zeros(1, 3, SIDE, SIDE)


def network():
    """Returns a new one: some counters leave things behind in it."""
    return timm.create_model("vit_small_patch14_dinov2", img_size=SIDE, num_classes=0).eval()


def by_torch():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network()(image)
    return counter.get_total_flops() / 2


def by_fvcore():
    return FlopCountAnalysis(network(), image).total()


def by_ptflops(backend):
    options = dict(as_strings=False, print_per_layer_stat=False, backend=backend)
    return get_model_complexity_info(network(), (3, SIDE, SIDE), **options)[0]


def printed(name, counts):
    counts = {counter: round(count / 1e9, 1) for counter, count in counts.items()}
    print(f"{name}:", ", ".join(f"{counter} {count}" for counter, count in counts.items()))
    return counts


patches = (SIDE // PATCH) ** 2
tokens = patches + 1
products = patches * WIDTH * 3 * PATCH**2 + DEPTH * tokens * 12 * WIDTH**2
attention = DEPTH * 2 * tokens**2 * WIDTH
print(f"by hand: {(products + attention) / 1e9:.1f}, of it attention {attention / 1e9:.1f}")
fused = {
    "torch": by_torch(),
    "fvcore": by_fvcore(),
    "thop": thop.profile(network(), (image,), verbose=False)[0],
    "ptflops pytorch": by_ptflops("pytorch"),
    "ptflops aten": by_ptflops("aten"),
    "torchinfo": torchinfo.summary(network(), input_data=image, verbose=0).total_mult_adds,
}
fused = printed("fused", fused)
set_fused_attn(False)
apart = printed("not fused", {"torch": by_torch(), "fvcore": by_fvcore()})
assert list(fused.values()) == [29.4, 29.5, 29.4, 37.2, 29.5, 0.3]
assert list(apart.values()) == [46.7, 46.8]
PY
python -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 fvcore==0.1.5.post20221221 \
    thop==0.1.1.post2209072238 ptflops==0.7.5 torchinfo==1.8.0
"$folder/venv/bin/python" "$folder/count.py"
