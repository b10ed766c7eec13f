"""Peak memory where classes are many: ESL's L_CTR, and evaluations of an image, 150 classes.

python benchmarks/peaks.py                     # all, a minute; writes results/peaks.json
python benchmarks/peaks.py --classes 40 --width 2000 --height 1500

L_CTR: part_contrast of esl.py at its sizes for VOC (batch, anchors, parts, queue, negatives; full
queues, every pixel a candidate), forward and backward, over the features and the bank that it is
given. Evaluation: predict of supervised.py and the confusion matrix of one image, above a network
that gives random logits at stride 4, which are not counted, or upsampled, which are. whole, slide:
the two protocols. window: slide with an image that one window shows. mean: whole, above two such
networks, by --evaluate mean of cps_fpl.py. Each in a process of its own; resident memory at its
peak (VmHWM), so Linux.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import cps_fpl  # noqa: E402
import esl  # noqa: E402
import supervised  # noqa: E402
from benchmarks import steps  # noqa: E402
from benchmarks.contrastive import resident  # noqa: E402
from common import fused, metrics  # noqa: E402
from common.flags import cli  # noqa: E402
from common.run import refusals  # noqa: E402

WINDOW = 1017  # pixels of a side
FILE = ROOT / "results" / "peaks.json"
# MiB, for 150 classes; window: one and a half maps of all classes, 592 each; mean: 0.6 of a map of
# all classes, 6866
LIMITS = {"contrast": 1024, "whole": 2048, "slide": 2048, "window": 888, "mean": 4120}


@dataclass
class Options:
    """What is measured."""

    classes: int = 150
    width: int = 4000  # pixels of the image
    height: int = 3000
    features: int = 256  # of the projection
    out: str = str(FILE)
    only: Literal["", "contrast", "whole", "slide", "window", "mean"] = ""  # one, in this process


def contrast(options):
    """Returns a function that makes one forward and backward of L_CTR."""
    args = steps.resolved(esl, ["--dataset", "voc", "--split", "732"])
    classes = options.classes
    rows = classes * args.parts * args.queue
    side = -(-args.crop_size // 4)
    pixels = args.batch_size * side**2
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(shape, generator=generator)

    bank = F.normalize(random(rows + 1, options.features) - 0.5, dim=1)
    bank[-1] = 0
    pushed = torch.full((classes * args.parts,), args.queue)
    ids = torch.randint(0, classes * args.parts, (pixels,), generator=generator)
    u_anchors = random(classes, args.anchors + 1)
    u_entries = random(classes, args.anchors, 1 + args.negatives)
    rep = random(pixels, options.features).requires_grad_()

    def call():
        loss, _ = fused.part_contrast(rep, ids, bank, pushed, u_anchors, u_entries, args)
        loss.backward()

    return call


class Coarse(torch.nn.Module):
    """Random logits at stride 4, one image at a time; kept, so that they are not counted."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes
        self.made = {}

    def forward(self, x, upsampled=True):
        size = x.shape[2:]
        if size not in self.made:
            h, w = (-(-side // 4) for side in size)
            self.made[size] = torch.rand(1, self.classes, h, w)
        logits = self.made[size]
        return {"logits": supervised.upsample(logits, size if upsampled else None)}


def evaluation(options):
    """Returns a function that scores one image by the protocol of options.only.

    window: by slide, an image that one window shows. mean: whole, by two networks.
    """
    args = steps.resolved(supervised, ["--dataset", "folder", "--num-classes", options.classes])
    size = options.height, options.width
    protocol = "slide" if options.only in ("slide", "window") else "whole"
    args = replace(args, protocol=protocol)
    if options.only == "window":
        size = WINDOW, WINDOW
        args = replace(args, crop_size=WINDOW)
    net = Coarse(options.classes)
    if options.only == "mean":
        net = cps_fpl.Average([net, Coarse(options.classes)])
    image = torch.zeros(3, *size, dtype=torch.uint8)
    label = torch.zeros(size, dtype=torch.uint8)
    if protocol == "whole":
        net(image[None], upsampled=False)

    def call():
        pred = supervised.predict(net, image, args, options.classes)
        metrics.confusion_matrix(pred, label, options.classes)

    return torch.no_grad()(call)


def measured(options):
    """Returns MiB that a call adds at its peak."""
    call = contrast(options) if options.only == "contrast" else evaluation(options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def main(options):
    """Measures all in processes of their own; prints and writes what they add."""
    if options.only:
        return print(json.dumps(measured(options)))
    peaks = {}
    for name in LIMITS:
        values = asdict(options) | {"only": name}
        flags = [f"--{key}={value}" for key, value in values.items()]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed is given back
        command = [sys.executable, __file__, *flags]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        peaks[name] = round(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {peaks[name]} MiB (150 classes: below {LIMITS[name]})", flush=True)
    found = {"torch": torch.__version__, "classes": options.classes, "mib": peaks}
    Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
    if options.classes == 150:
        assert all(peaks[name] < limit for name, limit in LIMITS.items()), peaks


if __name__ == "__main__":
    with refusals("start again"):
        main(cli(Options))
