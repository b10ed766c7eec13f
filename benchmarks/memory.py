"""What fits on a GPU: peak memory of a step of a script with a ResNet, on fake CUDA tensors.

python benchmarks/memory.py                    # all rows into results/memory.json, some minutes
python benchmarks/memory.py --scripts cps_fpl  # rows of one script are made again
python benchmarks/memory.py --scripts supervised esl --recipes coco --seconds   # needs timm

No GPU is needed. `main` takes two steps (the second one has the optimizer's momentum) with 2 and
with 4 labelled images a process (4 and 8 where half as many are unlabelled); what is alive at the
peak grows by the same amount with each image. Counted are tensors, in blocks of 512 bytes as the
allocator has them; not counted are the CUDA context, cuDNN's work space and fragmentation: a card
is said to hold what leaves 1 GB and a tenth of it free. Several processes add one copy of the
gradients (DDP's buckets), which is counted. docs/scaling.md has the table: benchmarks/page.py.

--seconds: also the processor time of a step on this CPU, of 2 labelled images of a small crop (and
unlabelled ones in the recipe's ratio), with the recipe's classes and with 21.
"""

import dataclasses
import importlib
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks import fake_cuda, steps  # noqa: E402
from common import distributed  # noqa: E402
from common.flags import cli  # noqa: E402
from common.run import refusals  # noqa: E402

FILE = ROOT / "results" / "memory.json"
SCRIPTS = tuple(name for name in steps.MODES if name != "unimatch_v2")  # its: dinov2.py
RESNETS = ("resnet50", "resnet101")
RECIPES = {  # data set: (flags, classes, backbones)
    "cityscapes": (["--dataset", "cityscapes", "--split", "1/16"], 19, RESNETS),
    "voc_aug": (["--dataset", "voc_aug", "--split", "1/16"], 21, RESNETS),
    "coco": (["--dataset", "coco", "--split", "1/32"], 81, ("timm/xception65.tf_in1k",)),
}
CARDS = (16, 24, 40, 80)  # GB
CROP, TIMED = 129, 2  # of --seconds: side of the crops, steps
# where a script has them: so that both steps are whole ones, and nothing is fetched
IF_THERE = {"warmup_iters": 0, "cutmix_prob": 1.0, "weights_2": "none"}


@dataclass
class Options:
    """Which rows to make."""

    scripts: tuple[Literal[SCRIPTS], ...] = SCRIPTS
    recipes: tuple[Literal[tuple(RECIPES)], ...] = ("cityscapes", "voc_aug")
    backbones: tuple[str, ...] = ()  # left out: those of each recipe
    seconds: bool = False  # time a step on this CPU too
    out: str = str(FILE)


def arguments(name, recipe, backbone, amp, images):
    """Returns the resolved arguments of a recipe, on the generated data set and cut to `images`.

    images: labelled ones of one process; the unlabelled ones keep the recipe's ratio.
    """
    script = importlib.import_module(name)
    args = steps.resolved(script, [*RECIPES[recipe][0], "--backbone", backbone])
    changed = {"dataset": "shapes", "weights": "none", "amp": amp, "batch_size": images}
    if hasattr(args, "batch_size_unlabeled"):
        ratio = args.batch_size_unlabeled / args.batch_size
        changed["batch_size_unlabeled"] = max(round(images * ratio), 1)
    changed |= {key: value for key, value in IF_THERE.items() if hasattr(args, key)}
    return dataclasses.replace(args, **changed)


def peak_bytes(name, recipe, backbone, amp, images):
    """Returns the peak of a step and the bytes of all trained parameters."""
    args = arguments(name, recipe, backbone, amp, images)
    classes = RECIPES[recipe][1]
    batches = steps.random_batches(classes=classes)
    trained = []

    def after(watch, done):
        found = [p for net in watch.networks.values() for p in net.parameters() if p.requires_grad]
        trained.append(sum(p.numel() * p.element_size() for p in found))

    mode = fake_cuda.fake_steps(name, args, batches=batches, classes=classes, after=after)
    return mode.peak, trained[-1]


def row(name, recipe, backbone, amp):
    """Returns one row: GB that a process needs at all, GB an image, images on each card."""
    args = arguments(name, recipe, backbone, amp, 100)
    ratio = getattr(args, "batch_size_unlabeled", 0) / 100
    few = 4 if 0 < ratio < 1 else 2  # plain BN wants two unlabelled ones
    low, buckets = peak_bytes(name, recipe, backbone, amp, few)
    high, _ = peak_bytes(name, recipe, backbone, amp, 2 * few)
    each = (high - low) / few
    fixed = low - few * each + buckets
    fits = {}
    for card in CARDS:
        room = 0.9 * card * 1e9 - 1e9 - fixed
        fits[str(card)] = max(int(room // each), 0)
    found = {"script": name, "recipe": recipe, "backbone": backbone, "amp": amp}
    found |= {"crop": args.crop_size, "output_stride": args.output_stride, "stem": args.stem}
    found["unlabelled_a_labelled"] = ratio
    return found | {"fixed_gb": fixed / 1e9, "image_gb": each / 1e9, "fits": fits}


def seconds(name, recipe, backbone, classes):
    """Returns the processor seconds of a step on this CPU, the median of all but the first."""
    args = arguments(name, recipe, backbone, "none", 2)
    ends = []

    def after(watch, done):
        ends.append(time.process_time())

    cpu = distributed.Group(0, 1, torch.device("cpu"))
    more = dict(after=after, batches=steps.random_batches(classes=classes), classes=classes)
    steps.take(name, dataclasses.replace(args, crop_size=CROP), cpu, 1 + TIMED, **more)
    return statistics.median(np.diff(ends).tolist())


def main(options):
    """Makes the rows asked for; keeps the others that the file has."""
    path = Path(options.out)
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    names = ("script", "recipe", "backbone", "amp")
    rows = {tuple(r[name] for name in names): r for r in old}
    for script in options.scripts:
        for recipe in options.recipes:
            for backbone in options.backbones or RECIPES[recipe][2]:
                for amp in ("none", "bf16"):
                    begin, key = time.time(), (script, recipe, backbone, amp)
                    rows[key] = row(*key)
                    made = rows[key]
                    if options.seconds and amp == "none":
                        counts = (RECIPES[recipe][1], 21)
                        timed = {str(c): seconds(script, recipe, backbone, c) for c in counts}
                        made |= {"cpu_crop": CROP, "cpu_s": timed}
                        print(f"{script} {recipe} {backbone}, seconds by classes: {timed}")
                    words = f"{made['fixed_gb']:.2f} GB + {made['image_gb']:.2f} GB an image"
                    print(" ".join(key), words, f"{time.time() - begin:.0f} s", flush=True)
                    found = {"torch": torch.__version__, "rows": list(rows.values())}
                    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with refusals("start again"):
        main(cli(Options))
