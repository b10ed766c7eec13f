"""What FPL adds to a whole training step: FPL supplement Table 7, in seconds and per cent.

    python benchmarks/fpl_step.py                 # writes results/fpl_step.json (CPU, small crop)
    python benchmarks/fpl_step.py --device cuda --backbone resnet101 --crop 769 --batch 4

The script's own `main` is run for some steps (benchmarks/steps.py) on random images that lie ready,
so that nothing is loaded: with cross-entropy, with FPL, and with FPL by the definition in the
script (--fused off), in turns; a step is the median of all but the first of each turn, and its
ratio is to cross-entropy in the same turn. FPL and its definition have the same first loss within
1e-4, as asserted. On a CPU processor time is counted, of one thread.

Table 7, seconds of an epoch on 8 V100, ResNet-101, 1/8 of the labels: AEL 730 and FPL+AEL 820 on
Cityscapes (+12 %), 835 and 985 on VOC (+18 %).
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import steps  # noqa: E402
from benchmarks.runs import spread  # noqa: E402
from common import distributed  # noqa: E402
from common.run import refusals  # noqa: E402

RESULT = ROOT / "results" / "fpl_step.json"
NEAR = 1e-4  # relative: one loss by the twin and by the definition, in float32
CASES = [("ael_fpl", 19), ("ael_fpl", 21), ("cps_fpl", 19)]  # script, classes
MODES = {"ce": "--unsup-loss ce", "fpl": "", "definition": "--fused off"}


def taken(script, classes, mode, options):
    """Returns (median seconds of a step of a short run, without the first; that one's loss)."""
    flags = f"--weights none --backbone {options.backbone} --output-stride {options.stride} "
    flags += f"--head-channels 256 --crop-size {options.crop} --batch-size {options.batch} "
    flags += MODES[mode]
    device = distributed.setup(options.device).device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    ends = []

    def after(watch, done):
        """Notes when a step ended, on the device too."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(clock())

    batches = steps.random_batches(classes=classes)
    group = distributed.Group(0, 1, device)
    more = dict(after=after, batches=batches, classes=classes, tiny=options.quick)
    watch = steps.take(script, flags.split(), group, options.steps + 1, **more)
    seconds = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    return statistics.median(seconds), float(watch.logged[0]["loss"])


def measure(options):
    """FPL supplement Table 7: returns {what, rows}; prints the rows as they come."""
    rows = []
    for script, classes in CASES:
        times = {mode: [] for mode in MODES}
        for _ in range(options.rounds):
            losses = {}
            for mode in MODES:
                seconds, losses[mode] = taken(script, classes, mode, options)
                times[mode].append(seconds)
            near = NEAR * abs(losses["definition"])
            assert abs(losses["fpl"] - losses["definition"]) <= near, losses
        modes = spread(times)
        rows.append({"script": script, "classes": classes, "modes": modes})
        words = (f"{mode} {row['s']:.2f} s, {row['ratio']:.3f}" for mode, row in modes.items())
        print(f"{script} {classes} classes: {'; '.join(words)}", flush=True)
    what = {name: value for name, value in vars(options).items() if name not in ("out", "quick")}
    return what | {"torch": torch.__version__, "load": os.getloadavg()[0], "rows": rows}


def parsed(words):
    """Returns the options of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny network, nothing written")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backbone", choices=["resnet18", "resnet50", "resnet101"])
    parser.add_argument("--stride", type=int, default=16, choices=[8, 16])
    parser.add_argument("--crop", type=int, default=129)
    parser.add_argument("--batch", type=int, default=2, help="labelled, and as many unlabelled")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(RESULT))
    parser.set_defaults(backbone="resnet50")
    options = parser.parse_args(words)
    if options.quick:
        options.crop = 32
        options.rounds = 1
        options.steps = 1
    return options


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = parsed(sys.argv[1:])
    with refusals("start again"):
        found = measure(options)
    if not options.quick:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
