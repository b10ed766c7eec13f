"""How time and memory grow with classes, crop, batch and processes; what two parts of a step cost.

    python benchmarks/growth.py                          # all parts into results/growth.json
    python benchmarks/growth.py --parts classes teacher  # these parts are made again
    python benchmarks/growth.py --quick                  # smaller, nothing written

classes    FPL's loss, forward and backward, of C = 2 to 1000 classes, in channels-last; ratio to
           cross-entropy with the likeliest class by argmax. Definition and twin equal, as asserted.
crop       a step of cps_fpl.py on crops from 64 to 384 pixels.
batch      peak resident memory of a process that trains with 2 to 8 labelled images.
processes  wall time of a step of the same batch in one process, and shared by two (gloo).
teacher    a step of mean_teacher.py with --teacher-bn own, whose extra pass of the teacher only
           moves its BN statistics, and with average, which has no such pass.
labels     ESL's soft labels of --label topk: its topk, and the same numbers by a full sort.

Steps are those of the scripts' own `main` (benchmarks/steps.py), ResNet-18 at stride 16, on random
images that lie ready. Times are processor time but for `processes`; what is compared takes turns;
medians, and ratios with [lowest..highest] over the rounds.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import esl  # noqa: E402
from benchmarks import fpl_loss, steps  # noqa: E402
from benchmarks.contrastive import resident  # noqa: E402
from benchmarks.runs import spread  # noqa: E402
from common import distributed  # noqa: E402

RESULT = ROOT / "results" / "growth.json"
CLASSES = (2, 8, 21, 81, 150, 365, 1000)
CROPS = (64, 128, 192, 256, 384)  # pixels
ROUNDS = {"batch": 1, "processes": 2}  # parts whose number of rounds is fixed
BATCHES = (2, 4, 8)  # labelled images, and as many unlabelled ones
ELEMENTS = 4e6  # of the logits, whatever the number of classes
STEP = "--weights none --backbone resnet18 --output-stride 16 --head-channels 256".split()


def in_turns(calls, rounds):
    """Returns {name: processor seconds of each round} of calls, {name: function}, once warm."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            times[name].append(time.process_time() - begin)
    return times


def taken(script, flags, count, group=None, clock=time.process_time):
    """Returns the seconds of `count` steps of a script, each but a first one."""
    ends = []

    def after(watch, done):
        """Notes when a step ended."""
        ends.append(clock())

    group = group or distributed.Group(0, 1, torch.device("cpu"))
    more = {"after": after, "classes": 19, "batches": steps.random_batches(classes=19)}
    steps.take(script, [*STEP, *flags.split()], group, count + 1, **more)
    return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]


# ---- the parts: each returns rows, lists of dicts ----


def classes(options):
    """FPL's loss for several numbers of classes, of a confident and a flat teacher."""
    rows = []
    names = (fpl_loss.BASELINE, "definition", "twin")
    for C in CLASSES:
        side = round((ELEMENTS / options.smaller / 2 / C) ** 0.5)
        for teacher in ("confident", "flat"):
            fpl_loss.compare(C, teacher)
            z, t = fpl_loss.inputs(C, side, teacher)
            calls = {n: partial(fpl_loss.seconds, fpl_loss.CALLS[n], z, t) for n in names}
            found = spread(in_turns(calls, options.rounds))
            elements = z.numel()
            for name, row in found.items():
                row["ns"] = 1e9 * row.pop("s") / elements  # a pixel and class
                rows.append({"classes": C, "side": side, "teacher": teacher, "call": name} | row)
    return rows


def crop(options):
    """A step of cps_fpl.py on crops of several sizes."""
    rows = []
    for side in CROPS[: 1 if options.quick else None]:
        flags = f"--crop-size {side} --batch-size 2"
        seconds = taken("cps_fpl", flags, options.steps)
        rows.append({"crop": side, "s": statistics.median(seconds)})
        rows[-1]["us_a_pixel"] = 1e6 * rows[-1]["s"] / side**2
    return rows


