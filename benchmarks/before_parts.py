"""Parts of a step in the checkout that this is started in, whichever it is: for before.py.

    cd CHECKOUT && python benchmarks/before_parts.py cross_loss --classes 19
    cd CHECKOUT && python benchmarks/before_parts.py peak cps_fpl.py --batch-size 2

The second runs a script as its command line would, or with no words none, and prints the MiB that
its process held at its peak (what a parent is told of a child is at least the parent's own). The
first prints one line of JSON: the processor seconds of a call, median of --calls, once warm, and
what the call returns, to be compared. samples returns nothing, as both commits do not make equal
ones (docs/supervised.md, D3).
"""

import argparse
import hashlib
import json
import re
import runpy
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path.cwd())  # not this folder, which has a predict.py too

import torch  # noqa: E402

import cps_fpl  # noqa: E402
import supervised  # noqa: E402
from common import distributed, metrics  # noqa: E402

ELEMENTS = 1e7  # of the logits, whatever the number of classes


def logits(*shape):
    """Returns random numbers, channels-last as networks give them."""
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def cross_loss(options):
    """Returns a function: FPL's loss of both networks by the official recipe, and its gradient."""
    classes = options.classes
    several = hasattr(cps_fpl, "adaptive_assignment")  # T is a tuple since A-FPL is there
    args = SimpleNamespace(
        unsup_loss="fpl",
        T=(0.9,) if several else 0.9,
        k_strategy="n-1",
        k_max=3,
        strict=False,
        weight="concave",
        mean_over="positives_and_next",
        balance=True,
        fused="auto",
    )
    side = round((ELEMENTS / 2 / classes) ** 0.5)
    students = [logits(2, classes, side, side).requires_grad_() for _ in range(2)]
    teachers = [1.5 * logits(2, classes, side, side) for _ in range(2)]
    inside = torch.ones(2, side, side, dtype=torch.bool)

    def call():
        for z in students:
            z.grad = None
        loss, _ = cps_fpl.cross_loss(students, teachers, inside, 0.5, args)
        loss.backward()
        return [float(loss.detach()), *(float(z.grad.double().norm()) for z in students)]

    return call


def confusion(options):
    """Returns a function: the confusion matrix of one image of Cityscapes' size."""
    classes = options.classes
    pred = torch.randint(0, classes, (1024, 2048))
    label = torch.randint(0, classes, (1024, 2048), dtype=torch.uint8)
    label[torch.rand(label.shape) < 0.1] = 255
    return lambda: metrics.confusion_matrix(pred, label, classes)


def slide(options):
    """Returns a function: the classes of an image of Cityscapes' size, in windows of 800 pixels.

    Each window's logits lie ready, channels-last as a network makes them.
    """
    classes = options.classes
    made = supervised.upsample(logits(1, classes, 200, 200), (800, 800))
    image = torch.zeros(3, 1024, 2048, dtype=torch.uint8)
    args = SimpleNamespace(protocol="slide", crop_size=800)

    @torch.no_grad()
    def call():
        pred = supervised.predict(lambda x: {"logits": made}, image, args, classes)
        if pred.ndim == 3:  # once it returned logits
            pred = pred.argmax(0)
        return pred

    return call


def samples(options):
    """Returns a function that makes six batches of two images of the folder --data.

    With --masks the labelled images of cps_fpl.py, else those without masks.
    """
    args = SimpleNamespace(
        dataset="folder",
        data_root=options.data,
        cache=options.cache,
        split="1/2",
        split_seed=None,
        split_family=None,
        labeled_list="",
        unlabeled_list="",
        num_classes=options.classes,
        ignore_index=255,
        seed=0,
        crop_size=options.crop,
        scales=(0.5, 2.0),
        batch_size=2,
        batch_size_unlabeled=2,
        unsup_weight=1.0,
        cutmix=False,
        same_image_cutmix=False,
        workers=0,
        total_iters=10**4,
    )
    alone = distributed.Group(0, 1, torch.device("cpu"))
    name = "labeled" if options.masks else "unlabeled"
    stream = cps_fpl.open_stream(name, cps_fpl.load(args), args, alone, 0)

    def call():
        for _ in range(6):
            next(stream)

    return call


PARTS = {"cross_loss": cross_loss, "confusion": confusion, "slide": slide, "samples": samples}


def peak(words):
    """Runs the script that the words name; prints the process's peak in MiB as its last line."""
    if words:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--data", help="of samples: a folder of images")
    parser.add_argument("--cache", default="", help="its decoded images")
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--crop", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    call = PARTS[options.part](options)
    value = call()
    seconds = []
    for _ in range(options.calls):
        begin = time.process_time()
        call()
        seconds.append(time.process_time() - begin)
    if torch.is_tensor(value):
        value = hashlib.sha1(value.contiguous().numpy()).hexdigest()
    print(json.dumps({"s": statistics.median(seconds), "value": value}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2:])
    else:
        main()
