"""Whole steps of large networks on a CPU: what bf16 and FPL change, and a table of sizes.

    python benchmarks/networks.py                  # results/networks.json, half an hour of one core
    python benchmarks/networks.py --parts step     # this part is made again
    python benchmarks/networks.py --quick          # ResNet-18 at small crops, nothing written

step    cps_fpl.py, ResNet-50, crop 256, 2 labelled and 2 + 2 unlabelled images: cross-entropy and
        FPL in float32, FPL with --amp bf16, in turns. bf16 pays where the CPU multiplies it (AMX,
        AVX512_BF16): which of these it has is written beside the figures.
sizes   ResNet-50 and -101 at crops of 512, 769 and 800: one step of supervised.py with 2 images,
        each in a process of its own, its peak, and beside it FPL's loss and cross-entropy of 2 such
        maps of logits. FPL's surplus is given in per cent of that step, so of one forward and
        backward pass of the images it teaches: a step of CPS has more.

All at stride 16, random images that lie ready, processor time of one thread. Networks as large as
these are slow here: `step` is a median of few steps, `sizes` are single ones, of which differences
of some per cent say nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import fpl_loss, steps  # noqa: E402
from benchmarks.contrastive import resident  # noqa: E402
from benchmarks.growth import in_turns, taken  # noqa: E402
from benchmarks.runs import spread  # noqa: E402
from common import distributed  # noqa: E402

RESULT = ROOT / "results" / "networks.json"
SIZES = [(net, crop) for net in ("resnet50", "resnet101") for crop in (512, 769, 800)]
MODES = {"cross-entropy": "--unsup-loss ce", "FPL": "", "FPL, bf16": "--amp bf16"}


def step(options):
    """Yields rows: a step of cps_fpl.py by each of MODES; ratios to the first."""
    net = "resnet18" if options.quick else "resnet50"
    crop = options.crop
    flags = f"--backbone {net} --crop-size {crop} --batch-size 2"
    times = {name: [] for name in MODES}
    for _ in range(options.rounds):
        for name, mode in MODES.items():
            seconds = taken("cps_fpl", f"{flags} {mode}", options.steps)
            times[name].append(statistics.median(seconds))
    for name, row in spread(times).items():
        yield {"backbone": net, "crop": crop, "mode": name} | row


def sizes(options):
    """Yields rows: a step of supervised.py for each size and type, and two losses of its logits."""
    for net, crop in [("resnet18", 64)] if options.quick else SIZES:
        z, t = fpl_loss.inputs(19, crop, "diffuse")
        names = (fpl_loss.BASELINE, "twin")
        calls = {n: partial(fpl_loss.seconds, fpl_loss.CALLS[n], z, t) for n in names}
        losses = spread(in_turns(calls, 2))
        del z, t, calls
        row = {"backbone": net, "crop": crop}
        row["bf16"] = None
        for amp in ("none", "bf16") if distributed.bf16_instructions() else ("none",):
            command = [sys.executable, __file__, "--child", net, str(crop), amp]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row[amp] = json.loads(done.stdout.splitlines()[-1])
        row |= {"ce_s": losses[names[0]]["s"], "fpl_s": losses[names[1]]["s"]}
        yield row


def child(net, crop, amp):
    """One step of supervised.py with 2 images; prints its seconds and peak MiB as JSON."""
    clock = []

    def before(watch):
        """Notes when all was made."""
        clock.append(time.process_time())

    def after(watch, done):
        """Notes when the step ended."""
        clock.append(time.process_time())

    flags = f"--weights none --backbone {net} --output-stride 16 --head-channels 256"
    flags += f" --crop-size {crop} --batch-size 2"
    group = distributed.Group(0, 1, torch.device("cpu"))
    more = {"before": before, "after": after, "classes": 19}
    more["batches"] = steps.random_batches(classes=19)
    steps.take("supervised", [*flags.split(), "--amp", amp], group, 1, **more)
    print(json.dumps({"s": clock[1] - clock[0], "peak_mib": resident("VmHWM")}))


PARTS = {"step": step, "sizes": sizes}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--crop", type=int, default=256, help="of the part step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--child", nargs=3, metavar=("BACKBONE", "CROP", "AMP"))
    options = parser.parse_args()
    if options.child:
        net, crop, amp = options.child
        return child(net, int(crop), amp)
    if options.quick:
        options.rounds = 1
        options.crop = 64
    found = json.loads(RESULT.read_text()) if RESULT.exists() and not options.quick else {}
    for name in options.parts:
        about = {"torch": torch.__version__, "instructions": distributed.bf16_instructions()}
        about |= {"rounds": options.rounds, "steps": options.steps, "load": os.getloadavg()[0]}
        found[name] = about | {"rows": []}
        for row in PARTS[name](options):
            found[name]["rows"].append(row)
            print(f"{name}: {row}", flush=True)
            if not options.quick:  # after each row: they take minutes
                RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
