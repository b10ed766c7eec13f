"""Memory of unimatch_v2.py's network in training: sizes, crops, frozen and recomputed blocks.

    python benchmarks/dinov2.py           # writes results/dinov2_memory.json, some minutes
    python benchmarks/dinov2.py --quick   # crops of 70 and 64 pixels, nothing written

No GPU is needed: a pass and its backward run on fake CUDA tensors in float32, and what is alive is
counted, as benchmarks/memory.py has it, with 1 and with 2 images: GB an image, and GB that are
there at all, the weights, their gradients and what a pass needs once. A run has the teacher and
AdamW's two momenta beside them: three more copies of the weights that learn.
Attention of fake tensors keeps the matrix of all pairs of tokens; a GPU's kernels need not.
"""

import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import unimatch_v2  # noqa: E402
from benchmarks import fake_cuda, steps  # noqa: E402
from common.distributed import Group  # noqa: E402
from common.flags import cli  # noqa: E402
from common.run import refusals  # noqa: E402

FILE = ROOT / "results" / "dinov2_memory.json"
CLASSES = 21
MODES = {  # name: flags
    "as it is": {},
    "recomputed": {"checkpoint_activations": True},
    "frozen": {"freeze": True},  # all blocks
}


@dataclass
class Options:
    """What is measured."""

    quick: bool = False  # small crops, ViT-S alone; nothing is written


def peak(backbone, crop, mode, images):
    """Returns the bytes alive at the peak of a pass of so many images and its backward."""
    args = steps.resolved(unimatch_v2, ["--backbone", backbone])
    changed = dict(MODES[mode])
    if "freeze" in changed:
        changed["freeze"] = unimatch_v2.SIZES[backbone].depth
    args = dataclasses.replace(args, **changed)
    group = Group(0, 1, fake_cuda.GPU)
    with fake_cuda.fake_cuda(fake_cuda.GPU) as counted:
        net = unimatch_v2.build(args, CLASSES, unimatch_v2.DPTHead, group)
        x = torch.zeros(images, 3, crop, crop, dtype=torch.uint8, device=fake_cuda.GPU)
        net(x)["logits"].mean().backward()
    return counted.peak


def main(options):
    """Prints the rows, and writes them."""
    crops = (70,) if options.quick else (518, 798)
    backbones = [name for name in unimatch_v2.SIZES if "vits" in name or not options.quick]
    rows = []
    for backbone, crop, mode in itertools.product(backbones, crops, MODES):
        crop = unimatch_v2.nearest_multiple(crop, unimatch_v2.SIZES[backbone].patch)
        one = peak(backbone, crop, mode, 1)
        each = peak(backbone, crop, mode, 2) - one
        row = {"backbone": backbone, "crop": crop, "mode": mode}
        rows.append(row | {"fixed_gb": (one - each) / 1e9, "image_gb": each / 1e9})
        words = f"{rows[-1]['fixed_gb']:.2f} GB + {rows[-1]['image_gb']:.2f} GB an image"
        print(backbone, crop, mode, words, flush=True)
    if not options.quick:
        found = {"torch": torch.__version__, "rows": rows}
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    with refusals("start again"):
        main(cli(Options))