def batch(options):
    """Peak memory of cps_fpl.py for several batches, each in a process of its own."""
    rows = []
    side = 64 if options.quick else 128
    for images in BATCHES[: 1 if options.quick else None]:
        command = [sys.executable, __file__, f"--child=--crop-size {side} --batch-size {images}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append({"images": images} | json.loads(done.stdout.splitlines()[-1]))
    return rows


def processes(options):
    """Wall seconds of a step of cps_fpl.py, 4 + 4 images, in one process and shared by two."""
    rows = []
    side = 64 if options.quick else 128
    for world in (1, 2) if options.quick else (1, 2, 1, 2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        started = []
        for rank in range(world):
            where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            where |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            command = [sys.executable, __file__, f"--child=--crop-size {side} --batch-size 4"]
            environment = os.environ | (where if world > 1 else {})
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
        texts = [process.communicate()[0] for process in started]
        found = json.loads(texts[0].splitlines()[-1])
        rows.append({"processes": world, "load": os.getloadavg()[0]} | found)
    return rows


def child(flags):
    """One short run of cps_fpl.py; prints its median wall seconds a step and peak MiB as JSON."""
    group = distributed.setup("cpu")
    before = resident("VmRSS")
    seconds = taken("cps_fpl", flags, 2, group, time.perf_counter)
    found = {"wall_s": statistics.median(seconds), "libraries_mib": before}
    print(json.dumps(found | {"peak_mib": resident("VmHWM")}), flush=True)
    distributed.teardown()


def teacher(options):
    """A step of mean_teacher.py with and without the teacher's pass that only moves BN."""
    side = 64 if options.quick else 128
    flags = f"--crop-size {side} --batch-size 4 --warmup-iters 0 --cutmix --teacher-bn"
    times = {"own": [], "average": []}
    for _ in range(options.rounds):
        for kind, found in times.items():
            found.append(statistics.median(taken("mean_teacher", f"{flags} {kind}", options.steps)))
    return [{"teacher_bn": kind} | row for kind, row in spread(times).items()]


def labels(options):
    """ESL's soft labels of --label topk, and the same by a full sort."""
    rows = []
    args = SimpleNamespace(label="topk", top_k=5)

    def by_sort(prob):
        """The same labels: delta out of all probabilities in order."""
        delta = prob.sort(dim=1, descending=True).values[:, args.top_k - 1, None]
        kept = torch.where(prob >= delta, prob, 0.0)
        return kept / kept.sum(1, keepdim=True)

    for C in (19, 150):
        side = round((ELEMENTS / options.smaller / 2 / C) ** 0.5)
        _, t = fpl_loss.inputs(C, side, "diffuse")
        prob = t.softmax(1)
        assert torch.equal(esl.soft_label(prob, args), by_sort(prob))
        calls = {"sort": partial(by_sort, prob), "topk": partial(esl.soft_label, prob, args)}
        for name, row in spread(in_turns(calls, options.rounds)).items():
            rows.append({"classes": C, "side": side, "call": name} | row)
    return rows


PARTS = {f.__name__: f for f in (classes, crop, batch, processes, teacher, labels)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--child", metavar="FLAGS")
    options = parser.parse_args()
    if options.child:
        return child(options.child)
    options.smaller = 1
    if options.quick:
        options.smaller = 16
        options.rounds = 2
        options.steps = 1
    found = json.loads(RESULT.read_text()) if RESULT.exists() and not options.quick else {}
    for name in options.parts:
        rows = PARTS[name](options)
        rounds = ROUNDS.get(name, options.rounds)
        about = {"torch": torch.__version__, "rounds": rounds, "steps": options.steps}
        found[name] = about | {"load": os.getloadavg()[0], "rows": rows}
        for row in rows:
            shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{name}: {', '.join(shown)}", flush=True)
        if not options.quick:
            RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
