"""FPL's loss: the definition in ael_fpl.py and its twin in common/fused.py, time and peak memory.

    python benchmarks/fpl_loss.py           # writes results/fpl_loss.json
    python benchmarks/fpl_loss.py --classes 150    # rows of so many classes are made again
    python benchmarks/fpl_loss.py --quick   # small images, nothing written: ratios depend on size

A call is the loss and its gradient, of logits in channels-last, as the networks make them: 2 images
of 512x512 with 19 and 21 classes, of 192x192 with 150. Teachers: confident, diffuse and flat. That
definition and twin compute the same loss and gradient, by both recipes, and the released order that
of the official one, is asserted first. Then all calls take turns in one process: medians of their
processor time, and ratios to cross-entropy with the likeliest class by argmax, [lowest..highest]
over the rounds. The peak is measured in a process of its own, in tensors of the logits' size above
the inputs; a gradient is one of them.
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
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from ael_fpl import fuzzy_positive_loss  # noqa: E402
from benchmarks.contrastive import resident  # noqa: E402
from benchmarks.released import released_loss  # noqa: E402
from common import fused  # noqa: E402

RESULT = ROOT / "results" / "fpl_loss.json"
SIZES = {19: 512, 21: 512, 150: 192}  # classes: side of the images
QUICK = {19: 128, 21: 128, 150: 64}
TEACHERS = ("confident", "diffuse", "flat")
T = 0.9
OFFICIAL = dict(k_max=3, strict=False, mean_over="positives_and_next")


def inputs(classes, side, teacher):
    """Returns the logits (2, C, side, side) of a student and of a teacher of this kind."""
    torch.manual_seed(0)
    shape = (2, classes, side, side)
    spread = {"confident": 1.0, "diffuse": 1.5, "flat": 0.1}[teacher]
    t = spread * torch.randn(shape)
    if teacher == "confident":
        likeliest = torch.randint(classes, (2, 1, side, side))
        t.scatter_add_(1, likeliest, torch.full_like(t[:, :1], 8.0))
    layout = torch.channels_last
    z = (2 * torch.randn(shape)).contiguous(memory_format=layout).requires_grad_()
    return z, t.contiguous(memory_format=layout)


def argmax_cross_entropy(z, t):
    return F.cross_entropy(z, t.argmax(1))


def max_cross_entropy(z, t):
    return F.cross_entropy(z, t.max(1)[1])


def released(z, t, T, **rules):
    loss, weight = released_loss(z, t, T)  # of the official rules
    return loss * weight


def mean_of(loss_of, rules, z, t):
    return loss_of(z, t, T, **rules).mean()


BASELINE = "argmax + cross-entropy"
CALLS = {
    BASELINE: argmax_cross_entropy,
    "max + cross-entropy": max_cross_entropy,
    "definition": partial(mean_of, fuzzy_positive_loss, {}),
    "twin": partial(mean_of, fused.fuzzy_positive_loss, {}),
    "definition, official": partial(mean_of, fuzzy_positive_loss, OFFICIAL),
    "twin, official": partial(mean_of, fused.fuzzy_positive_loss, OFFICIAL),
    "released order of work": partial(mean_of, released, OFFICIAL),
}


def compare(classes, teacher, *more):
    """Asserts that the twin computes what the definition does, and so do more losses, of official
    rules; returns the largest differences.
    """
    z, t = inputs(classes, 64, teacher)
    largest = {"loss": 0.0, "gradient": 0.0}
    for rules, others in (({}, ()), (OFFICIAL, more)):
        found = []
        for loss_of in (fuzzy_positive_loss, fused.fuzzy_positive_loss, *others):
            loss = loss_of(z, t, T, **rules)
            (gradient,) = torch.autograd.grad(loss.sum(), z)
            found.append({"loss": loss.detach(), "gradient": gradient})
        defined, *rest = found
        for other in rest:
            for name, x in defined.items():
                apart = (other[name] - x).abs().max() / x.abs().max()
                largest[name] = max(largest[name], float(apart))
    assert max(largest.values()) < 1e-5, largest
    return largest


def seconds(call, z, t):
    """Returns the processor time of a loss and its gradient."""
    z.grad = None
    begin = time.process_time()
    call(z, t).backward()
    return time.process_time() - begin


def timed(classes, side, teacher, rounds):
    """Returns {call: {ms, ratio, low, high}}."""
    z, t = inputs(classes, side, teacher)
    for call in CALLS.values():
        seconds(call, *inputs(classes, 32, teacher))
    found = {name: [] for name in CALLS}
    for _ in range(rounds):
        for name, call in CALLS.items():
            found[name].append(seconds(call, z, t))
    rows = {}
    for name, times in found.items():
        ratios = [a / b for a, b in zip(times, found[BASELINE], strict=True)]
        rows[name] = {
            "ms": 1e3 * statistics.median(times),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return rows


def peak(name, classes, side):
    """Returns the peak of a call above its inputs, in tensors of the logits' size."""
    call = CALLS[name]
    seconds(call, *inputs(classes, 16, "confident"))  # whatever a first call sets up
    z, t = inputs(classes, side, "confident")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    seconds(call, z, t)
    return (resident("VmHWM") - before) / (z.numel() * z.element_size() / 2**20)


def peaks(classes, side):
    """Returns {call: peak}, each measured in a process that returns memory when it is freed."""
    found = {}
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in CALLS:
        command = [sys.executable, __file__, "--peak", name, str(classes), str(side)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[name] = float(done.stdout)
    return found


def measure(sizes, rounds):
    """Returns {torch, threads, rows}; prints the rows as they come."""
    rows = []
    for classes, side in sizes.items():
        memory = peaks(classes, side)
        size = {"classes": classes, "side": side, "rounds": rounds, "load": os.getloadavg()[0]}
        for teacher in TEACHERS:
            apart = compare(classes, teacher, released)
            print(f"\n{classes} classes, 2x{side}x{side}, {teacher} teacher; twin and definition")
            print(f"apart by {apart['loss']:.0e} (loss), {apart['gradient']:.0e} (gradient)")
            for name, row in timed(classes, side, teacher, rounds).items():
                row |= {"peak_tensors": memory[name]}
                rows.append(size | {"teacher": teacher, "call": name} | row)
                print(
                    f"  {name:24}{row['ms']:8.0f} ms  {row['ratio']:6.2f} "
                    f"[{row['low']:.2f}..{row['high']:.2f}]  peak {row['peak_tensors']:.1f}"
                )
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--classes", type=int, nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--peak", nargs=3, metavar=("CALL", "CLASSES", "SIDE"))
    args = parser.parse_args()
    if args.peak:
        name, classes, side = args.peak
        return print(peak(name, int(classes), int(side)))
    sizes = QUICK if args.quick else SIZES
    found = measure({classes: sizes[classes] for classes in args.classes}, args.rounds)
    if not args.quick:
        if RESULT.exists():
            old = json.loads(RESULT.read_text())["rows"]
            found["rows"] += [row for row in old if row["classes"] not in args.classes]
            found["rows"].sort(key=lambda row: row["classes"])
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
